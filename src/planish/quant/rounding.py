"""Rounding steps that the papers share: lossy, and honest about it.

A rounding step sees a whole site, already transformed, and returns its new layers.

Legend: O outputs, C channels, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.formats import Affine, Format, Limits, QTensor, affine
from planish.quant.layers import QLinear
from planish.quant.moments import gram
from planish.quant.parts import in_place_of
from planish.quant.sites import Site
from planish.quant.transforms import Shift

if TYPE_CHECKING:
    from planish.quant.engine import Method


def layer_of(site: Site, name: str, weight: QTensor, method: "Method") -> QLinear:
    """Make the quantized layer of one of a site's consumers."""
    bias = getattr(site.consumers[name], "bias", None)
    act = act_of(site, method)
    layer = QLinear.of(weight, None if bias is None else bias.detach(), transform=site.online, act=act)
    return cast(QLinear, in_place_of(site.consumers[name], layer))


def act_of(site: Site, method: "Method") -> Format | None:
    """Return the grid of a site's activations: with zero points where they are, or were shifted, above zero."""
    parts = () if site.online is None else site.online.modules()
    above = site.one_sided or any(isinstance(part, Shift) for part in parts)
    return without_sign(method.act) if above else method.act


def without_sign(act: Format | None) -> Format | None:
    """Return an integer grid with a zero point of its own in every group; any other as it is."""
    return replace(act, symmetric=False) if isinstance(act, Affine) else act


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
        return clipped("Clip", site, method, importance, self.steps, self.least)


def clipped(
    where: str, site: Site, method: "Method", importance: Tensor | None, steps: int, least: float
) -> dict[str, nn.Module]:
    """Round a site's weights within the ranges that lose least; each channel counts with its importance, or alike."""
    grid, layers = affine(where, method.weight), dict[str, nn.Module]()
    for name, weight in site.weights.items():
        counted = weight.new_ones(weight.shape[1]) if importance is None else importance
        limits = best_limits(weight, grid, counted, steps, least)
        layers[name] = layer_of(site, name, grid.encode(weight, limits=limits), method)
    return layers


@dataclass(frozen=True)
class ClipOutput:
    """Round to nearest after shrinking each group's range to where its share of the output loses least.

    Args:
        steps: How many shrink factors are tried; default 20.
        least: The smallest factor; default 0.5.
        unclipped: Last parts of the names of layers that keep their range; default none.
        ends: Then move either end of the range by itself. Default True.
        independence: How far to trust channels to be independent, in [0, 1]: 0 takes their correlations as measured,
            1 ignores them. Default 0.5, as correlations are measured worse than squares.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> ClipOutput(steps=10).ends
        True
    """

    steps: int = 20
    least: float = 0.5
    unclipped: tuple[str, ...] = ()
    ends: bool = True
    independence: float = 0.5

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.steps < 2:
            raise bad("ClipOutput", "steps", "at least 2", self.steps)
        if not 0 < self.least < 1:
            raise bad("ClipOutput", "least", "a float in (0, 1)", self.least)
        if not 0 <= self.independence <= 1:
            raise bad("ClipOutput", "independence", "a float in [0, 1]", self.independence)

    def __call__(self, site: Site, method: "Method") -> dict[str, nn.Module]:
        """Round the site's weights."""
        if site.online is not None:
            raise bad("ClipOutput", "site", "one whose transform was folded", site.name)
        grid = affine("ClipOutput", method.weight)
        square = uncorrelated(gram(site.block, site), self.independence)
        layers: dict[str, nn.Module] = {}
        for name, weight in site.weights.items():
            limits = None
            if name.rpartition(".")[2] not in self.unclipped:
                limits = best_limits(weight, grid, square, self.steps, self.least, ends=self.ends)
            layers[name] = layer_of(site, name, method.weight.encode(weight, limits=limits), method)
        return layers


def uncorrelated(square: Float[Tensor, "channels channels"], independence: float) -> Float[Tensor, "channels channels"]:
    """Shrink the correlations of a matrix of second moments: 0 leaves it as it is, 1 leaves its diagonal alone.

    Example:
        >>> import torch
        >>> uncorrelated(torch.ones(2, 2), 0.5)[0]
        tensor([1.0000, 0.5000])
    """
    return torch.lerp(square, torch.diag(square.diagonal()), independence)


def best_limits(
    weight: Float[Tensor, "out channels"],
    grid: Affine,
    importance: Float[Tensor, "channels"] | Float[Tensor, "channels channels"],
    steps: int = 20,
    least: float = 0.5,
    *,
    ends: bool = False,
) -> Limits:
    """Return the limits of each group that minimise the error which rounding it causes.

    Args:
        weight: W.
        grid: Its format.
        importance: Weight of each channel's error, at or above zero (the mean square of its activation); or the mean
            of x x', with which the error is that of the group's share of the output.
        steps: How many shrink factors from 1 down to `least` are tried.
        least: The smallest factor.
        ends: Then move the low and the high end by themselves, twice; on a symmetric grid there is only one to move.

    Returns:
        (low, high), each (O, G).

    Example:
        >>> import torch
        >>> low, high = best_limits(torch.tensor([[1.0] * 63 + [9.0]]), Affine(2, 64), torch.ones(64))
        >>> bool(high < 9.0)
        True
    """
    low, high = grid.ranges(weight)
    error_of = _error_by_group(weight, grid, importance)
    best, best_low, best_high = error_of(low, high), low, high

    def offer(new_low: Tensor, new_high: Tensor) -> None:
        nonlocal best, best_low, best_high
        error = error_of(new_low, new_high)
        better = error < best
        best = torch.where(better, error, best)
        best_low, best_high = torch.where(better, new_low, best_low), torch.where(better, new_high, best_high)

    for step in range(1, steps):
        factor = 1 - (1 - least) * step / (steps - 1)
        offer(low * factor, high * factor)
    if ends and not grid.symmetric:
        for _ in range(2):
            for move_low, move_high in ((1, 0), (0, 1)):
                now_low, now_high, span = best_low, best_high, best_high - best_low
                for share in _MOVES:
                    step_low, step_high = share * move_low * span, share * move_high * span
                    offer((now_low + step_low).clamp(max=0), (now_high + step_high).clamp(min=0))
    return best_low, best_high


_MOVES = (-0.12, -0.09, -0.06, -0.03, 0.03, 0.06, 0.09, 0.12)


def _error_by_group(
    weight: Float[Tensor, "out channels"], grid: Affine, importance: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that maps limits to each group's error, (O, G)."""
    low, _ = grid.ranges(weight)
    channels, groups = weight.shape[1], low.shape[-1]
    size = grid.group_size or channels
    pad = groups * size - channels
    if importance.ndim == 1:
        weigh = nn.functional.pad(importance.to(low.dtype), (0, pad)).reshape(groups, size)
    else:  # the blocks on the diagonal, one a group
        square = nn.functional.pad(importance.to(low.dtype), (0, pad, 0, pad)).reshape(groups, size, groups, size)
        weigh = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def error_of(new_low: Tensor, new_high: Tensor) -> Tensor:
        gap = grid.fake(weight, limits=(new_low, new_high)).to(low.dtype) - weight
        gap = nn.functional.pad(gap, (0, pad)).reshape(*low.shape, size)
        if weigh.ndim == 2:
            return torch.einsum("ogc,gc->og", gap.square(), weigh)
        by_group = gap.transpose(0, 1)
        return (torch.bmm(by_group, weigh) * by_group).sum(-1).T

    return error_of
