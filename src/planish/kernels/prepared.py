"""Repacked 4-bit weights: made at first use, kept while the weight lives, made anew once it is written to.

The compiled module streams them; `csrc/linear_layout.h` says what lies in them.
"""

import contextlib
import mmap
import weakref
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # ScaleType of csrc/linear.h
_MOST_PADDING = 1.5  # of the codes, where a group is not a multiple of eight channels
_LARGEST_ZERO = 15  # sums of products times the zero point stay within 32 bits
_MIDDLE = 8
_PAGE = 2 << 20
_LARGE = 2 * _PAGE  # bytes from which on large pages are asked for


@dataclass(frozen=True)
class Prepared:
    """A repacked weight and its shape; `data` is None for a weight that the streaming kernels do not take."""

    out: int
    channels: int
    group_size: int
    data: Tensor | None


def _state(t: Tensor) -> tuple[int, int]:
    # A tensor made in inference mode counts no versions; it has an address all the same.
    return t.data_ptr(), -1 if t.is_inference() else t._version


class _Seen:
    """A tensor as it was when last looked at: whether this very one has been written to since."""

    def __init__(self, t: Tensor) -> None:
        self._tensor, self._state = weakref.ref(t), _state(t)

    def is_still(self, t: Tensor) -> bool:
        # An address alone says nothing: the next temporary tensor may get that of the last one.
        return self._tensor() is t and self._state == _state(t)


@dataclass
class _Entry:
    """A prepared weight, and what it was made of; small copies tell equal temporary tensors from others."""

    life: weakref.ref[Tensor]
    packed: _Seen
    scale: _Seen
    zero: _Seen
    values: tuple[Tensor, Tensor]
    weight: Prepared

    def holds(self, packed: Tensor, scale: Tensor, zero: Tensor) -> bool:
        if not self.packed.is_still(packed):
            return False
        if self.scale.is_still(scale) and self.zero.is_still(zero):
            return True
        for held, given in zip(self.values, (scale, zero), strict=True):
            if (held.dtype, held.device) != (given.dtype, given.device) or not torch.equal(held, given):
                return False
        self.scale, self.zero = _Seen(scale), _Seen(zero)
        return True


class Shelf:
    """Prepared weights by the identity of their packed codes.

    Args:
        native: The compiled module.
    """

    def __init__(self, native: ModuleType) -> None:
        self._native = native
        self._kept: dict[int, _Entry] = {}

    def kept(self, packed: Tensor, scale: Tensor, zero: Tensor, channels: int, group_size: int) -> Prepared | None:
        """Return the weight if it is on the shelf; then these tensors were checked when it came there."""
        kept = self._kept.get(id(packed))
        if kept is None or kept.weight.channels != channels or kept.weight.group_size != min(group_size, channels):
            return None
        return kept.weight if kept.holds(packed, scale, zero) else None

    def find(self, packed: Tensor, scale: Tensor, zero: Tensor, channels: int, group_size: int) -> Prepared:
        """Return the prepared weight, from the shelf or made now; arguments are checked already."""
        kept = self.kept(packed, scale, zero, channels, group_size)
        if kept is not None:
            return kept
        key = id(packed)
        weight = self.make(packed, scale, zero, channels, group_size)

        def forget(gone: weakref.ref[Tensor]) -> None:
            here = self._kept.get(key)
            if here is not None and here.life is gone:  # the number may belong to another tensor by now
                del self._kept[key]

        values = scale.detach().clone(), zero.clone()
        life = weakref.ref(packed, forget)
        self._kept[key] = _Entry(life, _Seen(packed), _Seen(scale), _Seen(zero), values, weight)
        return weight

    def make(self, packed: Tensor, scale: Tensor, zero: Tensor, channels: int, group_size: int) -> Prepared:
        """Repack a weight; arguments are checked already."""
        out, size = packed.shape[0], min(group_size, channels)
        groups, rest = divmod(channels, size)
        padded = groups * (-(-size // 8) * 8) + -(-rest // 8) * 8
        streams = out > 0 and padded <= max(_MOST_PADDING * channels, channels + 7)
        if not streams or int(zero.max()) > _LARGEST_ZERO:
            return Prepared(out, channels, size, None)
        scale = (scale if scale.dtype in _TYPES else scale.to(torch.float32)).contiguous()
        packed, zero = packed.contiguous(), zero.contiguous()
        kind, zeros = _TYPES[scale.dtype], not bool((zero == _MIDDLE).all())
        data = aligned(self._native.prepared_bytes(out, channels, size, kind, zeros))
        self._native.prepare(
            packed.data_ptr(),
            scale.data_ptr(),
            kind,
            zero.data_ptr() if zeros else 0,
            out,
            channels,
            size,
            data.data_ptr(),
            torch.get_num_threads(),
        )
        return Prepared(out, channels, size, data)


def aligned(size: int) -> Tensor:
    """Return `size` bytes that begin at a multiple of 64, and of a large page if they fill some: those are read faster.

    The system gives large pages only where it is asked to, and only whole ones.
    """
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        data = torch.empty(size + 63, dtype=torch.uint8)
        return data[-data.data_ptr() % 64 :][:size]
    # private: what is shared, as by default, gets small pages
    room = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = torch.frombuffer(room, dtype=torch.uint8)
    start = -data.data_ptr() % _PAGE
    with contextlib.suppress(OSError):  # a kernel without large pages
        room.madvise(mmap.MADV_HUGEPAGE, start, size // _PAGE * _PAGE)
    return data[start:][:size]
