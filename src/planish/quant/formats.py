"""What a number may be: grids, and tensors represented on them.

A format says how many bits a value has and which neighbours share a scale; it knows nothing of files or kernels.
Groups run along the last axis. Every grid represents zero exactly.

Legend: R rows (all leading axes), C channels (the last axis), G groups.
"""

import abc
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from planish._support import bad
from planish.quant.format_checks import check_finite, is_size, no_division, working

Limits: TypeAlias = tuple[Tensor, Tensor]
"""Lowest and highest value each group must reach, both of shape (*rows, G); zero is always included."""

SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_LATER = {"clip": 1.0, "per_tensor": False, "unsigned": False}  # files written before there were these do not name them
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1 magnitudes, by code


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor as a value: integer codes, the scales of their groups, and the format that reads them.

    Attributes:
        codes: Codes in the tensor's own shape, unsigned and one byte each; of two bytes where they have nine bits.
        scale: Scales, (*rows, G); (G,) where all rows share them.
        zero: Code that stands for zero, as the scales; None where the format fixes it.
        format: The format that made it.

    Example:
        >>> q = Affine(bits=4, group_size=2).encode(torch.tensor([[0.0, 15.0, -7.0, 8.0]]))
        >>> q.codes.tolist(), q.scale.shape, q.decode().tolist()
        ([[0, 15, 0, 15]], torch.Size([1, 2]), [[0.0, 15.0, -7.0, 8.0]])
    """

    codes: Integer[Tensor, "*rows channels"]
    scale: Float[Tensor, "*scales groups"]
    zero: UInt8[Tensor, "*scales groups"] | None
    format: "Format"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that is represented."""
        return tuple(self.codes.shape)

    def rows(self, part: slice) -> "QTensor":
        """Return some rows of a matrix."""
        zero = None if self.zero is None else self.zero[part]
        return QTensor(self.codes[part], self.scale[part], zero, self.format)

    def decode(self) -> Tensor:
        """Return the values, in the scale's precision and at least float32."""
        return self.format.decode(self)


@dataclass(frozen=True)
class Format(abc.ABC):
    """The grid on which a tensor is represented: how many bits, which neighbours share a scale."""

    @abc.abstractmethod
    def encode(self, x: Float[Tensor, "*rows channels"], *, limits: Limits | None = None) -> QTensor:
        """Round a tensor to the grid; the data's own extremes set the range unless `limits` are given."""

    @abc.abstractmethod
    def decode(self, q: QTensor) -> Float[Tensor, "*rows channels"]:
        """Return the values that the codes stand for."""

    def fake(
        self, x: Float[Tensor, "*rows channels"], *, limits: Limits | None = None
    ) -> Float[Tensor, "*rows channels"]:
        """Round to the grid and come back, in the dtype of `x`."""
        return self.decode(self.encode(x, limits=limits)).to(x.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able description; `format_from_dict` reads it."""
        fields = {name: value for name, value in asdict(self).items() if _LATER.get(name, self) != value}
        return {"kind": type(self).__name__, **fields}


def _cut(grouped: Tensor, channels: int) -> Tensor:
    """Return (*rows, channels) of (*rows, G, group) without a ragged group's padding.

    Rows lie one behind the other: some products of matrices are a hundred times slower where they lie apart.
    """
    return grouped.flatten(-2)[..., :channels].contiguous()


@dataclass(frozen=True, repr=False)
class Affine(Format):
    """Evenly spaced integers: value = (code - zero) * scale.

    Args:
        bits: Bits of a code, 1 to 8; default 4.
        group_size: Neighbouring channels that share a scale; None shares one over the whole row. Default 128.
        symmetric: Fix zero in the middle of the codes (no zero points to store). Default False.
        ragged: Allow a shorter last group where `group_size` does not divide the channels. Stock engines cannot read
            such layers, so it is off by default and the division is checked.
        scale_dtype: Precision in which scales are stored: "float16" (default), "bfloat16", "float32", "float64".
            Scales are rounded first and the codes chosen for the rounded scale.
        clip: Share of a group's own range that the codes span, in (0, 1]: what lies beyond goes to the last code.
            Default 1, all of it.
        per_tensor: Let every group of every row have the scale that the whole tensor needs. Default False.

    Raises:
        ValueError: An argument is out of range; on `encode`, a value is not finite or the channels do not divide.

    Source: group-wise round to nearest, SmoothQuant+ (arXiv 2312.03788), step 4; codes are clamped as well.

    Example:
        >>> import torch
        >>> q = Affine(4, group_size=4).encode(torch.tensor([[-1.0, 0.0, 0.4, 2.0]]))
        >>> q.codes.tolist(), q.zero.tolist()
        ([[0, 5, 7, 15]], [[5]])
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    ragged: bool = False
    scale_dtype: str = "float16"
    clip: float = 1.0
    per_tensor: bool = False

    def __repr__(self) -> str:
        """Return the fields; `clip` and `per_tensor` only where they do something."""
        silent = {name for name, value in _LATER.items() if getattr(self, name, None) == value}
        shown = [f for f in self.__dataclass_fields__ if f not in silent]
        return f"Affine({', '.join(f'{f}={getattr(self, f)!r}' for f in shown)})"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.clip, int | float) or isinstance(self.clip, bool) or not 0 < self.clip <= 1:
            raise bad("Affine", "clip", "a float in (0, 1]", self.clip)
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= 8:
            raise bad("Affine", "bits", "an integer from 1 to 8", self.bits)
        if self.group_size is not None and not is_size(self.group_size):
            raise bad("Affine", "group_size", "a positive integer or None (one scale a row)", self.group_size)
        if self.scale_dtype not in SCALE_DTYPES:
            raise bad("Affine", "scale_dtype", f"one of {', '.join(SCALE_DTYPES)}", self.scale_dtype)

    @property
    def middle(self) -> int:
        """The code that stands for zero when the format is symmetric."""
        return 1 << (self.bits - 1)

    def n_groups(self, channels: int) -> int:
        """Return how many groups a row of `channels` has, or raise ValueError where they do not divide."""
        size = self.group_size or channels
        if channels % size and not self.ragged:
            raise no_division("Affine", channels, size, ", None, or ragged=True", "None or ragged=True")
        return -(-channels // size)

    def _grouped(self, x: Tensor) -> tuple[Tensor, int]:
        """View as (*rows, G, group), padding a ragged last group with zeros, which no range can miss."""
        channels = x.shape[-1]
        groups = self.n_groups(channels)
        size = self.group_size or channels
        pad = groups * size - channels
        if pad:
            x = torch.nn.functional.pad(x, (0, pad))
        return x.reshape(*x.shape[:-1], groups, size), channels

    def ranges(self, x: Float[Tensor, "*rows channels"]) -> Limits:
        """Return the lowest and highest value of each group, zero included, times `clip`."""
        return self._ends(self._grouped(working(x))[0])

    def _ends(self, grouped: Tensor) -> Limits:
        low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
        if self.per_tensor and low.numel():
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        return (low, high) if self.clip == 1 else (low * self.clip, high * self.clip)

    def scales(self, limits: Limits) -> tuple[Tensor, Tensor]:
        """Return the rounded scale of each group and the code of zero, as floats of the working precision."""
        low, high = limits[0].clamp(max=0), limits[1].clamp(min=0)
        if self.symmetric:
            # half a step short of the extremes: both ends are within half a step of a code
            scale = torch.maximum(-low, high) / (self.middle - 0.5)
        else:
            scale = (high - low) / (2**self.bits - 1)
        stored = SCALE_DTYPES[self.scale_dtype]
        rounded = scale.to(stored)
        if torch.isinf(rounded).any():
            raise ValueError(
                f"Affine: a scale of {scale.max().item():.3g} does not fit {self.scale_dtype}; "
                "use scale_dtype='float32'."
            )
        tiny = torch.finfo(stored).smallest_normal
        rounded = torch.where(scale > 0, rounded.clamp(min=tiny), torch.ones_like(rounded)).to(scale.dtype)
        if self.symmetric:
            return rounded, torch.full_like(rounded, self.middle)
        return rounded, torch.round(-low / rounded).clamp_(0, 2**self.bits - 1)

    def encode(self, x: Float[Tensor, "*rows channels"], *, limits: Limits | None = None) -> QTensor:
        """Round to the grid; see `Format.encode`."""
        work = working(x)
        check_finite(work)
        grouped, channels = self._grouped(work)
        if limits is None:
            limits = self._ends(grouped)
        scale, zero = self.scales(limits)
        codes = torch.div(grouped, scale[..., None]).round_().add_(zero[..., None]).clamp_(0, 2**self.bits - 1)
        return QTensor(
            codes=_cut(codes.to(torch.uint8), channels),
            scale=scale.to(SCALE_DTYPES[self.scale_dtype]),
            zero=None if self.symmetric else zero.to(torch.uint8),
            format=self,
        )

    def fake(
        self, x: Float[Tensor, "*rows channels"], *, limits: Limits | None = None
    ) -> Float[Tensor, "*rows channels"]:
        """Round to the grid and come back; the same values as encode and decode, without the integer copy."""
        work = working(x)
        check_finite(work)
        grouped, channels = self._grouped(work)
        if limits is None:
            limits = self._ends(grouped)
        scale, zero = (t[..., None] for t in self.scales(limits))
        codes = torch.div(grouped, scale).round_().add_(zero).clamp_(0, 2**self.bits - 1)
        return _cut(codes.sub_(zero).mul_(scale), channels).to(x.dtype)

    def decode(self, q: QTensor) -> Float[Tensor, "*rows channels"]:
        """Return the values of the codes; see `Format.decode`."""
        scale = q.scale.to(torch.promote_types(q.scale.dtype, torch.float32))
        grouped, channels = self._grouped(q.codes.to(scale.dtype))
        zero = scale.new_full((), self.middle) if q.zero is None else q.zero.to(scale.dtype)[..., None]
        return _cut(grouped.sub_(zero).mul_(scale[..., None]), channels)  # of a copy: codes are integers


@dataclass(frozen=True)
class FP4(Format):
    """Four-bit floats (e2m1) with one e4m3 scale a group, as NVFP4 has them.

    Args:
        group_size: Neighbouring channels that share a scale; default 16.

    Raises:
        ValueError: `group_size` is not a positive integer; on `encode`, a value is not finite or the channels do not
            divide.

    The scale of the whole tensor is a power of two, so that the stored scale (e4m3 times that power) is exact in
    float32 and both factors can be told apart again.

    Example:
        >>> import torch
        >>> FP4().fake(torch.tensor([[6.0, 2.4, -0.2, 0.0] * 4]))[0, :4].tolist()
        [6.0, 2.0, 0.0, 0.0]
    """

    group_size: int = 16

    bits = 4
    symmetric = True
    middle = 8
    scale_dtype = "float8_e4m3fn"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not is_size(self.group_size):
            raise bad("FP4", "group_size", "a positive integer", self.group_size)

    def n_groups(self, channels: int) -> int:
        """Return how many groups a row of `channels` has, or raise ValueError where they do not divide."""
        if channels % self.group_size:
            other = f"a divisor of {channels}"
            raise no_division("FP4", channels, self.group_size, f" or {other}", other)
        return channels // self.group_size

    def _grouped(self, x: Tensor) -> Tensor:
        """View as (*rows, G, group)."""
        self.n_groups(x.shape[-1])
        grouped: Tensor = x.unflatten(-1, (-1, self.group_size))
        return grouped

    def encode(self, x: Float[Tensor, "*rows channels"], *, limits: Limits | None = None) -> QTensor:
        """Round to the grid; see `Format.encode`."""
        work = working(x).float()
        check_finite(work)
        grouped = self._grouped(work)
        top = grouped.abs().amax(-1) if limits is None else torch.maximum(limits[0].abs(), limits[1].abs()).float()
        scale = top / 6.0
        most = scale.amax() if scale.numel() else scale.new_zeros(())
        outer = outer_scale(most)
        scale = (scale / outer).to(torch.float8_e4m3fn).float()
        scale = torch.where(scale > 0, scale, 2.0**-9) * outer  # smallest e4m3: an all-zero group stays zero
        values = torch.tensor(FP4_VALUES, device=x.device)
        ratio = grouped / scale[..., None]
        magnitude = torch.bucketize(ratio.abs().contiguous(), (values[1:] + values[:-1]) / 2)
        sign = torch.where((ratio < 0) & (magnitude > 0), 8, 0)
        codes = (magnitude + sign).to(torch.uint8).flatten(-2)
        return QTensor(codes=codes, scale=scale, zero=None, format=self)

    def decode(self, q: QTensor) -> Float[Tensor, "*rows channels"]:
        """Return the values of the codes; see `Format.decode`."""
        values = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], device=q.codes.device)
        return (self._grouped(values[q.codes.long()]) * q.scale[..., None]).flatten(-2)


def outer_scale(most: Tensor) -> Tensor:
    """Return the power of two that brings the largest scale just within e4m3."""
    return torch.exp2(torch.ceil(torch.log2(most.float().clamp(min=1e-30) / 448.0)))


Weight: TypeAlias = Affine | FP4
"""What a weight may be."""


def affine(where: str, grid: Weight) -> Affine:
    """Return the grid of a weight where a step can handle integers alone.

    Raises:
        ValueError: It is another.
    """
    if not isinstance(grid, Affine):
        raise bad(where, "weight", "a grid of integers (Affine)", grid)
    return grid
