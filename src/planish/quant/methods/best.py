"""The strongest recipe without training: smoothing by the mean square, then rounding that compensates."""

from planish.quant.engine import Method
from planish.quant.formats import Affine
from planish.quant.methods.gptq import Compensate
from planish.quant.methods.smoothquant_plus import Smooth


def best(
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    ragged: bool = False,
    scale_dtype: str = "float16",
) -> Method:
    """Smooth, then round with compensation, clipped ranges and refitted scales.

    Args:
        bits: Bits of a weight; default 4.
        group_size: Input channels that share a scale; None for one scale a row. Default 128.
        symmetric: No zero points. Default False.
        ragged: Allow a shorter last group.
        scale_dtype: See `planish.quant.Affine`.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> best(bits=4, group_size=64).name
        'best'
    """
    grid = Affine(bits, group_size, symmetric, ragged, scale_dtype)
    smooth = Smooth(0.5, act_stat="rms", weight_stat="group_normalized")
    return Method("best", grid, transform=smooth, round=Compensate(clip=True, rounds=2))
