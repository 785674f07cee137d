"""Signals on graphs: edges, masks, and the sentence of each refused argument."""

import numpy as np
import pytest
import torch

from planish import _support
from planish.graphs import (
    ChebCascadeConv,
    ChebNet,
    LaplacianPower,
    SmoothnessPrior,
    SobolevLoss,
    TimeGNN,
    TimeGNNTraining,
    as_adjacency,
    find_period,
    fit_timegnn,
    forecast_mask,
    graph_trss,
    hide,
    interpolate_neighbours,
    interpolate_time,
    knn_graph,
    laplacian,
    learn_prior,
    random_mask,
    snapshot_mask,
    temporal_difference,
    to_edges,
)

pytest.importorskip("sklearn")

from sklearn.base import clone

from planish.graphs import GraphSignalImputer


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def sensors(n=8, m=60, seed=0):
    """Waves that travel around a ring, in (times, nodes), with a fifth of them gone."""
    t, i = np.arange(m)[:, None], np.arange(n)
    table = np.sin(t / 6 + i / 3) + 20
    gaps = table.copy()
    gaps[np.random.default_rng(seed).random(table.shape) < 0.2] = np.nan
    w = np.zeros((n, n))
    w[i, (i + 1) % n] = w[(i + 1) % n, i] = 1.0
    return table, gaps, w


def test_nearest_neighbours():
    points = torch.rand(30, 2, generator=drawn(), dtype=torch.float64)
    w = knn_graph(points, 4)
    assert torch.equal(w, w.T) and not w.diagonal().any()
    assert int((w > 0).sum(1).min()) >= 4
    assert torch.equal(knn_graph(points, 4, sparse=True).to_dense(), w)
    distance = torch.cdist(points, points)
    near = distance.topk(5, largest=False).values
    sigma = float(near.mean())  # each point counted as its own neighbour
    at = w > 0
    assert torch.allclose(w[at], torch.exp(-((distance[at] / sigma) ** 2)))
    wide = knn_graph(points, 4, sigma=10.0)
    assert wide[at].min() > 0.9


def test_adjacencies_of_other_libraries():
    sparse = pytest.importorskip("scipy.sparse")
    w = sensors()[2]
    ours = as_adjacency(sparse.csr_array(w))
    assert ours.is_sparse and torch.equal(ours.to_dense(), torch.tensor(w))
    with_loops = torch.tensor(w) + torch.eye(8)
    assert torch.equal(as_adjacency(with_loops), torch.tensor(w))
    assert torch.equal(as_adjacency(with_loops.to_sparse_coo()).to_dense(), torch.tensor(w))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: laplacian(torch.ones(2, 3)), "laplacian: `graph` must be a square matrix; got (2, 3)."),
        (lambda: laplacian(torch.tensor([[0.0, -1.0], [-1.0, 0.0]])), "must be without negative weights; got -1.0."),
        (lambda: laplacian(torch.tensor([[0.0, 1.0], [2.0, 0.0]])), "`graph` must be symmetric: (W + W') / 2"),
        (lambda: laplacian(torch.tensor([[0.0, torch.nan], [1.0, 0.0]])), "must be finite; got 'NaN or infinity'."),
        (lambda: laplacian(torch.zeros(2, 2), "row"), "`normalization` must be 'none' or 'symmetric'; got 'row'."),
        (lambda: to_edges(torch.ones(3)), "to_edges: `graph` must be a square matrix"),
        (lambda: knn_graph(torch.zeros(3, 2), 3), "`k` must be an int in [1, 2]; got 3."),
        (lambda: knn_graph(torch.zeros(1, 2), 1), "`coordinates` must be finite, (points >= 2, dimensions)"),
        (lambda: knn_graph(torch.zeros(3, 2), 1, weighting="inverse"), "must be distinct points"),
        (lambda: knn_graph(torch.rand(3, 2), 1, weighting="x"), "`weighting` must be 'gaussian' or 'inverse'"),
        (lambda: knn_graph(torch.rand(3, 2), 1, sigma=0), "`sigma` must be above 0; got 0."),
        (lambda: LaplacianPower(torch.ones(2)), "`laplacian` must be a square matrix"),
        (lambda: LaplacianPower(torch.eye(2), -1), "`epsilon` must be a float >= 0; got -1."),
        (lambda: LaplacianPower(torch.eye(2), 1, 0), "`beta` must be a float above 0; got 0."),
        (lambda: LaplacianPower(torch.eye(2), method="x"), "`method` must be 'auto', 'eigh' or 'chebyshev'"),
        (lambda: LaplacianPower(torch.eye(2), degree=0), "`degree` must be an int >= 1; got 0."),
        (lambda: LaplacianPower(torch.eye(2))(torch.ones(3, 1)), "`x` must be of 2 rows, one a node; got (3, 1)."),
        (lambda: SobolevLoss(torch.eye(2), lam=-1), "`lam` must be a float >= 0; got -1."),
        (lambda: temporal_difference(torch.ones(2, 1)), "`x` must be of at least two times; got (2, 1)."),
        (lambda: interpolate_time(torch.ones(2, 3), torch.ones(2, 2).bool()), "of the signals' shape (2, 3)"),
        (lambda: random_mask(torch.ones(2, 2).bool(), 0), "`fraction` must be a float in (0, 1]; got 0."),
        (lambda: snapshot_mask(torch.ones(2, 2).bool(), 1.1), "`fraction` must be a float in (0, 1]; got 1.1."),
        (lambda: forecast_mask(torch.ones(2, 2).bool(), 2), "`horizon` must be an int in [1, 1]; got 2."),
        (lambda: hide(torch.ones(2, 2).bool(), 1), "`fraction` must be a float in (0, 1); got 1."),
        (lambda: hide(torch.zeros(2, 2).bool(), 0.5), "`mask` must be True at two entries at least; got 0."),
        (lambda: SmoothnessPrior(alpha=0), "`alpha` must be a float above 0; got 0."),
        (lambda: SmoothnessPrior(periods=(2.0,)), "`periods` must be above 2 time steps each; got (2.0,)."),
        (lambda: TimeGNN(1), "`n_steps` must be an int >= 2; got 1."),
        (lambda: TimeGNNTraining(epochs=0), "`epochs` must be an int >= 1; got 0."),
        (lambda: TimeGNNTraining(learning_rate=0), "`learning_rate` must be a float above 0; got 0."),
        (lambda: TimeGNNTraining(schedule="x"), "`schedule` must be 'cosine' or 'plateau'; got 'x'."),
        (lambda: TimeGNNTraining(activation="relu"), "`start` must be 'zero', or 'graphtrss' for one preconditioned"),
        (lambda: ChebCascadeConv(0, 1, 1), "`in_channels` must be an int >= 1; got 0."),
        (lambda: ChebCascadeConv(1, 1, 1, polynomial="x"), "`polynomial` must be 'chebyshev' or 'gegenbauer'"),
        (lambda: ChebCascadeConv(1, 1, 1, polynomial="gegenbauer", alpha=0), "`alpha` must be above -1/2 and not 0"),
        (lambda: ChebCascadeConv(1, 1, 1, activation="x"), "`activation` must be one of relu, elu, tanh, linear"),
        (lambda: ChebCascadeConv(1, 1, 1, dropout=1), "`dropout` must be a float in [0, 1); got 1."),
        (lambda: ChebCascadeConv(1, 1, 1, mixing="x"), "`mixing` must be 'normal' or 'ones'; got 'x'."),
        (lambda: ChebCascadeConv(1, 1, 1)(torch.ones(2, 2), torch.ones(2, 2)), "`x` must be (nodes, 1 channels)"),
        (lambda: ChebCascadeConv(1, 1, 1)(torch.ones(2, 1), torch.ones(3, 3)), "an adjacency of 2 nodes; got (3, 3)."),
        (lambda: ChebCascadeConv(1, 1, 1)(torch.ones(2, 1), torch.ones(3, 3).long()), "of shape (2, edges)"),
        (lambda: ChebNet((3,)), "`channels` must be at least two widths; got (3,)."),
        (lambda: ChebNet((3, 3), activation="x"), "`activation` must be one of"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError, match="must be") as error:
        call()
    assert sentence in str(error.value)


def test_bad_signals():
    power, x = LaplacianPower(laplacian(torch.ones(3, 3))), torch.ones(3, 4)
    mask = torch.ones(3, 4).bool()
    for call, sentence in (
        (lambda: graph_trss(x[:2], mask, power), "`x` must be floats, (3 nodes, times); got 'torch.float32 (2, 4)'."),
        (lambda: graph_trss(x, mask[:, :2], power), "`mask` must be bools of shape (3, 4)"),
        (lambda: graph_trss(x, ~mask, power), "`mask` must be True somewhere: without a sample nothing is known"),
        (lambda: graph_trss(x * torch.nan, mask, power), "`x` must be finite where the mask is True"),
        (lambda: graph_trss(x, mask, power, alpha=-1), "`alpha` must be a float >= 0; got -1."),
        (lambda: graph_trss(x, mask, power, tol=1), "`tol` must be in (0, 1); got 1."),
        (lambda: learn_prior(x, mask, power, hidden=mask), "`hidden` must be some of the samples, not all"),
        (lambda: learn_prior(x, mask, power, hidden=hide(mask, 0.5), max_iter=0), "`max_iter` must be an int >= 1"),
    ):
        with pytest.raises(ValueError, match="must be") as error:
            call()
        assert sentence in str(error.value)


def test_what_does_not_converge_says_so_and_hands_over():
    x = torch.rand(3, 40, generator=drawn())
    mask = random_mask(torch.ones_like(x).bool(), 0.4, generator=drawn())
    with pytest.raises(_support.NotConverged, match="graph_trss: the residual is above") as error:
        graph_trss(x, mask, LaplacianPower(laplacian(torch.ones(3, 3)), method="chebyshev"), max_iter=1)
    assert error.value.best.shape == x.shape


def test_masks():
    valid = torch.ones(10, 20).bool()
    valid[3] = False
    assert (random_mask(valid, 0.5, generator=drawn()).sum(0) == 5).all()
    assert not random_mask(valid, 1.0, generator=drawn())[3].any()
    whole = snapshot_mask(valid, 0.25, generator=drawn())
    assert int(whole.any(0).sum()) == 5 and (whole == valid)[:, whole.any(0)].all()
    ahead = forecast_mask(valid, 3)
    assert not ahead[:, -3:].any() and (ahead == valid)[:, :-3].all()
    hidden = hide(ahead, 0.2, generator=drawn())
    assert (hidden <= ahead).all() and int(hidden.sum()) == round(0.2 * int(ahead.sum()))
    assert torch.equal(hidden, hide(ahead, 0.2, generator=drawn()))


def test_a_node_never_observed_and_a_time_without_samples():
    table, _, w = sensors()
    x = torch.tensor(table.T)
    mask = torch.ones_like(x).bool()
    mask[2], mask[:, 30] = False, False
    power = LaplacianPower(laplacian(w))
    for fill in (
        graph_trss(x, mask, power), SmoothnessPrior().fill(x, mask, power), interpolate_neighbours(x, mask, w)
    ):  # fmt: skip
        assert (fill[2] - x[2]).abs().max() < 0.3
        assert (fill[:, 30] - x[:, 30])[torch.arange(8) != 2].abs().max() < 0.1
    island = torch.tensor(w)
    island[2] = island[:, 2] = 0
    assert torch.isfinite(graph_trss(x, mask, LaplacianPower(laplacian(island)))).all()


def test_a_season_is_found_or_not():
    t = torch.arange(240.0)
    noise = torch.randn(5, 240, generator=drawn())
    assert find_period(torch.sin(2 * torch.pi * t / 17.3) + 0.5 * noise) == pytest.approx(17.3, abs=0.15)
    assert find_period(noise) is None
    assert find_period(noise.cumsum(1)) is None


def test_training_is_repeatable_and_keeps_the_best_epoch():
    table, _, w = sensors()
    x = torch.tensor(table.T)
    mask = random_mask(torch.ones_like(x).bool(), 0.6, generator=drawn())
    hidden = hide(mask, 0.2, generator=drawn())
    power, training = LaplacianPower(laplacian(w)), TimeGNNTraining(epochs=30)
    told = []
    one, two = (
        fit_timegnn(x, mask, power, hidden=hidden, training=training, generator=drawn(), progress=p)
        for p in (lambda epoch, loss: told.append(epoch), None)
    )
    assert torch.equal(one.fill, two.fill) and told == list(range(1, 31))
    assert one.validation[one.best_epoch - 1] == min(one.validation)
    error = float((one.fill - x)[hidden].square().mean().sqrt())
    assert error == pytest.approx(min(one.validation), rel=1e-3)
    assert len(fit_timegnn(x, mask, power, training=training, stop_after=7, generator=drawn()).loss) == 7
    deep = TimeGNNTraining(epochs=3, start="zero", hidden_channels=(4,), decoder_channels=(5,))
    assert torch.isfinite(fit_timegnn(x, mask, power, training=deep, generator=drawn()).fill).all()


@pytest.mark.parametrize("method", ["auto", "prior", "graphtrss", "timegnn", "tikhonov", "neighbours", "linear"])
def test_the_imputer(method):
    table, gaps, w = sensors()
    training = TimeGNNTraining(epochs=40)
    imputer = GraphSignalImputer(method, graph=w, training=training)
    filled = imputer.fit_transform(gaps)
    seen = ~np.isnan(gaps)
    assert np.array_equal(filled[seen], gaps[seen]) and not np.isnan(filled).any()
    assert imputer.score(table) == pytest.approx(-np.sqrt(np.mean((filled - table)[~seen] ** 2)))
    assert imputer.score(table) > (-0.7 if method == "neighbours" else -0.3)
    turned = clone(imputer).set_params(axis=0).fit_transform(gaps.T)
    assert np.allclose(turned.T, filled)
    later = gaps[10:40]
    if method == "timegnn":
        with pytest.raises(ValueError, match="a network fills no other"):
            imputer.transform(later)
    else:
        again = imputer.transform(later)
        assert again.shape == later.shape and not np.isnan(again).any()


def test_auto_blends_what_it_says():
    _, gaps, w = sensors()
    seen = ~np.isnan(gaps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planish.graphs.imputer.blend_weight", lambda *_: 0.25)
        blend = GraphSignalImputer(graph=w).fit(gaps)
    assert blend.method_ == "blend" and blend.weight_ == 0.25
    x, mask = torch.tensor(np.where(seen, gaps, 0.0).T), torch.tensor(seen.T)
    power = LaplacianPower(laplacian(torch.tensor(w)), 0.05)
    parts = graph_trss(x, mask, power, alpha=blend.alpha_), blend.prior_.fill(x, mask, power)
    mixed = (0.75 * parts[0] + 0.25 * parts[1]).T.numpy()
    assert np.allclose(blend.filled_[~seen], mixed[~seen], atol=1e-4)
    assert np.array_equal(blend.transform(gaps), blend.filled_)
    assert set(blend.hidden_errors_) == {"graphtrss", "prior"}
    auto = GraphSignalImputer(graph=w).fit(gaps)
    assert 0 <= auto.weight_ <= 1
    assert auto.method_ == {0: "graphtrss", 1: "prior"}.get(auto.weight_, "blend")
    short = GraphSignalImputer(graph=w).fit(gaps[:4])  # too few samples to say anything
    assert short.method_ == "graphtrss" and short.weight_ == 0


def test_the_imputer_takes_coordinates_and_sparse_graphs():
    sparse = pytest.importorskip("scipy.sparse")
    _, gaps, w = sensors()
    angle = 2 * np.pi * np.arange(8) / 8
    at = np.stack([np.cos(angle), np.sin(angle)], 1)
    near = GraphSignalImputer("graphtrss", graph=at, k=2, alpha=1e-3).fit_transform(gaps)
    assert not np.isnan(near).any()
    of_sparse = GraphSignalImputer("graphtrss", graph=sparse.csr_array(w), alpha=1e-3).fit_transform(gaps)
    assert np.allclose(of_sparse, GraphSignalImputer("graphtrss", graph=w, alpha=1e-3).fit_transform(gaps), atol=1e-4)


def test_the_imputer_warns_of_a_blind_node():
    _, gaps, w = sensors()
    gaps[:, 3] = np.nan
    with pytest.warns(_support.PlanishWarning, match="node 3 was never observed"):
        filled = GraphSignalImputer("graphtrss", graph=w, alpha=1e-3).fit_transform(gaps)
    assert not np.isnan(filled).any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "x"}, "`method` must be one of auto, prior, graphtrss"),
        ({"graph": None}, "`graph` must be an adjacency, or coordinates; got None."),
        ({"graph": np.ones((3, 3))}, "`graph` must be (8, 8), or coordinates of the 8 nodes along axis 1; got (3, 3)."),
        ({"axis": 2}, "`axis` must be 0 or 1, the axis of the nodes; got 2."),
        ({"alpha": -1}, "`alpha` must be 'auto' or a float >= 0; got -1."),
        ({"epsilon": 0}, "`epsilon` must be a float above 0; got 0."),
        ({"hidden_fraction": 1}, "`hidden_fraction` must be a float in (0, 1); got 1."),
        ({"period": 2}, "`period` must be 'auto', None or a float above 2; got 2."),
    ],
)
def test_bad_arguments_of_the_imputer(change, sentence):
    _, gaps, w = sensors()
    with pytest.raises(ValueError, match="must be") as error:
        GraphSignalImputer(**({"graph": w} | change)).fit(gaps)
    assert sentence in str(error.value)


def test_bad_tables_of_the_imputer():
    table, gaps, w = sensors()
    imputer = GraphSignalImputer("linear", graph=w).fit(gaps)
    for call, sentence in (
        (lambda: imputer.fit(gaps[0]), "`X` must be a table of two axes; got (8,)."),
        (lambda: imputer.fit(np.where(np.isnan(gaps), np.inf, gaps)), "`X` must be finite or NaN; got 'infinity'."),
        (lambda: imputer.fit(np.full((5, 8), np.nan)), "`X` must be of two times and two values at least"),
        (lambda: imputer.transform(gaps[:, :5]), "`X` must be of 8 nodes along axis 1; got (60, 5)."),
        (lambda: imputer.score(gaps), "`X` must be the table of `fit` with values where that had gaps"),
    ):
        with pytest.raises(ValueError, match="must be") as error:
            call()
        assert sentence in str(error.value)
    assert not np.isnan(imputer.transform(table)).any()
