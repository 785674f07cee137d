"""The ops on a CPU: every check, then plain addresses into the compiled module.

Addresses instead of DLPack arrays: a call costs microseconds, and a decoder makes hundreds of calls a token.
"""

from types import ModuleType

import torch
from torch import Tensor

from planish import _compiled
from planish._support import bad, warn_once
from planish.kernels.checks import check_w4a16
from planish.kernels.ops import LIBRARY, w4a16_reference
from planish.kernels.prepared import Prepared, Shelf

_native, absence, isa = _compiled.native, _compiled.absence, _compiled.isa
_shelf = None if _native is None else Shelf(_native)


def module() -> ModuleType:
    """Return the compiled module.

    Raises:
        ImportError: There is none; the message says why.
    """
    if _native is None:
        raise ImportError(f"planish.kernels: the compiled module is absent ({absence}).")
    return _native


def compiled(op: str) -> bool:
    """Say whether there is a compiled module; warn once for an op that runs without."""
    if _native is None:
        warn_once(
            f"planish.kernels: the compiled module is absent, so {op} runs on the slow reference; "
            f"reinstall planish where a C++17 compiler is found ({absence})."
        )
    return _native is not None


def _w4a16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    activation_bits: int | None = None,
) -> Tensor:
    if compiled("w4a16") and _shelf is not None and bits == 4:
        check_w4a16(x, packed, scale, zero, bias, bits, group_size, activation_bits)
        if activation_bits is not None and x.dtype is not torch.float64:
            weight = _shelf.find(packed, scale, zero, x.shape[-1], group_size)
            if weight.data is not None:
                return run_prepared(x, weight, bias, activation_bits=activation_bits)
        if x.dtype is torch.float32:
            return run_w4a16(x, packed, scale, zero, bias, group_size=group_size, instructions=isa)
    return w4a16_reference(
        x, packed, scale, zero, bias, bits=bits, group_size=group_size, activation_bits=activation_bits
    )


def run_prepared(
    x: Tensor, weight: Prepared, bias: Tensor | None, *, activation_bits: int, threads: int | None = None
) -> Tensor:
    """Multiply by a prepared weight; arguments are checked already."""
    if weight.data is None:
        raise bad("planish.kernels", "weight", "one that could be prepared", weight)
    x_f = x.to(torch.float32).contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    y = x_f.new_empty((*x.shape[:-1], weight.out))
    if y.numel() > 0:
        module().linear(
            weight.data.data_ptr(),
            weight.out,
            weight.channels,
            weight.group_size,
            x_f.data_ptr(),
            x.numel() // weight.channels,
            weight.channels,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            activation_bits,
            torch.get_num_threads() if threads is None else threads,
        )
    return y.to(x.dtype)


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
    out, channels = packed.shape[0], x.shape[-1]
    # The names keep converted copies alive until the call returns.
    x, packed, zero = x.contiguous(), packed.contiguous(), zero.contiguous()
    scale = scale.to(torch.float32).contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    if y.numel() == 0:
        return y
    module().w4a16(
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
