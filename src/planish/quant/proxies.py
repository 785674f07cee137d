"""Noise proxies on the layers of a model: which layers, who shares an input, on and off again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from planish._support import bad
from planish.quant.budget import Part
from planish.quant.formats import Affine
from planish.quant.noise import NoiseProxy, best_alpha
from planish.quant.sites import stays_float
from planish.quant.stacks import find_stacks
from planish.quant.stream import call_model

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Call = tuple[Tensor, Tensor]
"""What entered a layer and what left it."""
_INPUT = "input_proxy"


def weight_in(layer: nn.Module) -> Tensor:
    """Return a layer's own weight parameter."""
    return layer.get_parameter("weight")


def rounded_layers(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    """Return linears of 16 outputs and more inside the blocks, and convolutions there, by full name."""
    found: dict[str, nn.Module] = {}
    for names, modules in find_stacks(model):
        for prefix, block in zip(names, modules, strict=True):
            for inner, module in block.named_modules():
                name = ".".join(part for part in (prefix, inner) if part)
                if any(fnmatchcase(name, p) or name.endswith("." + p) for p in skip):
                    continue
                if isinstance(module, CONVOLUTIONS) or (isinstance(module, nn.Linear) and not stays_float(module)):
                    found[name] = module
    return found


@torch.no_grad()
def trace(model: nn.Module, layers: dict[str, nn.Module], sample: Any) -> dict[str, Call]:  # noqa: ANN401
    """Run a model once in eval mode and return what entered and left its layers, in order of execution.

    Raises:
        ValueError: A weight or an input is not finite; the sentence names the layer.
    """
    calls: dict[str, Call] = {}
    handles = []
    for name, layer in layers.items():
        if not torch.isfinite(weight_in(layer)).all():
            raise ValueError(f"attach, `{name}`: its weight holds NaN or Inf.")

        def record(_m: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> None:
            if not torch.isfinite(args[0]).all():
                raise ValueError(f"attach, `{name}`: its input holds NaN or Inf.")
            calls.setdefault(name, (args[0], out))

        handles.append(layer.register_forward_hook(record))
    try:
        with _modes_kept(model):
            call_model(model.eval(), sample)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def memory_of(x: Tensor) -> tuple[int, int, int]:
    """What tells one tensor from another, whatever shape it is viewed in."""
    return x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel()


def groups_of(name: str, layer: nn.Module, grid: Affine) -> int:
    """Return how many groups a row of a weight has, or say which layer does not divide."""
    try:
        return grid.n_groups(weight_in(layer)[0].numel())
    except ValueError as error:
        raise ValueError(f"attach, `{name}`: {str(error).removeprefix('Affine: ')}") from None


def put(layer: nn.Module, part: Part, shape: tuple[int, ...], call: Call, **options: Any) -> None:  # noqa: ANN401
    """Put the proxies of its weight and, if it has a width, of its input on a layer.

    Args:
        layer: The layer.
        part: Its widths.
        shape: Of the weight's ranges: () for one, or (outputs, groups).
        call: What entered and left it, for the input's range.
        **options: Of `NoiseProxy`.
    """
    weight = weight_in(layer).detach()
    rows = weight.float().reshape(*(shape or (1,)), -1)
    proxy = NoiseProxy(best_alpha(rows, part.weight.whole).reshape(shape), part.weight, **options)
    proxy.to(weight.device)
    parametrize.register_parametrization(layer, "weight", proxy.eval())
    if part.inputs is not None:
        x = call[0].detach().float()
        signed = bool((x < 0).any())
        alpha = best_alpha(x.reshape(1, -1), part.inputs.whole, signed=signed).reshape(())
        inner = NoiseProxy(alpha, part.inputs, signed=signed, **{**options, "scale_dtype": None})
        layer.add_module(_INPUT, inner.to(weight.device))
        layer.register_forward_pre_hook(_round_input)
    layer.train(layer.training)


def _round_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(nn.Module, getattr(layer, _INPUT))(args[0]), *args[1:])


def proxy_of(layer: nn.Module) -> NoiseProxy:
    """Return the proxy of a layer's weight."""
    return cast(NoiseProxy, layer.parametrizations.weight[0])  # type: ignore[union-attr, index]


def take_off(layer: nn.Module) -> None:
    """Remove a layer's proxies; its weight becomes the trained one."""
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    if hasattr(layer, _INPUT):
        delattr(layer, _INPUT)
        hooks = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _round_input]:
            del hooks[key]


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def renew_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Estimate the running statistics of batch norms anew, as plain means over the batches.

    Raises:
        ValueError: There are no batches.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    data = list(batches)
    if not data:
        raise bad("freeze", "batches", "at least one batch, or None", [])
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with _modes_kept(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        try:
            for batch in data:
                call_model(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
