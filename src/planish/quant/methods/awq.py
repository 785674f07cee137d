r"""AWQ: every group of layers gets the smoothing that its own module likes best.

The weights that meet large activations matter most. Scaling their columns up before rounding protects them; how far to
go is found for each site by trying, with the output of the module around it (attention, MLP, or the layer itself) as
the judge and the float model's activations as inputs. Then ranges are shrunk where that helps.

    s_j = (mean_t |X_tj|)^r / (mean_o of W_oj relative to its group + 1e-4)^(1 - r),   s / sqrt(max s * min s)

================  =================================  ===========================================
paper             here                               shape, range
================  =================================  ===========================================
r                 ``grid``                           0, 0.05 ... 0.95
s                 ``Scale.scale``                    (channels,), > 0
================  =================================  ===========================================

This is the rule of the authors' later releases (both sizes enter the scale), shipped as a baseline. As there, value and
output projections that do not match one to one (grouped-query attention) are left alone, and queries and keys are not
clipped.

When to use: to compare with; `best` starts from the same local search and goes on.

Reference:
    Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2023.
    https://arxiv.org/abs/2306.00978
"""

from dataclasses import dataclass

import torch

from planish._support import bad
from planish.quant.engine import Method
from planish.quant.formats import Affine
from planish.quant.local import SiteError
from planish.quant.methods.smoothquant_plus import column_size
from planish.quant.rounding import ClipOutput
from planish.quant.sites import Site
from planish.quant.transforms import Scale, Transform

QUERIES_AND_KEYS = ("q_proj", "k_proj", "query", "key")


@dataclass(frozen=True)
class LocalScale:
    """Scale a site by the exponent that hurts the module around it least.

    Args:
        steps: Points of the grid over [0, 1), default 20.
        tokens: How many tokens the module is run on for every point; default 4096.

    Raises:
        ValueError: An argument is below 1.

    Example:
        >>> LocalScale().steps
        20
    """

    steps: int = 20
    tokens: int = 4096

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.steps < 1 or self.tokens < 1:
            raise bad("LocalScale", "steps", "at least 1, with at least 1 token", (self.steps, self.tokens))

    def __call__(self, site: Site, method: Method) -> Transform | None:
        """Return the best scales, or None where nothing one to one could absorb them."""
        if site.producer is None or site.channels is not None:
            return None
        act = site.moments.mean_abs
        weight = column_size(site, method.weight, "group_normalized")
        judge = SiteError(site, self.tokens)
        best, least = None, float("inf")
        for step in range(self.steps):
            r = step / self.steps
            scale = (act.clamp(min=1e-8) ** r / (weight ** (1 - r) + 1e-4)).clamp(min=1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            error = judge.of(method, scale)
            if error < least:
                best, least = scale, error
        return None if best is None else Scale(torch.where(act > 0, best, 1.0))


def awq(
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    ragged: bool = False,
    scale_dtype: str = "float16",
    clip: bool = True,
) -> Method:
    """Scale every site by its own best exponent, clip, and round to nearest: the published baseline.

    Args:
        bits: Bits of a weight; default 4.
        group_size: Input channels that share a scale; None for one scale a row. Default 128.
        symmetric: No zero points. Default False.
        ragged: Allow a shorter last group.
        scale_dtype: See `planish.quant.Affine`.
        clip: Shrink ranges as well. Default True.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> awq(bits=3).weight.bits
        3
    """
    grid = Affine(bits, group_size, symmetric, ragged, scale_dtype)
    if clip:
        step = ClipOutput(unclipped=QUERIES_AND_KEYS, ends=False, independence=0.0)
        return Method("awq", grid, transform=LocalScale(), round=step, feed="float")
    return Method("awq", grid, transform=LocalScale(), feed="float")
