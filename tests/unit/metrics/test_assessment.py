import math

import numpy as np
import pytest
import torch

from planish.metrics import SmoothCalibrationDisplay, assess_calibration, smooth_ece


def draw(n, seed, power=1.0):
    random = np.random.default_rng(seed)
    f = random.random(n)
    return random.random(n) < f**power, f


def test_the_floor_is_what_calibrated_predictors_show():
    floors = [assess_calibration(*draw(500, 0), n_bootstrap=0, n_null=100).floor]
    seen = [smooth_ece(*draw(500, seed)) for seed in range(1, 61)]
    assert floors[0] == pytest.approx(np.mean(seen), rel=0.1)
    assert floors[0] == pytest.approx(0.303 * 500 ** (-1 / 3), rel=0.2)


def test_p_values_of_calibrated_predictors_are_uniform():
    found = [assess_calibration(*draw(200, seed), n_bootstrap=0, n_null=19).p_value for seed in range(40)]
    assert abs(np.mean(found) - 0.5) < 4 * math.sqrt(1 / 12 / 40)
    assert np.mean(np.array(found) <= 0.25) < 0.25 + 4 * math.sqrt(0.25 * 0.75 / 40)
    assert assess_calibration(*draw(500, 0, 2), n_bootstrap=0, n_null=99).p_value == 0.01


@pytest.mark.claim(
    "smooth_ece", "beyond the floor, sets of 300 and 30,000 samples agree (times nearer than the plain numbers)"
)
def test_sets_of_different_size_can_be_compared(record_claim):
    plain, beyond = [], []
    for n in (300, 30_000):
        found = [assess_calibration(*draw(n, seed), n_bootstrap=0, n_null=20) for seed in range(10)]
        plain.append(np.mean([a.ece for a in found]))
        beyond.append(np.mean([a.excess for a in found]))
    record_claim(abs(plain[0] - plain[1]) / abs(beyond[0] - beyond[1]), 1.5, "times")


def test_intervals_hold_the_truth():
    for power, least in ((1.0, 0.9), (1.3, 0.7)):
        truth = 0.5 - 1 / (power + 1)
        found = [assess_calibration(*draw(400, seed, power), n_bootstrap=40, n_null=10) for seed in range(15)]
        assert np.mean([a.low <= truth + 1e-12 and truth <= a.high for a in found]) >= least


def test_groups_are_resampled_together():
    y, f = draw(50, 0, 2.0)
    y, f, group = np.repeat(y, 20), np.repeat(f, 20), np.repeat(np.arange(50), 20)
    alone, together = (assess_calibration(y, f, groups=g, n_null=5) for g in (None, group))
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert together.ece == alone.ece == pytest.approx(smooth_ece(y, f), abs=1e-12)


def test_the_same_call_gives_the_same_bits():
    y, f = draw(100, 0)
    before = torch.random.get_rng_state()
    first, second = (assess_calibration(y, f, n_bootstrap=10, n_null=10) for _ in range(2))
    assert (first.low, first.floor) == (second.low, second.floor)
    assert (first.band[0] == second.band[0]).all() and torch.equal(before, torch.random.get_rng_state())
    assert "if calibrated" in str(first) and "beyond noise" in str(first)


def test_without_draws():
    found = assess_calibration(*draw(100, 0), n_bootstrap=0, n_null=0)
    assert math.isnan(found.low) and math.isnan(found.floor) and found.band is found.null_band is None
    assert str(found) == f"smECE {found.ece:.4f}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_bootstrap": -1}, "`n_bootstrap` must be an int >= 0; got -1"),
        ({"n_null": -1}, "`n_null` must be an int >= 0; got -1"),
        ({"n_points": 1}, "`n_points` must be an int >= 2; got 1"),
        ({"confidence": 1.0}, r"`confidence` must be a float in \(0, 1\); got 1.0"),
        ({"groups": [1]}, r"`groups` must be one value a sample; got 'shape \(1,\) for 2 samples'"),
    ],
)
def test_bad_input(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        assess_calibration([0, 1], [0.5, 0.5], **options)


def test_display():
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    y, f = draw(300, 0, 1.5)
    first = SmoothCalibrationDisplay.from_predictions(y, f, name="net", n_bootstrap=20, n_null=19, color="tab:red")
    second = SmoothCalibrationDisplay(first.assessment, estimator_name="twin").plot(ax=first.ax_)
    texts = [text.get_text() for text in first.ax_.get_legend().get_texts()]
    assert texts[0] == f"net: smECE {smooth_ece(y, f):.4f}" and texts[1].startswith("a calibrated one: 0.0")
    assert second.ax_ is first.ax_ and second.figure_ is first.figure_ and len(first.ax_.child_axes) == 1
    assert len(first.ax_.lines) == 3 and len(first.ax_.collections) == 6  # one diagonal, two curves with two bands each
    assert first.line_.get_color() == "tab:red" and (first.line_.get_ydata() == first.prob_true).all()
    assert first.ece_ci == (first.assessment.low, first.assessment.high) and dict(matplotlib.rcParams) == before
    first.figure_.canvas.draw()


class Classifier:
    def __init__(self, classes):
        self.classes_ = np.array(classes)

    def predict_proba(self, X):
        return X


def test_display_of_an_estimator():
    pytest.importorskip("matplotlib")
    y, f = draw(100, 0)
    options = {"n_bootstrap": 0, "n_null": 0}
    both = np.stack([1 - f, f], 1)
    words = np.where(y, "yes", "no")
    display = SmoothCalibrationDisplay.from_estimator(Classifier(["no", "yes"]), both, words, **options)
    assert display.ece == smooth_ece(y, f) and display.ax_.get_xlabel() == "Predicted probability of yes"
    assert display.line_.get_label().startswith("Classifier: smECE")
    other = SmoothCalibrationDisplay.from_estimator(Classifier(["no", "yes"]), both, words, pos_label="no", **options)
    assert other.ece == pytest.approx(display.ece, abs=1e-9)
    three = Classifier(["a", "b", "c"])
    prob = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    top = SmoothCalibrationDisplay.from_estimator(three, prob, ["a", "c", "c"], **options)
    assert top.ece == smooth_ece([0, 2, 2], prob)
    with pytest.raises(TypeError, match="`estimator` must be a fitted classifier with predict_proba; got a int"):
        SmoothCalibrationDisplay.from_estimator(3, prob, [0])
    with pytest.raises(ValueError, match="`y` must be classes in"):
        SmoothCalibrationDisplay.from_estimator(three, prob, ["a", "c", "d"])
    with pytest.raises(ValueError, match="`pos_label` must be None where there are more than two classes"):
        SmoothCalibrationDisplay.from_estimator(three, prob, ["a", "c", "c"], pos_label="a")
    with pytest.raises(ValueError, match="`pos_label` must be one of"):
        SmoothCalibrationDisplay.from_estimator(Classifier(["no", "yes"]), both, words, pos_label="maybe")
