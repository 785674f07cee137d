"""The reliability diagram: what came true, against what was predicted, as a smooth curve."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad, require
from planish.metrics import reflected
from planish.metrics.smooth_ece import Values, check_bandwidth, check_samples, fixed_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class ReliabilityCurve(NamedTuple):
    """A reliability curve, in scikit-learn's order of its columns.

    Attributes:
        prob_true: Frequency of outcome 1, smoothed; NaN where there is no data near.
        prob_pred: Predicted probability.
        density: Density of the predictions; its mean over the curve's points is 1.
        bandwidth: Width of the kernel; the smooth calibration error, where it was not given.

    Example:
        >>> curve = reliability_curve([0, 1, 1], [0.3, 0.6, 0.9], n_points=8)
        >>> isinstance(curve, ReliabilityCurve), len(curve.density)
        (True, 8)
    """

    prob_true: Float[Tensor, " points"]
    prob_pred: Float[Tensor, " points"]
    density: Float[Tensor, " points"]
    bandwidth: float


def reliability_curve(
    y_true: Values,
    y_prob: Values,
    *,
    sample_weight: Values | None = None,
    bandwidth: float | None = None,
    center: bool = True,
    n_points: int = 256,
) -> ReliabilityCurve:
    """Smooth the outcomes along the predictions.

    Args:
        y_true: See `smooth_ece`.
        y_prob: See `smooth_ece`.
        sample_weight: See `smooth_ece`.
        bandwidth: Width of the kernel, in (0, 1]; default that of `smooth_ece`.
        center: Smooth the residuals, so that a calibrated predictor gives the diagonal up to the borders; False
            smooths the outcomes themselves, as the paper does.
        n_points: Points of the curve, a power of two in [2, 4096]; default 256.

    Returns:
        The curve.

    Raises:
        ValueError: See `smooth_ece`; or `n_points` is not such a power of two.

    Example:
        >>> curve = reliability_curve([0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8], n_points=4)
        >>> [round(float(p), 3) for p in curve.prob_pred]
        [0.125, 0.375, 0.625, 0.875]
    """
    where = "reliability_curve"
    check_bandwidth(where, bandwidth)
    if n_points not in [2**power for power in range(1, 13)]:
        raise bad(where, "n_points", "a power of two in [2, 4096]", n_points)
    y, f, w = check_samples(where, y_true, y_prob, sample_weight)
    width = fixed_point(y, f, w) if bandwidth is None else bandwidth
    prob_true, density = _fit(y, f, w, width, center=center, n_points=n_points)
    return ReliabilityCurve(prob_true, reflected.midpoints(n_points), density, width)


def _fit(y: Tensor, f: Tensor, w: Tensor, width: float, *, center: bool, n_points: int) -> tuple[Tensor, Tensor]:
    """Return frequency and density at the points: cell averages of the fine grid."""
    cells = reflected.GRID
    both = reflected.deposit(f, torch.stack([w, w * (f - y if center else y)], 1), cells)
    mass, moved = (
        reflected.smooth(reflected.cosines(column.contiguous()), width).reshape(n_points, -1).sum(1)
        for column in both.unbind(1)
    )
    density = mass.clamp_min(0) * n_points
    near = density * len(f) > 1e-3  # less than a thousandth of a sample: nothing is known here
    ratio = torch.where(near, moved / mass, torch.nan)
    frequency = reflected.midpoints(n_points) - ratio if center else ratio
    return frequency.clamp(0, 1), density


def plot_reliability(
    y_true: Values,
    y_prob: Values,
    *,
    sample_weight: Values | None = None,
    name: str | None = None,
    n_bootstrap: int = 100,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the reliability diagram, thick where the data are, with a band of pointwise bootstrap confidence.

    Args:
        y_true: See `smooth_ece`.
        y_prob: See `smooth_ece`.
        sample_weight: See `smooth_ece`.
        name: What the legend calls the predictor.
        n_bootstrap: Resamples for the band, >= 0; 0 draws none. Default 100.
        confidence: Level of the band, in (0, 1). Default 0.95.
        generator: Source of the resamples; default a fixed one.
        ax: Where to draw; default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: See `smooth_ece`; or `n_bootstrap` or `confidence` is out of range.
        MissingExtra: matplotlib is not installed.

    Example:
        >>> ax = plot_reliability([0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8], n_bootstrap=0)
        >>> ax.get_xlabel()
        'predicted probability'
    """
    where = "plot_reliability"
    if n_bootstrap < 0:
        raise bad(where, "n_bootstrap", "an int >= 0", n_bootstrap)
    if not 0 < confidence < 1:
        raise bad(where, "confidence", "a float in (0, 1)", confidence)
    y, f, w = check_samples(where, y_true, y_prob, sample_weight)
    curve = reliability_curve(y, f, sample_weight=w)
    if ax is None:
        ax = require("matplotlib.figure", "plot", where).Figure(figsize=(4.4, 4.4), layout="constrained").add_subplot()
    collection = require("matplotlib.collections", "plot", where).LineCollection
    generator = generator or torch.Generator().manual_seed(0)
    curve = reliability_curve(y, f, sample_weight=w)
    x, true = curve.prob_pred.numpy(), curve.prob_true.numpy()
    weight = (curve.density / curve.density.max()).sqrt().numpy()
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    (line,) = ax.plot(x, true, linewidth=0.8, label=f"{name + ': ' if name else ''}smECE {curve.bandwidth:.4f}")
    segments = [[(x[i], true[i]), (x[i + 1], true[i + 1])] for i in range(len(x) - 1)]
    ax.add_collection(collection(segments, linewidths=0.8 + 4 * weight[1:], colors=line.get_color(), capstyle="round"))
    if n_bootstrap:
        fits = []
        for _ in range(n_bootstrap):
            drawn = torch.multinomial(w, len(f), replacement=True, generator=generator)
            counts = torch.bincount(drawn, minlength=len(f)).double() / len(f)
            fits.append(_fit(y, f, counts, curve.bandwidth, center=True, n_points=len(x))[0])
        tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
        low, high = torch.nanquantile(torch.stack(fits), tails, dim=0).numpy()
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="predicted probability", ylabel="observed frequency")
    ax.legend(loc="upper left", frameon=False)
    return ax
