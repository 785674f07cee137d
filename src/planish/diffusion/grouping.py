"""Which denoising steps run the whole network: ordered grouping by dynamic programming.

Steps are cut into groups of consecutive ones; the first of a group runs the network, the others reuse its features. A
group costs what its features are away from its first, in absolute values, and the cheapest cut is found exactly.

Legend: T steps, N interval, K groups, D(i, j) the cost of the group of steps i, ..., j - 1.
"""

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from planish._support import bad


class StepDistances:
    """Collect the distances between the features of steps as they come, keeping only the last few features.

    Args:
        window: Features kept, >= 1: distances are known between steps less than this far apart.

    Raises:
        ValueError: The window is below 1, or a feature is not finite or not of the shape of those before.

    Attributes:
        steps: Features seen.

    Example:
        >>> import torch
        >>> seen = StepDistances(3)
        >>> for t in range(4):
        ...     seen.add(torch.full((2,), float(t)))
        >>> seen.matrix()[1].tolist()
        [nan, 0.0, 2.0, 4.0]
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise bad("StepDistances", "window", "at least 1", window)
        self.window, self.steps = window, 0
        self._kept: deque[Tensor] = deque(maxlen=window)
        self._rows: list[list[float]] = []

    def add(self, feature: Tensor) -> None:
        """Take the next step's feature."""
        if self._kept and self._kept[-1].shape != feature.shape:
            raise bad("StepDistances", "feature", f"of shape {tuple(self._kept[-1].shape)}", tuple(feature.shape))
        self._kept.append(feature.detach())
        self._rows.append([])
        for back, kept in enumerate(reversed(self._kept)):
            away = float((feature - kept).detach().abs().double().sum())
            if not np.isfinite(away):
                raise bad("StepDistances", "feature", "finite", f"NaN or Inf at step {self.steps}")
            self._rows[self.steps - back].append(away)
        self.steps += 1

    def matrix(self) -> NDArray[np.float64]:
        """Return the distances (T, T): [i, t] is that of step t from step i <= t; NaN where it was not kept."""
        found = np.full((self.steps, self.steps), np.nan)
        for i, row in enumerate(self._rows):
            found[i, i : i + len(row)] = row
        return found


def uniform_schedule(steps: int, interval: int) -> list[int]:
    """Return every `interval`-th step.

    Args:
        steps: T >= 1.
        interval: N >= 1.

    Returns:
        The steps that run the whole network.

    Raises:
        ValueError: An argument is below 1.

    Example:
        >>> uniform_schedule(12, 5)
        [0, 5, 10]
    """
    for name, value in (("steps", steps), ("interval", interval)):
        if value < 1:
            raise bad("uniform_schedule", name, "at least 1", value)
    return list(range(0, steps, interval))


def schedule_cost(distances: Float[Tensor, "t t"] | ArrayLike, schedule: Sequence[int]) -> float:
    """Return what a schedule costs: the distance of every step's feature from that of its group's first step, summed.

    Args:
        distances: (T, T), as `StepDistances.matrix` gives them.
        schedule: Steps that run the whole network: rising, the first is 0.

    Returns:
        The sum; NaN where a distance that it needs is not known.

    Raises:
        ValueError: The schedule is not one.

    Example:
        >>> schedule_cost([[0, 1, 4], [0, 0, 2], [0, 0, 0]], [0, 1])
        2.0
    """
    table = _table("schedule_cost", distances)
    starts = check_schedule("schedule_cost", schedule, len(table))
    return float(sum(table[i, i:j].sum() for i, j in zip(starts, [*starts[1:], len(table)], strict=True)))


def steps_mask(schedule: Sequence[int], steps: int) -> list[int]:
    """Return a schedule as other tools take it: 1 for each step that runs the whole network, 0 for one that reuses.

    cache-dit takes this as `steps_computation_mask`.

    Args:
        schedule: Steps that run the whole network: rising, the first is 0.
        steps: T.

    Returns:
        T zeros and ones.

    Raises:
        ValueError: The schedule is not one.

    Example:
        >>> steps_mask([0, 3], 5)
        [1, 0, 0, 1, 0]
    """
    starts = set(check_schedule("steps_mask", schedule, steps))
    return [int(i in starts) for i in range(steps)]


def dps_schedule(
    distances: Float[Tensor, "t t"] | ArrayLike,
    interval: int | None = None,
    *,
    n_groups: int | None = None,
    min_len: int | None = None,
    max_len: int | None = None,
) -> list[int]:
    """Choose the steps that run the whole network so that the others are as near to them as can be.

    The optimum over all cuts into as many groups as the uniform schedule has, each of an admissible length.

    Args:
        distances: (T, T): [i, t] is the distance of step t's feature from step i's, for i <= t; what lies farther
            from the diagonal than `max_len` is not looked at. `StepDistances` collects them.
        interval: N >= 1: makes K = ceil(T / N) groups.
        n_groups: K itself, in place of `interval`.
        min_len: Fewest steps in a group; default ceil(N / 2), as published, with N = ceil(T / K).
        max_len: Most steps in a group; default 2 N.

    Returns:
        First steps of the groups: rising, the first is 0.

    Raises:
        ValueError: Not exactly one of `interval` and `n_groups`; no cut has groups of such lengths; a distance within
            reach is negative or not known.

    Example:
        >>> import numpy as np
        >>> t = np.array([0, 1, 2, 9, 10, 11.0])
        >>> dps_schedule(abs(t - t[:, None]), 3)
        [0, 3]
    """
    where = "dps_schedule"
    table = _table(where, distances)
    steps = len(table)
    if (interval is None) == (n_groups is None):
        raise bad(where, "interval", "given, or `n_groups` in its place", interval)
    if interval is not None and interval < 1:
        raise bad(where, "interval", "at least 1", interval)
    if n_groups is not None and not 1 <= n_groups <= steps:
        raise bad(where, "n_groups", f"in [1, {steps}]", n_groups)
    groups = n_groups if n_groups is not None else -(-steps // (interval or 1))
    n = interval if interval is not None else -(-steps // groups)
    low, high = -(-n // 2) if min_len is None else min_len, 2 * n if max_len is None else max_len
    if low < 1:
        raise bad(where, "min_len", "at least 1", low)
    if high < low:
        raise bad(where, "max_len", f"at least `min_len` = {low}", high)
    if not groups * low <= steps <= groups * high:
        raise ValueError(
            f"{where}: {groups} group{'s' * (groups > 1)} of {low} to {high} steps cannot make up {steps}; "
            f"change `interval`, `min_len` or `max_len`."
        )
    cost = _group_costs(table, low, min(high, steps))
    best = np.full(steps + 1, np.inf)  # of the prefix of each length, with the groups so far
    best[0] = 0
    cuts = []
    for _ in range(groups):
        found, length = np.full(steps + 1, np.inf), np.zeros(steps + 1, int)
        for size in range(low, min(high, steps) + 1):
            total = best[:-size] + cost[size - low, : steps + 1 - size]
            better = total < found[size:]
            found[size:][better], length[size:][better] = total[better], size
        best = found
        cuts.append(length)
    starts, end = [], steps
    for length in reversed(cuts):
        end -= int(length[end])
        starts.append(end)
    return starts[::-1]


def _group_costs(table: NDArray[np.float64], low: int, high: int) -> NDArray[np.float64]:
    """Return D(i, i + size): sizes down, i across; infinite where a group would pass the end."""
    steps = len(table)
    cost = np.full((high - low + 1, steps + 1), np.inf)
    running = np.zeros(steps)
    for size in range(1, high + 1):
        i = np.arange(steps + 1 - size)
        step = table[i, i + size - 1]
        if not (step >= 0).all() or not np.isfinite(step).all():
            raise bad(
                "dps_schedule", "distances", f"known and not negative up to {high} steps apart", float(step.min())
            )
        running = running[: len(i)] + step  # D(i, j + 1) = D(i, j) + |X_j - X_i|
        if size >= low:
            cost[size - low, : len(i)] = running
    return cost


def _table(where: str, distances: Tensor | ArrayLike) -> NDArray[np.float64]:
    values = distances.detach().cpu().double().numpy() if isinstance(distances, Tensor) else distances
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table):
        raise bad(where, "distances", "a square table, a row a step", table.shape)
    return table


def check_schedule(where: str, schedule: Sequence[int], steps: int) -> list[int]:
    """Return a schedule as a list of int, or say what it must be."""
    starts = [int(s) for s in schedule]
    rising = all(a < b for a, b in itertools.pairwise(starts))
    if not starts or starts[0] != 0 or not rising or starts[-1] >= steps:
        raise bad(where, "schedule", f"steps below {steps} in rising order, the first 0", list(schedule))
    return starts
