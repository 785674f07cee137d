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

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_ROUNDED = frozenset({torch.float32, torch.bfloat16, torch.float16})  # activations that `run_prepared` takes
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


def run_kept(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    activation_bits: int,
) -> Tensor | None:
    """Multiply plain tensors by a weight that is prepared already, without the dispatcher; None where that is not it.

    The dispatcher's way into Python and back takes longer than a small product. Nothing that wants to see the op is
    passed by: compilers and tracers, transforms of functorch, modes, profilers. Arguments that the shelf does not know,
    or that do not fit, take the other way, to its checks.
    """
    if _shelf is None or bits != 4 or activation_bits not in {16, 8} or x.dim() < 1 or _watched():
        return None
    if x.dtype not in _ROUNDED or not _plain(x):
        return None
    weight = _shelf.kept(packed, scale, zero, x.shape[-1], group_size)
    if weight is None or weight.data is None:
        return None
    if bias is not None and not (_plain(bias) and bias.dtype in _ROUNDED and tuple(bias.shape) == (weight.out,)):
        return None
    return run_prepared(x, weight, bias, activation_bits=activation_bits)


def _watched() -> bool:
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _plain(t: Tensor) -> bool:
    return type(t) in _PLAIN and t.is_cpu and t.layout is torch.strided and not (t.is_neg() or t._is_zerotensor())


def run_prepared(
    x: Tensor, weight: Prepared, bias: Tensor | None, *, activation_bits: int, threads: int | None = None
) -> Tensor:
    """Multiply by a prepared weight; arguments are checked already."""
    if weight.data is None:
        raise bad("planish.kernels", "weight", "one that could be prepared", weight)
    given = x.dtype
    if given is not torch.float32:  # a conversion to the same costs as much as the call into the compiled module
        x = x.to(torch.float32)
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    y = x.new_empty((*x.shape[:-1], weight.out))
    if y.numel() > 0:
        module().linear(
            weight.data.data_ptr(),
            weight.out,
            weight.channels,
            weight.group_size,
            x.data_ptr(),
            x.numel() // weight.channels,
            weight.channels,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            activation_bits,
            torch.get_num_threads() if threads is None else threads,
        )
    return y if given is torch.float32 else y.to(given)


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
