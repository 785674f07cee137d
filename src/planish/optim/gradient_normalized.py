r"""Newton's method with any Hessian approximation, regularized by the gradient, its one parameter found by trying.

How far does the model of the gradient, grad f(x) + H h, hold? The gradient-normalized smoothness is the radius

    gamma(x) = max {gamma : ||grad f(x + h) - grad f(x) - H h||_* <= ||grad f(x)||_* ||h|| / gamma, ||h|| <= gamma}

with ||h||^2 = <B h, h> and ||g||_*^2 = <g, B^-1 g>. The step moves by at most gamma_k,

    x+ = x - (H + lambda B)^-1 grad f(x),           lambda = ||grad f(x)||_* / gamma_k

and is taken if f(x) - f(x+) >= ||grad f(x+)||_*^2 / (8 lambda), which is sure where gamma_k <= gamma(x). Otherwise
gamma_k is halved. Nothing of f is to be known: neither a constant nor which class of functions it is in.

==============  ================================  ================================
paper           here                              range
==============  ================================  ================================
gamma_0         ``gamma0``                        > 0; 1
H               ``hessian``, ``hess``             symmetric, better >= 0
B               ``metric``                        positive definite; the identity
==============  ================================  ================================

Differs from the paper: gamma is doubled only after a first trial that was taken (`regrow="first"`: fewer solves,
about as many steps; "always" is the paper's). A failed factorization is a failed trial. Where the decrease of f drowns
in its rounding, the equivalent test on gradients, <grad f(x+), x - x+> >= ||grad f(x+)||_*^2 / (4 lambda), decides.
When to use: few parameters, or products with the Hessian, and no wish to tune. See ``docs/jobs/optim.md``.

Reference:
    Semenov, Jaggi, Doikov, Gradient-Normalized Smoothness for Optimization with Approximate Hessians, 2025.
    https://arxiv.org/abs/2506.13710
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.optim.regularized import Metric, Solve

Regrow = Literal["first", "always"]
_LEAST = 1e-9  # gamma starts no search below it
_ROUNDING = 4096  # epsilons of f below which a difference of two values of f says nothing


@dataclass(frozen=True)
class Point:
    """Where a function was evaluated, its value and its gradient there."""

    x: Tensor
    value: float
    gradient: Tensor

    @property
    def finite(self) -> bool:
        """Whether the value and the gradient are."""
        return math.isfinite(self.value) and bool(torch.isfinite(self.gradient).all())


@dataclass(frozen=True)
class Found:
    """What a search found: the point (None where no trial passed), and the trials it took.

    Attributes:
        point: The next iterate.
        gamma: The radius of the trial that passed.
        regularization: Its lambda.
        following: The radius with which the next search starts.
        solves: Linear systems solved or found indefinite.
        evaluations: Points evaluated.
    """

    point: Point | None
    gamma: float
    regularization: float
    following: float
    solves: int
    evaluations: int


def search(
    here: Point,
    evaluate: Callable[[Tensor], Point],
    solve: Solve,
    metric: Metric,
    gamma: float,
    *,
    tolerance: float = 0.0,
    trials: int = 40,
    regrow: Regrow = "first",
) -> Found:
    """Try radii from `gamma` down until a step passes the test."""
    size = metric.dual_norm(here.gradient)
    evaluations = 0
    start, solves = gamma, 0
    for trial in range(trials):
        lam = size / gamma
        if not math.isfinite(lam):  # the radius is below what floats can tell
            break
        h = solve(lam, tolerance)
        solves += 1
        if h is not None and bool(torch.isfinite(h).all()):
            x = here.x - h
            if torch.equal(x, here.x):
                break  # the step is below the spacing of floats: no smaller radius helps
            there = evaluate(x)
            evaluations += 1
            if there.finite and passes(here, there, lam, metric):
                doubled = regrow == "always" or trial == 0
                following = max(2 * gamma if doubled else gamma, _LEAST)
                return Found(there, gamma, lam, following, solves, evaluations)
        gamma /= 2
    return Found(None, gamma, size / gamma, start, solves, evaluations)


def passes(here: Point, there: Point, lam: float, metric: Metric) -> bool:
    """Test whether a step decreased f as it should."""
    decrease = here.value - there.value
    square = metric.dual_norm(there.gradient) ** 2
    if abs(decrease) < _ROUNDING * torch.finfo(here.x.dtype).eps * abs(here.value):
        return float(there.gradient @ (here.x - there.x)) >= square / (4 * lam)
    return decrease >= square / (8 * lam)


def gamma_estimate(
    function: Callable[[Float[Tensor, " n"]], Float[Tensor, ""]],
    hessian: Float[Tensor, "n n"],
    x: Float[Tensor, " n"],
    n_dirs: int = 64,
    *,
    metric: Float[Tensor, "..."] | None = None,
    largest: float = 1e3,
    generator: torch.Generator | None = None,
) -> float:
    """Estimate the gradient-normalized smoothness at a point, from random directions; it is never too small.

    Along each direction the radii are a geometric grid, of ratio 1.12, down to 1e-6 of the largest; the estimate is the
    last of them up to which the model of the gradient holds.

    Args:
        function: A differentiable scalar function of a tensor.
        hessian: H, the approximation under test.
        x: The point.
        n_dirs: Directions, >= 1; of each the opposite is tried, too. Default 64.
        metric: B, a matrix or a diagonal. Default the identity.
        largest: Radius at which to stop, > 0. Default 1000.
        generator: Source of the directions; default a fixed one.

    Returns:
        gamma(x), at most `largest`; 0 where the model does not hold on the whole grid.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> x = torch.tensor([2.0], dtype=torch.float64)
        >>> gamma = gamma_estimate(lambda x: (x.abs() ** 3).sum() / 3, torch.tensor([[4.0]]), x)
        >>> 1.7 < gamma <= 2.0  # the root of the gradient's norm
        True
    """
    where = "gamma_estimate"
    if isinstance(n_dirs, bool) or not isinstance(n_dirs, int) or n_dirs < 1:
        raise bad(where, "n_dirs", "an int >= 1", n_dirs)
    if not 0 < largest < math.inf:
        raise bad(where, "largest", "a finite float > 0", largest)
    if x.ndim != 1 or hessian.shape != (len(x), len(x)):
        raise bad(where, "hessian", f"of shape ({len(x)}, {len(x)})", tuple(hessian.shape))
    x, H = x.detach().double(), hessian.detach().double()
    measure = Metric(where, metric, x)
    generator = generator or torch.Generator().manual_seed(0)
    drawn = torch.randn(n_dirs, len(x), dtype=torch.float64, generator=generator).to(x.device)
    directions = torch.cat([d / measure.norm(d) for d in (*drawn, *-drawn)]).reshape(-1, len(x))
    gradient = torch.func.grad(function)
    g = gradient(x)
    size = measure.dual_norm(g)
    if not math.isfinite(size):
        raise bad(where, "function", "one with a finite gradient at x", f"a gradient of norm {size}")
    radii = largest * torch.logspace(-6, 0, 121, dtype=torch.float64).to(x.device)
    least = largest
    for d in directions:
        away = torch.func.vmap(gradient)(x + radii[:, None] * d) - g - radii[:, None] * (H @ d)
        errors = torch.tensor([measure.dual_norm(row) for row in away], dtype=torch.float64) / radii.cpu()
        errors = torch.where(torch.isfinite(errors), errors, math.inf).cummax(0).values
        rounding = 1e3 * torch.finfo(torch.float64).eps * size / radii.cpu()  # of the difference of two gradients
        holds = (errors - rounding).clamp_min(0) * radii.cpu() <= size
        count = int(holds.long().cumprod(0).sum())
        least = min(least, float(radii[count - 1]) if count else 0.0)
    return least
