"""The ops on a CPU: every check, then plain addresses into the compiled module.

Addresses instead of DLPack arrays: a call costs microseconds, and a decoder makes hundreds of calls a token.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from planish._support import warn_once
from planish.kernels.checks import check_w4a16
from planish.kernels.ops import LIBRARY, w4a16_reference


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("planish.kernels._native"), ""
    except ImportError as error:
        return None, str(error)


_native, absence = _load()
isa: str = _native.best_isa() if _native is not None else "none"


def _w4a16(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    if _native is None:
        warn_once(
            "planish.kernels: the compiled module is absent, so 4-bit layers run on the slow reference; "
            f"reinstall planish where a C++17 compiler is found ({absence})."
        )
    if _native is None or bits != 4 or x.dtype is not torch.float32:
        return w4a16_reference(x, packed, scale, zero, bias, bits=bits, group_size=group_size)
    check_w4a16(x, packed, scale, zero, bias, bits, group_size)
    return run_w4a16(x, packed, scale, zero, bias, group_size=group_size, instructions=isa)


def run_w4a16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    *,
    group_size: int,
    instructions: str,
    threads: int | None = None,
) -> Tensor:
    """Call the compiled `w4a16` on checked arguments (float32, 4 bits), with a named instruction set."""
    if _native is None:
        raise ImportError(f"planish.kernels: the compiled module is absent ({absence}).")
    out, channels = packed.shape[0], x.shape[-1]
    # The names keep converted copies alive until the call returns.
    x, packed, zero = x.contiguous(), packed.contiguous(), zero.contiguous()
    scale = scale.to(torch.float32).contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    if y.numel() == 0:
        return y
    _native.w4a16(
        x.data_ptr(),
        packed.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // channels,
        channels,
        out,
        min(group_size, channels),
        torch.get_num_threads() if threads is None else threads,
        instructions,
    )
    return y


LIBRARY.impl("w4a16", _w4a16, "CPU")
