"""Four-bit floats as the rest of the house wants them: integers for the kernels, two factors of a scale for a file."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from planish._support import bad
from planish.quant.formats import FP4_VALUES, outer_scale

_TWICE = [int(2 * v) for v in FP4_VALUES]


def halves(codes: Tensor) -> Int8[Tensor, "*rows channels"]:
    """Return twice the value of each e2m1 code, an integer from -12 to 12: kernels take it at half the scale.

    Example:
        >>> halves(torch.tensor([1, 3, 15])).tolist()
        [1, 3, -12]
    """
    return torch.tensor([*_TWICE, *(-v for v in _TWICE)], dtype=torch.int8, device=codes.device)[codes.long()]


def split_scale(scale: Float[Tensor, "rows groups"]) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, ""]]:
    """Return scales as e4m3, and the power of two that belongs to all of them.

    Raises:
        ValueError: They are no such product.

    Example:
        >>> inner, outer = split_scale(torch.tensor([[1.0, 0.125]]))
        >>> inner.dtype, outer.item()
        (torch.float8_e4m3fn, 0.00390625)
    """
    outer = outer_scale(scale.amax())
    inner = (scale / outer).to(torch.float8_e4m3fn)
    if not torch.equal(inner.float() * outer, scale.float()):
        raise bad("split_scale", "scale", "e4m3 values times one power of two", "others")
    return inner, outer
