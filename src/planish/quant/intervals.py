"""Confidence intervals by resampling windows of text.

Tokens of one window depend on each other, windows hardly do: so windows are what is drawn. A percentile interval from
few windows is too narrow; its levels are widened as Student's t is wider than the normal (the expanded percentile
interval).

Reference:
    Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69, 2015.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

MIN_WINDOWS = 8


class Estimate(NamedTuple):
    """A figure and its confidence interval.

    Attributes:
        value: The figure.
        low: Lower end; NaN where there were fewer than 8 windows.
        high: Upper end; NaN likewise.
    """

    value: float
    low: float
    high: float

    def through(self, function: Callable[[float], float]) -> "Estimate":
        """Return the estimate of an increasing function of the figure."""
        return Estimate(*(function(part) for part in self))

    def to_json(self) -> list[float | None]:
        """Return [value, low, high], None for what is unknown."""
        return [part if math.isfinite(part) else None for part in self]


class Resamples:
    """How often each window is drawn, the same draws for every figure.

    Args:
        windows: How many windows there are.
        confidence: Level of the intervals, in (0, 1).
        n_bootstrap: Resamples.
        generator: Source of the draws; default a fixed one.
    """

    def __init__(
        self, windows: int, *, confidence: float, n_bootstrap: int, generator: torch.Generator | None = None
    ) -> None:
        self.windows = windows
        generator = generator or torch.Generator().manual_seed(0)
        self.counts = torch.zeros(n_bootstrap, windows, dtype=torch.float32)
        if windows >= MIN_WINDOWS:
            for i in range(n_bootstrap):  # one by one: all draws at once would be eight times as large
                drawn = torch.randint(windows, (windows,), generator=generator)
                self.counts[i] = torch.bincount(drawn, minlength=windows)
            tail = NormalDist().inv_cdf((1 - confidence) / 2)
            wide = math.sqrt(windows / (windows - 1)) * _student(tail, windows - 1)
            self.levels = torch.tensor([NormalDist().cdf(wide), NormalDist().cdf(-wide)], dtype=torch.float64)

    def ratio(self, numerators: Float[Tensor, " windows"], denominators: Float[Tensor, " windows"]) -> Estimate:
        """Return the ratio of two sums over windows, with its interval."""
        value = float(numerators.sum() / denominators.sum())
        if self.windows < MIN_WINDOWS:
            return Estimate(value, math.nan, math.nan)
        both = torch.stack([numerators, denominators], 1).double()
        sums = torch.cat([part.double() @ both for part in self.counts.split(256)])
        low, high = torch.quantile(sums[:, 0] / sums[:, 1], self.levels).tolist()
        return Estimate(value, low, high)


def _student(z: float, degrees: int) -> float:
    """Return the quantile of Student's t at the normal's quantile z, by expansion in 1 / degrees (>= 7 here)."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(degrees) ** (power + 1) for power, term in enumerate(terms))
