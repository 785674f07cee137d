"""Rounding steps that the papers share: lossy, and honest about it.

A rounding step sees a whole site, already transformed, and returns its new layers.

Legend: O outputs, C channels, G groups.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.formats import Affine, Limits, QTensor
from planish.quant.layers import QLinear
from planish.quant.sites import Site

if TYPE_CHECKING:
    from planish.quant.engine import Method


def layer_of(site: Site, name: str, weight: QTensor, method: "Method") -> QLinear:
    """Make the quantized layer of one of a site's consumers."""
    bias = getattr(site.consumers[name], "bias", None)
    return QLinear.of(weight, None if bias is None else bias.detach(), transform=site.online, act=method.act)


@dataclass(frozen=True)
class Nearest:
    """Round every weight to the nearest code; the group's own extremes set the range.

    Example:
        >>> Nearest()
        Nearest()
    """

    def __call__(self, site: Site, method: "Method") -> dict[str, nn.Module]:
        """Round the site's weights."""
        return {n: layer_of(site, n, method.weight.encode(w), method) for n, w in site.weights.items()}

    def values(self, site: Site, method: "Method") -> dict[str, Float[Tensor, "out channels"]]:
        """Return what the rounded weights stand for, without making layers of them: all that a trial needs."""
        return {n: method.weight.fake(w) for n, w in site.weights.items()}


@dataclass(frozen=True)
class Clip:
    """Round to nearest after shrinking each group's range to where the weighted squared error is least.

    Args:
        steps: How many shrink factors are tried, from 1 downwards; default 20.
        least: The smallest of them, in (0, 1); default 0.5.

    Each weight's error counts with the mean square of the activation that it meets.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> Clip(steps=10)
        Clip(steps=10, least=0.5)
    """

    steps: int = 20
    least: float = 0.5

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.steps < 2:
            raise bad("Clip", "steps", "at least 2", self.steps)
        if not 0 < self.least < 1:
            raise bad("Clip", "least", "a float in (0, 1)", self.least)

    def __call__(self, site: Site, method: "Method") -> dict[str, nn.Module]:
        """Round the site's weights."""
        importance = site.moments.second_moment
        if site.online is not None:
            raise bad("Clip", "site", "one whose transform was folded", site.name)
        layers: dict[str, nn.Module] = {}
        for name, weight in site.weights.items():
            limits = best_limits(weight, method.weight, importance, self.steps, self.least)
            layers[name] = layer_of(site, name, method.weight.encode(weight, limits=limits), method)
        return layers


def best_limits(
    weight: Float[Tensor, "out channels"],
    grid: Affine,
    importance: Float[Tensor, "channels"] | Float[Tensor, "channels channels"],
    steps: int = 20,
    least: float = 0.5,
) -> Limits:
    """Return the limits of each group that minimise the error which rounding it causes.

    Args:
        weight: W.
        grid: Its format.
        importance: Weight of each channel's error, at or above zero (the mean square of its activation); or the mean
            of x x', with which the error is that of the group's share of the output.
        steps: How many shrink factors from 1 down to `least` are tried.
        least: The smallest factor.

    Returns:
        (low, high), each (O, G).

    Example:
        >>> import torch
        >>> low, high = best_limits(torch.tensor([[1.0] * 63 + [9.0]]), Affine(2, 64), torch.ones(64))
        >>> bool(high < 9.0)
        True
    """
    low, high = grid.ranges(weight)
    channels = weight.shape[1]
    size = grid.group_size or channels
    pad = low.shape[-1] * size - channels
    groups = low.shape[-1]
    if importance.ndim == 1:
        weigh = nn.functional.pad(importance.to(low.dtype), (0, pad)).reshape(groups, size)
    else:  # the blocks on the diagonal, one a group
        square = nn.functional.pad(importance.to(low.dtype), (0, pad, 0, pad)).reshape(groups, size, groups, size)
        weigh = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    best_low, best_high = low.clone(), high.clone()
    best: Tensor | None = None
    for step in range(steps):
        factor = 1 - (1 - least) * step / (steps - 1)
        gap = grid.fake(weight, limits=(low * factor, high * factor)).to(low.dtype) - weight
        gap = nn.functional.pad(gap, (0, pad)).reshape(*low.shape, size)
        if weigh.ndim == 2:
            error = torch.einsum("ogc,gc->og", gap.square(), weigh)
        else:
            error = (torch.bmm(gap.transpose(0, 1), weigh) * gap.transpose(0, 1)).sum(-1).T
        if best is None:
            best = error
            continue
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * factor, best_low)
        best_high = torch.where(better, high * factor, best_high)
    return best_low, best_high
