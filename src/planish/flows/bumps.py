r"""Monotone maps of class C-infinity on [0, 1] and on the circle: mixtures of steps whose slopes are smooth bumps.

A step rises from 0 to 1 on [0, 1], with all derivatives 0 at both ends (in the paper a quotient of ramps exp(-alpha
x^-beta); a sigmoid here, which never divides tiny numbers):

    sigma(x)  = sigmoid(h(x)),    h(x) = alpha ((1 - x)^-beta - x^-beta)
    sigma'(x) = sigmoid(h) sigmoid(-h) h'(x)

Moved, narrowed, wrapped around the circle or cut off at the interval's ends, given a floor of slope c, and averaged:

    interval  f(x) = sum_k w_k ((1 - c_k) (g_k(x) - g_k(0)) / (g_k(1) - g_k(0)) + c_k x),
              g_k(x) = sigma(a_k (x - b_k) + 1/2)
    circle    f(x) = sum_k w_k ((1 - c_k) (G_k(x) - G_k(0)) + c_k x),  G_k(x) = n + sigma(a_k (x - l_k - n)),
              l_k = b_k - 1 / (2 a_k),  n = floor(x - l_k)

Both have f(0) = 0, f(1) = 1 and f' >= min c; on the circle f(x + 1) = f(x) + 1 and every derivative agrees at 0 and 1.

Legend: K bumps, on the last axis of every parameter; a inverse width; b centre; c floor; w weight.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from planish._support import bad

_FLAT = 100.0  # where alpha x^-beta exceeds it, sigma is below 1e-28, and its derivatives are 0 for any arithmetic


def unimodal_alpha(beta: int | float) -> float:
    """Return the least alpha for which the slope of `smooth_step` has a single maximum.

    There the second derivative of log sigma' vanishes at 1/2: (h'(1/2))^2 / 2 = 4 (beta + 1) (beta + 2).

    Args:
        beta: In [0.5, 2].

    Raises:
        ValueError: `beta` is out of range.

    Example:
        >>> round(unimodal_alpha(1), 6), round(unimodal_alpha(2), 6)
        (0.866025, 0.306186)
    """
    if not 0.5 <= beta <= 2:
        raise bad("unimodal_alpha", "beta", "in [0.5, 2]", beta)
    return math.sqrt(8 * (beta + 1) * (beta + 2)) / (beta * 2 ** (beta + 2))


def _power(t: Tensor, beta: int | float) -> Tensor:
    if beta == 1:
        return t
    return t * t if beta == 2 else t**beta


def _inside(x: Tensor, alpha: Tensor, beta: int | float) -> tuple[Tensor, Tensor]:
    """Return where the step is not flat for any arithmetic, and x with 1/2 elsewhere, so that no power overflows."""
    edge = ((alpha.detach() / _FLAT) ** (1 / beta)).clamp(max=0.25)
    inside = (x > edge) & (x < 1 - edge)
    return inside, torch.where(inside, x, 0.5)


def _value(x: Tensor, alpha: Tensor, beta: int | float) -> Tensor:
    inside, safe = _inside(x, alpha, beta)
    h = alpha * (_power(1 / (1 - safe), beta) - _power(1 / safe, beta))
    return torch.where(inside, h.sigmoid(), (x > 0.5).to(h.dtype))


def _value_and_slope(x: Tensor, alpha: Tensor, beta: int | float) -> tuple[Tensor, Tensor]:
    inside, safe = _inside(x, alpha, beta)
    left, right = 1 / safe, 1 / (1 - safe)
    down, up = _power(left, beta), _power(right, beta)
    h = alpha * (up - down)
    s = h.sigmoid()
    slope = s * (-h).sigmoid() * (alpha * beta) * (up * right + down * left)
    return torch.where(inside, s, (x > 0.5).to(s.dtype)), torch.where(inside, slope, 0.0)


def smooth_step(
    x: Float[Tensor, "*b"], alpha: int | float | Tensor = 2.0, beta: int | float = 1.0
) -> tuple[Float[Tensor, "*c"], Float[Tensor, "*c"]]:
    """Evaluate a step of class C-infinity from 0 (for x <= 0) to 1 (for x >= 1), and its slope.

    Args:
        x: Where.
        alpha: Steepness, > 0; broadcasts. Below `unimodal_alpha(beta)` the slope has two maxima.
        beta: Order of the flat ends, in [0.5, 2].

    Returns:
        Value and slope; differentiable any number of times, in `x` and `alpha`.

    Raises:
        ValueError: `alpha` or `beta` is out of range.

    Example:
        >>> value, slope = smooth_step(torch.tensor([-1.0, 0.5, 2.0]), alpha=1.0)
        >>> value.tolist(), slope.tolist()
        ([0.0, 0.5, 1.0], [0.0, 2.0, 0.0])
    """
    if not 0.5 <= beta <= 2:
        raise bad("smooth_step", "beta", "in [0.5, 2]", beta)
    steep = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    if not bool((steep > 0).all()):
        raise bad("smooth_step", "alpha", "above 0", alpha)
    return _value_and_slope(x, steep, beta)


@dataclass(frozen=True)
class Bumps:
    """The parameters of a mixture, K on the last axis of each, in units of a domain of length 1.

    Attributes:
        weight: w, >= 0, with sum 1 over the last axis.
        center: b, in [0, 1].
        scale: a, inverse width, > 0; at least 1 on a circle.
        alpha: Steepness, > 0.
        floor: c, least slope, in (0, 1].
        beta: Order of the flat ends, in [0.5, 2].

    Example:
        >>> one = torch.ones(1)
        >>> bumps = Bumps(one, one / 2, 2 * one, one, one / 10)
        >>> bumps.circle(torch.tensor([0.0, 0.5, 1.0]))[0].tolist()
        [0.0, 0.5, 1.0]
    """

    weight: Tensor
    center: Tensor
    scale: Tensor
    alpha: Tensor
    floor: Tensor
    beta: int | float = 1.0

    @staticmethod
    def from_raw(
        weights: Tensor, centers: Tensor, scales: Tensor, alphas: Tensor, floors: Tensor, *,
        beta: int | float, floor: int | float, periodic: bool,
    ) -> "Bumps":  # fmt: skip
        """Map unconstrained numbers to parameters; zeros give equal, evenly spread, overlapping bumps."""
        n = weights.shape[-1]
        share = centers.softmax(-1)
        narrowest = 1.0 if periodic else 0.5
        usual = max(n / 3, 1.2) - narrowest  # each bump overlaps about three
        return Bumps(
            weights.softmax(-1),
            share.cumsum(-1) - share / 2,
            narrowest + softplus(scales + math.log(math.expm1(usual))),
            unimodal_alpha(beta) + 10 * (alphas - 2).sigmoid(),
            floor + (1 - floor) * (floors - 2).sigmoid(),
            beta,
        )

    def check(self, where: str, *, periodic: bool) -> "Bumps":
        """Return these, or raise the ValueError of what is out of range."""
        least = 1 if periodic else 0
        rules = (
            ("weight", "non-negative with sum 1", (self.weight >= 0) & ((self.weight.sum(-1, True) - 1).abs() < 1e-4)),
            ("center", "in [0, 1]", (self.center >= 0) & (self.center <= 1)),
            ("scale", "at least 1 on a circle" if periodic else "above 0", (self.scale > 0) & (self.scale >= least)),
            ("alpha", "above 0", self.alpha > 0),
            ("floor", "in (0, 1]", (self.floor > 0) & (self.floor <= 1)),
        )
        for name, allowed, holds in rules:
            if not bool(holds.all()):
                value: Tensor = getattr(self, name)
                raise bad(where, name, allowed, value[~holds.expand(value.shape)][0].item())
        if not 0.5 <= self.beta <= 2:
            raise bad(where, "beta", "in [0.5, 2]", self.beta)
        return self

    def interval(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) and f'(x) on [0, 1]; beyond, both go on monotonically."""
        start = _value(0.5 - self.scale * self.center, self.alpha, self.beta)
        mass = _value(0.5 + self.scale * (1 - self.center), self.alpha, self.beta) - start
        at = self.scale * (x[..., None] - self.center) + 0.5
        step, slope = _value_and_slope(at, self.alpha, self.beta)
        return self._mixture(x, (step - start) / mass, self.scale * slope / mass)

    def circle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) and f'(x) on the line, which goes around the circle: f(x + 1) = f(x) + 1."""
        left = self.center - 0.5 / self.scale
        turns = torch.floor(-left.detach())
        start = turns + _value(self.scale * (-left - turns), self.alpha, self.beta)
        from_left = x[..., None] - left
        turns = torch.floor(from_left.detach())
        step, slope = _value_and_slope(self.scale * (from_left - turns), self.alpha, self.beta)
        return self._mixture(x, turns + step - start, self.scale * slope)

    def _mixture(self, x: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        share, least = self.weight * (1 - self.floor), (self.weight * self.floor).sum(-1)
        return (share * value).sum(-1) + least * x, (share * slope).sum(-1) + least
