"""The smooth calibration error: time and exactness, against relplot, the package of the paper's authors.

Ours and theirs take turns in one process on one thread, on the same arrays. Both are held against a quadrature of the
definition at their own answers: the error that a bandwidth leaves must equal that bandwidth.
"""

import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.harness import Row
from planish.metrics import smooth_ece

Array = npt.NDArray[np.float64]
REUSE_MEMORY = False  # the allocator as it is in anybody's process


def quadrature(y: Array, f: Array, s: float, points: int = 3001) -> float:
    """Return smECE_s by its definition: images of the Gaussian, summed over samples; trapezoids."""
    t, q, images = np.linspace(0, 1, points)[:, None], np.zeros(points), math.ceil(2 + 4 * s)
    for i in range(0, len(f), 100):
        for m, sign in itertools.product(range(-images, images + 1), (1, -1)):
            z = (t - sign * f[i : i + 100] - 2 * m) / s
            if np.abs(z).min() < 9:
                q += np.exp(-(z**2) / 2) @ (f - y)[i : i + 100]
    q /= len(f) * s * math.sqrt(2 * math.pi)
    size, flips = np.abs(q), q[1:] * q[:-1] < 0
    a, b = size[1:][flips], size[:-1][flips]
    whole = size.sum() - (size[0] + size[-1]) / 2 + ((a + b) / 6 - a * b / (a + b)).sum()
    return float(whole / (points - 1))


def truth(y: Array, f: Array) -> float:
    """Return the fixed point of the quadrature, by bisection."""
    low, high = 1e-4, 1.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if quadrature(y, f, middle, 2001) > middle else (low, middle)
    return (low + high) / 2


def cases(n: int) -> Iterator[tuple[str, Array, Array]]:
    """Yield predictors of several kinds: name, outcomes, probabilities."""
    random = np.random.default_rng(1)
    f = random.random(n)
    yield "calibrated", (random.random(n) < f).astype(float), f
    yield "y ~ f^1.3", (random.random(n) < f**1.3).astype(float), f
    yield "y = 1[f < 1/2]", (f < 0.5).astype(float), f
    yield "two atoms", np.repeat([1.0, 0.0], n // 2), np.repeat([0.49, 0.51], n // 2)
    g = random.beta(0.3, 0.05, n)
    yield "over-confident", (random.random(n) < 0.7 * g).astype(float), g
    yield "n = 20, calibrated", (random.random(20) < f[:20]).astype(float), f[:20]
    yield "n = 5, y = 1[f < 1/2]", (f[:5] < 0.5).astype(float), f[:5]
    yield "n = 4, at the ends", np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0, 0.3])


def rows(
    quick: bool, *, against: tuple[str, ...] | None = None, skipped: dict[str, str] | None = None, **_: object
) -> Iterator[Row]:
    """Yield errors against the quadrature, times, and ratios of times taken in turns.

    Args:
        quick: Fewer samples and rounds.
        against: Rivals; relplot by default.
        skipped: Takes the reason where relplot is not installed.
    """
    subjects: dict[str, Callable[[Array, Array], float]] = {"planish": smooth_ece}
    if against is None or "relplot" in against:
        if importlib.util.find_spec("relplot") is None:
            (skipped if skipped is not None else {})["relplot"] = "not installed: pip install relplot"
        else:
            import relplot  # noqa: PLC0415

            subjects["relplot"] = lambda y, f: float(relplot.smECE(f, y))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, y, f in cases(100 if quick else 1000):
        right = truth(y, f)
        yield Row(name, "definition", "smECE", right, "")
        for subject, score in subjects.items():
            found = score(y, f)
            yield Row(name, subject, "smECE", found, "")
            yield Row(name, subject, "difference", found - right, "", "definition")
    random = np.random.default_rng(2)
    for n in (1_000, 10_000) if quick else (1_000, 10_000, 100_000, 1_000_000):
        f = random.random(n)
        y = (random.random(n) < f**1.1).astype(float)
        spent: dict[str, list[float]] = {subject: [] for subject in subjects}
        for turn in range(4 if quick else 21 if n < 1_000_000 else 15):
            for subject, score in subjects.items():
                began = time.perf_counter()
                score(y, f)
                if turn:  # the first warms up
                    spent[subject].append(1e3 * (time.perf_counter() - began))
        case = f"{n:,} samples"
        for subject, times in spent.items():
            yield Row(case, subject, "time", statistics.median(times), "ms", low=min(times), high=max(times))
        if "relplot" in spent:
            ratios = [b / a for a, b in zip(spent["planish"], spent["relplot"], strict=True)]
            yield Row(
                case, "planish", "time", statistics.median(ratios), "times faster", "relplot", min(ratios), max(ratios)
            )
    torch.set_num_threads(threads)
