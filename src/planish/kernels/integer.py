"""The ops of integer activations on a CPU: every check, then plain addresses into the compiled module.

Only results in float64, which are to be exact, run on the definition of `qgemm`.
"""

import torch
from torch import Tensor

from planish.kernels import cpu
from planish.kernels.checks import check_qgemm, check_quantize_rows, check_rotate
from planish.kernels.ops import LIBRARY, qgemm_reference, quantize_rows_reference, rotate_reference

_REAL = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _float32(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()


def run_quantize_rows(
    x: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
    clip: float = 1.0,
    instructions: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the compiled `quantize_rows` on checked arguments, with a named instruction set."""
    channels = x.shape[-1]
    size = min(group_size or channels, channels)
    per_row = (*x.shape[:-1], -(-channels // size))
    codes = torch.empty(x.shape, dtype=torch.int8)
    scale, zero = torch.empty(per_row, dtype=torch.float32), torch.empty(per_row, dtype=torch.int8)
    if codes.numel() == 0:
        return codes, scale, zero
    x = (x.to(torch.float32) if x.dtype is torch.float64 else x).contiguous()
    cpu.module().quantize_rows(
        _address(x),
        _address(codes),
        _address(scale),
        _address(zero),
        x.numel() // channels,
        channels,
        size,
        bits,
        symmetric,
        _REAL[x.dtype],
        _REAL[scale_dtype],
        threads or torch.get_num_threads(),
        instructions or cpu.module().active_isa(),
        clip,
    )
    return codes, scale, zero


def run_qgemm(
    xq: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    x_zero: Tensor | None = None,
    x_group_size: int | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    x: Tensor | None = None,
    instructions: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Call the compiled `qgemm` on checked arguments, with a named instruction set; the result is float32."""
    out, channels = packed.shape[0], xq.shape[-1]
    y = torch.empty((*xq.shape[:-1], out), dtype=torch.float32)
    if y.numel() == 0:
        return y
    # The names keep converted copies alive until the call returns.
    xq, x_scale, packed, zero = xq.contiguous(), _float32(x_scale), packed.contiguous(), zero.contiguous()
    scale = _float32(scale) if scale.dtype is torch.float64 else scale.contiguous()
    x_zero = None if x_zero is None else x_zero.contiguous()
    bias = None if bias is None else _float32(bias)
    low, rank = None, 0
    if down is not None and up is not None and x is not None and down.shape[0] > 0:
        low, up, rank = (_float32(x) @ _float32(down).mT).contiguous(), _float32(up), down.shape[0]
    cpu.module().qgemm(
        _address(xq),
        _address(x_scale),
        _address(x_zero),
        _address(packed),
        _address(scale),
        _address(zero),
        _address(bias),
        _address(low),
        _address(up if rank else None),
        _address(y),
        xq.numel() // channels,
        channels,
        out,
        min(group_size, channels),
        min(x_group_size or channels, channels),
        rank,
        bits,
        _REAL[scale.dtype],
        threads or torch.get_num_threads(),
        instructions or cpu.module().active_isa(),
    )
    return y


def run_rotate(
    x: Tensor,
    blocks: Tensor,
    index: Tensor | None,
    *,
    instructions: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Call the compiled `rotate` on checked arguments, with a named instruction set."""
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel() == 0:
        return y
    count, size, _ = blocks.shape
    x = x.contiguous()
    shared = count > 1 and blocks.stride(0) == 0  # one matrix for all blocks, not copied
    blocks = (blocks[:1] if shared else blocks).to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    index = None if index is None else index.to(torch.int64).contiguous()
    cpu.module().rotate(
        _address(x),
        _address(blocks),
        _address(index),
        _address(y),
        x.numel() // x.shape[-1],
        count,
        size,
        0 if shared else size * size,
        _REAL[x.dtype],
        threads or torch.get_num_threads(),
        instructions or cpu.module().active_isa(),
    )
    return y


def _quantize_rows(
    x: Tensor, *, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype, clip: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    run = run_quantize_rows if cpu.compiled("quantize_rows") else quantize_rows_reference
    check_quantize_rows(x, bits, group_size, scale_dtype, clip)
    return run(x, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype, clip=clip)


def _qgemm(
    xq: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    x_zero: Tensor | None,
    x_group_size: int | None,
    down: Tensor | None,
    up: Tensor | None,
    x: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if not cpu.compiled("qgemm") or dtype is torch.float64:
        return qgemm_reference(
            xq, x_scale, packed, scale, zero, bias, bits=bits, group_size=group_size, x_zero=x_zero,
            x_group_size=x_group_size, down=down, up=up, x=x, dtype=dtype,
        )  # fmt: skip
    check_qgemm(xq, x_scale, x_zero, packed, scale, zero, bias, down, up, x, bits, group_size, x_group_size, dtype)
    return run_qgemm(
        xq, x_scale, packed, scale, zero, bias, bits=bits, group_size=group_size, x_zero=x_zero,
        x_group_size=x_group_size, down=down, up=up, x=x,
    ).to(dtype)  # fmt: skip


def _rotate(x: Tensor, blocks: Tensor, index: Tensor | None) -> Tensor:
    run = run_rotate if cpu.compiled("rotate") else rotate_reference
    check_rotate(x, blocks, index)
    return run(x, blocks, index)


LIBRARY.impl("quantize_rows", _quantize_rows, "CPU")
LIBRARY.impl("qgemm", _qgemm, "CPU")
LIBRARY.impl("rotate", _rotate, "CPU")
