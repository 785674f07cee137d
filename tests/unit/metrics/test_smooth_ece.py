import itertools
import math

import numpy as np
import pytest
import torch

from planish._support import PlanishWarning
from planish.metrics import reflected, reliability_curve, smooth_ece
from planish.metrics.smooth_ece import check_samples, fixed_point


def quadrature(y, f, s, points=2001):
    """smECE_s by its definition: images of the Gaussian, trapezoids."""
    t = np.linspace(0, 1, points)[:, None]
    kernel = sum(
        np.exp(-(((t - sign * f - 2 * m) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
        for m in range(-4, 5)
        for sign in (1, -1)
    )
    return np.trapezoid(np.abs((kernel * (f - y)).mean(1)), t[:, 0])


def draw(n=400, seed=1):
    random = np.random.default_rng(seed)
    f = random.random(n)
    return (random.random(n) < f**1.3).astype(float), f


@pytest.mark.parametrize("s", [0.02, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("n", [5, 400])
def test_equals_the_definition(s, n):
    y, f = draw(n)
    assert smooth_ece(y, f, bandwidth=s) == pytest.approx(quadrature(y, f, s), abs=2e-5)


def test_is_the_fixed_point():
    y, f = draw()
    s = smooth_ece(y, f)
    assert smooth_ece(y, f, bandwidth=s) == pytest.approx(s, abs=1e-8)


def test_falls_with_the_bandwidth():
    y, f = draw()
    errors = [smooth_ece(y, f, bandwidth=s) for s in np.geomspace(1e-3, 1, 30)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(errors))


def test_population_with_residuals_of_one_sign():
    f = (np.arange(200_000) + 0.5) / 200_000
    assert smooth_ece(f**1.3, f) == pytest.approx(1 / 2 - 1 / 2.3, abs=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.95])
def test_constant_predictor(rate):
    y = np.arange(100) < round(100 * rate)
    assert smooth_ece(y, np.full(100, 0.2)) == pytest.approx(abs(rate - 0.2), abs=1e-8)


def test_ends_of_the_scale():
    with pytest.warns(PlanishWarning, match="swapped"):
        s = smooth_ece([0.5, 0.5], [0, 1])
    assert s == pytest.approx(quadrature(np.array([0.5, 0.5]), np.array([0.0, 1.0]), s), abs=1e-6)
    assert smooth_ece([1, 1], [0, 0]) == 1
    assert smooth_ece([0, 1], [0, 1]) == 0
    assert smooth_ece([1], [0.25]) == pytest.approx(0.75)


def test_calibrated_limit_goes_to_zero_at_the_known_rate():
    random = np.random.default_rng(3)
    for n in (1_000, 30_000):
        means = []
        for _ in range(20):
            f = random.random(n)
            means.append(smooth_ece(random.random(n) < f, f))
        assert np.mean(means) == pytest.approx(0.303 * n ** (-1 / 3), rel=0.25)


def test_invariances():
    y, f = draw(300)
    whole = smooth_ece(y, f)
    order = np.random.default_rng(0).permutation(300)
    assert smooth_ece(y[order], f[order]) == pytest.approx(whole, abs=1e-9)
    assert smooth_ece(np.tile(y, 3), np.tile(f, 3)) == pytest.approx(whole, abs=1e-9)
    assert smooth_ece(1 - y, 1 - f) == pytest.approx(whole, abs=1e-9)
    times = np.random.default_rng(0).integers(0, 4, 300)
    assert smooth_ece(y, f, sample_weight=times) == pytest.approx(
        smooth_ece(y.repeat(times), f.repeat(times)), abs=1e-9
    )


def test_lipschitz_in_the_predictions():
    y = np.repeat([1.0, 0.0], 500)
    for gap in (1e-3, 1e-5):  # a binned error jumps from 0 to 1/2 here
        below = smooth_ece(y, np.repeat([0.5 - gap, 0.5 + gap], 500))
        above = smooth_ece(y, np.repeat([0.5 + gap, 0.5 - gap], 500))
        assert abs(below - above) <= 2 * gap * (1 + 0.8 / max(below, above))


def test_fine_grids_are_used_where_the_error_is_small():
    n = 200_000
    random = np.random.default_rng(5)
    f = random.beta(0.3, 0.05, n)
    y = random.random(n) < f
    coarse = smooth_ece(y, f)
    checked = check_samples("test", y, f, None)
    fine = reflected.GRID
    try:
        reflected.GRID = 1 << 16
        assert fixed_point(*checked) == pytest.approx(coarse, rel=5e-4)
    finally:
        reflected.GRID = fine


def test_transform_and_back():
    grid = torch.rand(64, dtype=torch.float64)
    assert torch.allclose(reflected.smooth(reflected.cosines(grid), 0.0), grid, atol=1e-14)
    twice = reflected.smooth(reflected.cosines(reflected.smooth(reflected.cosines(grid), 0.03)), 0.04)
    assert torch.allclose(twice, reflected.smooth(reflected.cosines(grid), 0.05), atol=1e-14)


def test_top_label_of_several_classes():
    prob = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    assert smooth_ece([0, 2, 2], prob) == pytest.approx(smooth_ece([1, 0, 1], [0.7, 0.6, 0.6]), abs=1e-6)


def test_curve_of_a_calibrated_predictor_is_the_diagonal():
    f = (np.arange(20_000) + 0.5) / 20_000
    curve = reliability_curve(f, f, bandwidth=0.05)
    assert torch.allclose(curve.prob_true, curve.prob_pred, atol=1e-9)
    assert float(curve.density.mean()) == pytest.approx(1)
    plain = reliability_curve(f, f, bandwidth=0.05, center=False)
    assert float((plain.prob_true - plain.prob_pred)[128].abs()) < 1e-6
    assert float(plain.prob_true[0]) > 0.02  # the outcomes themselves bend at the border


def test_curve_hides_where_nothing_is_known():
    curve = reliability_curve([0, 1] * 50, [0.2] * 50 + [0.25] * 50, bandwidth=0.01)
    assert torch.isnan(curve.prob_true[200:]).all()
    assert not torch.isnan(curve.prob_true[52])


def test_plot_draws_curve_and_band():
    pytest.importorskip("matplotlib")
    from planish.metrics import plot_reliability

    y, f = draw()
    ax = plot_reliability(y, f, name="net", n_bootstrap=20)
    assert len(ax.collections) == 2
    assert ax.get_legend().get_texts()[0].get_text() == f"net: smECE {smooth_ece(y, f):.4f}"
    band = ax.collections[1].get_paths()[0].vertices[:, 1]
    assert 0 <= band.min() < band.max() <= 1


@pytest.mark.parametrize(
    ("y", "f", "options", "sentence"),
    [
        ([0, 1], [0.5], {}, "`y_true` must be a vector as long as `y_prob`; got 'shapes"),
        ([], [], {}, "`y_prob` must be at least one probability"),
        ([0, 1], [0.5, 1.5], {}, "`y_prob` must be in [0, 1]; got '1.5 at index 1'"),
        ([0, 1], [math.nan, 0.5], {}, "`y_prob` must be in [0, 1]; got 'nan at index 0'"),
        ([0, 2], [0.5, 0.5], {}, "`y_true` must be in [0, 1]; got '2 at index 1'"),
        ([0, 1], [0.5, 0.5], {"bandwidth": 0.0}, "`bandwidth` must be None or a float in (0, 1]; got 0.0"),
        ([0, 1], [0.5, 0.5], {"sample_weight": [0, 0]}, "`sample_weight` must be"),
        ([0, 1], [0.5, 0.5], {"sample_weight": [1, -1]}, "`sample_weight` must be"),
        ([0, 1], [[0.5, 0.6], [0.5, 0.5]], {}, "`y_prob` must be rows that sum to 1; got '1.1 in row 0'"),
        ([0], [[0.5, 0.5], [0.5, 0.5]], {}, "`y_true` must be one class number a row"),
    ],
)
def test_bad_input(y, f, options, sentence):
    with pytest.raises(ValueError) as caught:
        smooth_ece(y, f, **options)
    assert str(caught.value).startswith("smooth_ece: ") and sentence in str(caught.value)


def test_bad_input_of_the_curve():
    with pytest.raises(ValueError, match="`n_points` must be a power of two"):
        reliability_curve([0, 1], [0.5, 0.5], n_points=100)


def test_bad_input_of_the_plot():
    pytest.importorskip("matplotlib")
    from planish.metrics import plot_reliability

    with pytest.raises(ValueError, match="`n_bootstrap` must be an int >= 0; got -1"):
        plot_reliability([0, 1], [0.5, 0.5], n_bootstrap=-1)
    with pytest.raises(ValueError, match="`confidence` must be"):
        plot_reliability([0, 1], [0.5, 0.5], confidence=1.0)
