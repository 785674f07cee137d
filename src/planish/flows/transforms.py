"""Smooth monotone maps as `torch.distributions` transforms: one dimension, on an interval or around a circle.

They take unconstrained parameters, as conditioners give them, with K bumps on the last axis, so that they can stand
where zuko's flows ask for a `univariate` transform. Inverses are numerical, and differentiable to third order.
"""

from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Transform, constraints

from planish._support import bad
from planish.flows.bumps import Bumps
from planish.flows.inverse import ImplicitInverse

Kind = TypeVar("Kind", bound="_Smooth")


class Univariate(Transform):
    """A monotone map of [low, high] onto itself, given on [0, 1] by a value and a slope.

    Subclasses define `value_and_slope`; one that sets `periodic` maps the whole line, f(x + 1) = f(x) + 1.
    """

    bijective = True
    sign = 1
    periodic: ClassVar[bool] = False

    def __init__(self, low: int | float = 0.0, high: int | float = 1.0) -> None:
        super().__init__()
        if not low < high:
            raise bad(type(self).__name__, "high", f"above low ({low})", high)
        self.low, self.high = low, high
        self.domain = self.codomain = constraints.interval(low, high)

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(u) and f'(u) in units of the domain."""
        raise NotImplementedError

    def solve(self, v: Tensor) -> Tensor:
        """Return u in [0, 1] with f(u) = v."""
        return ImplicitInverse(self.value_and_slope, (0.0, 1.0))(v)

    def call_and_ladj(self, x: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*c"], Float[Tensor, "*c"]]:
        """Return the map's value and the logarithm of its slope, for the price of one."""
        value, slope = self.value_and_slope(self._to_unit(x))
        return self._from_unit(value), slope.log()

    def log_abs_det_jacobian(self, x: Float[Tensor, "*b"], y: Float[Tensor, "*c"]) -> Float[Tensor, "*c"]:
        """Return the logarithm of the slope at x."""
        return self.value_and_slope(self._to_unit(x))[1].log()

    def _call(self, x: Tensor) -> Tensor:
        return self._from_unit(self.value_and_slope(self._to_unit(x))[0])

    def _inverse(self, y: Tensor) -> Tensor:
        v = self._to_unit(y)
        if not self.periodic:
            return self._from_unit(self.solve(v))
        turns = torch.floor(v.detach())
        return self._from_unit(self.solve(v - turns) + turns)

    def _to_unit(self, x: Tensor) -> Tensor:
        return (x - self.low) / (self.high - self.low)

    def _from_unit(self, u: Tensor) -> Tensor:
        return self.low + u * (self.high - self.low)


class _Smooth(Univariate):
    """What the two share: parameters, and how they are made."""

    def __init__(
        self,
        weights: Float[Tensor, "*b k"],
        centers: Float[Tensor, "*b k"],
        scales: Float[Tensor, "*b k"],
        alphas: Float[Tensor, "*b k"],
        floors: Float[Tensor, "*b k"],
        *,
        beta: int | float = 1.0,
        floor: int | float = 1e-3,
        low: int | float = 0.0,
        high: int | float = 1.0,
    ) -> None:
        super().__init__(low, high)
        if not 0 < floor < 1:
            raise bad(type(self).__name__, "floor", "in (0, 1)", floor)
        self.bumps = Bumps.from_raw(
            weights, centers, scales, alphas, floors, beta=beta, floor=floor, periodic=self.periodic
        )

    @classmethod
    def of(cls: type[Kind], bumps: Bumps, *, low: int | float = 0.0, high: int | float = 1.0) -> Kind:
        """Make the transform of given bumps instead of raw parameters.

        Args:
            bumps: The mixture, in units of a domain of length 1.
            low: Lower end of the domain.
            high: Upper end, above `low`.

        Raises:
            ValueError: A parameter is out of range.
        """
        made = cls.__new__(cls)
        Univariate.__init__(made, low, high)
        made.bumps = bumps.check(cls.__name__, periodic=cls.periodic)
        return made

    def __repr__(self) -> str:
        return f"{type(self).__name__}(components={self.bumps.weight.shape[-1]}, low={self.low}, high={self.high})"


class SmoothIntervalTransform(_Smooth):
    """Map an interval onto itself by a mixture of smooth steps; the density at its ends need not vanish.

    Args:
        weights: Raw weights; parameters are `softmax` of them. All five have K bumps on the last axis, and the axes
            before it broadcast with those of x.
        centers: Raw centres; ordered shares of the domain by `softmax`.
        scales: Raw inverse widths; positive by `softplus`, at least 1/2, or 1 on a circle.
        alphas: Raw steepness; above `unimodal_alpha(beta)`, within 10 of it.
        floors: Raw least slopes; in (`floor`, 1).
        beta: Order of the flat ends of a step, in [0.5, 2]; default 1.
        floor: Least slope of the whole, in (0, 1); default 1e-3, so that log-slopes and forces stay moderate.
        low: Lower end of the domain, default 0.
        high: Upper end, default 1.

    Raises:
        ValueError: An argument is out of range; NaN, or a value outside the codomain, is to be inverted.

    Example:
        >>> raw = [torch.zeros(4, dtype=torch.float64) for _ in range(5)]
        >>> transform = SmoothIntervalTransform(*raw, low=-1, high=1)
        >>> x = torch.tensor([-1.0, 0.3, 1.0], dtype=torch.float64)
        >>> [round(v, 9) for v in transform.inv(transform(x)).tolist()]
        [-1.0, 0.3, 1.0]
    """

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(u) and f'(u) in units of the domain."""
        return self.bumps.interval(u)


class SmoothCircularTransform(_Smooth):
    """Map a circle onto itself by a mixture of smooth steps that wrap around; every derivative agrees at the seam.

    Low stays where it is: put a rotation before or behind. The map is defined on the whole line, which winds around
    the circle, and moves by a turn where its argument does; nothing is wrapped. Arguments are those of
    `SmoothIntervalTransform`.

    Raises:
        ValueError: An argument is out of range; NaN is to be inverted.

    Example:
        >>> import math
        >>> raw = [torch.zeros(4, dtype=torch.float64) for _ in range(5)]
        >>> transform = SmoothCircularTransform(*raw, low=-math.pi, high=math.pi)
        >>> x = torch.tensor([1.0, 1.0 + 2 * math.pi], dtype=torch.float64)
        >>> round((transform(x).diff() / (2 * math.pi)).item(), 12)
        1.0
    """

    periodic = True

    def value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(u) and f'(u) in units of the domain; f(u + 1) = f(u) + 1."""
        return self.bumps.circle(u)
