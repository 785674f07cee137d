"""Recalibrate: replace a probability by the smoothed frequency of what it predicted."""

from typing import Any, Literal

import numpy as np
import torch

from planish._support import bad, require
from planish.metrics import reflected
from planish.metrics.assessment import calibrated
from planish.metrics.curve import at, spectra
from planish.metrics.reflected import Array
from planish.metrics.samples import Label, Samples, Values, check_bandwidth, check_grid, check_samples, one
from planish.metrics.score import of_spectrum

base = require("sklearn.base", "sklearn", "SmoothRecalibrator")
validation = require("sklearn.utils.validation", "sklearn", "SmoothRecalibrator")


_ROUNDS = 10
_DRAWS = 10  # of calibrated outcomes, for the noise


class SmoothRecalibrator(base.TransformerMixin, base.BaseEstimator):  # type: ignore[misc, name-defined]
    """Map predicted probabilities to the smoothed frequency of what came true, as a scikit-learn transformer.

    What is learnt is the correction t - mu(t) of the calibration curve, at the bandwidth of `smooth_ece`; then that of
    what was corrected, at its own, narrower one, until no more is left than noise would leave. A predictor that is
    calibrated already stays as it is, and so do probabilities far from all data. Unlike isotonic regression the map
    has no steps, and unlike Platt's no form; it need not be monotone, so ranks may change a little.
    Learn it on data that the predictor was not trained on.

    Args:
        bandwidth: See `smooth_ece`.
        pos_label: See `smooth_ece`.
        n_grid: See `smooth_ece`.

    Attributes:
        bandwidth_: The bandwidth; the smooth calibration error before recalibration, where it was not given.
        n_rounds_: How often it corrected; 0 where there was nothing beyond noise.
        prob_pred_: Probabilities at which the map is kept.
        prob_true_: What they are mapped to; between them the map is linear.

    Example:
        >>> f = np.linspace(0, 1, 1000)
        >>> y = np.random.default_rng(0).random(1000) < f**2
        >>> after = SmoothRecalibrator().fit(f, y).transform([0.3, 0.7])
        >>> bool(np.abs(after - [0.09, 0.49]).max() < 0.08)
        True
    """

    def __init__(
        self,
        *,
        bandwidth: float | Literal["auto"] = "auto",
        pos_label: Label | None = None,
        n_grid: int = reflected.GRID,
    ) -> None:
        self.bandwidth = bandwidth
        self.pos_label = pos_label
        self.n_grid = n_grid

    def fit(self, X: Values, y: Values, sample_weight: Values | None = None) -> "SmoothRecalibrator":
        """Learn the map.

        Args:
            X: Predicted probabilities of outcome 1, (n,) or (n, 1).
            y: Outcomes.
            sample_weight: Weights; default ones.

        Returns:
            Itself.

        Raises:
            ValueError: See `smooth_ece`; or only one class is there.
        """
        where = "SmoothRecalibrator.fit"
        width, cells = check_bandwidth(where, self.bandwidth), check_grid(where, self.n_grid)
        column = _column(where, X)
        samples = one(check_samples(where, y, column, sample_weight, pos_label=self.pos_label), where)
        if bool((samples.y == samples.y[0]).all()):
            raise bad(where, "y", "outcomes of both classes", f"{len(column)} times the same")
        self.prob_pred_ = np.linspace(0, 1, 4097)
        self.prob_true_ = self.prob_pred_
        generator = torch.Generator().manual_seed(0)
        for round_ in range(_ROUNDS):
            f = torch.from_numpy(np.interp(column, self.prob_pred_, self.prob_true_))
            now = Samples(samples.y, f, samples.w)
            c = spectra(now, cells)
            error, s = of_spectrum(c[0], width)
            if not round_:
                self.bandwidth_ = s
            noise = [of_spectrum(spectra(calibrated(now, generator), cells)[0], width)[0] for _ in range(_DRAWS)]
            if error <= sum(noise) / _DRAWS:
                break
            residual, density = at(c, s, self.prob_pred_)
            # a thousandth of a sample more, of residual 0: far from the data nothing is corrected
            mended = (self.prob_pred_ - residual / (density + 1e-3 / len(column))).clip(0, 1)
            self.prob_true_ = np.interp(self.prob_true_, self.prob_pred_, mended)
        self.n_rounds_ = round_
        self.n_features_in_ = 1
        return self

    def transform(self, X: Values) -> Array:
        """Return recalibrated probabilities.

        Args:
            X: Predicted probabilities, (n,) or (n, 1).

        Returns:
            Probabilities of outcome 1, in the shape of `X`.

        Raises:
            ValueError: A value is outside [0, 1].
        """
        validation.check_is_fitted(self)
        column = _column("SmoothRecalibrator.transform", X)
        check_samples("SmoothRecalibrator.transform", np.zeros(len(column)), column)
        out: Array = np.interp(column, self.prob_pred_, self.prob_true_)
        return out.reshape(np.shape(X))

    def predict(self, X: Values) -> Array:
        """Return what `transform` does, as scikit-learn's calibrators spell it.

        Args:
            X: Predicted probabilities, (n,) or (n, 1).

        Returns:
            Probabilities of outcome 1.
        """
        return self.transform(X)

    def __sklearn_tags__(self) -> Any:  # noqa: ANN401  (scikit-learn's own)
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.target_tags.required = True
        return tags


def _column(where: str, X: Values) -> Array:
    array = X.detach().cpu().numpy() if isinstance(X, torch.Tensor) else np.asarray(X)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise bad(where, "X", "probabilities of outcome 1, a vector or one column", f"shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise bad(where, "X", "numbers", f"dtype {array.dtype}")
    return array.astype(np.float64)
