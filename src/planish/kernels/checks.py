"""What each op demands of its arguments, in the house's one sentence; behind these checks are raw addresses."""

import torch
from torch import Tensor

from planish._support import bad

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_SCALES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def groups(channels: int, group_size: int) -> int:
    """Count the groups of a row; the last one may be shorter."""
    return -(-channels // group_size)


def words(channels: int, bits: int) -> int:
    """Count the 32-bit words that hold a row of codes."""
    return -(-channels * bits // 32)


def _tensor(op: str, name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(t.shape) != shape:
        raise bad(op, name, f"of shape {shape}", tuple(t.shape))
    if t.device != device:
        raise bad(op, name, f"on {device} like the input", str(t.device))


def _floating(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in _FLOATS:
        raise bad(op, name, "float32, bfloat16, float16 or float64", t.dtype)


def _weight(
    op: str,
    channels: int,
    device: torch.device,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    if not 1 <= bits <= 8:
        raise bad(op, "bits", "an int in [1, 8]", bits)
    if group_size < 1:
        raise bad(op, "group_size", "an int >= 1", group_size)
    if packed.dim() != 2 or packed.dtype != torch.int32:
        raise bad(op, "packed", "an int32 matrix (out, words)", (packed.dtype, tuple(packed.shape)))
    out = packed.shape[0]
    _tensor(op, "packed", packed, (out, words(channels, bits)), device)
    _floating(op, "scale", scale)
    _tensor(op, "scale", scale, (out, groups(channels, group_size)), device)
    if zero.dtype != torch.uint8:
        raise bad(op, "zero", "uint8", zero.dtype)
    _tensor(op, "zero", zero, (out, groups(channels, group_size)), device)
    if bias is not None:
        _floating(op, "bias", bias)
        _tensor(op, "bias", bias, (out,), device)


def _channels(op: str, name: str, x: Tensor) -> int:
    if x.dim() < 1 or x.shape[-1] < 1:
        raise bad(op, name, "a tensor of at least one channel", tuple(x.shape))
    return x.shape[-1]


def check_w4a16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    activation_bits: int | None,
) -> None:
    """Refuse what `w4a16` cannot multiply."""
    if activation_bits not in {None, 16, 8}:
        raise bad("w4a16", "activation_bits", "None, 16 or 8", activation_bits)
    _floating("w4a16", "x", x)
    _weight("w4a16", _channels("w4a16", "x", x), x.device, packed, scale, zero, bias, bits, group_size)


def check_quantize_rows(
    x: Tensor, bits: int, group_size: int | None, scale_dtype: torch.dtype, clip: float = 1.0
) -> None:
    """Refuse what `quantize_rows` cannot encode."""
    _floating("quantize_rows", "x", x)
    _channels("quantize_rows", "x", x)
    if not 2 <= bits <= 8:
        raise bad("quantize_rows", "bits", "an int in [2, 8]", bits)
    if group_size is not None and group_size < 1:
        raise bad("quantize_rows", "group_size", "None or an int >= 1", group_size)
    if scale_dtype not in _SCALES:
        raise bad("quantize_rows", "scale_dtype", "float32, bfloat16 or float16", scale_dtype)
    if not 0 < clip <= 1:
        raise bad("quantize_rows", "clip", "a float in (0, 1]", clip)


def check_qgemm(
    xq: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    x: Tensor | None,
    bits: int,
    group_size: int,
    x_group_size: int | None,
    dtype: torch.dtype,
) -> None:
    """Refuse what `qgemm` cannot multiply."""
    if xq.dtype != torch.int8:
        raise bad("qgemm", "xq", "int8", xq.dtype)
    channels = _channels("qgemm", "xq", xq)
    if x_group_size is not None and x_group_size < 1:
        raise bad("qgemm", "x_group_size", "None or an int >= 1", x_group_size)
    if dtype not in _FLOATS:
        raise bad("qgemm", "dtype", "float32, bfloat16, float16 or float64", dtype)
    _weight("qgemm", channels, xq.device, packed, scale, zero, bias, bits, group_size)
    per_row = (*xq.shape[:-1], groups(channels, x_group_size or channels))
    _floating("qgemm", "x_scale", x_scale)
    _tensor("qgemm", "x_scale", x_scale, per_row, xq.device)
    if x_zero is not None:
        if x_zero.dtype != torch.int8:
            raise bad("qgemm", "x_zero", "int8", x_zero.dtype)
        _tensor("qgemm", "x_zero", x_zero, per_row, xq.device)
    if (down is None, up is None, x is None) not in {(True, True, True), (False, False, False)}:
        raise bad("qgemm", "down, up, x", "all given or all None", [t is not None for t in (down, up, x)])
    if down is not None and up is not None and x is not None:
        for name, t in (("down", down), ("up", up), ("x", x)):
            _floating("qgemm", name, t)
        if down.dim() != 2:
            raise bad("qgemm", "down", "a matrix (rank, channels)", tuple(down.shape))
        _tensor("qgemm", "down", down, (down.shape[0], channels), xq.device)
        _tensor("qgemm", "up", up, (packed.shape[0], down.shape[0]), xq.device)
        _tensor("qgemm", "x", x, tuple(xq.shape), xq.device)


def check_rotate(x: Tensor, blocks: Tensor, index: Tensor | None) -> None:
    """Refuse what `rotate` cannot turn."""
    _floating("rotate", "x", x)
    _floating("rotate", "blocks", blocks)
    channels = _channels("rotate", "x", x)
    if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2]:
        raise bad("rotate", "blocks", "of shape (count, size, size)", tuple(blocks.shape))
    if blocks.shape[0] * blocks.shape[1] != channels:
        raise bad("rotate", "blocks", f"blocks that cover {channels} channels", tuple(blocks.shape))
    _tensor("rotate", "blocks", blocks, tuple(blocks.shape), x.device)
    if index is not None:
        if index.dtype not in {torch.int64, torch.int32}:
            raise bad("rotate", "index", "int64 or int32", index.dtype)
        _tensor("rotate", "index", index, (channels,), x.device)
