"""The distribution a flow stands for: densities, energies, forces, and samples with gradients."""

from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints

from planish._support import bad

if TYPE_CHECKING:
    from planish.flows.flow import SmoothFlow

Shape = torch.Size | list[int] | tuple[int, ...]
_ONE = torch.Size()


class FlowDistribution(Distribution):
    """A density on a box, as `SmoothFlow` returns it; a `torch.distributions.Distribution`.

    Args:
        flow: The flow.
        context: What conditions it, or None.
        validate_args: Refuse NaN and places outside an interval; if False, the latter have log-probability -inf.

    Raises:
        ValueError: x has another last dimension, holds NaN, or lies outside an interval (`validate_args=True`).

    Example:
        >>> from planish.flows import SmoothFlow
        >>> density = SmoothFlow(1)()
        >>> x, log_prob = density.rsample_and_log_prob((5,))
        >>> torch.allclose(density.log_prob(x), log_prob, atol=1e-4)
        True
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, flow: "SmoothFlow", context: Tensor | None = None, *, validate_args: bool = True) -> None:
        self.flow, self.context = flow, context
        batch = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size([flow.features]), validate_args=False)
        self.validate_args = validate_args

    @property
    def support(self) -> constraints.Constraint:
        """The box; a feature that is a circle takes any number."""
        low, high = self.flow.low, self.flow.high
        around = torch.tensor(self.flow.periodic, device=low.device)
        box = constraints.interval(low.masked_fill(around, -torch.inf), high.masked_fill(around, torch.inf))
        return constraints.independent(box, 1)

    def log_prob(self, value: Float[Tensor, "*b d"]) -> Float[Tensor, "*c"]:
        """Return the log-density, in nats, of the units of x.

        Args:
            value: Where; the leading axes broadcast with the batch. A circle's coordinate may lie any turns away.

        Raises:
            ValueError: See the class.
        """
        if value.shape[-1:] != self.event_shape:
            raise bad("log_prob", "x", f"of {self.flow.features} numbers on the last axis", tuple(value.shape))
        if self.validate_args and bool(value.isnan().any()):
            raise bad("log_prob", "x", "free of NaN", "NaN")
        at, context = self._together(value)
        inside = self.support.check(at)
        if self.validate_args and not bool(inside.all()):
            raise bad("log_prob", "x", "in the box", at[~inside][0].tolist())
        safe = torch.where(inside[..., None], at, (self.flow.low + self.flow.high) / 2)
        return self.flow.to_noise(safe, context)[1].masked_fill(~inside, -torch.inf)

    def energy(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*c"]:
        """Return the reduced energy -log p(x), in kT."""
        return -self.log_prob(x)

    def force(self, x: Float[Tensor, "*b d"], *, create_graph: bool = False) -> Float[Tensor, "*c d"]:
        """Return d log p / dx, in kT per unit of x.

        Args:
            x: Where.
            create_graph: Keep the graph, to train on forces or differentiate once more; default False.
        """
        with torch.enable_grad():
            if not (create_graph and x.requires_grad):
                x = x.detach().requires_grad_()
            at = x.expand(self._extended_shape_of(x))
            (made,) = torch.autograd.grad(self.log_prob(at).sum(), at, create_graph=create_graph)
        return made

    def rsample(self, sample_shape: Shape = _ONE, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples with gradients to the flow and the context, of any order up to the third.

        Args:
            sample_shape: Leading axes, before those of the batch.
            generator: Source of noise, on the device of the flow; torch's own by default.
        """
        return self.rsample_and_log_prob(sample_shape, generator)[0]

    def sample(self, sample_shape: Shape = _ONE, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples without gradients; arguments are those of `rsample`."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    def rsample_and_log_prob(
        self, sample_shape: Shape = _ONE, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw samples, and return their log-densities, which come on the way; arguments are those of `rsample`."""
        low = self.flow.low
        shape = self._extended_shape(torch.Size(sample_shape))
        z = torch.rand(shape, dtype=low.dtype, device=low.device, generator=generator)
        return self.flow.from_noise(*self._together(z))

    def _together(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x and context with the same leading axes."""
        if self.context is None:
            return x, None
        shape = torch.broadcast_shapes(x.shape[:-1], self.context.shape[:-1])
        return x.expand(*shape, x.shape[-1]), self.context.expand(*shape, self.context.shape[-1])

    def _extended_shape_of(self, x: Tensor) -> torch.Size:
        return torch.Size([*torch.broadcast_shapes(x.shape[:-1], self.batch_shape), x.shape[-1]])
