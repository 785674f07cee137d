"""By which factor a sample's gradient is multiplied before the sum, and how long it can then be."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad

Normalizer = Literal["max1", "clip", "nsgd", "auto"]
_STABILIZER = 0.01  # of "auto", as its authors have it


def check_normalizer(where: str, normalizer: str, threshold: float) -> None:
    """Refuse a normalizer or threshold that is none.

    Raises:
        ValueError: It is none.
    """
    if normalizer not in get_args(Normalizer):
        raise bad(where, "normalizer", "'max1', 'clip', 'nsgd' or 'auto'", normalizer)
    if not (isinstance(threshold, int | float) and 0 < threshold < math.inf):
        raise bad(where, "threshold", "a finite float > 0", threshold)


def bound(normalizer: Normalizer, threshold: float) -> float:
    """Return the norm that no gradient exceeds after its factor: what noise is measured in."""
    return 1.0 if normalizer in ("max1", "nsgd") else float(threshold)


def factors(norms: Float[Tensor, "samples"], normalizer: Normalizer, threshold: float) -> Float[Tensor, "samples"]:
    """Return a factor a sample; 0 where the norm is not finite."""
    if normalizer == "max1":
        factor = 1 / norms.clamp(min=threshold)
    elif normalizer == "clip":
        factor = (threshold / norms).clamp(max=1.0)  # infinite, then 1, for a gradient of 0
    elif normalizer == "nsgd":
        factor = 1 / (threshold + norms)
    else:
        factor = threshold / (_STABILIZER + norms)
    return torch.where(norms.isfinite(), factor, 0.0)
