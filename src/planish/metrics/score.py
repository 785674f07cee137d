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
s        ``bandwidth``          (0, 1]; "auto" finds the fixed point
=======  =====================  ==========================================

Differs from the paper: the kernel is applied in the cosine basis, where it is exact at every bandwidth; the root is
found to rounding; the number can be differentiated, through its bandwidth too.
Limits: n samples of a perfectly calibrated predictor still show about 0.3 n^(-1/3); `assess_calibration` says how
much. The top-label form for several classes hides errors of the other classes. At a fixed bandwidth the number is not
a consistent measure of calibration.

Reference:
    Blasiok and Nakkiran, Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing, ICLR 2024.
    https://arxiv.org/abs/2309.12236
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from planish.metrics import reflected
from planish.metrics.samples import Label, Multiclass, Samples, Values, check_bandwidth, check_grid, check_samples


@overload
def smooth_ece(
    y_true: Values,
    y_prob: Tensor,
    *,
    sample_weight: Values | None = None,
    bandwidth: float | Literal["auto"] = "auto",
    pos_label: Label | None = None,
    multiclass: Multiclass = "top_label",
    n_grid: int = reflected.GRID,
) -> Float[Tensor, ""]: ...


@overload
def smooth_ece(
    y_true: Values,
    y_prob: npt.NDArray[Any] | Sequence[Any],
    *,
    sample_weight: Values | None = None,
    bandwidth: float | Literal["auto"] = "auto",
    pos_label: Label | None = None,
    multiclass: Multiclass = "top_label",
    n_grid: int = reflected.GRID,
) -> float: ...


def smooth_ece(
    y_true: Values,
    y_prob: Values,
    *,
    sample_weight: Values | None = None,
    bandwidth: float | Literal["auto"] = "auto",
    pos_label: Label | None = None,
    multiclass: Multiclass = "top_label",
    n_grid: int = reflected.GRID,
) -> float | Tensor:
    """Measure how far predicted probabilities are from the frequencies of what they predict.

    Args:
        y_true: Outcomes, 0 or 1 (or soft labels between), or two labels of any kind with `pos_label`; class numbers
            where `y_prob` has a column a class.
        y_prob: Predicted probabilities of outcome 1, in [0, 1]; or (n, classes) with rows that sum to 1.
        sample_weight: Weights >= 0, not all zero; default equal ones.
        bandwidth: Width of the kernel, in (0, 1]; default the fixed point of the paper.
        pos_label: The label that counts as 1; default labels are numbers.
        multiclass: What is scored where there is a column a class: "top_label", the confidence in the most probable
            one (default), or "classwise", the mean over all classes.
        n_grid: Cells of the grid, a power of two in [256, 1048576]; default 8192, good to 1e-6.

    Returns:
        The error in [0, 1]: a float; or, where `y_prob` is a tensor, a tensor on its device with its gradient.

    Raises:
        ValueError: Lengths differ, there is no sample, or a value is out of its range (the sentence gives its index).

    Example:
        >>> round(smooth_ece([0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]), 6)
        0.25
    """
    where = "smooth_ece"
    width, cells = check_bandwidth(where, bandwidth), check_grid(where, n_grid)
    problems = check_samples(where, y_true, y_prob, sample_weight, pos_label=pos_label, multiclass=multiclass)
    found = [_score(samples, width, cells) for samples in problems]
    if isinstance(y_prob, Tensor):
        return torch.stack([torch.as_tensor(e, dtype=torch.float64, device=y_prob.device) for e in found]).mean()
    return sum(map(float, found)) / len(found)


def _score(samples: Samples, width: float | None, cells: int) -> Tensor | float:
    nodes = reflected.deposit(samples.f, samples.y, samples.w, cells=cells, mass=False)[0]
    c = reflected.coefficients(reflected.host(nodes)) / samples.total
    value, s = of_spectrum(c, width)
    if not nodes.requires_grad or value == 0:
        return value
    weighted = samples.w is not None and samples.w.requires_grad
    felt = reflected.absolute(nodes, s) / (samples.w.double().sum() if weighted else samples.total)  # type: ignore[union-attr]
    # the fixed point is defined by E(theta, s) = s, hence ds = dE / (1 - E_s)
    return value + (felt - felt.detach()) / (1 - reflected.slope(c, s) if width is None else 1.0)


def of_spectrum(c: reflected.Array, width: float | None) -> tuple[float, float]:
    """Return the error of residuals with cosine coefficients c, and the bandwidth: the same where it is None."""
    s = reflected.fixed_point(c) if width is None else width
    return (s if width is None else min(1.0, reflected.error(c, s))), s
