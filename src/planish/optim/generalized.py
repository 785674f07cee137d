r"""Smoothness that grows with the gradient: constants, the bounds they give, and the steps that follow.

A function is symmetric generalized-smooth of degree alpha when on the segment from w to w'

    ||grad f(w') - grad f(w)|| <= (L0 + L1 max ||grad f(w_t)||^alpha) ||w' - w||

alpha = 0 is ordinary smoothness, alpha = 1 with two derivatives bounds the Hessian by L0 + L1 ||grad f||. Polynomials
of degree k have alpha = (k - 2) / (k - 1), exponentials 1. With g = ||grad f(w)|| and d = ||w' - w|| it follows that

    ||grad f(w') - grad f(w)|| <= d (K0 + K1 g^alpha + K2 d^p),                   p = alpha / (1 - alpha)
    f(w') <= f(w) + <grad f(w), w' - w> + d^2 / 2 (K0 + K1 g^alpha + 2 K2 d^p)

and for alpha = 1 the bracket is (L0 + L1 g) exp(L1 d) in both. The second bound names the step that surely decreases f
most (`step_length`), which is what `NormalizedGD(lr="auto")` takes.

==============  ================================  ================================
paper           here                              range
==============  ================================  ================================
alpha           ``alpha``                         [0, 1]
L0, L1          ``L0``, ``L1``                    >= 0, not both 0
gamma           ``stepsize(eps, beta)``           > 0
epsilon         ``eps``                           (0, 1]
beta            ``beta``                          [alpha, 1]; below it no theory
==============  ================================  ================================

Differs from the paper: its step has a 12 and a + 1 that the descent bound does not need; `rule="paper"` keeps them.
When to use: to know a safe step of a function whose curvature can be bounded or measured. See ``docs/jobs/optim.md``.

Reference:
    Chen et al., Generalized-Smooth Nonconvex Optimization is As Efficient As Smooth Nonconvex Optimization, 2023.
    https://arxiv.org/abs/2303.02854
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad, warn_once


@dataclass(frozen=True)
class GeneralizedSmoothness:
    """Hold the constants of a generalized-smooth function, and compute what they promise.

    Args:
        alpha: Degree, how fast curvature grows with the gradient, in [0, 1]. (k - 2) / (k - 1) for a polynomial of
            degree k, 1 for an exponential, 0 for a function with a Lipschitz gradient.
        L0: Curvature where the gradient is 0, >= 0.
        L1: Growth of the curvature, >= 0; one of the two is above 0.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> quartic = GeneralizedSmoothness(alpha=2 / 3, L0=0.0, L1=12 / 4 ** (2 / 3))  # f(x) = x^4
        >>> x, f = 5.0, 625.0
        >>> length = quartic.step_length(gradient_norm=4 * x**3)
        >>> bool((x - length) ** 4 <= quartic.descent_bound(f, -500 * length, 500.0, length) < f)
        True
    """

    alpha: float
    L0: float
    L1: float

    def __post_init__(self) -> None:
        where = "GeneralizedSmoothness"
        if not 0 <= self.alpha <= 1:
            raise bad(where, "alpha", "a float in [0, 1]", self.alpha)
        for name in ("L0", "L1"):
            value = getattr(self, name)
            if not (0 <= value < math.inf):
                raise bad(where, name, "a finite float >= 0", value)
        if self.L0 == self.L1 == 0:
            raise bad(where, "L1", "above 0 where L0 is 0", self.L1)

    @property
    def _c(self) -> float:
        return float(2 ** (self.alpha**2 / (1 - self.alpha)))

    @property
    def K0(self) -> float:  # noqa: N802  (the paper's name)
        """The part of the bound that does not depend on the gradient; L0 where alpha is 1."""
        if self.alpha == 0:
            return self.L0 + self.L1
        return self.L0 if self.alpha == 1 else self.L0 * (self._c + 1)

    @property
    def K1(self) -> float:  # noqa: N802  (the paper's name)
        """The factor of g^alpha; L1 where alpha is 1."""
        if self.alpha == 0:
            return 0.0
        return self.L1 if self.alpha == 1 else float(self.L1 * self._c * 3**self.alpha)

    @property
    def K2(self) -> float:  # noqa: N802  (the paper's name)
        """The factor of d^p; 0 where alpha is 0 or 1 (there the bracket grows by exp(L1 d) instead)."""
        a = self.alpha
        if a in (0, 1):
            return 0.0
        return float(self.L1 ** (1 / (1 - a)) * self._c * 3**a * (1 - a) ** (a / (1 - a)))

    def _bracket(self, g: float, d: float, twice: float) -> float:
        if self.alpha == 1:
            return (self.L0 + self.L1 * g) * math.exp(min(self.L1 * d, 700.0))
        if self.alpha == 0:
            return self.K0
        return float(self.K0 + self.K1 * g**self.alpha + twice * self.K2 * d ** (self.alpha / (1 - self.alpha)))

    def lipschitz_bound(self, gradient_norm: float, distance: float) -> float:
        """Bound how far the gradient can be, after a move, from what it was.

        Args:
            gradient_norm: g, before the move, >= 0.
            distance: d, the length of the move, >= 0.

        Returns:
            The largest possible norm of the difference.
        """
        return distance * self._bracket(gradient_norm, distance, 1.0)

    def descent_bound(self, value: float, slope: float, gradient_norm: float, distance: float) -> float:
        """Bound the function after a move.

        Args:
            value: f(w).
            slope: <grad f(w), w' - w>.
            gradient_norm: g >= 0.
            distance: d = ||w' - w|| >= 0.

        Returns:
            The largest possible f(w').
        """
        return value + slope + distance**2 / 2 * self._bracket(gradient_norm, distance, 2.0)

    def step_length(self, gradient_norm: float) -> float:
        """Return the length of the step along -gradient whose guaranteed decrease is largest.

        The root s of d/ds [g s - s^2 / 2 (K0 + K1 g^alpha + 2 K2 s^p)] = 0; no target accuracy enters.

        Args:
            gradient_norm: g >= 0, finite.

        Returns:
            s >= 0; 0 where g is 0.

        Raises:
            ValueError: `gradient_norm` is negative or not finite.
        """
        g, a = gradient_norm, self.alpha
        if not 0 <= g < math.inf:
            raise bad("GeneralizedSmoothness.step_length", "gradient_norm", "a finite float >= 0", g)
        if g == 0:
            return 0.0
        if a == 1:
            steep = self.L0 + self.L1 * g

            def falling(s: float) -> float:
                return g - steep * math.exp(min(self.L1 * s, 700.0)) * (s + self.L1 * s * s / 2)
        else:
            p = a / (1 - a)
            steep, bend = self.K0 + self.K1 * g**a, self.K2 * (2 + p)

            def falling(s: float) -> float:
                return float(g - steep * s - bend * s ** (1 + p))

        low, high = 0.0, g / steep  # the concave guarantee falls at the end, where the bend is left out
        while True:  # halving until no float lies between
            middle = (low + high) / 2
            if middle in (low, high):
                return low
            low, high = (middle, high) if falling(middle) > 0 else (low, middle)

    def stepsize(self, eps: float, beta: float | None = None, *, rule: Literal["sharp", "paper"] = "sharp") -> float:
        """Return the constant step of beta-normalized descent that reaches a gradient of norm `eps`.

        Args:
            eps: Target gradient norm, in (0, 1].
            beta: Power of the norm divided by, in [alpha, 1]; default alpha. Below alpha the theory is silent, and a
                warning says so.
            rule: "sharp", the largest step for which the descent bound halves the first-order decrease, or "paper",
                which divides further (by about 12). Default "sharp".

        Returns:
            gamma > 0, for `NormalizedGD(lr=gamma, beta=beta)`.

        Raises:
            ValueError: `eps`, `beta` or `rule` is out of range.
        """
        where = "GeneralizedSmoothness.stepsize"
        beta = self.alpha if beta is None else beta
        if not 0 < eps <= 1:
            raise bad(where, "eps", "a float in (0, 1]", eps)
        if not 0 <= beta <= 1:
            raise bad(where, "beta", "a float in [0, 1]", beta)
        if rule not in ("sharp", "paper"):
            raise bad(where, "rule", "'sharp' or 'paper'", rule)
        if beta < self.alpha:
            warn_once(f"{where}: beta = {beta:.4g} is below alpha = {self.alpha:.4g}; no rate is known there.")
        if self.alpha == 1:
            return float(eps**beta / (math.e * (self.L0 + self.L1 * eps)))
        K = self.K0 + self.K1 + 2 * self.K2
        return float(eps**beta / (max(1.0, K) if rule == "sharp" else 12 * K + 1))

    def iterations(self, eps: float, gap: float) -> int:
        """Bound the iterations that the sharp step needs until the gradient's norm is at most `eps`.

        Args:
            eps: Target gradient norm, in (0, 1].
            gap: f at the start, less its infimum, >= 0.

        Returns:
            An upper bound, of order eps^-2.

        Raises:
            ValueError: An argument is out of range.
        """
        if not gap >= 0:
            raise bad("GeneralizedSmoothness.iterations", "gap", "a float >= 0", gap)
        gain = float(self.stepsize(eps, self.alpha) * eps ** (2 - self.alpha)) / 2  # at least, of each step
        return math.ceil(gap / gain)

    @classmethod
    def estimate(
        cls,
        function: Callable[[Float[Tensor, " n"]], Float[Tensor, ""]],
        points: Float[Tensor, "rows n"],
        alpha: float,
        *,
        rounds: int = 4,
        step: float = 1e-4,
    ) -> "GeneralizedSmoothness":
        """Fit L0 and L1 to gradients: the least curve above all quotients of differences that are seen.

        Quotients come from all pairs of points, and from a neighbour of each, found by iterating gradient differences
        towards the direction of largest curvature. The fit is the linear program min sum (L0 + L1 m - r) with every
        residual >= 0. It holds where it was measured; elsewhere it is a guess.

        Args:
            function: A twice differentiable scalar function.
            points: Where to measure, at least 2 rows, for instance a descent path; computed in float64.
            alpha: Degree, in [0, 1].
            rounds: Steps towards the largest curvature at each point, >= 1. Default 4.
            step: Distance of the neighbour, relative to the norm of the point, > 0. Default 1e-4.

        Returns:
            The constants.

        Raises:
            ValueError: An argument is out of range, a gradient is not finite, or all gradients are equal.
        """
        where = "GeneralizedSmoothness.estimate"
        if not 0 <= alpha <= 1:
            raise bad(where, "alpha", "a float in [0, 1]", alpha)
        if points.ndim != 2 or len(points) < 2:
            raise bad(where, "points", "a matrix of at least two rows", tuple(points.shape))
        if rounds < 1:
            raise bad(where, "rounds", "an int >= 1", rounds)
        if not step > 0:
            raise bad(where, "step", "above 0", step)
        x = points.detach().double()
        gradient = torch.func.vmap(torch.func.grad(function))
        g = gradient(x)
        if not bool(torch.isfinite(g).all()):
            raise bad(where, "function", "one with finite gradients at all points", "one without")
        norms = g.norm(dim=1)
        i, j = torch.triu_indices(len(x), len(x), 1)
        apart = (x[i] - x[j]).norm(dim=1)
        far = apart > 0
        quotients = [(g[i] - g[j]).norm(dim=1)[far] / apart[far]]
        sizes = [torch.maximum(norms[i], norms[j])[far]]
        length = step * x.norm(dim=1, keepdim=True).clamp_min(step)
        v = torch.where(norms[:, None] > 0, g, torch.ones_like(g))
        for _ in range(rounds):
            v = v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) * length
            moved = gradient(x + v)
            quotients.append((moved - g).norm(dim=1) / length[:, 0])
            sizes.append(torch.maximum(norms, moved.norm(dim=1)))
            v = moved - g
        L0, L1 = _envelope(torch.cat(sizes) ** alpha, torch.cat(quotients))
        if L0 == L1 == 0:
            raise bad(where, "function", "one whose gradient changes among the points", "a linear one")
        return cls(alpha, L0, L1)


def _envelope(m: Float[Tensor, " k"], r: Float[Tensor, " k"]) -> tuple[float, float]:
    """Solve min sum(a + b m - r) with a + b m >= r, a >= 0, b >= 0: one of its vertices, all of which are tried.

    A vertex is an edge of the upper hull, or the lowest line above all points with a = 0 or b = 0.
    """
    order = sorted(zip(m.tolist(), r.tolist(), strict=True))
    hull: list[tuple[float, float]] = []
    for point in order:
        while len(hull) > 1 and _turns_left(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    lines = [(max(y for _, y in hull), 0.0)]
    if all(x > 0 or y == 0 for x, y in hull):
        lines.append((0.0, max((y / x for x, y in hull if x > 0), default=0.0)))
    for (x0, y0), (x1, y1) in itertools.pairwise(hull):
        if x1 > x0:
            slope = (y1 - y0) / (x1 - x0)
            lines.append((y0 - slope * x0, slope))
    mean = float(m.mean())
    return min((line for line in lines if min(line) >= 0), key=lambda line: (line[0] + line[1] * mean, line[1]))


def _turns_left(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) >= 0
