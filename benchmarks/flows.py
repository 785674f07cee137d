"""Smooth flows beside splines on a torus: likelihood, forces, conserved energy; inverses beside plain bisection.

Every training is kept in the cache: a run that was stopped goes on.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks import flows_cases, harness
from benchmarks.data import cache_dir
from benchmarks.flows_cases import MODELS, Score
from benchmarks.harness import Row
from planish.flows import ImplicitInverse, SmoothCircularTransform

SEEDS = 3
FORCE_WEIGHT = 0.002
VERSION = 1  # of what is kept: raise it when the cases change
METRICS = {
    "KL to the truth": ("kl", "nats"),
    "force RMSE": ("force_rmse", "kT/rad"),
    "median force error": ("force_median", "kT/rad"),
    "largest force error": ("force_worst", "kT/rad"),
    "energy drift": ("drift", "kT"),
    "parameters": ("parameters", ""),
    "training": ("seconds", "s"),
}
NOTE = (
    "Means over {n} seeds: of samples, weights and batches. 4 layers, 8 bumps or bins, 64 x 64 SiLU units, "
    "{steps} steps of 256 samples by Adam. Energy drift: the median over 64 runs of 600 steps of velocity Verlet of "
    "the largest change of total energy, in float64. The RMS of the true forces' components is {rms:.1f} kT/rad."
)


def kept(name: str, seed: int, force_weight: float, steps: int, *, fresh: bool) -> Score:
    """Return a training's scores, from the cache when they are there."""
    folder = cache_dir() / f"flows-{VERSION}"
    path = folder / f"{name.replace(' ', '-')}-{seed}-{force_weight}-{steps}.json"
    if path.is_file() and not fresh:
        return Score(**json.loads(path.read_text(encoding="utf-8")))
    score = flows_cases.run(name, seed=seed, force_weight=force_weight, steps=steps)
    harness.write_json(path, asdict(score))
    return score


def _torus(quick: bool, fresh: bool, skipped: dict[str, str]) -> Iterator[Row]:
    steps, seeds = (150, 1) if quick else (700, SEEDS)
    x = flows_cases.draw(4000, 10_000)
    rms = float(flows_cases.forces(x).square().mean().sqrt())
    note = NOTE.format(n=seeds, steps=steps, rms=rms)
    for force_weight in (0.0,) if quick else (0.0, FORCE_WEIGHT):
        trained = "likelihood" if not force_weight else f"likelihood and forces (weight {force_weight})"
        case = f"torus, trained on {trained}"
        found: dict[str, list[Score]] = {}
        for seed in range(seeds):
            for name in MODELS:
                try:
                    found.setdefault(name, []).append(kept(name, seed, force_weight, steps, fresh=fresh))
                except ImportError as error:
                    skipped[name] = str(error)
        for name, scores in ((n, s) for n, s in found.items() if s):
            for metric, (field, unit) in METRICS.items():
                yield Row(case, name, metric, statistics.fmean(getattr(s, field) for s in scores), unit, note=note)
        for rival, scores in ((n, s) for n, s in found.items() if s and n != "smooth"):
            pairs = list(zip(found["smooth"], scores, strict=True))
            for metric, field in (("force RMSE", "force_rmse"), ("energy drift", "drift")):
                ratios = [getattr(a, field) / getattr(b, field) for a, b in pairs]
                yield Row(case, "smooth", f"{metric}, ratio", statistics.geometric_mean(ratios), "ratio", rival)
                yield Row(case, "smooth", f"{metric}, worst ratio", max(ratios), "ratio", rival)
            yield Row(case, "smooth", "KL, difference", statistics.fmean(a.kl - b.kl for a, b in pairs), "nats", rival)


def _inverses(n: int, skipped: dict[str, str]) -> Iterator[Row]:
    """Yield time and error of inverting one map of eight bumps an element, all subjects in turn."""
    g = torch.Generator().manual_seed(0)
    transform = SmoothCircularTransform(*(torch.randn(n, 8, generator=g, dtype=torch.float64) for _ in range(5)))
    f = transform.value_and_slope
    x = torch.rand(n, generator=g, dtype=torch.float64)
    y = f(x)[0]
    subjects: dict[str, Callable[[], Tensor]] = {
        f"ImplicitInverse, {bins} bins": lambda bins=bins: ImplicitInverse(f, (0.0, 1.0), bins=bins)(y)  # type: ignore[misc]
        for bins in (2, 8, 32, 128)
    }
    try:
        from zuko.utils import bisection  # noqa: PLC0415

        for eps in (1e-6, 1e-12):
            rounds = math.ceil(math.log2(1 / eps))
            subjects[f"zuko bisection to {eps:g}"] = lambda r=rounds: bisection(  # type: ignore[misc]
                lambda x: f(x)[0], y, 0.0, 1.0, n=r
            )
    except ImportError as error:
        skipped["zuko bisection"] = str(error)
    best = dict.fromkeys(subjects, math.inf)
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        for _ in range(7):
            for name, invert in subjects.items():
                began = time.perf_counter()
                made[name] = invert()
                best[name] = min(best[name], time.perf_counter() - began)
    case = f"inverse of {n} circle maps of eight bumps, float64"
    for name in subjects:
        yield Row(case, name, "least time", 1e3 * best[name], "ms")
        yield Row(case, name, "largest error of x", float((made[name] - x).abs().max()), "")
        yield Row(case, name, "largest error of f(x)", float((f(made[name])[0] - y).abs().max()), "")


def rows(quick: bool, *, fresh: bool = False, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield the torus experiment, and the inverses.

    Args:
        quick: One seed, short trainings on likelihood alone.
        fresh: Train again what the cache holds.
        skipped: Filled with what could not run, and why.
        **_: What other benchmarks are asked beside this.
    """
    skipped = {} if skipped is None else skipped
    torch.set_num_threads(1)
    yield from _torus(quick, fresh, skipped)
    for n in (512,) if quick else (512, 16_384):
        yield from _inverses(n, skipped)
