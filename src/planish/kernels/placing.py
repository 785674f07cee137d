"""Where the weights of a compiled decoder lie: divided among threads, each part's in the order in which it is read.

A layer's rows are divided by tiles, so that every thread makes its own outputs from memory of its own. The slices of
one part lie one behind another through all layers: what is fetched ahead at the end of one begins the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from planish._support import bad
from planish.kernels import cpu
from planish.kernels.checks import check_w4a16
from planish.kernels.prepared import aligned

TILE = 32  # rows that kernels take together
SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_WHERE = "planish.kernels.NativeDecoder"


def instructions() -> str:
    """Return the instruction set in use."""
    return str(cpu.module().active_isa())


def absence() -> str:
    """Return why there is no compiled module, empty where there is one."""
    return "" if cpu._native is not None else cpu.absence


@dataclass(frozen=True)
class Matrix:
    """One linear layer: 4-bit codes as `w4a16` takes them, or dense rows in float32, float16 or bfloat16."""

    out: int
    channels: int
    dense: Tensor | None = None
    packed: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    group_size: int = 0
    bias: Tensor | None = None


class Arena:
    """Prepared weights in the order in which one thread streams them, on large pages where the system has them."""

    def __init__(self) -> None:
        self.size = 0
        self.memory: Tensor | None = None

    def place(self, size: int) -> int:
        """Reserve bytes and return their offset."""
        offset, self.size = self.size, self.size + -(-size // 64) * 64
        return offset

    def open(self) -> None:
        """Allocate what was reserved."""
        if self.size == 0:
            return
        self.memory = aligned(self.size)


@dataclass(frozen=True)
class Slice:
    """Rows [first, last) of a matrix, whose outputs go to `column`, at `offset` of their part's arena."""

    matrix: Matrix
    first: int
    last: int
    column: int
    offset: int


def check_matrix(m: Matrix, channels: int) -> None:
    """Refuse a layer whose tensors do not fit each other, or take other channels."""
    if m.channels != channels or (m.dense is None) == (m.packed is None):
        raise bad(_WHERE, "matrices", f"of {channels} channels, dense or packed", (m.out, m.channels))
    if m.dense is not None:
        if tuple(m.dense.shape) != (m.out, channels):
            raise bad(_WHERE, "matrices", f"({m.out}, {channels})", tuple(m.dense.shape))
        return
    if not 1 <= m.group_size <= channels or m.scale is None:
        raise bad(_WHERE, "group_size", f"between 1 and {channels}, with scales", m.group_size)
    x = torch.empty(1, channels)
    zero = torch.empty(m.scale.shape, dtype=torch.uint8) if m.zero is None else m.zero
    check_w4a16(x, cast(Tensor, m.packed), m.scale, zero, None, 4, m.group_size, 16)


def rows_of(matrices: Sequence[Matrix], start: int, stop: int) -> list[tuple[Matrix, int, int, int]]:
    """Find rows [start, stop) of matrices that lie one below another: matrix, its first and last row, the column."""
    found, base = [], 0
    for m in matrices:
        first, last = max(start - base, 0), min(stop - base, m.out)
        if first < last:
            found.append((m, first, last, base + first))
        base += m.out
    return found


def reserve(arena: Arena, m: Matrix, first: int, last: int, column: int) -> Slice:
    """Reserve memory for some rows of a layer."""
    offset = 0
    if m.packed is not None and m.scale is not None:
        kind = SCALES.get(m.scale.dtype, 0)
        size = cpu.module().prepared_bytes(last - first, m.channels, m.group_size, kind, m.zero is not None)
        offset = arena.place(size)
    return Slice(m, first, last, column, offset)
