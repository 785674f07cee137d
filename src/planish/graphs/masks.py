"""Which entries are samples: the protocols of the literature, and parts hidden on purpose."""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from planish._support import bad


def random_mask(
    valid: Bool[Tensor, "N M"], fraction: int | float, *, generator: torch.Generator | None = None
) -> Bool[Tensor, "N M"]:
    """Sample round(fraction N) nodes at each time, at random among those that are valid there.

    Args:
        valid: Which entries have a value.
        fraction: Of all nodes, in (0, 1].
        generator: Source of randomness, on the CPU.

    Raises:
        ValueError: The fraction is out of range.

    Example:
        >>> mask = random_mask(torch.ones(10, 3, dtype=torch.bool), 0.4, generator=torch.Generator().manual_seed(0))
        >>> mask.sum(0)
        tensor([4, 4, 4])
    """
    count = _count("random_mask", fraction, len(valid))
    order = torch.rand(valid.shape, generator=generator, dtype=torch.float64).to(valid.device)
    rank = torch.where(valid, order, 2.0).argsort(0).argsort(0)
    return valid & (rank < count)


def snapshot_mask(
    valid: Bool[Tensor, "N M"], fraction: int | float, *, generator: torch.Generator | None = None
) -> Bool[Tensor, "N M"]:
    """Sample all nodes at round(fraction M) times, drawn at random; at the other times nobody looks.

    Args:
        valid: Which entries have a value.
        fraction: Of all times, in (0, 1].
        generator: Source of randomness, on the CPU.

    Raises:
        ValueError: The fraction is out of range.

    Example:
        >>> mask = snapshot_mask(torch.ones(2, 10, dtype=torch.bool), 0.3, generator=torch.Generator().manual_seed(0))
        >>> int(mask[0].sum()), bool((mask[0] == mask[1]).all())
        (3, True)
    """
    count = _count("snapshot_mask", fraction, valid.shape[1])
    chosen = torch.randperm(valid.shape[1], generator=generator)[:count].to(valid.device)
    times = torch.zeros(valid.shape[1], dtype=torch.bool, device=valid.device)
    times[chosen] = True
    return valid & times


def forecast_mask(valid: Bool[Tensor, "N M"], horizon: int) -> Bool[Tensor, "N M"]:
    """Sample everything but the last times.

    Args:
        valid: Which entries have a value.
        horizon: Times at the end without samples, in [1, M - 1].

    Raises:
        ValueError: The horizon is out of range.

    Example:
        >>> forecast_mask(torch.ones(1, 4, dtype=torch.bool), 1)
        tensor([[ True,  True,  True, False]])
    """
    m = valid.shape[1]
    if not isinstance(horizon, int) or not 1 <= horizon < m:
        raise bad("forecast_mask", "horizon", f"an int in [1, {m - 1}]", horizon)
    return valid & (torch.arange(m, device=valid.device) < m - horizon)


def hide(
    mask: Bool[Tensor, "N M"], fraction: int | float, *, generator: torch.Generator | None = None
) -> Bool[Tensor, "N M"]:
    """Choose a part of the samples to be hidden: at least one, and not all.

    Args:
        mask: Which entries are samples, two at least.
        fraction: Of the samples, in (0, 1).
        generator: Source of randomness, on the CPU.

    Raises:
        ValueError: The fraction is out of range, or there are fewer than two samples.

    Example:
        >>> hidden = hide(torch.ones(5, 4, dtype=torch.bool), 0.2, generator=torch.Generator().manual_seed(0))
        >>> int(hidden.sum())
        4
    """
    total = int(mask.sum())
    if not 0 < fraction < 1:
        raise bad("hide", "fraction", "a float in (0, 1)", fraction)
    if total < 2:
        raise bad("hide", "mask", "True at two entries at least", total)
    count = min(max(1, round(fraction * total)), total - 1)
    where = mask.flatten().nonzero()[:, 0]
    chosen = where[torch.randperm(total, generator=generator)[:count].to(where.device)]
    hidden = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    hidden[chosen] = True
    return hidden.view_as(mask)


def _count(where: str, fraction: float, n: int) -> int:
    if not 0 < fraction <= 1 or math.isnan(fraction):
        raise bad(where, "fraction", "a float in (0, 1]", fraction)
    return max(1, round(fraction * n))
