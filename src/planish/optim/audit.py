"""Attack a private training: how much does its output tell whether one sample was in the data?"""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from planish._support import bad, require
from planish.optim.noise import gaussian_epsilon

Scores = Tensor | npt.NDArray[np.floating] | list[float]


def audit_epsilon(
    inside: Scores,
    outside: Scores,
    delta: float,
    *,
    confidence: float = 0.95,
    tradeoff: Literal["gaussian", "any"] = "gaussian",
    generator: np.random.Generator | None = None,
) -> float:
    """Return an epsilon that, at a confidence, a training exceeds: a lower bound from a membership attack.

    Train many times with a canary and as often without, and score each result: higher where it looks like "with".
    A random half of the scores chooses the threshold, the other half gives exact (Clopper-Pearson) bounds of both
    error rates, so the choice costs nothing. A claimed epsilon below the bound is refuted.

    Args:
        inside: Scores of trainings with the canary, at least 20.
        outside: Scores of trainings without.
        delta: As claimed, in (0, 1).
        confidence: Of the bound, in (0.5, 1). Default 0.95.
        tradeoff: "gaussian" takes the training for a Gaussian mechanism, as noisy sums of all data are; "any" takes
            nothing for granted, and finds less.
        generator: Splits the scores; default a fixed one.

    Returns:
        Epsilon, >= 0.

    Raises:
        ValueError: An argument is out of range.
        MissingExtra: SciPy is not installed.

    Example:
        >>> random = np.random.default_rng(0)
        >>> bound = audit_epsilon(random.normal(1.0, 1.0, 2000), random.normal(0.0, 1.0, 2000), 1e-5)
        >>> 3.0 < bound < gaussian_epsilon(1.0, 1e-5)  # sensitivity 1, deviation 1: 4.38
        True
    """
    where = "audit_epsilon"
    if not 0 < delta < 1:
        raise bad(where, "delta", "a float in (0, 1)", delta)
    if not 0.5 < confidence < 1:
        raise bad(where, "confidence", "a float in (0.5, 1)", confidence)
    if tradeoff not in ("gaussian", "any"):
        raise bad(where, "tradeoff", "'gaussian' or 'any'", tradeoff)
    stats = require("scipy.stats", "scipy", "audit_epsilon")
    random = np.random.default_rng(0) if generator is None else generator
    halves = []
    for name, scores in (("inside", inside), ("outside", outside)):
        array = np.asarray(scores, dtype=np.float64)
        if array.ndim != 1 or len(array) < 20 or not np.isfinite(array).all():
            raise bad(where, name, "a vector of at least 20 finite scores", f"shape {array.shape}")
        order = random.permutation(len(array))
        halves.append((array[order[::2]], array[order[1::2]]))
    (choose_in, test_in), (choose_out, test_out) = halves
    level = (1 - confidence) / 2  # a half for either error rate

    def bound(missed: int, of_in: int, alarms: int, of_out: int) -> float:
        false_negative = stats.beta.ppf(1 - level, missed + 1, of_in - missed) if missed < of_in else 1.0
        false_positive = stats.beta.ppf(1 - level, alarms + 1, of_out - alarms) if alarms < of_out else 1.0
        if tradeoff == "gaussian":
            mu = -stats.norm.ppf(false_positive) - stats.norm.ppf(false_negative)
            return gaussian_epsilon(float(mu), delta) if mu > 0 else 0.0
        ratio = (1 - delta - false_negative) / false_positive
        return max(0.0, math.log(ratio)) if ratio > 0 else 0.0

    def at(threshold: float, scores_in: npt.NDArray[np.float64], scores_out: npt.NDArray[np.float64]) -> float:
        missed, alarms = int((scores_in < threshold).sum()), int((scores_out >= threshold).sum())
        return bound(missed, len(scores_in), alarms, len(scores_out))

    candidates = np.unique(np.quantile(np.concatenate([choose_in, choose_out]), np.linspace(0, 1, 100)))
    best = max(candidates, key=lambda t: at(float(t), choose_in, choose_out))
    return at(float(best), test_in, test_out)
