"""Activations as integers that `kernels.qgemm` multiplies: what each format's codes are made of.

A grid with one scale a group is one term. `Dual` is two, one for each sign: their codes are never both non-zero in a
place, so that the sum of two integer products is the product with the rounded activation, and no zero point is needed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from planish import kernels
from planish.quant.act_formats import Dual, Static
from planish.quant.formats import FP4, SCALE_DTYPES, Affine, Format
from planish.quant.fp4 import halves


@dataclass(frozen=True)
class Term:
    """One factor of an integer product: x is the sum over terms of (codes - zero) * scale.

    Attributes:
        codes: Signed codes.
        scale: Scales of rows, or of groups of rows.
        zero: Codes that stand for zero; None for 0.
        group_size: Channels that share a scale; None for all of a row.
    """

    codes: Int8[Tensor, "*rows channels"]
    scale: Float[Tensor, "*rows groups"]
    zero: Int8[Tensor, "*rows groups"] | None
    group_size: int | None = None


def has_integers(act: Format | None) -> bool:
    """Tell whether activations on a grid can be multiplied as integers.

    Example:
        >>> has_integers(Affine(8, None)), has_integers(Affine(8, None, scale_dtype="float64"))
        (True, False)
    """
    grid = act.grid if isinstance(act, Static) else act
    if isinstance(grid, Affine):
        return grid.bits >= 2 and grid.scale_dtype != "float64"
    return isinstance(grid, FP4 | Dual)


def terms(act: Format, x: Float[Tensor, "*rows channels"]) -> tuple[Term, ...]:
    """Encode an activation on a grid, as integers.

    Args:
        act: A grid for which `has_integers`.
        x: The activation.

    Returns:
        The terms whose products are to be summed: two for `Dual`, else one.

    Raises:
        ValueError: The channels do not divide into groups, or a value is not finite; an `Affine` grid that looks at
            its rows answers that with a scale that is not finite.

    Example:
        >>> both = terms(Dual(8), torch.tensor([[-128.0, 127.0, 0.0]]))
        >>> [t.codes.tolist() for t in both]
        [[[-128, 0, 0]], [[0, 127, 0]]]
    """
    if isinstance(act, FP4):
        encoded = act.encode(x)
        return (Term(halves(encoded.codes), encoded.scale / 2, None, act.group_size),)
    if isinstance(act, Affine) and not act.per_tensor:
        act.n_groups(x.shape[-1])  # says what does not divide
        codes, scale, zero = kernels.quantize_rows(
            x, bits=act.bits, group_size=act.group_size, symmetric=act.symmetric,
            scale_dtype=SCALE_DTYPES[act.scale_dtype], clip=act.clip,
        )  # fmt: skip
        return (Term(codes, scale, None if act.symmetric else zero, act.group_size),)
    grid, encoded = act.grid if isinstance(act, Static) else act, act.encode(x)
    if isinstance(grid, Dual):
        return _sides(grid, encoded.codes.to(torch.int16) - grid.last[0], encoded.scale)
    if not isinstance(grid, Affine):
        raise TypeError(f"terms: {act!r} has no integers")
    middle = grid.middle  # codes are unsigned: an int8 holds them less the middle one
    origin = None if encoded.zero is None else (encoded.zero.to(torch.int16) - middle).to(torch.int8).contiguous()
    codes = (encoded.codes.to(torch.int16) - middle).to(torch.int8)
    return (Term(codes, encoded.scale.float().contiguous(), origin, grid.group_size),)


def _sides(grid: Dual, codes: Tensor, scale: Tensor) -> tuple[Term, ...]:
    """Split signed codes by sign; where a side has more of them than an int8 holds, its zero moves to an end."""
    made = []
    zero: Tensor | None
    for column, part in ((0, codes.clamp(max=0)), (1, codes.clamp(min=0))):
        step = scale[..., column : column + 1].float().contiguous()
        zero, origin = None, -128 if column else 127
        if grid.last[column] > 128 - column:
            zero = torch.full_like(step, origin, dtype=torch.int8)
        shifted = part if zero is None else part + origin
        made.append(Term(shifted.to(torch.int8), step, zero))
    return tuple(made)
