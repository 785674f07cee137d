"""Choose a site's smoothing by what the smallest module around it loses: quick, and blind to what follows.

Legend: O rows, C channels, G groups.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish.quant.compensate import output_loss
from planish.quant.moments import gram as collect
from planish.quant.sites import Site, is_linear, set_weight, weight_of
from planish.quant.stream import Block, first_tensor
from planish.quant.transforms import Scale

if TYPE_CHECKING:
    from planish.quant.engine import Method


@dataclass
class Calls:
    """Recorded calls of one module and what it returned."""

    module: nn.Module
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    targets: list[Tensor]

    @torch.no_grad()
    def error(self) -> float:
        """Return the mean squared difference to the recorded outputs, now."""
        total, count = 0.0, 0
        for (args, kwargs), target in zip(self.arguments, self.targets, strict=True):
            total += (first_tensor(self.module(*args, **kwargs)).float() - target.float()).square().sum().item()
            count += target.numel()
        return total / max(count, 1)


def home(site: Site) -> tuple[str, nn.Module]:
    """Return the smallest module that holds all of a site's consumers: the attention, or the layer itself."""
    names = [name.split(".") for name in site.consumers]
    common: list[str] = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    name = ".".join(common)
    return name, site.block.module.get_submodule(name)


@torch.no_grad()
def record(block: Block, module: nn.Module, tokens: int) -> Calls:
    """Run a block until a module has seen about `tokens` tokens, and keep its calls."""
    calls = Calls(module, [], [])

    def keep(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ANN401
        calls.arguments.append((args, kwargs))
        calls.targets.append(first_tensor(out))

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        for _ in block.run():
            if sum(t.numel() // t.shape[-1] for t in calls.targets) >= tokens:
                break
    finally:
        handle.remove()
    return calls


class SiteError:
    """The error that rounding a site causes, as a function of its scales.

    One linear layer: exact over all tokens, from its inputs' second moments. Several layers: the output of the
    smallest module that holds them, on the first tokens.

    Args:
        site: The site, in float.
        tokens: How many tokens a module is run on.
    """

    def __init__(self, site: Site, tokens: int) -> None:
        self.site = site
        _, module = home(site)
        self.gram = collect(site.block, site) if is_linear(module) else None
        self.calls = None if is_linear(module) else record(site.block, module, tokens)

    @torch.no_grad()
    def of(self, method: "Method", scale: Float[Tensor, "channels"] | None) -> float:
        """Return the mean squared error when the site is rounded to nearest after scaling."""
        rounded: dict[str, Tensor] = {}
        for name, weight in self.site.weights.items():
            if scale is None:
                rounded[name] = method.weight.fake(weight)
            else:
                step = Scale(scale)
                rounded[name] = method.weight.fake(step.weight(weight)) / scale
        if self.gram is not None:
            return sum(output_loss(w, rounded[n], self.gram).sum().item() for n, w in self.site.weights.items())
        saved = {name: weight_of(module).clone() for name, module in self.site.consumers.items()}
        try:
            for name, weight in rounded.items():
                set_weight(self.site.consumers[name], weight)
            return self.calls.error() if self.calls else 0.0
        finally:
            for name, weight in saved.items():
                set_weight(self.site.consumers[name], weight)
