"""Integer codes as bit streams: the layout that checkpoints and kernels share.

Row by row, little-endian: element i of a row occupies bits i*bits to (i+1)*bits of the row's stream of 32-bit words,
so widths that do not divide 32 run across words. At 4 bits, element 8k+j lies in bits 4j to 4j+3 of word k.
This is the layout of compressed-tensors' `pack-quantized`.
"""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from planish._support import bad


def n_words(columns: int, bits: int) -> int:
    """Return how many 32-bit words a row of `columns` codes takes."""
    return -(-columns * bits // 32)


def pack(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Pack unsigned codes densely along their last axis.

    Args:
        codes: Values below 2**bits.
        bits: Bits of a code, 1 to 8.

    Returns:
        Words of 32 bits; what is left over at a row's end is zero.

    Raises:
        ValueError: `bits` is out of range, or a code does not fit.

    Example:
        >>> hex(pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).item())
        '0xf21'
    """
    _check_bits("pack", bits)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise bad("pack", "codes", f"below {1 << bits} for {bits} bits", int(codes.max()))
    rows, columns = codes.shape
    words = n_words(columns, bits)
    if 32 % bits == 0:
        each = 32 // bits
        padded = torch.nn.functional.pad(codes, (0, words * each - columns)).reshape(rows, words, each)
        packed = torch.zeros(rows, words, dtype=torch.int32, device=codes.device)
        for i in range(each):
            packed |= padded[..., i].to(torch.int32) << (bits * i)
        return packed
    stream = (codes[..., None] >> torch.arange(bits, device=codes.device, dtype=torch.uint8)) & 1
    stream = torch.nn.functional.pad(stream.flatten(1), (0, words * 32 - columns * bits)).reshape(rows, words, 32)
    packed = torch.zeros(rows, words, dtype=torch.int32, device=codes.device)
    for i in range(32):
        packed |= stream[..., i].to(torch.int32) << i
    return packed


def unpack(packed: Int32[Tensor, "rows words"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """Undo `pack`.

    Args:
        packed: Words of 32 bits.
        bits: Bits of a code, 1 to 8.
        columns: Codes in a row.

    Returns:
        The codes, one byte each.

    Raises:
        ValueError: `bits` is out of range or `columns` codes do not take this many words.

    Example:
        >>> unpack(pack(torch.tensor([[1, 2, 7]], dtype=torch.uint8), 3), 3, 3).tolist()
        [[1, 2, 7]]
    """
    _check_bits("unpack", bits)
    if packed.ndim != 2 or packed.shape[1] != n_words(columns, bits):
        shape = f"(rows, {n_words(columns, bits)}) for {columns} codes of {bits} bits"
        raise bad("unpack", "packed", shape, tuple(packed.shape))
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        each = 32 // bits
        shifts = torch.arange(each, device=packed.device, dtype=torch.int32) * bits
        codes = (packed[..., None] >> shifts) & mask
        return codes.to(torch.uint8).flatten(1)[:, :columns]
    first = torch.arange(columns, device=packed.device) * bits
    word, offset = first // 32, first % 32
    wide = torch.nn.functional.pad(packed, (0, 1)).to(torch.int64) & 0xFFFFFFFF
    pair = wide[:, word] | (wide[:, word + 1] << 32)  # 63 bits are enough: offset + bits <= 39
    return ((pair >> offset) & mask).to(torch.uint8)


def _check_bits(where: str, bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise bad(where, "bits", "an integer from 1 to 8", bits)
