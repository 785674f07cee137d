"""Time of PaRIS: how it grows with particles and with time, and beside the package `particles` on the same model.

All run with hybrid rejection and two backward draws, in one process and one thread. The rival's model is the same
autoregression; where it cannot be imported (it needs numba) its rows are skipped.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch

from benchmarks.harness import Row
from benchmarks.smoothing import products, walk
from planish.statespace import Paris, paris

GROWTH = "time of PaRIS by its size"


def timed(run: Callable[[], object], times: int) -> list[float]:
    """Return processor times of some runs, in seconds, rising."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return sorted(taken)


def _slope(sizes: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _growth(quick: bool) -> Iterator[Row]:
    model, y, _ = walk()
    sizes = [1000, 2000] if quick else [4_000, 8_000, 16_000, 32_000, 64_000, 128_000]
    steps = 4 if quick else 9
    seconds = [timed(lambda n=n: paris(model, y[:steps], n, additive=products), 3)[0] for n in sizes]
    for n, s in zip(sizes, seconds, strict=True):
        yield Row(GROWTH, f"N = {n}, {steps} steps", "processor time", s, "s")
    note = "The last size is beyond this processor's nearer caches, and not in the slope."
    yield Row(GROWTH, "in particles", "slope of log time", _slope(sizes[:5], seconds[:5]), "", note=note)
    long = y.repeat(20, 1)
    lengths = [20, 40] if quick else [125, 250, 500, 1000]
    seconds = [timed(lambda n=n: paris(model, long[:n], 200, additive=products), 3)[0] for n in lengths]
    for n, s in zip(lengths, seconds, strict=True):
        yield Row(GROWTH, f"N = 200, {n} steps", "processor time", s, "s")
    yield Row(GROWTH, "in steps", "slope of log time", _slope(lengths, seconds), "")


def _rival(n: int, y: np.ndarray) -> Callable[[], float]:
    """Return a run of the rival's PaRIS that gives its estimate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import particles  # noqa: PLC0415
        from particles import collectors, distributions, resampling, state_space_models  # noqa: PLC0415

    class Queue(resampling.MultinomialQueue):
        """Give one index as a number, not in a list of one, which the NumPy of today refuses to take for a number."""

        def dequeue(self, k):  # noqa: ANN001, ANN202
            found = super().dequeue(k)
            return found[0] if k == 1 else found

    class Walk(state_space_models.StateSpaceModel):
        def PX0(self):  # noqa: ANN202, N802
            return distributions.Normal(scale=0.6 / math.sqrt(1 - 0.97**2))

        def PX(self, t, xp):  # noqa: ANN001, ANN202, N802
            return distributions.Normal(loc=0.97 * xp, scale=0.6)

        def PY(self, t, xp, x):  # noqa: ANN001, ANN202, N802
            return distributions.Normal(loc=x)

        def upper_bound_log_pt(self, t):  # noqa: ANN001, ANN202
            return -math.log(0.6 * math.sqrt(2 * math.pi))

        def add_func(self, t, xp, x):  # noqa: ANN001, ANN202
            return np.zeros_like(x) if t == 0 else xp * x

    def run() -> float:
        # resampled at every step, as ours is
        filtered = particles.SMC(
            fk=state_space_models.Bootstrap(ssm=Walk(), data=y), N=n, ESSrmin=1.0, resampling="multinomial",
            collect=[collectors.Paris(Nparis=2)],
        )  # fmt: skip
        with mock.patch.object(resampling, "MultinomialQueue", Queue):
            filtered.run()
        return float(filtered.summaries.paris[-1])

    return run


def _errors(values: list[float], truth: float) -> tuple[float, float]:
    return float(np.mean(values)) - truth, float(np.sqrt(np.mean((np.array(values) - truth) ** 2)))


def _against(quick: bool, skipped: dict[str, str]) -> Iterator[Row]:
    model, y, truth = walk()
    n, times = (50, 2) if quick else (200, 8)
    case = f"PaRIS, N = {n}, 51 steps, the sum of x_t x_{{t+1}}"
    ours = lambda: float(paris(model, y, n, additive=products).mean)  # noqa: E731
    try:
        theirs = _rival(n, y[:, 0].numpy())
        theirs()  # compiled once
    except ImportError as error:
        skipped["particles"] = str(error)
        return
    ours()
    found: dict[str, list[tuple[float, float]]] = {"planish": [], "particles": []}
    for _ in range(times):
        for name, run in (("planish", ours), ("particles", theirs)):
            began = time.process_time()
            value = run()
            found[name].append((time.process_time() - began, value))
    for name, results in found.items():
        seconds, values = sorted(s for s, _ in results), [v for _, v in results]
        yield Row(case, name, "processor time", float(np.median(seconds)), "s", low=seconds[0], high=seconds[-1])
        yield Row(case, name, "root mean square error", _errors(values, truth)[1], "")
    ratios = sorted(b[0] / a[0] for a, b in zip(found["planish"], found["particles"], strict=True))
    note = "Medians of turns, with the least and the most; one thread."
    yield Row(
        case, "planish", "times faster", float(np.median(ratios)), "ratio", "particles", ratios[0], ratios[-1], note
    )


def _memory() -> Iterator[Row]:
    """Yield what a stream keeps after few and after many steps, in numbers: it does not grow."""
    model, y, _ = walk()
    smoother = Paris(model, 200, additive=products)
    for t in range(1, 1001):
        smoother.update(y[t % 51])
        if t in (10, 1000):
            kept = [smoother.cloud.x, smoother.cloud.log_weights, smoother.cloud.ancestors, smoother.beta]
            kept.append(smoother.indices)
            numbers = sum(part.numel() for part in kept if part is not None)
            yield Row("a stream's memory, N = 200", f"after {t} steps", "numbers kept", numbers, "")


@torch.no_grad()
def rows(quick: bool, *, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield times.

    Args:
        quick: Small sizes, few turns.
        skipped: Filled with what could not run, and why.
        **_: What other benchmarks are asked beside this.
    """
    torch.set_num_threads(1)
    yield from _growth(quick)
    yield from _against(quick, {} if skipped is None else skipped)
    if not quick:
        yield from _memory()
