"""How a block computes while it is processed: in float32 whatever it is stored in, and by the quickest dense kernel."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class Dense(nn.Linear):
    """An `nn.Linear` that a block holds while it is processed: the same function by the quickest kernel there is."""

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Return x W' + b."""
        return linear(x, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*rows out"]:
    """Return x W' + b by the quickest dense kernel.

    For shapes that come again and again: oneDNN compiles a kernel for each.

    Example:
        >>> linear(torch.ones(1, 2), torch.ones(3, 2)).tolist()
        [[2.0, 2.0, 2.0]]
    """
    if onednn_is_quicker() and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel():
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return nn.functional.linear(x, weight, bias)


@cache
def onednn_is_quicker() -> bool:
    """Tell whether oneDNN multiplies float32 matrices faster here than the BLAS that PyTorch calls.

    PyTorch's BLAS (MKL) does not use AVX-512 on processors of another make than its own; oneDNN does. The answer
    depends on the machine alone, so that a resumed run computes the same bits.

    Example:
        >>> onednn_is_quicker() in (True, False)
        True
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()[:4096]


def widen(module: nn.Module) -> dict[str, torch.dtype]:
    """Turn half-precision parameters and buffers to float32, in place, and dense layers to their quick form.

    Returns:
        The precision in which each is stored, by name; `restore` takes it.
    """
    stored = {name: tensor.dtype for name, tensor in _tensors(module)}
    try:
        for _, tensor in _tensors(module):
            if tensor.dtype in HALF:
                tensor.data = tensor.data.float()
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = Dense  # the same parameters, another forward
    except BaseException:  # no memory for it, or somebody is tired of waiting
        restore(module, stored)
        raise
    return stored


def restore(module: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
    """Undo `widen`; parameters that it did not see stay as they are."""
    for name, tensor in _tensors(module):
        if stored.get(name) in HALF:
            tensor.data = tensor.data.to(stored[name])
    for part in module.modules():
        if type(part) is Dense:
            cast(nn.Module, part).__class__ = nn.Linear


def round_off(
    module: nn.Module, stored: Mapping[str, torch.dtype], prefix: str = "", but: frozenset[str] = frozenset()
) -> None:
    """Give what stays in float the values that it will have once stored, so that no later step is surprised.

    Args:
        module: The block, or one of its new layers.
        stored: What `widen` returned.
        prefix: Name of the layer in the block, with a dot, when `module` is a layer.
        but: Layers that are not to be touched: stand-ins of quantized ones.
    """
    for name, tensor in _tensors(module):
        full = prefix + name
        if stored.get(full) in HALF and full.rpartition(".")[0] not in but:
            tensor.data = tensor.data.to(stored[full]).float()


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
