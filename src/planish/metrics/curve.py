"""What came true, against what was predicted, as a smooth curve."""

from typing import Literal, NamedTuple

import numpy as np

from planish._support import bad
from planish.metrics import reflected
from planish.metrics.reflected import Array
from planish.metrics.samples import (
    Label,
    Multiclass,
    Samples,
    Values,
    check_bandwidth,
    check_grid,
    check_samples,
    one,
)
from planish.metrics.score import of_spectrum


class SmoothCalibrationCurve(NamedTuple):
    """A calibration curve, in scikit-learn's order of its columns.

    Attributes:
        prob_true: Frequency of outcome 1 among predictions near `prob_pred`; NaN where there is no data near.
        prob_pred: Predicted probability: points from 0 to 1, at equal distances.
        density: Density of the predictions; its integral is 1.
        bandwidth: Width of the kernel; the smooth calibration error, where it was not given.

    Example:
        >>> curve = smooth_calibration_curve([0, 1, 1], [0.3, 0.6, 0.9], n_points=8)
        >>> isinstance(curve, SmoothCalibrationCurve), len(curve.density)
        (True, 8)
    """

    prob_true: Array
    prob_pred: Array
    density: Array
    bandwidth: float


def smooth_calibration_curve(
    y_true: Values,
    y_prob: Values,
    *,
    sample_weight: Values | None = None,
    bandwidth: float | Literal["auto"] = "auto",
    pos_label: Label | None = None,
    multiclass: Multiclass = "top_label",
    center: bool = True,
    n_points: int = 257,
    n_grid: int = reflected.GRID,
) -> SmoothCalibrationCurve:
    """Smooth the outcomes along the predictions.

    Args:
        y_true: See `smooth_ece`.
        y_prob: See `smooth_ece`.
        sample_weight: See `smooth_ece`.
        bandwidth: Width of the kernel, in (0, 1]; default "auto", that of `smooth_ece`.
        pos_label: See `smooth_ece`.
        multiclass: See `smooth_ece`; a curve shows one problem, so only "top_label" will do.
        center: Smooth the residuals, so that a calibrated predictor gives the diagonal up to the borders; False
            smooths the outcomes themselves, as the paper does.
        n_points: Points of the curve, at least 2; default 257.
        n_grid: See `smooth_ece`.

    Returns:
        The curve.

    Raises:
        ValueError: See `smooth_ece`; or `n_points` is below 2.

    Example:
        >>> curve = smooth_calibration_curve([0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8], n_points=5)
        >>> curve.prob_pred.tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
        >>> curve.prob_true.round(3).tolist()
        [0.0, 0.323, 0.5, 0.677, 1.0]
    """
    where = "smooth_calibration_curve"
    width, cells = check_bandwidth(where, bandwidth), check_grid(where, n_grid)
    if n_points < 2:
        raise bad(where, "n_points", "an int >= 2", n_points)
    problems = check_samples(where, y_true, y_prob, sample_weight, pos_label=pos_label, multiclass=multiclass)
    samples = one(problems, where)
    return curve_of(samples, width, center=center, points=np.linspace(0, 1, n_points), cells=cells)


def curve_of(
    samples: Samples, width: float | None, *, center: bool, points: Array, cells: int
) -> SmoothCalibrationCurve:
    """Return the curve of checked samples at the given points."""
    c = spectra(samples, cells)
    _, s = of_spectrum(c[0], width)
    residual, density = at(c, s, points)
    known = density * len(samples.f) > 1e-3  # less than a thousandth of a sample: nothing is known here
    if not center:  # put on the nodes y = f - (f - y)
        f = samples.f.double()
        c = spectra(Samples(f - samples.y.double(), f, samples.w), cells)
        hits, _ = at(c, s, points)
        moved = hits
    else:
        moved = points * density - residual
    true = np.divide(moved, density, out=np.full_like(points, np.nan), where=known)
    return SmoothCalibrationCurve(true.clip(0, 1), points, density, s)


def spectra(samples: Samples, cells: int) -> Array:
    """Return the cosine coefficients of residuals and of mass, for weights that sum to 1."""
    nodes = reflected.host(reflected.deposit(samples.f, samples.y, samples.w, cells=cells))
    return reflected.coefficients(nodes) / samples.total


def at(c: Array, bandwidth: float, points: Array) -> Array:
    """Return smoothed functions at points: coefficients along the last axis become values; a mass is never negative."""
    waves = reflected.waves(points, max(bandwidth, 0.5 / reflected.GRID), c.shape[-1])
    out: Array = c[..., : len(waves)] @ waves
    out[..., -1, :] = out[..., -1, :].clip(0)
    return out
