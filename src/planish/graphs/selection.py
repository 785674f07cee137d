r"""Leave a trusted recovery only as far as samples that nobody has looked at say so.

Blend two recoveries, (1 - w) trusted + w other, with errors e and e - d on samples hidden from both. The error of the
blend is |e|^2 - 2 w <e, d> + w^2 |d|^2: least at w* = <e, d> / |d|^2, and below the trusted one's for every w in
(0, 2 w*). So w is the lower confidence bound of w*: the blend is worse only if the true w* is below half of a number
that is below w* already. A gain that comes from few nodes or few stretches of time makes the bound low.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_DEVIATIONS = 2.0  # of the weight, below its estimate
_STRETCHES = 20  # of time, whose errors are taken to be independent of each other
_FEWEST = 6  # groups, or samples a group on average, with which anything is said at all


def split(samples: Bool[Tensor, "N M"], parts: int, *, generator: torch.Generator | None = None) -> list[Tensor]:
    """Divide samples at random into parts of nearly equal size.

    Args:
        samples: True where there is one.
        parts: How many, >= 1.
        generator: Source of randomness, on the CPU.

    Example:
        >>> [int(part.sum()) for part in split(torch.ones(2, 5, dtype=torch.bool), 3)]
        [4, 3, 3]
    """
    where = samples.flatten().nonzero()[:, 0]
    where = where[torch.randperm(len(where), generator=generator).to(where.device)]
    found = []
    for part in range(parts):
        flat = torch.zeros(samples.numel(), dtype=torch.bool, device=samples.device)
        flat[where[part::parts]] = True
        found.append(flat.view_as(samples))
    return found


def blend_weight(
    trusted: Float[Tensor, "n"], other: Float[Tensor, "n"], nodes: Int[Tensor, "n"], times: Int[Tensor, "n"]
) -> float:
    """Return how much of the other recovery to take, in [0, 1]: the lower confidence bound of the best share.

    The variance is the sum of two: over nodes, and over stretches of time. Each leaves out one group at a time, whose
    errors may depend on each other as they like.

    Args:
        trusted: Errors of the recovery to fall back to, on samples hidden from both.
        other: Errors of the other one on the same samples.
        nodes: The node of each sample.
        times: The time of each sample.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> noise = torch.randn(2, 400, generator=draw)
        >>> nodes, times = torch.arange(400) % 20, torch.arange(400) // 20
        >>> blend_weight(noise[0], 0.1 * noise[1], nodes, times) > 0.8
        True
        >>> blend_weight(0.1 * noise[1], noise[0], nodes, times)
        0.0
    """
    stretch = times * _STRETCHES // (int(times.max()) + 1) if len(times) else times
    groups = [torch.unique(label, return_inverse=True)[1] for label in (nodes, stretch)]
    step = trusted - other
    pull, size = trusted * step, step.square()
    if float(size.sum()) == 0 or len(step) < _FEWEST**2 or any(int(group.max()) + 1 < _FEWEST for group in groups):
        return 0.0
    variance = 0.0
    for group in groups:
        count = int(group.max()) + 1
        one = torch.zeros(2, count).to(step).index_add(1, group, torch.stack([pull, size]))
        rest = one.sum(1, keepdim=True) - one
        without = torch.where(rest[1] > 0, rest[0] / rest[1].clamp_min(torch.finfo(rest.dtype).tiny), 0.0)
        variance += float((without - without.mean()).square().sum()) * (count - 1) / count  # the jackknife's
    return min(1.0, max(0.0, float(pull.sum() / size.sum()) - _DEVIATIONS * math.sqrt(variance)))
