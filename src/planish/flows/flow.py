r"""Smooth normalizing flows: densities on intervals and tori whose energies have forces one can compute with.

A flow maps data x to uniform noise z by coupling layers of monotone maps; log p(x) is the sum of their log-slopes. With
rational-quadratic splines that density has corners at every knot, so that forces, its derivative, jump: training on
forces and molecular dynamics on the learned energy suffer. Here every map is C-infinity, on intervals and around
circles, and so is every network that decides its parameters. The maps have no inverse in closed form: samples are found
by root-finding, and differentiated implicitly, to the order that force matching needs.

    log p(x) = sum_layers sum_i log f'(x_i; theta(x_rest)) - log volume
    energy   u(x) = -log p(x)  in kT,     force  F(x) = d log p / dx  in kT per unit of x

================  =============================  ============================================
paper             here                           range, default
================  =============================  ============================================
rho, sigma        ``smooth_step``                alpha > 0, beta in [0.5, 2]
K                 ``components``                 8
a, b, alpha, c    ``Bumps``                      c >= ``floor`` = 1e-3
omega             ``hidden_features``            SiLU instead of sin
w_n, w_f, w_k     ``force_matching_loss``        0.999, 0.001, 0
================  =============================  ============================================

Differs from the paper: widths of bumps are learned; sigmas are sigmoids, which never divide tiny by tiny; the
conditioner also turns circles; gradients go through the inverse to the conditioner's input.
When to use: forces or higher derivatives of a density matter. Else splines are cheaper. See ``docs/jobs/flows.md``.

Reference:
    Köhler, Krämer, Noé, Smooth Normalizing Flows, 2021.
    https://arxiv.org/abs/2110.00351
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.flows import coupling
from planish.flows.distribution import FlowDistribution

UNIVARIATES = ("smooth", "spline")


class SmoothFlow(nn.Module):
    """Model a density on a box whose sides are intervals or circles; called, it returns a distribution.

    Args:
        features: Dimensions of x, >= 1.
        context: Numbers that condition the density, default 0.
        periodic: Which features are circles: one bool for all, or one each; default False.
        components: Bumps of each one-dimensional map (bins, for splines), >= 1; default 8.
        transforms: Coupling layers, >= 1; default 4. With two or more features, at least 2 reach all of them.
        hidden_features: Widths of the conditioners' hidden layers; default (64, 64).
        low: Lower ends of the box, one for all or one each; default 0.
        high: Upper ends; default 1.
        univariate: "smooth" (default), or "spline" for rational-quadratic splines, whose forces jump.
        beta: Order of the flat ends of a smooth step, in [0.5, 2]; default 1.
        floor: Least slope of smooth maps, in (0, 1); default 1e-3. Smaller ones let log-densities of places without
            data fall further, and forces there grow.
        generator: Source of the initial weights, on the CPU; torch's own by default.

    Raises:
        ValueError: An argument is out of range, or an input has another last dimension.

    Example:
        >>> import math
        >>> flow = SmoothFlow(2, periodic=True, low=-math.pi, high=math.pi, generator=torch.Generator().manual_seed(0))
        >>> x = torch.tensor([[0.1, -3.0], [0.1, -3.0 + 2 * math.pi]])
        >>> here, same_place = flow().log_prob(x).tolist()
        >>> abs(here - same_place) < 1e-4
        True
        >>> flow().force(x).shape, flow().sample((3,)).shape
        (torch.Size([2, 2]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        periodic: bool | Sequence[bool] = False,
        components: int = 8,
        transforms: int = 4,
        hidden_features: Sequence[int] = (64, 64),
        low: int | float | Sequence[int | float] = 0.0,
        high: int | float | Sequence[int | float] = 1.0,
        univariate: str = "smooth",
        beta: int | float = 1.0,
        floor: int | float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("features", features, 1), ("context", context, 0), ("components", components, 1),
            ("transforms", transforms, 1),
        ):  # fmt: skip
            if number < least:
                raise bad("SmoothFlow", name, f"at least {least}", number)
        if univariate not in UNIVARIATES:
            raise bad("SmoothFlow", "univariate", f"one of {UNIVARIATES}", univariate)
        if not 0 < floor < 1:
            raise bad("SmoothFlow", "floor", "in (0, 1)", floor)
        if not 0.5 <= beta <= 2:
            raise bad("SmoothFlow", "beta", "in [0.5, 2]", beta)
        self.features, self.context = features, context
        self.periodic = [bool(around) for around in _each("periodic", periodic, features)]
        # numbers, not buffers: a flow made in float32 and turned to float64 is to have a period of 2 pi, not near it
        self.ends = _each("low", low, features), _each("high", high, features)
        if not all(0 < b - a < math.inf for a, b in zip(*self.ends, strict=True)):
            raise bad("SmoothFlow", "high", f"above low ({low})", high)
        families = coupling.smooth(components, beta, floor) if univariate == "smooth" else coupling.spline(components)
        self.layers = nn.ModuleList(
            coupling.Coupling(active, self.periodic, context, families, hidden_features, generator)
            for active in _masks(features, transforms)
        )

    def forward(self, context: Float[Tensor, "*b c"] | None = None, *, validate_args: bool = True) -> FlowDistribution:
        """Return the density, given a context if the flow has one.

        Args:
            context: What conditions it; its leading axes are the batch of the distribution.
            validate_args: Refuse NaN and places outside an interval; if False, the latter have log-probability -inf.

        Raises:
            ValueError: The context is missing, not wanted, or of another length.
        """
        wanted = f"of {self.context} numbers on the last axis" if self.context else "None: the flow has none"
        if (context is None) != (self.context == 0):
            raise bad("SmoothFlow", "context", wanted, None if context is None else tuple(context.shape))
        if context is not None and context.shape[-1] != self.context:
            raise bad("SmoothFlow", "context", wanted, tuple(context.shape))
        return FlowDistribution(self, context, validate_args=validate_args)

    @property
    def low(self) -> Tensor:
        """The box's lower ends, in the dtype and on the device of the parameters."""
        return next(self.parameters()).new_tensor(self.ends[0])

    @property
    def high(self) -> Tensor:
        """The box's upper ends."""
        return next(self.parameters()).new_tensor(self.ends[1])

    def to_noise(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return noise in [0, 1]^n, circles unrolled, and the log-density of x."""
        low, high = self.low, self.high
        u, total = (x - low) / (high - low), -(high - low).log().sum()
        for layer in self.layers:
            u, ladj = layer(u, context)
            total = total + ladj
        return u, total

    def from_noise(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x, circles rolled up, and the log-density there."""
        low, high = self.low, self.high
        total = -(high - low).log().sum()
        for layer in reversed(self.layers):
            z, ladj = layer.inverse(z, context)  # type: ignore[operator]
            total = total + ladj
        around = torch.tensor(self.periodic, device=z.device)
        z = torch.where(around, z - torch.floor(z.detach()), z.clamp(0, 1))
        x = low + z * (high - low)
        return torch.where(around & (x >= high), low, x), total  # rounding: 1 - 1e-9 is 1 in float32

    def extra_repr(self) -> str:
        """Name what distinguishes flows."""
        return f"features={self.features}, context={self.context}, periodic={self.periodic}"


def _each(name: str, value: int | float | Sequence[int | float], features: int) -> list[int | float]:
    """Return a value for each feature."""
    given = [value] * features if isinstance(value, bool | int | float) else list(value)
    if len(given) != features:
        raise bad("SmoothFlow", name, f"one value, or {features}", value)
    return given


def _masks(features: int, transforms: int) -> list[list[bool]]:
    """Return which features each layer moves: every second one and the others, halves and the others, in turn."""
    if features == 1:
        return [[True]] * transforms
    second = [i % 2 == 0 for i in range(features)]
    halves = [i < features // 2 for i in range(features)]
    cycle = [second, [not a for a in second], halves, [not a for a in halves]]
    return [cycle[i % 4] for i in range(transforms)]
