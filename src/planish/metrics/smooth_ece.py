r"""Smooth expected calibration error: one number, no bins.

The residuals f - y of the predictions are smoothed along the predictions by a Gaussian reflected at 0 and 1; what is
left of their absolute mass is the error. Too narrow a kernel sees noise, too wide a one sees nothing; the bandwidth at
which the error equals the bandwidth is taken. It is unique, since the error falls with the bandwidth.

    smECE_s = integral over [0, 1] of | sum_i w_i (f_i - y_i) K_s(t, f_i) | dt
    smECE   = smECE_s  at the s with  smECE_s = s

=======  =====================  ==========================================
paper    here                   shape, range
=======  =====================  ==========================================
f        ``y_prob``             (n,), [0, 1]
y        ``y_true``             (n,), 0 or 1; fractions count as soft labels
w        ``sample_weight``      (n,), >= 0
s        ``bandwidth``          (0, 1]; None finds the fixed point
=======  =====================  ==========================================

Differs from the paper: the kernel is applied in the cosine basis, where it is exact at every bandwidth.
Limits: n samples of a perfectly calibrated predictor still show about 0.3 n^(-1/3); compare on equal n. The top-label
form for several classes hides errors of the other classes. At a fixed bandwidth the number is not a consistent
measure of calibration.

Reference:
    Blasiok and Nakkiran, Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing, ICLR 2024.
    https://arxiv.org/abs/2309.12236
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import PlanishWarning, bad
from planish.metrics import reflected

Values = Tensor | npt.NDArray[Any] | Sequence[Any]


def smooth_ece(
    y_true: Values, y_prob: Values, *, sample_weight: Values | None = None, bandwidth: float | None = None
) -> float:
    """Measure how far predicted probabilities are from the frequencies of what they predict.

    Args:
        y_true: Outcomes, 0 or 1 (or soft labels between); class numbers where `y_prob` has a column a class.
        y_prob: Predicted probabilities of outcome 1, in [0, 1]; or (n, classes) with rows that sum to 1, of which the
            most probable class is scored (top-label confidence).
        sample_weight: Weights >= 0, not all zero; default equal ones.
        bandwidth: Width of the kernel, in (0, 1]; default the fixed point of the paper.

    Returns:
        The error in [0, 1].

    Raises:
        ValueError: Lengths differ, there is no sample, or a value is out of its range (the sentence gives its index).

    Example:
        >>> round(smooth_ece([0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]), 6)
        0.25
    """
    check_bandwidth("smooth_ece", bandwidth)
    y, f, w = check_samples("smooth_ece", y_true, y_prob, sample_weight)
    if bandwidth is None:
        return fixed_point(y, f, w)
    return _error(_residual(y, f, w, reflected.GRID), bandwidth)


def fixed_point(y: Float[Tensor, " n"], f: Float[Tensor, " n"], w: Float[Tensor, " n"]) -> float:
    """Return the bandwidth that equals its own error, on a grid of at least 16 cells a bandwidth."""
    cells = reflected.GRID
    while True:
        residual = _residual(y, f, w, cells)
        low, high = 0.0, 1.0
        if _error(residual, high) >= high:
            return 1.0
        if _error(residual, low) <= _EXACT:
            return 0.0
        while high - low > _EXACT:
            middle = (low + high) / 2
            low, high = (middle, high) if _error(residual, middle) >= middle else (low, middle)
        if cells * high >= 16 or cells >= reflected.FINEST:
            return high
        cells *= 2


_EXACT = 1e-10


def _residual(y: Tensor, f: Tensor, w: Tensor, cells: int) -> Tensor:
    return reflected.cosines(reflected.deposit(f, w * (f - y), cells))


def _error(residual: Tensor, bandwidth: float) -> float:
    return min(1.0, float(reflected.smooth(residual, bandwidth).abs().sum()))


def check_bandwidth(where: str, bandwidth: float | None) -> None:
    """Refuse a bandwidth outside (0, 1]."""
    if bandwidth is not None and not 0 < bandwidth <= 1:
        raise bad(where, "bandwidth", "None or a float in (0, 1]", bandwidth)


def check_samples(
    where: str, y_true: Values, y_prob: Values, sample_weight: Values | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return outcomes, probabilities and weights (summing to 1) in float64, or refuse them."""
    y, f = _vector(y_true), _vector(y_prob)
    if f.ndim == 2:
        y, f = _top_label(where, y, f)
    if f.ndim != 1 or y.shape != f.shape:
        raise bad(where, "y_true", "a vector as long as `y_prob`", f"shapes {tuple(y.shape)} and {tuple(f.shape)}")
    if not len(f):
        raise bad(where, "y_prob", "at least one probability", [])
    _within(where, "y_prob", f)
    _within(where, "y_true", y)
    w = torch.ones_like(f) if sample_weight is None else _vector(sample_weight)
    if w.shape != f.shape or not bool(torch.isfinite(w).all()) or bool((w < 0).any()) or not float(w.sum()) > 0:
        raise bad(where, "sample_weight", "one finite weight >= 0 a sample, not all zero", _short(w))
    if bool(((f == 0) | (f == 1)).all()) and not bool(((y == 0) | (y == 1)).all()):
        warnings.warn(
            f"{where}: `y_prob` holds only 0 and 1, `y_true` does not: swapped?", PlanishWarning, stacklevel=3
        )
    return y, f, w / w.sum()


def _top_label(where: str, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    if y.ndim != 1 or len(y) != len(f) or not f.shape[1]:
        raise bad(
            where, "y_true", "one class number a row of `y_prob`", f"shapes {tuple(y.shape)} and {tuple(f.shape)}"
        )
    off = (f.sum(1) - 1).abs() > 1e-6
    if bool(off.any()):
        raise bad(where, "y_prob", "rows that sum to 1", f"{float(f[off][0].sum()):.6g} in row {int(off.nonzero()[0])}")
    top = f.max(1)
    return (top.indices == y).double(), top.values


def _vector(values: Values) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().double().cpu()
    return torch.from_numpy(np.asarray(values, dtype=np.float64).copy())


def _within(where: str, name: str, values: Tensor) -> None:
    wrong = ~((values >= 0) & (values <= 1))  # NaN is wrong, too
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise bad(where, name, "in [0, 1]", f"{float(values[index]):.6g} at index {index}")


def _short(values: Tensor) -> str:
    return f"shape {tuple(values.shape)}, sum {float(values.sum()):.6g}"
