"""Coupling layers: some coordinates are mapped, one by one, by transforms whose parameters the others decide.

Coordinates are those of [0, 1] each, or of a circle of length 1, unrolled: u and u + 1 are the same place.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from planish.flows.splines import SplineCircularTransform, SplineIntervalTransform
from planish.flows.transforms import SmoothCircularTransform, SmoothIntervalTransform, Univariate


class Family(NamedTuple):
    """Makes a transform of raw parameters; `sizes` are the lengths of their last axes."""

    make: Callable[..., Univariate]
    sizes: tuple[int, ...]


def smooth(components: int, beta: int | float, floor: int | float) -> tuple[Family, Family]:
    """Return the smooth family: on intervals, on circles."""

    def interval(*raw: Tensor) -> Univariate:
        return SmoothIntervalTransform(*raw, beta=beta, floor=floor)

    def circle(*raw: Tensor) -> Univariate:
        return SmoothCircularTransform(*raw, beta=beta, floor=floor)

    return Family(interval, (components,) * 5), Family(circle, (components,) * 5)


def spline(bins: int) -> tuple[Family, Family]:
    """Return the splines: on intervals, on circles."""
    return Family(SplineIntervalTransform, (bins, bins, bins + 1)), Family(SplineCircularTransform, (bins,) * 3)


def encode(u: Tensor, periodic: Sequence[bool]) -> Tensor:
    """Return what a network sees of coordinates: cosine and sine of a circle's, 2 u - 1 of an interval's."""
    around = torch.tensor(periodic, dtype=torch.bool, device=u.device)
    angle = 2 * torch.pi * u[..., around]
    return torch.cat([angle.cos(), angle.sin(), 2 * u[..., ~around] - 1], -1)


def network(sizes: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    """Return linear layers with SiLU between them: smooth, or forces would have the kinks of its units."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        bound = max(fan_in, 1) ** -0.5
        with torch.no_grad():
            for parameter in linear.parameters():
                uniform = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((2 * uniform - 1) * bound)
        layers += [linear, nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Coupling(nn.Module):
    """Map the coordinates `active`, by transforms that depend on the others and on a context.

    A circle is also turned, by an angle that depends on the same: the transforms keep one point in its place.

    Args:
        active: Which coordinates move.
        periodic: For each coordinate whether it is a circle's.
        context: Numbers in a context.
        families: Of intervals and circles.
        hidden: Widths of the conditioner's hidden layers.
        generator: Source of its weights, on the CPU.
    """

    def __init__(
        self, active: Sequence[bool], periodic: Sequence[bool], context: int, families: tuple[Family, Family],
        hidden: Sequence[int], generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        super().__init__()
        features = range(len(active))
        self.passive = [i for i in features if not active[i]]
        # intervals first, then circles
        self.groups = [[i for i in features if active[i] and periodic[i] is kind] for kind in (False, True)]
        self.families = families
        self.seen = [periodic[i] for i in self.passive]
        widths = [sum(family.sizes) + around for around, family in enumerate(families)]
        self.totals = [len(group) * width for group, width in zip(self.groups, widths, strict=True)]
        n_in = sum(2 if around else 1 for around in self.seen) + context
        self.alone = n_in == 0  # one feature, no context: the network is a constant, learned
        self.conditioner = network([max(n_in, 1), *hidden, sum(self.totals)], generator)

    def forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the image and the logarithm of the determinant."""
        return self._mapped(u, context, inverse=False)

    def inverse(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the preimage u and the logarithm of the determinant of the forward map there."""
        return self._mapped(v, context, inverse=True)

    def _mapped(self, u: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        columns = list(u.unbind(-1))
        seen = encode(u[..., self.passive], self.seen)
        if self.alone:
            seen = torch.ones_like(u[..., :1])
        raw = self.conditioner(seen if context is None else torch.cat([seen, context], -1))
        total = torch.zeros_like(columns[0])
        for around, part in enumerate(raw.split(self.totals, -1)):
            group, family = self.groups[around], self.families[around]
            if not group:
                continue
            parameters = part.unflatten(-1, (len(group), -1)).split([*family.sizes, *[1] * around], -1)
            transform = family.make(*parameters[: len(family.sizes)])
            turn = parameters[-1][..., 0] if around else torch.zeros_like(u[..., :1])
            if inverse:
                moved = transform._inverse(u[..., group] - turn)
                ladj = transform.log_abs_det_jacobian(moved, moved)
            else:
                moved, ladj = transform.call_and_ladj(u[..., group])
                moved = moved + turn
            total = total + ladj.sum(-1)
            for place, column in zip(group, moved.unbind(-1), strict=True):
                columns[place] = column
        return torch.stack(columns, -1), total
