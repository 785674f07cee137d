"""Any continuous piecewise linear function, smoothed: ReLU6, hard sigmoid, absolute value, hinge.

f = f(k_0) + c_0 (x - k_0) + sum_i (c_{i+1} - c_i) (x - k_i)_+
f * phi_sigma: the same, with every (x - k_i)_+ smoothed
"""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.nn.leaky import sau
from planish.nn.profiles import Kernel


def smooth_piecewise(
    x: Float[Tensor, "*shape"],
    knots: Sequence[float],
    slopes: Sequence[float],
    *,
    first_value: float = 0.0,
    sigma: float | Tensor = 1.0,
    kernel: Kernel = "gaussian",
) -> Float[Tensor, "*shape"]:
    """Return a continuous piecewise linear function smoothed by a kernel, elementwise.

    Args:
        x: Any floating-point tensor.
        knots: Where the slope changes, increasing.
        slopes: The slope before the first knot, between each two, and behind the last: one more than knots.
        first_value: The function at the first knot. Default 0.
        sigma: Width of the kernel, >= 0, in units of x. Default 1.
        kernel: As for `sau`.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: `x` is not of a floating-point dtype.
        ValueError: Knots do not increase, or there are not one more slopes than knots.

    Example:
        >>> import torch
        >>> relu6 = smooth_piecewise(torch.tensor([-1.0, 3.0, 9.0]), [0.0, 6.0], [0.0, 1.0, 0.0], sigma=0.0)
        >>> relu6
        tensor([0., 3., 6.])
    """
    where = "smooth_piecewise"
    if not knots or any(a >= b for a, b in pairwise(knots)):
        raise bad(where, "knots", "at least one number, increasing", list(knots))
    if len(slopes) != len(knots) + 1:
        raise bad(where, "slopes", f"one more than the {len(knots)} knots", list(slopes))
    out = first_value + slopes[0] * (x - knots[0])
    for knot, (before, behind) in zip(knots, pairwise(slopes), strict=True):
        out = out + (behind - before) * sau(x - knot, 0.0, sigma, kernel=kernel)
    return out
