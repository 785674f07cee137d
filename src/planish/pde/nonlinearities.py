"""Nonlinearities of the Choquard equation: pairs (F, f = F') that vanish for t <= 0."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from planish._support import bad

_MOST = 600.0  # exp beyond is out of range soon
_SERIES = 0.3  # below, exp less its first terms is summed as a series


@runtime_checkable
class Nonlinearity(Protocol):
    """What a problem needs of a nonlinearity; `growth` is the power of its first term at 0.

    Example:
        >>> cube: Nonlinearity = PowerNonlinearity(4)
        >>> cube.growth, cube(torch.tensor(2.0)).item()
        (4, 8.0)
    """

    @property
    def growth(self) -> float:
        """Power of t in F at 0."""

    def primitive(self, t: Tensor) -> Tensor:
        """Return F(t), 0 for t <= 0."""

    def __call__(self, t: Tensor) -> Tensor:
        """Return f(t) = F'(t)."""


@dataclass(frozen=True)
class PowerNonlinearity:
    """F(t) = t^power / power for t > 0.

    Args:
        power: Above 1; 2 for the classical Choquard equation.

    Raises:
        ValueError: `power` is not above 1.

    Example:
        >>> PowerNonlinearity(2)(torch.tensor([-1.0, 3.0])).tolist()
        [0.0, 3.0]
    """

    power: int | float = 2.0

    def __post_init__(self) -> None:
        """Check the argument."""
        if not 1 < self.power < math.inf:
            raise bad("PowerNonlinearity", "power", "above 1", self.power)

    @property
    def growth(self) -> float:
        """Power of t in F at 0."""
        return self.power

    def primitive(self, t: Tensor) -> Tensor:
        """Return F(t)."""
        return t.clamp_min(0) ** self.power / self.power

    def __call__(self, t: Tensor) -> Tensor:
        """Return f(t)."""
        return t.clamp_min(0) ** (self.power - 1)


@dataclass(frozen=True)
class ExpNonlinearity:
    """F(t) = A (exp(y) - sum_{j<m} y^j / j!), y = beta t^exponent, for t > 0: the exponential growth of N = p s.

    Args:
        amplitude: A > 0; default 10.
        beta: Rate > 0; default 1.
        terms: m >= 1, terms of the series that are taken away, so that F is as small as t^(m exponent) at 0; default 2.
        exponent: N / (N - s) = p / (p - 1), above 1; default 2, that of N = 1, s = 1/2.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> f = ExpNonlinearity()
        >>> t = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        >>> torch.autograd.grad(f.primitive(t).sum(), t)[0].sub(f(t)).abs().item() < 1e-14
        True
    """

    amplitude: int | float = 10.0
    beta: int | float = 1.0
    terms: int = 2
    exponent: int | float = 2.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("amplitude", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise bad("ExpNonlinearity", name, "above 0", getattr(self, name))
        if self.terms < 1:
            raise bad("ExpNonlinearity", "terms", "at least 1", self.terms)
        if not 1 < self.exponent < math.inf:
            raise bad("ExpNonlinearity", "exponent", "above 1", self.exponent)

    @property
    def growth(self) -> float:
        """Power of t in F at 0."""
        return self.terms * self.exponent

    def primitive(self, t: Tensor) -> Tensor:
        """Return F(t)."""
        return self.amplitude * _tail(self.beta * t.clamp_min(0) ** self.exponent, self.terms)

    def __call__(self, t: Tensor) -> Tensor:
        """Return f(t)."""
        t = t.clamp_min(0)
        inner = self.beta * self.exponent * t ** (self.exponent - 1)
        return self.amplitude * inner * _tail(self.beta * t**self.exponent, self.terms - 1)


def _tail(y: Tensor, m: int) -> Tensor:
    """Return exp(y) less the first m terms of its series, for 0 <= y, without cancellation; y is capped at 600."""
    y = y.clamp_max(_MOST)
    if m <= 0:
        return y.exp()
    small = y.clamp_max(_SERIES)
    series = torch.zeros_like(y)
    for j in reversed(range(m, m + 14)):
        series = (series + 1 / math.factorial(j)) * (small if j > m else torch.ones_like(small))
    series = series * small**m
    large = y.clamp_min(_SERIES)
    direct = large.exp()
    for j in range(m):
        direct = direct - large**j / math.factorial(j)
    return torch.where(y < _SERIES, series, direct)
