"""The four ops: schema, definition and shape rule of each.

A definition here is short, slow and obviously right; it runs on any device and dtype, and every fast kernel is tested
against it. PyTorch's dispatcher is the registry: a fast kernel overrides the definition for its device and nothing else
changes.

    I, O    channels in and out           G   groups of a row, ceil(I / group_size); the last may be shorter
    codes   unsigned, packed along I as one little-endian stream of bits, in int32 words (4 bits: eight to a word)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from planish.kernels.checks import (
    check_qgemm,
    check_quantize_rows,
    check_rotate,
    check_w4a16,
    groups,
)

LIBRARY = torch.library.Library("planish", "DEF")
LIBRARY.define(
    "w4a16(Tensor x, Tensor packed, Tensor scale, Tensor zero, Tensor? bias, *, int bits, int group_size, "
    "int? activation_bits=None) -> Tensor"
)
LIBRARY.define(
    "quantize_rows(Tensor x, *, int bits, int? group_size, bool symmetric, ScalarType scale_dtype, float clip=1.0)"
    " -> (Tensor codes, Tensor scale, Tensor zero)"
)
LIBRARY.define(
    "qgemm(Tensor xq, Tensor x_scale, Tensor packed, Tensor scale, Tensor zero, Tensor? bias, *, int bits, "
    "int group_size, Tensor? x_zero, int? x_group_size, Tensor? down, Tensor? up, Tensor? x, ScalarType dtype)"
    " -> Tensor"
)
LIBRARY.define("rotate(Tensor x, Tensor blocks, Tensor? index) -> Tensor")


def unpack(packed: Tensor, bits: int, channels: int) -> Tensor:
    """Read the first `channels` unsigned codes of each row of a packed stream: (O, words) int32 -> (O, I) int32."""
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
        return ((packed.unsqueeze(-1) >> shifts) & mask).flatten(-2)[:, :channels]
    start = torch.arange(channels, device=packed.device) * bits
    stream = F.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))  # a code may straddle two words
    low, high = stream[:, start // 32], stream[:, start // 32 + 1]
    return (((low >> start % 32) | (high << (32 - start % 32))) & mask).to(torch.int32)


def _spread(per_group: Tensor, group_size: int, channels: int) -> Tensor:
    return per_group.repeat_interleave(min(group_size, channels), dim=-1)[..., :channels]


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    bits: int,
    group_size: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight (codes - zero) * scale that a packed stream stands for, (O, I), computed in `dtype`."""
    codes = unpack(packed, bits, channels) - _spread(zero.to(torch.int32), group_size, channels)
    return codes.to(dtype) * _spread(scale.to(dtype), group_size, channels)


def w4a16_reference(
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
    """Define `w4a16`: the weight in float32, cast to the activation's dtype, times the activation.

    `activation_bits` allows a kernel to round the activation and obliges none to: the definition does not.
    """
    check_w4a16(x, packed, scale, zero, bias, bits, group_size, activation_bits)
    weight = dequantize(packed, scale, zero, bits=bits, group_size=group_size, channels=x.shape[-1])
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def quantize_rows_reference(
    x: Tensor, *, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype, clip: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Define `quantize_rows`: x is close to (codes - zero) * scale, group by group, and 0 is exact."""
    check_quantize_rows(x, bits, group_size, scale_dtype, clip)
    channels = x.shape[-1]
    size = min(group_size or channels, channels)
    count = groups(channels, size)
    x_ng = F.pad(x.to(torch.float32), (0, count * size - channels)).unflatten(-1, (count, size))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    least, most = x_ng.amin(-1).clamp_max(0) * clip, x_ng.amax(-1).clamp_min(0) * clip
    # symmetric: half a step short of the extremes, so that both ends are within half a step of a code
    span = torch.maximum(-least, most) / (high + 0.5) if symmetric else (most - least) / (high - low)
    stored = span.to(scale_dtype).to(torch.float32).clamp_min(torch.finfo(scale_dtype).smallest_normal)
    scale = torch.where(span == 0, 1.0, stored)
    origin = torch.zeros_like(scale) if symmetric else torch.round(-least / scale) + low
    zero = origin.nan_to_num(0).clamp(low, high)
    # A non-finite activation leaves a non-finite scale: whatever is computed from its code, 0, is not finite either.
    codes = (torch.round(x_ng / scale.unsqueeze(-1)) + zero.unsqueeze(-1)).nan_to_num(0).clamp(low, high)
    return codes.to(torch.int8).flatten(-2)[..., :channels].contiguous(), scale, zero.to(torch.int8)


def qgemm_reference(
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
    """Define `qgemm`: in float64, where the integer products are exact, and rounded once."""
    check_qgemm(xq, x_scale, x_zero, packed, scale, zero, bias, down, up, x, bits, group_size, x_group_size, dtype)
    channels = xq.shape[-1]
    size = x_group_size or channels
    codes = xq.to(torch.float64)
    if x_zero is not None:
        codes = codes - _spread(x_zero.to(torch.float64), size, channels)
    weight = dequantize(packed, scale, zero, bits=bits, group_size=group_size, channels=channels, dtype=torch.float64)
    y = (codes * _spread(x_scale.to(torch.float64), size, channels)) @ weight.mT
    if down is not None and up is not None and x is not None:
        y = y + x.to(torch.float64) @ down.to(torch.float64).mT @ up.to(torch.float64).mT
    if bias is not None:
        y = y + bias.to(torch.float64)
    return y.to(dtype)


def rotate_reference(x: Tensor, blocks: Tensor, index: Tensor | None) -> Tensor:
    """Define `rotate`: y[k B + j] = sum_i x[index[k B + i]] blocks[k, i, j], at float32 or better, rounded once."""
    check_rotate(x, blocks, index)
    count, size, _ = blocks.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    x_kb = (x if index is None else x.index_select(-1, index)).to(wide).unflatten(-1, (count, size))
    return torch.einsum("...ki,kij->...kj", x_kb, blocks.to(wide)).flatten(-2).to(x.dtype)


def _w4a16_shape(
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
    check_w4a16(x, packed, scale, zero, bias, bits, group_size, activation_bits)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _quantize_rows_shape(
    x: Tensor, *, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype, clip: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    check_quantize_rows(x, bits, group_size, scale_dtype, clip)
    per_row = (*x.shape[:-1], groups(x.shape[-1], group_size or x.shape[-1]))
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(per_row, dtype=torch.float32),
        x.new_empty(per_row, dtype=torch.int8),
    )


def _qgemm_shape(
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
    check_qgemm(xq, x_scale, x_zero, packed, scale, zero, bias, down, up, x, bits, group_size, x_group_size, dtype)
    return xq.new_empty((*xq.shape[:-1], packed.shape[0]), dtype=dtype)


def _rotate_shape(x: Tensor, blocks: Tensor, index: Tensor | None) -> Tensor:
    check_rotate(x, blocks, index)
    return x.new_empty(x.shape)


for _name, _reference, _shape in (
    ("w4a16", w4a16_reference, _w4a16_shape),
    ("quantize_rows", quantize_rows_reference, _quantize_rows_shape),
    ("qgemm", qgemm_reference, _qgemm_shape),
    ("rotate", rotate_reference, _rotate_shape),
):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"planish::{_name}", _shape, lib=LIBRARY)
