"""From scores of candidates to those that go on."""

import math
from collections.abc import Sequence
from typing import Literal

Keep = Literal["largest", "smallest"]
KEEPS = ("largest", "smallest")


def ranked(scores: Sequence[float], keep: Keep) -> list[int]:
    """Return the candidates that can go on, best first.

    A score that is not finite belongs to a probe that failed: the candidate is left out. A score of exactly zero says
    nothing (a dead network, a singular covariance): such candidates come last. Equal ones keep the order in which they
    were drawn, which is random.
    """
    sign = -1.0 if keep == "largest" else 1.0
    usable = [i for i, score in enumerate(scores) if math.isfinite(score)]
    return sorted(usable, key=lambda i: (scores[i] == 0, sign * scores[i]))


def combined(scores: Sequence[float], values: Sequence[float], keep: Keep) -> list[int]:
    """Return the candidates by the sum of two ranks, of smoothness and of a validation score (larger is better).

    Where the smoothness is zero or equal for all, it adds the same to each and the validation score alone decides.
    """
    usable = [i for i in ranked(scores, keep) if math.isfinite(values[i])]
    if not usable:
        return ranked(scores, keep)
    sign = -1.0 if keep == "largest" else 1.0
    worst = max((sign * scores[i] for i in usable if scores[i] != 0), default=0.0)
    by_score = _mid_ranks([sign * scores[i] if scores[i] != 0 else worst + 1 for i in usable])
    by_value = _mid_ranks([-values[i] for i in usable])
    total = {i: a + b for i, a, b in zip(usable, by_score, by_value, strict=True)}
    return sorted(sorted(usable), key=lambda i: total[i])


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's correlation, NaN where one side is constant or there are fewer than two pairs."""
    if len(a) < 2 or len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    x, y = _mid_ranks(a), _mid_ranks(b)
    middle = (len(a) + 1) / 2
    moved = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    return moved / math.sqrt(sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y))


def _mid_ranks(values: Sequence[float]) -> list[float]:
    """Rank from 1, smallest first; equal ones share the mean of their ranks."""
    order = sorted(values)
    first: dict[float, int] = {}
    count: dict[float, int] = {}
    for place, value in enumerate(order, 1):
        first.setdefault(value, place)
        count[value] = count.get(value, 0) + 1
    return [first[value] + (count[value] - 1) / 2 for value in values]
