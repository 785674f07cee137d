"""Laws of signals on graphs: equivariance, exact forms, linear systems solved, gradients by finite differences."""

import math

import pytest
import torch

from planish.graphs import (
    ChebCascadeConv,
    ChebNet,
    LaplacianPower,
    SmoothnessPrior,
    SobolevLoss,
    TimeGNN,
    as_adjacency,
    graph_trss,
    interpolate_neighbours,
    interpolate_time,
    laplacian,
    learn_prior,
    sobolev_loss,
    temporal_difference,
    tikhonov,
    to_edges,
)
from planish.graphs.blocks import TimeBlocks
from planish.graphs.chebconv import polynomials
from planish.graphs.prior import _System
from planish.graphs.selection import blend_weight, split
from planish.graphs.time import cosines, frequencies, from_cosines, second_difference

F64 = torch.float64


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def ring(n=6, seed=0):
    """A ring with one chord, of uneven weights."""
    w = torch.zeros(n, n, dtype=F64)
    for i in range(n):
        w[i, (i + 1) % n] = 0.5 + torch.rand((), generator=drawn(seed + i), dtype=F64)
    w[0, n // 2] = 0.7
    return w + w.T


def table(n=6, m=8, seed=1, density=0.6):
    x = torch.randn(n, m, generator=drawn(seed), dtype=F64).cumsum(1) + torch.arange(n)[:, None]
    mask = torch.rand(n, m, generator=drawn(seed + 1)) < density
    mask[:, 0] = True
    return x, mask


def differences(m):
    """D, (M, M - 1), with (X D)_t = x_{t+1} - x_t."""
    d = torch.zeros(m, m - 1, dtype=F64)
    d[range(1, m), range(m - 1)], d[range(m - 1), range(m - 1)] = 1, -1
    return d


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["dense", "sparse", "csr"])
def test_laplacian_is_positive_and_kills_constants(layout):
    w = ring()
    graph = w if layout == "dense" else w.to_sparse_coo() if layout == "sparse" else w.to_sparse_csr()
    for normalization in ("none", "symmetric"):
        L = laplacian(graph, normalization)
        assert L.is_sparse == (layout != "dense")
        L = L.to_dense()
        assert torch.linalg.eigvalsh(L).min() > -1e-12
        kernel = torch.ones(6, dtype=F64) if normalization == "none" else w.sum(1).sqrt()
        assert (L @ kernel).abs().max() < 1e-12
    index, weight = to_edges(graph)
    assert torch.equal(
        torch.sparse_coo_tensor(index, weight, (6, 6), check_invariants=True).to_dense(), as_adjacency(w)
    )


def test_an_isolated_node_has_an_identity_row():
    w = torch.zeros(3, 3, dtype=F64)
    w[0, 1] = w[1, 0] = 2.0
    assert laplacian(w)[2].abs().max() == 0
    for graph in (w, w.to_sparse_coo()):
        assert torch.equal(laplacian(graph, "symmetric").to_dense()[2], torch.tensor([0, 0, 1], dtype=F64))
    out = ChebCascadeConv(2, 2, 3, generator=drawn())(torch.ones(3, 2), w.float())
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("m", [2, 5, 8])
def test_cosines_diagonalize_differences(m):
    x = torch.randn(3, m, generator=drawn(), dtype=F64)
    d = differences(m)
    assert torch.allclose(temporal_difference(x), x @ d, atol=1e-14)
    assert torch.allclose(second_difference(x), x @ d @ d.T, atol=1e-13)
    assert torch.allclose(from_cosines(cosines(x)), x, atol=1e-13)
    assert torch.allclose(cosines(x).norm(), x.norm())
    assert torch.allclose(cosines(second_difference(x)), frequencies(m, x) * cosines(x), atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 2.7])
@pytest.mark.parametrize("method", ["auto", "eigh", "chebyshev"])
def test_powers_agree_with_the_spectral_definition(beta, method):
    L = laplacian(ring())
    values, vectors = torch.linalg.eigh(L)
    x = torch.randn(6, 4, generator=drawn(), dtype=F64)
    power = LaplacianPower(L, 0.3, beta, method=method)
    exact = vectors @ ((values.clamp_min(0) + 0.3)[:, None] ** beta * (vectors.T @ x))
    assert torch.allclose(power(x), exact, atol=1e-9, rtol=1e-9)
    sparse = LaplacianPower(L.to_sparse_coo(), 0.3, beta, method=method)
    assert torch.allclose(sparse(x), exact, atol=1e-9, rtol=1e-9)


def test_the_loss_is_the_explicit_trace_and_nothing_for_constants():
    x, _ = table()
    L, d = laplacian(ring()), differences(8)
    exact = torch.trace((x @ d).T @ (L + 0.2 * torch.eye(6)) @ (x @ d))
    assert torch.allclose(sobolev_loss(x, L, epsilon=0.2), exact)
    assert torch.allclose(SobolevLoss(L, epsilon=0.2, lam=0.1)(x), 0.1 * exact)
    assert sobolev_loss(x[:, :1].expand(6, 8), L) == 0
    assert sobolev_loss(x, L, epsilon=0.0, beta=1.5) >= 0
    assert torch.autograd.gradcheck(lambda v: sobolev_loss(v, L, beta=1.5), x.requires_grad_())


@pytest.mark.parametrize("order", [1, 4])
def test_polynomials_on_a_diagonal_graph(order):
    special = pytest.importorskip("scipy.special")
    at = torch.linspace(-0.9, 0.9, 5, dtype=F64)
    one = torch.ones(5, 1, dtype=F64)
    for k, term in enumerate(polynomials(torch.diag(at), one, order, None)):
        assert torch.allclose(term[:, 0], torch.cos(k * at.acos()), atol=1e-12)
    for alpha in (0.7, 1.0, 2.5):
        for k, term in enumerate(polynomials(torch.diag(at), one, order, alpha)):
            assert torch.allclose(term[:, 0], torch.from_numpy(special.eval_gegenbauer(k, alpha, at.numpy())))
    u = polynomials(torch.diag(at), one, order, 1.0)[-1][:, 0]
    assert torch.allclose(u, torch.sin(order * at.acos()) / at.acos().sin(), atol=1e-12)


@pytest.mark.parametrize("polynomial", ["chebyshev", "gegenbauer"])
def test_the_cascade_is_its_formula(polynomial):
    layer = ChebCascadeConv(3, 2, 3, polynomial=polynomial, alpha=0.8, generator=drawn()).double()
    with torch.no_grad():
        layer.biases.normal_(generator=drawn(3))
    w = ring()
    h = torch.randn(6, 3, generator=drawn(1), dtype=F64)
    lhat = laplacian(w, "symmetric") - torch.eye(6)
    terms = polynomials(lhat, h, 3, None if polynomial == "chebyshev" else 0.8)
    expected = sum(
        layer.mix[r] * torch.relu(sum(terms[k] @ layer.weights[r][k] for k in range(r + 1)) + layer.biases[r])
        for r in range(3)
    )
    assert torch.allclose(layer(h, w), expected, atol=1e-12)
    assert torch.allclose(layer(h, w.to_sparse_coo()), expected, atol=1e-12)
    assert torch.allclose(layer(h, *to_edges(w)), expected, atol=1e-12)


@pytest.mark.parametrize("make", ["timegnn", "stacked", "chebnet"])
def test_networks_do_not_care_for_the_order_of_nodes(make):
    net = {
        "timegnn": lambda: TimeGNN(8, generator=drawn()),
        "stacked": lambda: TimeGNN(8, hidden_channels=(4, 3), decoder_channels=(5, 6), generator=drawn()),
        "chebnet": lambda: ChebNet((7, 5, 8), generator=drawn()),
    }[make]().double()
    w, turn = ring(), torch.tensor([3, 1, 5, 0, 2, 4])
    h = torch.randn(6, 7, generator=drawn(2), dtype=F64)
    assert torch.allclose(net(h[turn], w[turn][:, turn]), net(h, w)[turn], atol=1e-12)


RECOVERIES = {
    "graphtrss": lambda x, mask, power: graph_trss(x, mask, power, alpha=0.05, tol=1e-12),
    "all terms": lambda x, mask, power: graph_trss(x, mask, power, alpha=0.05, spatial=0.02, temporal=0.03, tol=1e-12),
    "tikhonov": lambda x, mask, power: tikhonov(x, mask, power, alpha=0.05, tol=1e-12),
    "prior": lambda x, mask, power: SmoothnessPrior(0.05, beta=1.3, gamma=0.8).fill(x, mask, power, tol=1e-12),
    "neighbours": lambda x, mask, power: interpolate_neighbours(
        x, mask, torch.diag(power.laplacian.diagonal()) - power.laplacian
    ),
    "linear": lambda x, mask, power: interpolate_time(x, mask),
}


@pytest.mark.parametrize("name", RECOVERIES)
def test_recoveries_are_equivariant(name):
    """Nodes in another order, another unit and another zero: the same recovery."""
    (x, mask), w = table(), ring()
    fill = RECOVERIES[name](x, mask, LaplacianPower(laplacian(w), 0.1))
    turn = torch.tensor([3, 1, 5, 0, 2, 4])
    turned = RECOVERIES[name](x[turn], mask[turn], LaplacianPower(laplacian(w[turn][:, turn]), 0.1))
    assert torch.allclose(turned, fill[turn], atol=1e-8)
    moved = RECOVERIES[name](3 * x - 20, mask, LaplacianPower(laplacian(w), 0.1))
    assert torch.allclose(moved, 3 * fill - 20, atol=1e-8)
    blind = torch.where(mask, x, 1e6)  # what is not a sample is not read
    assert torch.equal(RECOVERIES[name](blind, mask, LaplacianPower(laplacian(w), 0.1)), fill)


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_graphtrss_solves_its_equations_as_a_dense_solver_does(layout):
    (x, mask), L, d = table(), laplacian(ring()), differences(8)
    power = LaplacianPower(L if layout == "dense" else L.to_sparse_coo(), 0.1, method="auto")
    if layout == "sparse":
        power.method = "chebyshev"  # no eigenvectors: preconditioned by degrees
    found = graph_trss(x, mask, power, alpha=0.05, tol=1e-12)
    s, k = L + 0.1 * torch.eye(6), d @ d.T
    assert (mask * found + 0.05 * s @ found @ k - mask * x).abs().max() < 1e-8
    matrix = torch.diag(mask.double().flatten()) + 0.05 * torch.kron(s, k)
    exact = torch.linalg.solve(matrix, (mask * x).flatten()).view(6, 8)
    assert torch.allclose(found, exact, atol=1e-8)


def few(n=6, m=40):
    """Values that are all but exact and that hardly anybody saw: where a small residual is far from a solution."""
    x, mask = table(n, m, density=0.12)
    mask[4] = False  # one node never
    mask[:, 7] = False  # one time by nobody
    return x, mask


def test_blocks_are_the_dense_solution():
    _, mask = few()
    L, k = laplacian(ring()), differences(40) @ differences(40).T
    fixed, changes = 1e-3 * L, 1e-4 * (L + 0.05 * torch.eye(6))
    levels, vectors = torch.linalg.eigh(L)
    matrix = torch.diag(mask.double().flatten()) + torch.kron(fixed, torch.eye(40)) + torch.kron(changes, k)
    right = torch.randn(6, 40, generator=drawn(3), dtype=F64)
    exact = torch.linalg.solve(matrix, right.flatten()).view(6, 40)
    found = TimeBlocks(mask, vectors, 1e-3 * levels.clamp_min(0), 1e-4 * (levels + 0.05)).solve(right)
    assert torch.allclose(found, exact, rtol=1e-6, atol=1e-6)
    alone = TimeBlocks(mask, torch.eye(6), torch.zeros(6), torch.zeros(6)).solve(
        mask * right
    )  # nothing ties what nobody saw
    assert torch.allclose(alone, mask * right, atol=1e-10)


def test_graphtrss_is_solved_where_a_small_residual_says_little():
    (x, mask), power = few(), LaplacianPower(laplacian(ring()), 0.05)
    alpha = 1e-6
    found = graph_trss(x, mask, power, alpha=alpha)
    s, k = power.laplacian + 0.05 * torch.eye(6), differences(40) @ differences(40).T
    assert (mask * (found - x) + alpha * s @ found @ k).abs().max() < 1e-9 * x.abs().max()
    free = torch.zeros(6, 40, dtype=F64)
    free[4] = 1  # only the level of the node that was never seen is free
    matrix = torch.diag(mask.double().flatten()) + alpha * torch.kron(s, k) + 1e-3 * torch.outer(*2 * (free.flatten(),))
    exact = torch.linalg.solve(matrix, (mask * x).flatten()).view(6, 40)
    gap = (found - exact)[mask.any(1)]
    assert gap.abs().max() < 1e-5
    gap = (found - exact)[4]
    assert (gap - gap.mean()).abs().max() < 1e-5


@pytest.mark.parametrize("weights", [(1e-3, 0.0, 0.0), (0.0, 1e-3, 0.0), (0.0, 0.0, 0.1), (1e3, 1e-4, 0.0)])
def test_what_is_free_is_no_trouble(weights):
    """Without epsilon a time that nobody saw is free, and so is the level of a node that nobody saw."""
    (x, mask), L = few(), laplacian(ring())
    alpha, spatial, temporal = weights
    power = LaplacianPower(L, 0.0)
    found = graph_trss(x, mask, power, alpha=alpha, spatial=spatial, temporal=temporal)
    k = differences(40) @ differences(40).T
    left = mask * (found - x) + alpha * L @ found @ k + spatial * L @ found + temporal * found @ k
    assert left.abs().max() < 1e-7 * x.abs().max() * max(weights[0], 1)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("gamma", [0.6, 1.0, 1.7])
def test_the_prior_is_the_dense_solution(gamma):
    (x, mask), power = few(), LaplacianPower(laplacian(ring()), 0.05)
    prior = SmoothnessPrior(1e-5, beta=0.7, gamma=gamma, periods=(6.0,))
    system = _System(x, mask, power, prior.periods)
    p, c = system.charges(prior._theta(x))

    def column(v):
        spectrum, inside = system.spectra(v.view(6, 40))
        return (system.seen * v.view(6, 40) + system.signals(p * spectrum, c * inside)).flatten()

    matrix = torch.stack([column(v) for v in torch.eye(240, dtype=F64)], 1)
    exact = system.level + torch.linalg.solve(matrix, system.y.flatten()).view(6, 40)
    assert torch.allclose(prior.fill(x, mask, power, tol=1e-12), exact, atol=1e-6)


def test_parts_are_a_partition():
    _, mask = table()
    parts = split(mask, 4, generator=drawn())
    assert torch.equal(sum(part.long() for part in parts), mask.long())
    sizes = [int(part.sum()) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_blend_is_never_worse_on_what_chose_it():
    nodes, times = torch.meshgrid(torch.arange(12), torch.arange(60), indexing="ij")
    nodes, times = nodes.flatten(), times.flatten()
    for seed in range(20):
        base, own = torch.randn(2, 720, generator=drawn(seed), dtype=F64)
        other = base * (seed / 15) + own * torch.rand((), generator=drawn(seed + 99)) * 1.2
        w = blend_weight(base, other, nodes, times)
        assert 0 <= w <= 1
        assert torch.lerp(base, other, w).square().sum() <= base.square().sum() * (1 + 1e-12)
        assert blend_weight(7 * base, 7 * other, nodes, times) == pytest.approx(w, abs=1e-12)
        turn = torch.randperm(720, generator=drawn(seed))
        assert blend_weight(base[turn], other[turn], nodes[turn], times[turn]) == pytest.approx(w, abs=1e-12)
    assert blend_weight(base, base, nodes, times) == 0
    assert blend_weight(base, 0 * base, nodes, times) == 1


def test_gains_of_one_node_or_of_a_moment_are_no_reason_to_leave():
    nodes, times = torch.meshgrid(torch.arange(12), torch.arange(60), indexing="ij")
    nodes, times = nodes.flatten(), times.flatten()
    base, own = torch.randn(2, 720, generator=drawn(1), dtype=F64)
    for few in (nodes == 3, times // 3 == 5):
        trusted, other = torch.where(few, 30 * base, 0.1 * base), torch.where(few, base, own)
        assert other.square().mean() < 0.1 * trusted.square().mean()  # better by far, but where it counts only here
        assert blend_weight(trusted, other, nodes, times) == 0


def test_all_samples_and_no_weight_give_the_samples():
    x, mask = table()
    everything = torch.ones_like(mask)
    power = LaplacianPower(laplacian(ring()))
    assert torch.allclose(graph_trss(x, everything, power, alpha=1e-12, tol=1e-12), x, atol=1e-8)
    assert torch.equal(interpolate_time(x, mask)[mask], x[mask])


def test_the_prior_without_its_additions_is_graphtrss():
    (x, mask), power = table(), LaplacianPower(laplacian(ring()), 0.1)
    tiny = SmoothnessPrior(0.05, 0.1, forget=1e-12, forget_rough=1e-12, mean=1e-12, season=1e-12)
    assert torch.allclose(
        tiny.fill(x, mask, power, tol=1e-12), graph_trss(x, mask, power, alpha=0.05, tol=1e-12), atol=1e-6
    )


def test_the_prior_solves_its_system_and_its_parts_are_adjoint():
    (x, mask), power = table(m=30), LaplacianPower(laplacian(ring()), 0.1)
    system = _System(x, mask, power, (6.0,))
    a, b = torch.randn(2, 6, 30, generator=drawn(3), dtype=F64)
    s, f = system.spectra(a)
    assert torch.allclose(system.signals(s, f), a, atol=1e-12)
    sb, fb = system.spectra(b)
    assert torch.allclose((s * sb).sum() + (f * fb).sum(), (a * b).sum())
    assert torch.allclose(system.frame.T @ system.frame, torch.eye(5, dtype=F64), atol=1e-12)


def test_the_gradient_of_learning_is_that_of_finite_differences(monkeypatch):
    """The first step of L-BFGS goes down the gradient: look at what the optimizer is given."""
    (x, mask), power = table(m=20, seed=4), LaplacianPower(laplacian(ring()), 0.1)
    hidden = mask & (torch.rand(mask.shape, generator=drawn(9)) < 0.3)
    start = SmoothnessPrior(0.3, 0.2, periods=(5.0,), mean=0.1, season=0.1, forget=0.2, forget_rough=0.1)
    seen = {}

    def step(self, closure):
        closure()
        seen["gradient"] = self.param_groups[0]["params"][0].grad.clone()

    monkeypatch.setattr(torch.optim.LBFGS, "step", step)
    solve = _System.solve
    monkeypatch.setattr(
        _System, "solve", lambda self, t, r, s, within, n, **how: solve(self, t, r, s, 1e-12, 5000, **how)
    )
    learn_prior(x, mask, power, hidden=hidden, start=start)

    def loss(theta):
        system = _System(x, mask & ~hidden, power, start.periods)
        fill = system.solve(theta, system.y, system.guess, 1e-12, 5000)
        return 10 * math.log(float(((fill + system.level - x) * hidden).square().sum()))

    origin, h = start._theta(x), 1e-4
    for i, slope in enumerate(seen["gradient"].tolist()):
        away = torch.zeros_like(origin)
        away[i] = h
        assert (loss(origin + away) - loss(origin - away)) / (2 * h) == pytest.approx(slope, rel=1e-3, abs=1e-4)
