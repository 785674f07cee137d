r"""Rational-quadratic splines on an interval and a circle: the baseline, once differentiable at its knots.

Between knots (x_k, y_k) and (x_k+1, y_k+1), with slopes d_k and d_k+1 there, s the mean slope and t in [0, 1],

    f(x)  = y_k + (y_k+1 - y_k) (s t^2 + d_k t (1 - t)) / q,      q = s + (d_k + d_k+1 - 2 s) t (1 - t)
    f'(x) = s^2 (d_k+1 t^2 + 2 s t (1 - t) + d_k (1 - t)^2) / q^2

Values and slopes agree at knots, curvatures do not: log f' has corners there, and its derivative, the force, jumps.

Reference:
    Durkan et al., Neural Spline Flows, 2019. https://arxiv.org/abs/1906.04032
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, softplus

from planish._support import bad
from planish.flows.transforms import Univariate

_LEAST = 1e-3  # of widths, heights and slopes


class _Spline(Univariate):
    """What the two share; K bins, K + 1 slopes."""

    def __init__(
        self,
        widths: Float[Tensor, "*b k"],
        heights: Float[Tensor, "*b k"],
        slopes: Float[Tensor, "*b m"],
        *,
        low: int | float = 0.0,
        high: int | float = 1.0,
    ) -> None:
        super().__init__(low, high)
        n = widths.shape[-1]
        if slopes.shape[-1] != n + (not self.periodic):
            raise bad(type(self).__name__, "slopes", f"{n + (not self.periodic)} on the last axis", slopes.shape[-1])
        self.x, self.y = (
            pad((_LEAST + (1 - n * _LEAST) * raw.softmax(-1)).cumsum(-1)[..., :-1], (1, 0)) for raw in (widths, heights)
        )
        self.x, self.y = (torch.cat([knots, torch.ones_like(knots[..., :1])], -1) for knots in (self.x, self.y))
        rising = _LEAST + softplus(slopes + math.log(math.expm1(1 - _LEAST)))
        self.d = torch.cat([rising, rising[..., :1]], -1) if self.periodic else rising

    def _bin(self, at: Tensor, knots: Tensor) -> list[Tensor]:
        """Return x, y and slope at both ends of the bins that hold given points."""
        k = (at.detach()[..., None] >= knots[..., 1:-1]).sum(-1, keepdim=True)
        shape = k.shape[:-1]
        ends = []
        for values in (self.x, self.y, self.d):
            values = values.expand(*shape, values.shape[-1])  # noqa: PLW2901
            ends += [values.gather(-1, k)[..., 0], values.gather(-1, k + 1)[..., 0]]
        return ends

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(u) and f'(u) in units of the domain."""
        turns = torch.floor(u.detach()) if self.periodic else torch.zeros_like(u)
        u = u - turns
        x0, x1, y0, y1, d0, d1 = self._bin(u, self.x)
        s = (y1 - y0) / (x1 - x0)
        t = (u - x0) / (x1 - x0)
        both = t * (1 - t)
        q = s + (d0 + d1 - 2 * s) * both
        value = y0 + (y1 - y0) * (s * t * t + d0 * both) / q
        slope = s * s * (d1 * t * t + 2 * s * both + d0 * (1 - t) ** 2) / (q * q)
        return value + turns, slope

    def solve(self, v: Tensor) -> Tensor:
        """Return u with f(u) = v, the root of a quadratic equation."""
        x0, x1, y0, y1, d0, d1 = self._bin(v, self.y)
        s, rise = (y1 - y0) / (x1 - x0), v - y0
        bend = rise * (d0 + d1 - 2 * s)
        a, b, c = (y1 - y0) * (s - d0) + bend, (y1 - y0) * d0 - bend, -s * rise
        root = (b * b - 4 * a * c).clamp_min(0).sqrt()
        return x0 + (x1 - x0) * 2 * c / (-b - root)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bins={self.x.shape[-1] - 1}, low={self.low}, high={self.high})"


class SplineIntervalTransform(_Spline):
    """Map an interval onto itself by a rational-quadratic spline, once differentiable; with an exact inverse.

    Args:
        widths: Raw widths of K bins, on the last axis.
        heights: Raw heights.
        slopes: Raw slopes at K + 1 knots; zeros give 1.
        low: Lower end of the domain, default 0.
        high: Upper end, default 1.

    Raises:
        ValueError: An argument is out of range or has another length.

    Example:
        >>> transform = SplineIntervalTransform(torch.zeros(4), torch.zeros(4), torch.zeros(5))
        >>> x = torch.tensor([0.0, 0.3, 1.0])
        >>> torch.allclose(transform(x), x)
        True
    """


class SplineCircularTransform(_Spline):
    """Map a circle onto itself by a rational-quadratic spline, once differentiable; with an exact inverse.

    Args:
        widths: Raw widths of K bins, on the last axis.
        heights: Raw heights.
        slopes: Raw slopes at K knots, of which the first is the last too; zeros give 1.
        low: Lower end of the domain, default 0.
        high: Upper end, default 1.

    Raises:
        ValueError: An argument is out of range or has another length.

    Example:
        >>> transform = SplineCircularTransform(torch.zeros(4), torch.zeros(4), torch.zeros(4))
        >>> x = torch.tensor([0.0, 0.3, 1.3])
        >>> torch.allclose(transform(x), x)
        True
    """

    periodic = True
