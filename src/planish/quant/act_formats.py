"""Formats that only activations have: two scales by sign, and ranges known before the value is; all formats by name.

Legend: R rows (all leading axes), C channels (the last axis).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.quant.format_checks import check_finite, working
from planish.quant.formats import FP4, Affine, Format, Limits, QTensor


@dataclass(frozen=True, repr=False)
class Dual(Format):
    """Integers with one scale for negative and one for other values, a pair for each row.

    For activations whose two sides differ much, as after SiLU or GELU. A product with integer weights is two integer
    products, one a side, without a zero point.

    Args:
        bits: Bits of a code, 2 to 8; default 8.
        unsigned: Give each side all 2^bits codes, as its sign is known: both steps halve at the same cost. A code then
            has a bit more, its side. Default False, as published: the two sides share the codes of one integer.

    Source: SegQuant (arXiv 2507.14811), dual-scale activation quantization.

    Example:
        >>> import torch
        >>> Dual(8).fake(torch.tensor([[-0.25, 0.0, 10.0]])).tolist()
        [[-0.25, 0.0, 10.0]]
    """

    bits: int = 8
    unsigned: bool = False

    def __repr__(self) -> str:
        """Return the fields; `unsigned` only where it is."""
        return f"Dual(bits={self.bits}{', unsigned=True' if self.unsigned else ''})"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise bad("Dual", "bits", "an integer from 2 to 8", self.bits)

    @property
    def last(self) -> tuple[int, int]:
        """Magnitude of the last code of either side: of negative and of other values."""
        half = 1 << (self.bits - 1)
        return (2 * half - 1, 2 * half - 1) if self.unsigned else (half, half - 1)

    def encode(self, x: Float[Tensor, "*rows channels"], *, limits: Limits | None = None) -> QTensor:
        """Round to the grid; see `Format.encode`."""
        work = working(x)
        check_finite(work)
        if limits is None:
            low, high = work.amin(-1, keepdim=True).clamp(max=0), work.amax(-1, keepdim=True).clamp(min=0)
        else:
            low, high = limits[0].clamp(max=0), limits[1].clamp(min=0)
        below, above = self.last
        scale = torch.cat([-low / below, high / above], -1)
        scale = torch.where(scale > 0, scale, 1.0)
        codes = torch.where(work < 0, work / scale[..., :1], work / scale[..., 1:]).round_().clamp_(-below, above)
        kind = torch.int16 if self.unsigned else torch.uint8
        return QTensor(codes=(codes + below).to(kind), scale=scale, zero=None, format=self)

    def decode(self, q: QTensor) -> Float[Tensor, "*rows channels"]:
        """Return the values of the codes; see `Format.decode`."""
        codes = q.codes.to(q.scale.dtype) - self.last[0]
        return torch.where(codes < 0, codes * q.scale[..., :1], codes * q.scale[..., 1:])


@dataclass(frozen=True)
class Static(Format):
    """A grid whose range is fixed beforehand, one for all tokens: nothing is looked at when values are rounded.

    Args:
        grid: What is fixed: an `Affine` grid with one group, or `Dual`.
        low: Lowest value in range, at most 0.
        high: Highest value in range, at least 0. What lies beyond either gets the last code.

    Raises:
        ValueError: An argument is out of range.

    Source: SegQuant (arXiv 2507.14811): static scales a tensor, from the largest magnitudes of calibration.

    Example:
        >>> import torch
        >>> Static(Affine(8, None, scale_dtype="float32"), -1.0, 1.55).fake(torch.tensor([[0.123, 9.0]])).tolist()[0][1]
        1.5499999523162842
    """

    grid: Affine | Dual
    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.grid, Affine | Dual) or getattr(self.grid, "group_size", None) is not None:
            raise bad("Static", "grid", "Dual, or Affine with group_size=None", self.grid)
        for name, value, sign in (("low", self.low, -1), ("high", self.high, 1)):
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value * sign < 0:
                raise bad("Static", name, f"finite and {'at most' if sign < 0 else 'at least'} 0", value)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.grid.bits

    def _limits(self, x: Tensor) -> Limits:
        kind = torch.promote_types(x.dtype, torch.float32)
        return torch.tensor([self.low], dtype=kind, device=x.device), torch.tensor(
            [self.high], dtype=kind, device=x.device
        )

    def encode(self, x: Float[Tensor, "*rows channels"], *, limits: Limits | None = None) -> QTensor:
        """Round to the grid; see `Format.encode`. Other `limits` than its own are used where they are given."""
        made = self.grid.encode(x, limits=limits or self._limits(x))
        rows = x.shape[:-1]
        scale = made.scale.expand(*rows, made.scale.shape[-1])
        zero = None if made.zero is None else made.zero.expand(*rows, made.zero.shape[-1])
        return QTensor(made.codes, scale, zero, self)

    def decode(self, q: QTensor) -> Float[Tensor, "*rows channels"]:
        """Return the values of the codes; see `Format.decode`."""
        return self.grid.decode(q)

    def fake(
        self, x: Float[Tensor, "*rows channels"], *, limits: Limits | None = None
    ) -> Float[Tensor, "*rows channels"]:
        """Round to the grid and come back, in the dtype of `x`."""
        return self.grid.fake(x, limits=limits or self._limits(x))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able description."""
        return {"kind": "Static", "grid": self.grid.to_dict(), "low": self.low, "high": self.high}


def format_from_dict(description: dict[str, Any]) -> Format:
    """Rebuild a format from `Format.to_dict`; ValueError on anything else.

    Example:
        >>> format_from_dict(Affine(3, 64).to_dict())
        Affine(bits=3, group_size=64, symmetric=False, ragged=False, scale_dtype='float16')
    """
    kinds: dict[str, type[Format]] = {"Affine": Affine, "FP4": FP4, "Dual": Dual, "Static": Static}
    fields = dict(description) if isinstance(description, dict) else {}
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds or not set(fields) <= set(kinds[kind].__dataclass_fields__):
        raise bad("format_from_dict", "description", f"what Format.to_dict returns ({', '.join(kinds)})", description)
    if kind == "Static" and isinstance(fields.get("grid"), dict) and fields["grid"].get("kind") in ("Affine", "Dual"):
        fields["grid"] = format_from_dict(fields["grid"])
    return kinds[kind](**fields)
