"""The fan of quantile curves: what is drawn, and what is refused."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from planish.regression import QuantileFanDisplay


class Known:
    """Predicts the first feature plus the level, and remembers what it was asked."""

    def predict(self, X, quantiles):
        self.asked = np.asarray(X)
        return self.asked[:, :1] + np.asarray(quantiles)


def test_one_feature_varies_and_the_others_stay():
    X = np.random.default_rng(0).random((30, 3))
    known = Known()
    display = QuantileFanDisplay.from_estimator(known, X, X[:, 0], feature=2, n_grid=10, target_name="strength")
    assert np.ptp(known.asked[:, 2]) == pytest.approx(np.ptp(X[:, 2]))
    np.testing.assert_array_equal(known.asked[:, :2], np.tile(np.median(X, 0)[:2], (10, 1)))
    assert display.ax_.get_xlabel() == "feature 2" and display.ax_.get_ylabel() == "strength"
    assert len(display.bands_) == 4 and display.line_ is not None
    assert display.ax_.get_legend_handles_labels()[1] == ["95 %", "90 %", "80 %", "50 %", "median"]


def test_columns_give_their_names_and_axes_are_shared():
    pandas = pytest.importorskip("pandas")
    X = pandas.DataFrame({"age": [1.0, 2.0, 3.0], "load": [4.0, 5.0, 6.0]})
    first = QuantileFanDisplay.from_estimator(Known(), X, quantiles=[0.1, 0.4])
    assert first.ax_.get_xlabel() == "age" and first.line_ is None
    second = QuantileFanDisplay([0, 1], [[0, 1], [1, 2]], [0.25, 0.75]).plot(ax=first.ax_, color="tab:red")
    assert second.figure_ is first.figure_
    assert second.ax_.get_legend_handles_labels()[1] == ["0.1 to 0.4", "50 %"]


@pytest.mark.parametrize("levels", [[0.5, 0.1], [0.0, 0.5], [0.5, 1.0], [], [0.5, 0.5]])
def test_levels_must_rise(levels):
    with pytest.raises(ValueError, match=r"^QuantileFanDisplay: `levels` must be rising within \(0, 1\)"):
        QuantileFanDisplay([0, 1], np.zeros((2, len(levels))), levels)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"`curves` must be of shape \(2, 1\); got \(1, 2\)"):
        QuantileFanDisplay([0, 1], [[0, 1]], [0.5])
    X = np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"^from_estimator: `feature` must be in \[0, 2\); got 2"):
        QuantileFanDisplay.from_estimator(Known(), X, feature=2)
    with pytest.raises(ValueError, match="^from_estimator: `n_grid` must be an int >= 2; got 1"):
        QuantileFanDisplay.from_estimator(Known(), X, n_grid=1)
