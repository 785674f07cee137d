"""What is asked of a conditional distribution once its quantiles are known: intervals, samples, cdf, scores.

Legend: n rows; m levels; k values of a row.
"""

import abc
from typing import Any

import numpy as np
import numpy.typing as npt

from planish._support import bad, require

_why = "planish.regression.QuantileProcessRegressor"
_utils = require("sklearn.utils", "sklearn", _why)
_validation = require("sklearn.utils.validation", "sklearn", _why)

Array = npt.NDArray[np.float64]
_FINE = np.arange(1, 100) / 100
_MIDDLES = (np.arange(50) + 0.5) / 50  # the midpoint rule over levels
_NOISE = 1e-9  # of the target's scale: falls this small are rounding


def weighted_quantiles(y: Array, weight: Array | None, levels: Array) -> Array:
    """Return the quantiles of a sample: where its cumulated weight first reaches the level."""
    order = np.argsort(y, kind="stable")
    mass = np.cumsum(np.ones(len(y)) if weight is None else weight[order])
    at = np.searchsorted(mass, levels * mass[-1] * (1 - 1e-12)).clip(0, len(y) - 1)
    return np.asarray(y[order][at], np.float64)


def checked_levels(quantiles: Any, where: str) -> Array:  # noqa: ANN401
    """Return levels as a vector, or raise."""
    levels = np.atleast_1d(np.asarray(quantiles, np.float64))
    if levels.ndim != 1 or not len(levels) or not ((levels > 0) & (levels < 1)).all():
        raise bad(where, "quantiles", "in (0, 1), a float or a sequence", quantiles)
    return levels


def pinball(y: Array, curves: Array, levels: Array) -> Array:
    """Return the pinball loss of each row, (n,), averaged over levels."""
    z = y[:, None] - curves
    return np.asarray(np.maximum(levels * z, (levels - 1) * z).mean(1), np.float64)


class ConditionalDistribution(abc.ABC):
    """The part of `QuantileProcessRegressor` that follows from `_curves(X, levels, slopes=...)` alone."""

    y_scale_: float

    @abc.abstractmethod
    def _curves(self, X: Any, levels: Array, *, slopes: bool = False) -> Array:  # noqa: ANN401
        """Return the quantiles of each row, (n, levels), or their slopes."""

    def predict(self, X: Any, quantiles: Any = None, *, rearrange: bool = False) -> Array:  # noqa: ANN401
        """Predict conditional quantiles.

        Args:
            X: Features, (n, d).
            quantiles: Levels in (0, 1): None (default) is the median, a float is one level, a sequence several;
                "mean" is the mean of the conditional distribution.
            rearrange: Whether to sort each row's quantiles, which makes them rise and is never further from the truth;
                default False.

        Returns:
            (n,) for one level or the mean, (n, m) for a sequence.

        Raises:
            ValueError: A level lies outside (0, 1), or `X` is not what was fitted.
        """
        if isinstance(quantiles, str):
            if quantiles != "mean":
                raise bad("predict", "quantiles", "'mean', or in (0, 1)", quantiles)
            nodes, weights = np.polynomial.legendre.leggauss(32)
            return np.asarray(self._curves(X, (nodes + 1) / 2) @ (weights / 2), np.float64)
        levels = checked_levels(0.5 if quantiles is None else quantiles, "predict")
        curves = self._curves(X, levels)
        if rearrange:
            order = np.argsort(levels, kind="stable")
            curves[:, order] = np.sort(curves, 1)
        return curves[:, 0] if quantiles is None or np.ndim(quantiles) == 0 else curves

    def predict_interval(self, X: Any, coverage: float = 0.9, *, conformal: bool = False) -> Array:  # noqa: ANN401
        """Predict the central interval that is to hold the target with a given probability.

        Args:
            X: Features, (n, d).
            coverage: That probability, in (0, 1); default 0.9.
            conformal: Whether to widen (or narrow) intervals by what `conformalize` found, so that they hold at least
                `coverage` of rows exchangeable with those, whatever the fit is worth; default False.

        Returns:
            Lower and upper ends, (n, 2).

        Raises:
            ValueError: `coverage` lies outside (0, 1); or there are no, or too few, rows to conform to.
        """
        if not 0 < coverage < 1:
            raise bad("predict_interval", "coverage", "in (0, 1)", coverage)
        ends = np.array([(1 - coverage) / 2, (1 + coverage) / 2])
        interval = np.sort(self._curves(X, ends), 1)
        if not conformal:
            return interval
        if not hasattr(self, "conformal_X_"):
            raise bad("predict_interval", "conformal", "False before `conformalize(X, y)` was called", conformal)
        low, high = np.sort(self._curves(self.conformal_X_, ends), 1).T
        misses = np.sort(np.maximum(low - self.conformal_y_, self.conformal_y_ - high))
        rank = int(np.ceil((len(misses) + 1) * coverage))
        if rank > len(misses):
            allowed = f"at most {len(misses) / (len(misses) + 1):.4g} with {len(misses)} rows to conform to"
            raise bad("predict_interval", "coverage", allowed, coverage)
        middle = interval.mean(1)  # where a narrowing is larger than the interval, its middle is left
        return np.stack(
            [
                np.minimum(interval[:, 0] - misses[rank - 1], middle),
                np.maximum(interval[:, 1] + misses[rank - 1], middle),
            ],
            1,
        )

    def conformalize(self, X: Any, y: Any) -> "ConditionalDistribution":  # noqa: ANN401
        """Keep rows that the fit has not seen, for `predict_interval(..., conformal=True)`.

        Args:
            X: Features, (n, d).
            y: Targets, (n,).

        Returns:
            The estimator itself.
        """
        _validation.check_is_fitted(self, "network_")
        X, y = _validation.validate_data(self, X, y, dtype=np.float64, y_numeric=True, reset=False)
        self.conformal_X_, self.conformal_y_ = X, np.asarray(y, np.float64)
        return self

    def sample(self, X: Any, n_samples: int = 1, *, random_state: Any = None) -> Array:  # noqa: ANN401
        """Draw targets from the conditional distribution of each row.

        Args:
            X: Features, (n, d).
            n_samples: Draws a row, >= 1; default 1.
            random_state: Seed, or generator of numpy's legacy kind, of the levels drawn.

        Returns:
            (n, n_samples).

        Raises:
            ValueError: `n_samples` is below 1.
        """
        if n_samples < 1:
            raise bad("sample", "n_samples", "an int >= 1", n_samples)
        uniform = _utils.check_random_state(random_state).uniform(size=(_validation._num_samples(X), n_samples))
        return self._curves(X, uniform.clip(1e-6, 1 - 1e-6))

    def cdf(self, X: Any, y: Any) -> Array:  # noqa: ANN401
        """Return the probability that the target is at most y, by bisection of the quantiles.

        Args:
            X: Features, (n, d).
            y: One value a row, (n,), or k of them, (n, k).

        Returns:
            Probabilities of the shape of `y`, in [0, 1].

        Raises:
            ValueError: `y` has another number of rows than `X`, or is not finite.
        """
        values = np.asarray(y, np.float64)
        n = _validation._num_samples(X)
        if values.ndim not in (1, 2) or len(values) != n or not np.isfinite(values).all():
            raise bad("cdf", "y", f"finite, of {n} rows and one or two axes", values.shape)
        columns = values.reshape(n, -1)
        low, high = np.zeros(columns.shape), np.ones(columns.shape)
        for _ in range(25):
            middle = (low + high) / 2
            above = self._curves(X, middle) > columns
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return ((low + high) / 2).reshape(values.shape)

    def quantile_density(self, X: Any, quantiles: Any = _MIDDLES) -> Array:  # noqa: ANN401
        """Return the derivatives of quantiles by their level: one over the density of the target there.

        Args:
            X: Features, (n, d).
            quantiles: Levels in (0, 1), (m,); default 50 midpoints.

        Returns:
            (n, m).

        Raises:
            ValueError: A level lies outside (0, 1).
        """
        return self._curves(X, checked_levels(quantiles, "quantile_density"), slopes=True)

    def crossing_rate(self, X: Any, quantiles: Any = _FINE) -> float:  # noqa: ANN401
        """Return how often a higher level has a lower quantile.

        Args:
            X: Features, (n, d).
            quantiles: Levels in (0, 1), two or more; default 0.01, 0.02, ... 0.99.

        Returns:
            The part of all pairs of rows and neighbouring levels, in [0, 1].

        Raises:
            ValueError: A level lies outside (0, 1), or there is only one.
        """
        levels = np.sort(checked_levels(quantiles, "crossing_rate"))
        if len(levels) < 2:
            raise bad("crossing_rate", "quantiles", "two levels or more", quantiles)
        return float((np.diff(self._curves(X, levels), axis=1) < -_NOISE * self.y_scale_).mean())

    def crps(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: ANN401
        """Return the continuous ranked probability score: twice the pinball loss, integrated over levels.

        Args:
            X: Features, (n, d).
            y: Targets, (n,).
            sample_weight: Weights, (n,).

        Returns:
            The mean score, >= 0, in units of the target; less is better.
        """
        return 2 * float(np.average(self._pinball(X, y), weights=sample_weight))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: ANN401
        """Return the part of the integrated pinball loss that the features explain: a D2 score.

        Args:
            X: Features, (n, d).
            y: Targets, (n,).
            sample_weight: Weights, (n,).

        Returns:
            1 less the integrated pinball loss over that of constant quantiles, those of `y` itself: 1 is best, 0 is no
            better than constants.
        """
        target = np.asarray(_validation.column_or_1d(y), np.float64)
        ours = np.average(self._pinball(X, target), weights=sample_weight)
        weight = None if sample_weight is None else np.asarray(sample_weight, np.float64)
        constant = weighted_quantiles(target, weight, _MIDDLES)
        theirs = np.average(pinball(target, np.tile(constant, (len(target), 1)), _MIDDLES), weights=weight)
        if theirs == 0:
            return 1.0 if ours == 0 else 0.0
        return float(1 - ours / theirs)

    def _pinball(self, X: Any, y: Any) -> Array:  # noqa: ANN401
        target = np.asarray(_validation.column_or_1d(y), np.float64)
        curves = self._curves(X, _MIDDLES)
        _validation.check_consistent_length(curves, target)
        return pinball(target, curves, _MIDDLES)
