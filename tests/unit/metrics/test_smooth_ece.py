import math

import numpy as np
import pytest
import torch

from planish._support import PlanishWarning
from planish.metrics import SmoothECE, assess_calibration, smooth_calibration_curve, smooth_ece


def draw(n=400, seed=1, power=1.3):
    random = np.random.default_rng(seed)
    f = random.random(n)
    return (random.random(n) < f**power).astype(float), f


def test_tensors_give_tensors_with_gradients_only_where_wanted():
    y, f = draw()
    plain = smooth_ece(y, torch.tensor(f))
    assert plain.shape == () and not plain.requires_grad and isinstance(smooth_ece(y, f), float)
    assert smooth_ece(y, torch.tensor(f, requires_grad=True)).requires_grad


def test_several_classes():
    prob = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    assert float(smooth_ece([0, 2, 2], prob)) == pytest.approx(smooth_ece([1, 0, 1], [0.7, 0.6, 0.6]), abs=1e-6)
    each = [smooth_ece(np.array([0, 2, 2]) == c, prob[:, c].numpy()) for c in range(3)]
    assert float(smooth_ece([0, 2, 2], prob, multiclass="classwise")) == pytest.approx(np.mean(each), abs=1e-12)


def test_labels_of_any_kind():
    f = [0.1, 0.4, 0.8, 0.7]
    whole = smooth_ece([0, 1, 1, 0], f)
    assert smooth_ece(["ham", "spam", "spam", "ham"], f, pos_label="spam") == whole
    assert smooth_ece([-1, 1, 1, -1], f, pos_label=1) == whole
    assert smooth_ece(torch.tensor([2, 3, 3, 2]), f, pos_label=3) == whole
    assert smooth_ece([True, False, False, True], f, pos_label=False) == whole


def test_swapped_arguments_are_suspected():
    with pytest.warns(
        PlanishWarning, match="every probability is 0 or 1 and `y_true` is not: are the arguments swapped"
    ):
        smooth_ece([0.5, 0.5], [0, 1])


def test_curve_of_a_calibrated_predictor_is_the_diagonal():
    f = (np.arange(20_000) + 0.5) / 20_000
    curve = smooth_calibration_curve(f, f, bandwidth=0.05)
    assert np.allclose(curve.prob_true, curve.prob_pred, atol=1e-9)
    assert np.trapezoid(curve.density, curve.prob_pred) == pytest.approx(1)
    plain = smooth_calibration_curve(f, f, bandwidth=0.05, center=False)
    assert abs(plain.prob_true - plain.prob_pred)[128] < 1e-6
    assert plain.prob_true[0] > 0.02  # the outcomes themselves bend at the border


def test_curve_is_the_kernel_average():
    y, f = draw(50)
    curve = smooth_calibration_curve(y, f, bandwidth=0.1, center=False, n_points=11)
    images = [(2 * m + sign * f) for m in range(-2, 3) for sign in (1, -1)]
    kernel = sum(np.exp(-(((curve.prob_pred[:, None] - image) / 0.1) ** 2) / 2) for image in images)
    assert np.allclose(curve.prob_true, kernel @ y / kernel.sum(1), atol=1e-5)
    assert np.allclose(curve.density, kernel.mean(1) / 0.1 / math.sqrt(2 * math.pi), atol=1e-5)


def test_curve_hides_where_nothing_is_known():
    curve = smooth_calibration_curve([0, 1] * 50, [0.2] * 50 + [0.25] * 50, bandwidth=0.01)
    assert np.isnan(curve.prob_true[200:]).all() and not np.isnan(curve.prob_true[52])


BAD = [
    ([0, 1], [0.5], {}, "`y_true` must be a vector as long as `y_prob`; got 'shapes (2,) and (1,)'"),
    ([], [], {}, "`y_prob` must be at least one probability; got []"),
    ([0, 1], [0.5, 1.5], {}, "`y_prob` must be in [0, 1]; got '1.5 at index 1'"),
    ([0, 1], [-0.1, 0.5], {}, "`y_prob` must be in [0, 1]; got '-0.1 at index 0'"),
    ([0, 1], [math.nan, 0.5], {}, "`y_prob` must be in [0, 1]; got 'nan at index 0'"),
    (
        [0, math.nan],
        [0.5, 0.5],
        {},
        "`y_true` must be in [0, 1] or a label for which `pos_label` is given; got 'nan at",
    ),
    (
        [0, 2],
        [0.5, 0.5],
        {},
        "`y_true` must be in [0, 1] or a label for which `pos_label` is given; got '2 at index 1'",
    ),
    (["a", "b"], [0.5, 0.5], {}, "`y_true` must be numbers, or labels for which `pos_label` is given"),
    (
        ["a", "b"],
        [0.5, 0.5],
        {"pos_label": "c"},
        "`pos_label` must be one of at most two labels in `y_true` (['a', 'b'])",
    ),
    ([0, 1, 2], [0.5, 0.5, 0.5], {"pos_label": 1}, "`pos_label` must be one of at most two labels"),
    ([0, 1], ["a", "b"], {}, "`y_prob` must be numbers"),
    ([0, 1], [[[0.5]], [[0.5]]], {}, "`y_prob` must be a vector, or a matrix with a column a class"),
    ([0, 1], [0.5, 0.5], {"bandwidth": 0.0}, '`bandwidth` must be "auto" or a float in (0, 1]; got 0.0'),
    ([0, 1], [0.5, 0.5], {"bandwidth": "wide"}, "`bandwidth` must be \"auto\" or a float in (0, 1]; got 'wide'"),
    ([0, 1], [0.5, 0.5], {"n_grid": 1000}, "`n_grid` must be a power of two in [256, 1048576]; got 1000"),
    ([0, 1], [0.5, 0.5], {"multiclass": "all"}, '`multiclass` must be "top_label" or "classwise"; got \'all\''),
    ([0, 1], [0.5, 0.5], {"sample_weight": [0, 0]}, "`sample_weight` must be one finite weight >= 0 a sample"),
    ([0, 1], [0.5, 0.5], {"sample_weight": [1, -1]}, "`sample_weight` must be one finite weight >= 0 a sample"),
    ([0, 1], [0.5, 0.5], {"sample_weight": [1]}, "`sample_weight` must be one finite weight >= 0 a sample"),
    ([0, 1], [[0.5, 0.6], [0.5, 0.5]], {}, "`y_prob` must be rows that sum to 1; got '1.1 in row 0'"),
    ([0, 2], [[0.5, 0.5], [0.5, 0.5]], {}, "`y_true` must be class numbers in [0, 1]; got '2 at index 1'"),
    ([0], [[0.5, 0.5], [0.5, 0.5]], {}, "`y_true` must be one class number a row"),
    (
        [0, 1],
        [[0.5, 0.5], [0.5, 0.5]],
        {"pos_label": 1},
        "`pos_label` must be None where `y_prob` has a column a class",
    ),
]


@pytest.mark.parametrize(("y", "f", "options", "sentence"), BAD)
def test_bad_input(y, f, options, sentence):
    for call in (smooth_ece, smooth_calibration_curve, assess_calibration):
        with pytest.raises(ValueError) as caught:
            call(y, f, **options)
        assert str(caught.value).startswith(f"{call.__name__}: ") and sentence in str(caught.value)


def test_bad_input_of_the_curve():
    with pytest.raises(ValueError, match="`n_points` must be an int >= 2; got 1"):
        smooth_calibration_curve([0, 1], [0.5, 0.5], n_points=1)
    with pytest.raises(ValueError, match='`multiclass` must be "top_label": a curve shows one problem'):
        smooth_calibration_curve([0, 1], [[0.5, 0.5], [0.5, 0.5]], multiclass="classwise")


def test_metric_in_batches():
    y, f = draw()
    metric = SmoothECE()
    assert float(metric(f[:100], y[:100])) == pytest.approx(smooth_ece(y[:100], f[:100]), abs=1e-12)
    metric(f[100:], y[100:])
    assert float(metric.compute()) == pytest.approx(smooth_ece(y, f), abs=1e-12)
    other = SmoothECE()
    other.load_state_dict(metric.half().state_dict())
    assert float(other.compute()) == float(metric.compute())
    metric.reset()
    assert float(metric.sums.abs().sum() + metric.total) == 0


def test_metric_of_classes():
    prob = torch.rand(60, 3, dtype=torch.float64).softmax(1)
    label = torch.arange(60) % 3
    for multiclass, n in (("top_label", None), ("classwise", 3)):
        metric = SmoothECE(multiclass=multiclass, n_classes=n)
        for rows in torch.arange(60).split(17):
            metric.update(prob[rows], label[rows])
        assert float(metric.compute()) == pytest.approx(
            float(smooth_ece(label, prob, multiclass=multiclass)), abs=1e-12
        )


def test_bad_input_of_the_metric():
    with pytest.raises(ValueError, match="SmoothECE.compute: nothing was added"):
        SmoothECE().compute()
    with pytest.raises(ValueError, match="`n_classes` must be an int >= 2 with multiclass"):
        SmoothECE(multiclass="classwise")
    with pytest.raises(ValueError, match="`others` must be metrics with"):
        SmoothECE().merge_state(SmoothECE(n_grid=256))
    with pytest.raises(ValueError, match="SmoothECE.update: `preds` must be of 3 classes, as before; got 2"):
        SmoothECE(multiclass="classwise", n_classes=3).update([[0.5, 0.5]], [0])
    metric = SmoothECE()
    metric(np.array([0.4]), np.array([1]))
    with pytest.raises(ValueError, match="SmoothECE.update: `y_prob` must be in"):
        metric(np.array([1.4]), np.array([1]))
    assert float(metric.compute()) == pytest.approx(0.6)  # a refused batch leaves no trace
