"""The papers' own problems, as modules of torch: phase retrieval, and robust regression by a penalized divergence."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from planish._support import bad
from planish.optim.generalized import GeneralizedSmoothness

Divergence = Literal["chi2", "kl", "cvar"]
Rows = Int[Tensor, " batch"] | slice
_ALL = slice(None)


class PhaseRetrieval(nn.Module):
    """Find z from squared projections: f(z) = 1/(2m) sum of (y_r - (a_r'z)^2)^2, a quartic of degree alpha = 2/3.

    Args:
        a: Projections a_r, one a row.
        y: Squared magnitudes, with noise.
        start: Where z starts.

    Raises:
        ValueError: Shapes do not fit.

    Example:
        >>> problem = PhaseRetrieval.random(m=200, n=5, generator=torch.Generator().manual_seed(0))
        >>> problem().backward()
        >>> problem.z.grad.shape
        torch.Size([5])
    """

    a: Tensor
    y: Tensor

    def __init__(self, a: Float[Tensor, "m n"], y: Float[Tensor, " m"], start: Float[Tensor, " n"]) -> None:
        super().__init__()
        if a.ndim != 2 or not len(a) or y.shape != a.shape[:1] or start.shape != a.shape[1:]:
            raise bad(
                "PhaseRetrieval", "a", "(m, n) beside y (m,) and start (n,)", [tuple(t.shape) for t in (a, y, start)]
            )
        self.register_buffer("a", a)
        self.register_buffer("y", y)
        self.z = nn.Parameter(start.detach().clone())

    @classmethod
    def random(
        cls, m: int = 3000, n: int = 100, noise: float = 4.0, *, generator: torch.Generator | None = None
    ) -> "PhaseRetrieval":
        """Draw the paper's instance in float64: a and z* from N(0, 1/2), z from N(5, 1/2).

        Args:
            m: Measurements, >= 1. Default 3000.
            n: Unknowns, >= 1. Default 100.
            noise: Standard deviation of the noise of y, >= 0. Default 4.
            generator: Source of all draws; default a fixed one.

        Returns:
            The problem.

        Raises:
            ValueError: An argument is out of range.
        """
        for name, value in (("m", m), ("n", n)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad("PhaseRetrieval.random", name, "an int >= 1", value)
        if not 0 <= noise < math.inf:
            raise bad("PhaseRetrieval.random", "noise", "a finite float >= 0", noise)
        generator = generator or torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        a, truth = normal(m, n) * math.sqrt(0.5), normal(n) * math.sqrt(0.5)
        y = (a @ truth).square() + noise * normal(m)
        return cls(a, y, 5 + normal(n) * math.sqrt(0.5))

    def forward(self, rows: Rows = _ALL) -> Float[Tensor, ""]:
        """Return the loss of some of the measurements.

        Args:
            rows: Their numbers, or a slice. Default all.

        Returns:
            The mean of their squared errors, halved.
        """
        return self.at(self.z, rows)

    def at(self, z: Float[Tensor, " n"], rows: Rows = _ALL) -> Float[Tensor, ""]:
        """Return the loss at another z.

        Args:
            z: The point.
            rows: As for `forward`.

        Returns:
            The mean of their squared errors, halved.
        """
        return ((self.a[rows] @ z).square() - self.y[rows]).square().mean() / 2

    def smoothness(self) -> GeneralizedSmoothness:
        """Estimate L0 and L1 on spheres through the start's half, quarter and so on, with alpha = 2/3.

        Returns:
            Constants for `NormalizedGD(lr="auto")`.
        """
        with torch.no_grad():
            points = torch.cat([self.z[None] * 2.0**-k for k in range(8)])
        return GeneralizedSmoothness.estimate(self.at, points, 2 / 3)


class PenalizedDRO(nn.Module):
    r"""Robust regression: the worst distribution near the data, at the price of its divergence, in its dual form.

        L(w, eta) = lambda E psi*((loss(w) - eta) / lambda) + eta,      Psi(w) = min over eta of L

    with psi* of chi2: ((t/2 + 1)_+)^2 - 1; kl: exp(t) - 1; cvar, smoothed: log(1 - a + a exp(t)) / a. Its curvature
    grows with its gradient, alpha = 1.

    Args:
        x: Features, one example a row.
        y: Targets.
        divergence: "chi2", "kl" or "cvar". Default "chi2".
        penalty: lambda, > 0. Default 0.01, the paper's.
        tail: The a of "cvar", in (0, 1). Default 0.5.
        loss: (w, x, y) -> one loss an example. Default the paper's, (y - x'w)^2 / 2 + 0.1 sum log(1 + |w|).
        start: Where w starts. Default 0.

    Raises:
        ValueError: An argument is out of range, or shapes do not fit.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> problem = PenalizedDRO(x, x[:, 0], start=torch.tensor([0.5]))
        >>> bool(problem.robust() <= problem())  # Psi is the least over eta
        True
    """

    x: Tensor
    y: Tensor

    def __init__(
        self,
        x: Float[Tensor, "m n"],
        y: Float[Tensor, " m"],
        divergence: Divergence = "chi2",
        *,
        penalty: float = 0.01,
        tail: float = 0.5,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        start: Float[Tensor, " n"] | None = None,
    ) -> None:
        super().__init__()
        where = "PenalizedDRO"
        if divergence not in get_args(Divergence):
            raise bad(where, "divergence", f"one of {', '.join(get_args(Divergence))}", divergence)
        if not 0 < penalty < math.inf:
            raise bad(where, "penalty", "a finite float > 0", penalty)
        if not 0 < tail < 1:
            raise bad(where, "tail", "a float in (0, 1)", tail)
        start = x.new_zeros(x.shape[-1]) if start is None else start
        if x.ndim != 2 or not len(x) or y.shape != x.shape[:1] or start.shape != x.shape[1:]:
            raise bad(where, "x", "(m, n) beside y (m,) and start (n,)", [tuple(t.shape) for t in (x, y, start)])
        self.register_buffer("x", x)
        self.register_buffer("y", y)
        self.divergence, self.penalty, self.tail = divergence, penalty, tail
        self.loss = loss or regression_loss
        self.w = nn.Parameter(start.detach().clone())
        self.eta = nn.Parameter(x.new_tensor(0.1))

    def forward(self, rows: Rows = _ALL) -> Float[Tensor, ""]:
        """Return L(w, eta) of some of the examples.

        Args:
            rows: Their numbers, or a slice. Default all.

        Returns:
            The dual objective.
        """
        return self._dual(self.loss(self.w, self.x[rows], self.y[rows]), self.eta)

    @torch.no_grad()
    def robust(self) -> float:
        """Return Psi(w), the dual objective at its best eta, found by bisection.

        dL/d eta rises; it is <= 0 at the least loss and >= 0 at the greatest, for all three divergences.

        Returns:
            Psi(w).
        """
        losses = self.loss(self.w, self.x, self.y).double()
        low, high = float(losses.min()), float(losses.max())
        while True:
            eta = (low + high) / 2
            if eta in (low, high):
                return float(self._dual(losses, losses.new_tensor(eta)))
            below = float(self._slope((losses - eta) / self.penalty).mean()) > 1
            low, high = (eta, high) if below else (low, eta)

    def _dual(self, losses: Tensor, eta: Tensor) -> Tensor:
        t = (losses - eta) / self.penalty
        if self.divergence == "chi2":
            conjugate = (t / 2 + 1).clamp_min(0).square() - 1
        elif self.divergence == "kl":
            conjugate = t.clamp_max(80.0).expm1()  # beyond it the exponential leaves every float32
        else:
            conjugate = torch.logaddexp(t.new_tensor(math.log1p(-self.tail)), t + math.log(self.tail)) / self.tail
        return self.penalty * conjugate.mean() + eta

    def _slope(self, t: Tensor) -> Tensor:
        if self.divergence == "chi2":
            return (t / 2 + 1).clamp_min(0)
        if self.divergence == "kl":
            return t.clamp_max(80.0).exp()
        return torch.sigmoid(t + math.log(self.tail) - math.log1p(-self.tail)) / self.tail


def regression_loss(w: Float[Tensor, " n"], x: Float[Tensor, "m n"], y: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Return the paper's loss of each example, a squared error with a penalty that is not convex.

    Args:
        w: Coefficients.
        x: Features.
        y: Targets.

    Returns:
        (y - x'w)^2 / 2 + 0.1 sum log(1 + |w|).

    Example:
        >>> regression_loss(torch.zeros(1), torch.ones(2, 1), torch.tensor([1.0, 2.0])).tolist()
        [0.5, 2.0]
    """
    return (y - x @ w).square() / 2 + 0.1 * w.abs().log1p().sum()
