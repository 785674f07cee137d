"""The scales of a quantized model as vectors that can be tried: whatever layer holds them.

A `QLinear` has the scales of its weight's groups; a module with tensors `scale` and `zero_point` (torch's
`FakeQuantize`) has its own. Zero points stay as they are.

Legend: O outputs, C channels, G groups of a row.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.formats import Affine
from planish.quant.layers import QLinear
from planish.quant.packing import pack

Scope: TypeAlias = str | Callable[[str, nn.Module], bool]
"""Which layers: "all", "attention", or a function of name and layer."""

_ATTENTION = re.compile("att", re.IGNORECASE)


@dataclass
class Scales:
    """The scales of one layer.

    Attributes:
        name: The layer's.
        module: What runs in the model: the layer, or what stands in for it.
        holder: The tensor that holds them.
        show: Lets the model compute with other values.
        keep: Lets the layer hold other values, for good.
    """

    name: str
    module: nn.Module
    holder: Tensor
    show: Callable[[Tensor], None]
    keep: Callable[[Tensor], None]

    @property
    def value(self) -> Float[Tensor, "n"]:
        """What the layer holds now, in float64."""
        return self.holder.detach().double().flatten().cpu()

    @property
    def bounds(self) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """How far they may go: positive, and what their precision can hold."""
        kind = torch.finfo(self.holder.dtype)
        low = (self.value * torch.finfo(torch.float32).eps).clamp(min=kind.smallest_normal)
        return low, torch.full_like(low, kind.max)


def of_layer(
    name: str, layer: QLinear, stand_in: nn.Module | None = None, source: Float[Tensor, "out channels"] | None = None
) -> Scales:
    """Return the scales of a quantized layer.

    Args:
        name: The layer's.
        layer: The layer.
        stand_in: A dense layer that runs in its place, with the values of its weight.
        source: The weight in float that was rounded to nearest: codes follow the scales. None keeps the codes.

    Raises:
        ValueError: The layer's format is not `Affine`, or rounding `source` to nearest does not give its codes.
    """
    form, quantized = layer.format, layer.weight
    if not isinstance(form, Affine):
        raise bad(
            f"Evolve, `{name}`", "format", "an Affine format: a grid of floats has scales too coarse to move", form
        )
    work = torch.promote_types(layer.weight_scale.dtype, torch.float32)
    zero = torch.full_like(layer.weight_scale, form.middle) if quantized.zero is None else quantized.zero
    zero = zero.to(work)[..., None]
    fixed = form._grouped(quantized.codes.to(work))[0]
    grouped = None if source is None else form._grouped(source.to(work))[0]

    def stored(scale: Tensor) -> Tensor:
        return scale.view_as(layer.weight_scale).to(layer.weight_scale.device, layer.weight_scale.dtype)

    def codes(scale: Tensor) -> Tensor:
        if grouped is None:
            return fixed
        rounded = torch.div(grouped, scale.to(work)[..., None]).round_()
        return rounded.add_(zero).clamp_(0, 2**form.bits - 1)

    def keep(value: Tensor) -> None:
        scale = stored(value)
        if grouped is not None:
            flat = codes(scale).to(torch.uint8).flatten(-2)[..., : layer.in_features]
            layer.weight_packed.copy_(pack(flat.contiguous(), form.bits))
        layer.weight_scale.copy_(scale)

    def show(value: Tensor) -> None:
        if stand_in is None:
            return keep(value)
        if layer.transform is not None or layer.down is not None or layer.loras:
            keep(value)
            dense = layer.dequantize()
            _write(stand_in, "weight", dense.weight)
            return _write(stand_in, "bias", dense.bias)
        scale = stored(value)
        weight = (
            (codes(scale) - zero).mul_(scale.to(work)[..., None]).flatten(-2)[..., : layer.in_features].contiguous()
        )
        return _write(stand_in, "weight", weight)

    if grouped is not None and not torch.equal(codes(layer.weight_scale), fixed):
        allowed = "'fixed' for a layer that was not rounded to nearest from the float weight at hand"
        raise bad(f"Evolve, `{name}`", "codes", allowed, "nearest")
    return Scales(name, stand_in or layer, layer.weight_scale, show, keep)


def _write(module: nn.Module, name: str, value: Tensor | None) -> None:
    if value is not None:
        parameter = module.get_parameter(name).detach()
        parameter.copy_(value.detach().view_as(parameter))


def of_fake(name: str, module: nn.Module) -> Scales:
    """Return the scales of a module that rounds with its own `scale` and `zero_point`.

    Raises:
        ValueError: It would overwrite them: its observer is on.
    """
    observing = getattr(module, "observer_enabled", None)
    if isinstance(observing, Tensor) and bool(observing.any()):
        raise bad(f"Evolve, `{name}`", "model", "one whose observers are off", "an observer that sets the scale")
    holder = cast(Tensor, module.scale)

    def keep(value: Tensor) -> None:
        holder.data.copy_(value.view_as(holder))

    return Scales(name, module, holder, keep, keep)


def is_fake(module: nn.Module) -> bool:
    """Tell whether a module holds a floating `scale` and a `zero_point`."""
    scale, zero = getattr(module, "scale", None), getattr(module, "zero_point", None)
    return isinstance(scale, Tensor) and isinstance(zero, Tensor) and scale.is_floating_point()


def find_scales(
    root: nn.Module,
    scope: Scope = "all",
    *,
    layers: Mapping[str, QLinear] | None = None,
    sources: Callable[[str], Tensor] | None = None,
) -> dict[str, list[Scales]]:
    """Return the scales in a model, together for layers of one parent: those of an attention, of an MLP.

    Args:
        root: The model or block.
        scope: Which of them.
        layers: Quantized layers that have dense stand-ins in `root`, by name.
        sources: Returns the float weight of a layer, see `of_layer`; None keeps all codes.

    Raises:
        ValueError: A scale is not above zero, or there is none in the scope.
    """
    groups: dict[str, list[Scales]] = {}
    for name, module in root.named_modules():
        layer = (layers or {}).get(name)
        if layer is None and not isinstance(module, QLinear) and not is_fake(module):
            continue
        owner = name if layer is not None or isinstance(module, QLinear) else name.rpartition(".")[0]
        parent = owner.rpartition(".")[0]
        if not _chosen(scope, root, owner, parent, layer or module):
            continue
        if layer is not None or isinstance(module, QLinear):
            source = None if sources is None else sources(name)
            stand_in = None if layer is None else module
            found = of_layer(name, layer or cast(QLinear, module), stand_in, source)
        else:
            found = of_fake(name, module)
        if not bool((found.value > 0).all() & found.value.isfinite().all()):
            raise bad(f"Evolve, `{name}`", "scale", "finite and above 0", found.value.min().item())
        groups.setdefault(parent, []).append(found)
    if not groups:
        raise bad("Evolve", "scope", "one that holds a quantized layer", scope)
    return groups


def _chosen(scope: Scope, root: nn.Module, name: str, parent: str, layer: nn.Module) -> bool:
    if not isinstance(scope, str):
        return bool(scope(name, layer))
    kind = type(root.get_submodule(parent)).__name__
    return scope == "all" or bool(_ATTENTION.search(parent) or _ATTENTION.search(kind))
