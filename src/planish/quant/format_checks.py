"""What every format asks of the tensors and sizes that it is given."""

import torch
from torch import Tensor

from planish._support import bad


def working(x: Tensor) -> Tensor:
    """At least float32: ranges and scales are never computed in half precision."""
    if not x.ndim or not x.shape[-1]:
        raise bad("Format.encode", "x", "a tensor with at least one channel", tuple(x.shape))
    return x if x.dtype == torch.float64 else x.float()


def no_division(where: str, channels: int, size: int, beside: str, alone: str) -> ValueError:
    """Build the ValueError of channels that do not divide, with sizes that would do."""
    whole, rest = divmod(channels, size)
    fits = [g for g in (128, 64, 32, 16) if g < size and channels % g == 0]
    hint = f"{fits[0]}{beside}" if fits else alone
    return ValueError(
        f"{where}: {channels} channels cannot be split in groups of {size} "
        f"({channels} = {whole} x {size} + {rest}); use group_size={hint}."
    )


def is_size(value: object) -> bool:
    """Say whether a value can be a number of channels."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_finite(x: Tensor) -> None:
    """Refuse NaN and infinity, and say where the first one is."""
    if not torch.isfinite(x).all():
        where = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise ValueError(f"Format.encode: values must be finite; got {x[tuple(where)].item()} at {where}.")
