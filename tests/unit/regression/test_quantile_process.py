"""What the estimator does with its arguments, its data, and those who ask it."""

import logging

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from planish._support import PlanishWarning
from planish.regression import QuantileProcessRegressor

TENTHS = np.arange(1, 10) / 10


def table(n=120, d=2, seed=0):
    random = np.random.default_rng(seed)
    X = random.random((n, d))
    return X, X[:, 0] + (0.5 + X[:, -1]) * random.standard_normal(n)


def quick(**given):
    return QuantileProcessRegressor(
        **{
            "hidden_layer_sizes": (12, 12),
            "n_members": 2,
            "max_iter": 60,
            "learning_rate_init": 5e-3,
            "random_state": 0,
        }
        | given
    )


@pytest.fixture(scope="module")
def fitted():
    X, y = table()
    return quick().fit(X, y)


def test_shapes_of_predictions(fitted):
    X, y = table(7)
    assert fitted.predict(X).shape == fitted.predict(X, 0.3).shape == fitted.predict(X, "mean").shape == (7,)
    assert fitted.predict(X, [0.3]).shape == (7, 1) and fitted.predict(X, TENTHS).shape == (7, 9)
    np.testing.assert_allclose(fitted.predict(X), fitted.predict(X, [0.1, 0.5])[:, 1], rtol=1e-12)
    assert fitted.predict_interval(X).shape == (7, 2)
    assert fitted.sample(X, 5, random_state=0).shape == (7, 5)
    assert fitted.cdf(X, y).shape == (7,) and fitted.cdf(X, np.zeros((7, 3))).shape == (7, 3)
    assert fitted.quantile_density(X, TENTHS).shape == (7, 9)


def test_all_answers_are_of_one_distribution(fitted):
    X, _ = table(6)
    curves = fitted.predict(X, TENTHS)
    np.testing.assert_allclose(fitted.cdf(X, curves), np.tile(TENTHS, (6, 1)), atol=1e-4)
    np.testing.assert_allclose(fitted.predict_interval(X, 0.8), curves[:, [0, 8]])
    step = 1e-2
    difference = fitted.predict(X, TENTHS + step) - fitted.predict(X, TENTHS - step)
    np.testing.assert_allclose(fitted.quantile_density(X, TENTHS), difference / (2 * step), rtol=0.05)
    draws = fitted.sample(X, 4000, random_state=1)
    np.testing.assert_allclose(np.quantile(draws, TENTHS, axis=1).T, curves, atol=0.12)
    np.testing.assert_allclose(draws.mean(1), fitted.predict(X, "mean"), atol=0.1)
    np.testing.assert_array_equal(draws, fitted.sample(X, 4000, random_state=1))
    assert fitted.crossing_rate(X) == 0 and (fitted.cdf(X, np.full(6, -1e6)) < 1e-6).all()


def test_rearranging_sorts_whatever_the_order_of_levels():
    X, y = table(60)
    wild = quick(monotone="none", start="random", max_iter=1, n_members=1, early_stopping=False).fit(X, y)
    for p in wild.network_.parameters():
        p.data.mul_(-8)
    asked = [0.9, 0.1, 0.5]
    plain, rising = wild.predict(X, asked), wild.predict(X, asked, rearrange=True)
    assert wild.crossing_rate(X) > 0
    np.testing.assert_array_equal(np.sort(plain, 1), rising[:, [1, 2, 0]])
    assert (np.diff(wild.predict_interval(X), axis=1) >= 0).all()


@pytest.mark.parametrize("monotone", ["penalty", "hard", "none"])
def test_shifts_and_scales_pass_through(monotone):
    X, y = table()
    fit = quick(monotone=monotone, dtype="float64", max_iter=15)
    plain = fit.fit(X, y).predict(X, TENTHS)
    moved = clone(fit).fit(100 * X - 7, 50 * y + 3).predict(100 * X - 7, TENTHS)
    np.testing.assert_allclose(moved, 50 * plain + 3, rtol=1e-6, atol=1e-6)


def test_the_same_seed_gives_the_same_bits():
    X, y = table()
    runs = [quick(max_iter=10, random_state=seed).fit(X, y).predict(X, TENTHS) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def test_global_seeds_are_neither_read_nor_set():
    import torch

    X, y = table(40)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.random.get_rng_state(), np.random.get_state()[1]
    quick(max_iter=3).fit(X, y).sample(X, 2, random_state=0)
    assert (torch.random.get_rng_state() == before[0]).all() and (np.random.get_state()[1] == before[1]).all()


def test_every_row_is_learnt_from_and_held_out_by_one_member():
    X, y = table(53)
    import torch

    model = quick(n_members=5)
    train, held = model._split(53, torch.Generator().manual_seed(0))
    for a, b in zip(train, held, strict=True):
        assert sorted([*a.tolist(), *b.tolist()]) == list(range(53))
    assert train.shape == (5, 42) and len(set(held.ravel().tolist())) == 53
    assert model.set_params(early_stopping=False)._split(53, torch.Generator())[1] is None
    assert len(quick(n_members=1, max_iter=2, validation_fraction=0.9).fit(X[:2], y[:2]).loss_curve_) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"resample_levels": False, "average": 0.0, "n_members": 1, "start": "random"},  # the paper's
        {"monotone": "hard"}, {"monotone": "none"}, {"start": "random"}, {"activation": "relu"}, {"activation": "tanh"},
        {"level_input": "logit"}, {"level_law": (0.5, 0.5)}, {"early_stopping": False}, {"standardize": False},
        {"batch_size": 32}, {"n_levels": 5}, {"penalty": 3.0}, {"dtype": "float64"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_learns(settings):
    X, y = table(200)
    model = quick(**{"learning_rate_init": 0.02, "average": 0.9, **settings}).fit(X, 3 * X[:, 0] + 0.1 * y)
    assert model.score(X, 3 * X[:, 0] + 0.1 * y) > 0.4
    assert model.penalty_ == {"penalty": settings.get("penalty", np.log(200))}.get(model.monotone, 0)


def test_weights_choose_what_is_learnt():
    X, _ = table(200)
    y = np.where(np.arange(200) % 2, 5.0, -5.0) + 0.1 * X[:, 0]
    weight = np.where(np.arange(200) % 2, 1.0, 1e-3)
    model = quick(max_iter=150).fit(X, y, sample_weight=weight)
    assert (np.abs(model.predict(X) - 5) < 1).all()
    heavy = model.crps(X, y, sample_weight=weight)
    assert heavy < model.crps(X, y) and model.score(X, y, sample_weight=weight) > -0.5


def test_training_stops_early_and_keeps_the_best():
    X, y = table(60)
    model = quick(max_iter=400, n_iter_no_change=20, learning_rate_init=0.02).fit(X, y)
    epochs = [epoch for epoch, _ in model.validation_curve_]
    assert model.n_iter_ < 400 and model.n_iter_ == model.best_iter_ + 20 == len(model.loss_curve_) == epochs[-1]
    late = quick(max_iter=30, early_stopping=False).fit(X, y)
    assert late.n_iter_ == late.best_iter_ == 30 and late.validation_curve_ == []


def test_a_training_shorter_than_the_time_between_validations_counts():
    X, y = table(60)
    model = quick(max_iter=3).fit(X, y)
    assert model.best_iter_ == 3 and [epoch for epoch, _ in model.validation_curve_] == [3]


def test_a_diverging_training_keeps_its_best(caplog):
    X, y = table(60)
    with caplog.at_level(logging.WARNING, logger="planish"):
        model = quick(learning_rate_init=1e12, max_iter=50, average=0.0, activation="requ").fit(X, y)
    assert "not finite" in caplog.text and model.n_iter_ < 50


def test_progress_is_shown_on_the_error_stream(capsys):
    X, y = table(40)
    quick(max_iter=3, verbose=True).fit(X, y)
    shown = capsys.readouterr()
    assert "loss" in shown.err and shown.out == ""


def test_outside_the_data_curves_are_held_or_a_warning_is_given(fitted):
    X, y = table()
    far, edge = np.array([[50.0, 0.5]]), np.array([[X[:, 0].max(), 0.5]])
    np.testing.assert_allclose(fitted.predict(far), fitted.predict(edge))
    loose = clone(fitted).set_params(extrapolation="warn", max_iter=3).fit(X, y)
    with pytest.warns(PlanishWarning, match="1 of 1 rows lie outside the range of training"):
        loose.predict(far)
    loose.predict(edge)


def test_constant_columns_and_targets():
    X, y = table(60)
    X[:, 1] = 3.0
    assert np.isfinite(quick(max_iter=5).fit(X, y).predict(X)).all()
    model = quick(max_iter=150).fit(X, np.full(60, 7.0))
    np.testing.assert_allclose(model.predict(X), 7, atol=0.3)
    mostly = np.where(np.arange(60) % 3, 2.0, 5.0)  # the median deviation is 0
    assert quick(max_iter=2).fit(X, mostly).y_scale_ == pytest.approx(np.sqrt(np.mean((mostly - 2) ** 2)))


def test_conformal_intervals_hold_what_they_promise():
    X, y = table(400)
    poor = quick(start="random", max_iter=1, n_members=1).fit(X[:60], y[:60])  # has learnt nothing
    rest, last = slice(60, 230), slice(230, 400)
    poor.conformalize(X[rest], y[rest])
    for coverage in (0.5, 0.9):
        low, high = poor.predict_interval(X[rest], coverage, conformal=True).T
        inside = ((y[rest] >= low - 1e-9) & (y[rest] <= high + 1e-9)).mean()
        assert coverage <= inside <= coverage + 2 / 170  # on the rows it conformed to, exactly
        low, high = poor.predict_interval(X[last], coverage, conformal=True).T
        assert abs(((y[last] >= low) & (y[last] <= high)).mean() - coverage) < 0.12
    plain = poor.predict_interval(X[last], 0.9)
    assert abs(((y[last] >= plain[:, 0]) & (y[last] <= plain[:, 1])).mean() - 0.9) > 0.12


def test_score_is_one_less_the_part_of_the_loss_that_is_left(fitted):
    X, y = table()
    assert fitted.score(X, y) > fitted.score(X, y + 3)
    assert -0.1 < fitted.score(X, y) < 0.6
    levels = (np.arange(50) + 0.5) / 50
    z = y[:, None] - fitted.predict(X, levels)
    assert fitted.crps(X, y) == pytest.approx(2 * np.maximum(levels * z, (levels - 1) * z).mean())
    constant = quick(max_iter=1).fit(X, np.zeros(len(y)))
    assert constant.score(X[:3], np.zeros(3)) in (0.0, 1.0)


BAD_SETTINGS = {
    "hidden_layer_sizes": [(), (0,), (3.5,)],
    "n_members": [0, 1.5, True], "n_levels": [0], "max_iter": [0], "n_iter_no_change": [0],
    "activation": ["gelu"], "monotone": [True], "level_input": ["probit"], "extrapolation": ["none"], "dtype": ["half"],
    "penalty": [-1.0, "log", float("nan")], "learning_rate_init": [0.0, float("inf")], "batch_size": [0, "all"],
    "average": [1.0, -0.1], "validation_fraction": [0.0, 1.0], "level_law": ["beta", (1.0,), (0.0, 1.0)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in BAD_SETTINGS.items() for v in values])
def test_bad_settings_are_refused(name, value):
    X, y = table(20)
    with pytest.raises(ValueError, match=rf"^QuantileProcessRegressor: `{name}` must be .*; got .*\.$"):
        quick(**{name: value}).fit(X, y)


def test_bad_data_are_refused(fitted):
    X, y = table(20)
    with pytest.raises(ValueError, match="contains NaN"):
        quick().fit(np.where(X > 0.9, np.nan, X), y)
    with pytest.raises(ValueError, match="contains infinity"):
        quick().fit(X, np.where(y > 0, np.inf, y))
    with pytest.raises(ValueError, match="1d array"):
        quick().fit(X, np.stack([y, y], 1))
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        quick().fit(X[:1], y[:1])
    with pytest.raises(ValueError, match="[Ww]eight.* (positive somewhere|non-zero)"):
        quick().fit(X, y, sample_weight=np.zeros(20))
    with pytest.raises(ValueError, match=r"fit: `sample_weight` must be >= 0, and positive somewhere; got -1.0\.$"):
        quick().fit(X, y, sample_weight=-np.ones(20))
    with pytest.raises(ValueError, match="expecting 2 features"):
        fitted.predict(X[:, :1])
    with pytest.raises(NotFittedError):
        quick().predict(X)
    with pytest.raises(NotFittedError):
        quick().conformalize(X, y)


@pytest.mark.parametrize("quantiles", [0.0, 1.0, [0.5, 1.5], [], [[0.5]], float("nan"), "median"])
def test_bad_levels_are_refused(fitted, quantiles):
    X, _ = table(3)
    with pytest.raises(ValueError, match=r"^predict: `quantiles` must be .*in \(0, 1\)"):
        fitted.predict(X, quantiles)


def test_other_bad_arguments_are_refused(fitted):
    X, y = table(9)
    for call, sentence in (
        (lambda: fitted.predict_interval(X, 1.0), r"predict_interval: `coverage` must be in \(0, 1\); got 1.0."),
        (lambda: fitted.predict_interval(X, conformal=True), "`conformal` must be False before"),
        (lambda: fitted.sample(X, 0), "sample: `n_samples` must be an int >= 1; got 0."),
        (lambda: fitted.cdf(X, y[:3]), "cdf: `y` must be finite, of 9 rows"),
        (lambda: fitted.cdf(X, y * np.nan), "cdf: `y` must be finite"),
        (lambda: fitted.quantile_density(X, [2.0]), "quantile_density: `quantiles` must be in"),
        (lambda: fitted.crossing_rate(X, [0.5]), "crossing_rate: `quantiles` must be two levels or more"),
        (lambda: clone(fitted).fit(X, y).conformalize(X, y).predict_interval(X, 0.95, conformal=True),
         "`coverage` must be at most 0.9 with 9 rows"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            call()
