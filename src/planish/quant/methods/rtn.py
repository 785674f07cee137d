"""Round to nearest: the baseline of every method."""

from planish.quant.engine import Method
from planish.quant.formats import Affine


def rtn(
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    ragged: bool = False,
    scale_dtype: str = "float16",
) -> Method:
    """Round every weight to the nearest code of its group, without data.

    Args:
        bits: Bits of a weight, 1 to 8; default 4.
        group_size: Input channels that share a scale; None for one scale a row. Default 128.
        symmetric: No zero points. Default False.
        ragged: Allow a shorter last group.
        scale_dtype: See `planish.quant.Affine`.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rtn(bits=3).weight.bits
        3
    """
    return Method("rtn", weight=Affine(bits, group_size, symmetric, ragged, scale_dtype))
