"""The unit in the compiled module: one pass forward, one pass back, for float32 on a processor.

The plain formulas of `planish.nn.unit` are the definition. This is taken by rule (`fits`) and equals them to rounding.
"""

import torch
from torch import Tensor, nn

from planish._compiled import isa, native
from planish.nn.profiles import PROFILES

_NUMBERS = {kernel: number for number, kernel in enumerate(PROFILES)}  # as the compiled module numbers them
_TYPES = (Tensor, nn.Parameter)


def fits(x: Tensor, *parameters: Tensor) -> bool:
    """Tell whether the compiled module takes these: plain float32 numbers on a processor, and parameters there.

    Not inside a transform of functorch, nor under a dispatch mode (tracing by `make_fx`, counting of operations): they
    would not see what is done.
    """
    if native is None or x.dtype is not torch.float32 or not x.numel():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(
        type(t) in _TYPES
        and t.is_cpu
        and t.layout is torch.strided
        and not (t.is_neg() or t._is_zerotensor() or wrapped(t))
        for t in (x, *parameters)
    )


def wrapped(t: Tensor) -> bool:
    """Tell whether a tensor stands for a batch of them, or for one of a transform: its numbers lie elsewhere."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._C._functorch.is_legacy_batchedtensor(t))


def forward(x: Tensor, slope: Tensor, sigma: Tensor, kernel: str, channel_dim: int) -> Tensor:
    """Return the unit, with the strides of x where that is dense."""
    out = torch.empty_like(x)
    _run(_like(x, out), None, out, slope, sigma, kernel, channel_dim, None, None)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    slope: Tensor,
    sigma: Tensor,
    kernel: str,
    channel_dim: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients by x, slope and sigma, each where it is wanted."""
    out = torch.empty_like(x)
    by_slope, by_sigma = (
        torch.empty(p.shape, dtype=torch.float32) if want else None
        for p, want in zip((slope, sigma), wanted[1:3], strict=True)
    )
    into = out if wanted[0] else None
    _run(_like(x, out), _like(grad, out), into, slope, sigma, kernel, channel_dim, by_slope, by_sigma)
    return (
        into,
        None if by_slope is None else by_slope.to(slope.dtype),
        None if by_sigma is None else by_sigma.to(sigma.dtype),
    )


def _like(t: Tensor, dense: Tensor) -> Tensor:
    """Return t in float32 and in the order of a dense tensor: itself, or a copy."""
    if t.dtype is torch.float32 and (t.stride() == dense.stride() or (t.is_contiguous() and dense.is_contiguous())):
        return t
    return torch.empty_like(dense).copy_(t)


def _run(
    x: Tensor,
    grad: Tensor | None,
    out: Tensor | None,
    slope: Tensor,
    sigma: Tensor,
    kernel: str,
    channel_dim: int,
    by_slope: Tensor | None,
    by_sigma: Tensor | None,
) -> None:
    if native is None:
        raise ImportError("planish.nn: the compiled module is absent.")
    # The names keep converted copies alive until the call returns.
    slope, sigma = (p if p.dtype is torch.float32 else p.to(torch.float32) for p in (slope, sigma))
    slope, sigma = slope.contiguous(), sigma.contiguous()
    count, channels = x.numel(), max(slope.numel(), sigma.numel())
    inner = count if channels == 1 else x.stride(channel_dim)  # of a dense tensor: what is faster than the channels
    native.smoothed(
        x.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if out is None else out.data_ptr(),
        slope.data_ptr(),
        slope.numel(),
        sigma.data_ptr(),
        sigma.numel(),
        count // (channels * inner),
        channels,
        inner,
        0 if by_slope is None else by_slope.data_ptr(),
        0 if by_sigma is None else by_sigma.data_ptr(),
        _NUMBERS[kernel],
        torch.get_num_threads(),
        isa,
    )
