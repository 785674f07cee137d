"""Smoothing a series: bias at equal cost, and bias by sweep.

The series is an autoregression (0.97, noise 0.6) seen 51 times with noise 1; smoothed is the sum of x_t x_{t+1}, whose
value Kalman's smoother knows. Cost is counted in particle moves: N a step and pass, the first pass included. Every
piece is kept in the cache: a run that was stopped goes on. `--suite learning` and `--suite time` have more.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import cache_dir
from benchmarks.harness import Row, write_json
from planish.statespace import LinearGaussian, ffbs, kalman, paris, parisian_gibbs

VERSION = 1
BIAS = "sum of x_t x_{t+1}, 51 steps: 200 particle moves a step"
Piece = dict[str, list[float]]


def by_sweep(n: int) -> str:
    return f"bias by sweep, {n} particles; sweep 0 is the first pass"


def products(t: int, before: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x[..., 0]) if before is None else (before * x)[..., 0]


def walk(n: int = 51) -> tuple[LinearGaussian, Tensor, float]:
    """Return the model, the series, and the exact answer."""
    random = np.random.default_rng(0)
    x = [random.normal() * 0.6 / math.sqrt(1 - 0.97**2)]
    for _ in range(n - 1):
        x.append(0.97 * x[-1] + 0.6 * random.normal())
    y = torch.tensor(np.array(x) + random.normal(size=n))[:, None]
    model = LinearGaussian(0.97, 0.36).double()
    exact = kalman(model, y)
    return model, y, float((exact.mean[:-1, 0] * exact.mean[1:, 0] + exact.lag_cov[:, 0, 0]).sum().detach())


def kept(name: str, make: Callable[[], Piece], *, quick: bool, fresh: bool) -> Piece:
    """Return a piece of the benchmark, from the cache when it is there."""
    folder: Path = cache_dir() / f"smoothing-{VERSION}{'-quick' if quick else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if path.is_file() and not fresh:
        return json.loads(path.read_text(encoding="utf-8"))
    logging.getLogger("benchmarks").info("%s", name)
    found = make()
    write_json(path, found)
    return found


def _one_pass(kind: str, n: int, replicates: int) -> Piece:
    model, y, truth = walk()
    random, parts = torch.Generator().manual_seed(n), []
    for start in range(0, replicates, 200):
        batch = y.expand(min(200, replicates - start), *y.shape)
        smooth = ffbs if kind == "FFBSm" else paris
        parts.append(smooth(model, batch, n, additive=products, generator=random).mean - truth)
    return {"errors": torch.cat(parts).tolist()}


def _sweeps(n: int, k: int, chains: int) -> Piece:
    """Return errors of k passes, the unconditional first one among them, as (k, chains) flattened."""
    model, y, truth = walk()
    random, parts = torch.Generator().manual_seed(n), []
    for start in range(0, chains, 400):
        size = min(400, chains - start)
        first = paris(model, y.expand(size, *y.shape), n, additive=products, generator=random).mean
        found = parisian_gibbs(model, y, n, k - 1, 0, additive=products, n_chains=size, generator=random)
        parts.append(torch.cat([first[None], found.per_sweep]) - truth)
    return {f"sweep {i}": row.tolist() for i, row in enumerate(torch.cat(parts, 1))}


def _bias_row(case: str, subject: str, errors: np.ndarray) -> Iterator[Row]:
    mean, half = float(errors.mean()), 1.96 * float(errors.std(ddof=1)) / len(errors) ** 0.5
    yield Row(case, subject, "bias", mean, "", low=mean - half, high=mean + half)
    yield Row(case, subject, "standard deviation", float(errors.std(ddof=1)), "")
    yield Row(case, subject, "root mean square error", float(np.sqrt((errors**2).mean())), "")
    yield Row(case, subject, "repetitions", len(errors), "")


def _biases(quick: bool, fresh: bool) -> Iterator[Row]:
    few = 40 if quick else 1
    for kind, n, said in (("PaRIS", 200, ""), ("FFBSm", 28, ": as many densities")):
        piece = kept(f"{kind}-{n}", lambda k=kind, n=n: _one_pass(k, n, 1200 // few), quick=quick, fresh=fresh)
        name, errors = f"{kind}, N = {n}{said}", piece
        yield from _bias_row(BIAS, name, np.array(errors["errors"]))
    for n, k, burn_ins in ((20, 10, (0, 4, 7, 8)), (25, 8, (0, 3, 6)), (50, 4, (0, 2))):
        piece = kept(f"ppg-{n}-{k}", lambda a=(n, k, 1200 // few): _sweeps(*a), quick=quick, fresh=fresh)
        errors = np.array([piece[f"sweep {i}"] for i in range(k)])
        for k0 in burn_ins:  # k0 conditional sweeps are left out, and the first pass
            name = f"PPG, N = {n}, first pass + {k - 1} sweeps, burn-in {k0}"
            yield from _bias_row(BIAS, name, errors[1 + k0 :].mean(0))
        for i, row in enumerate(errors):
            half = 1.96 * float(row.std(ddof=1)) / len(row) ** 0.5
            mean = float(row.mean())
            yield Row(by_sweep(n), f"sweep {i}", "bias", mean, "", low=mean - half, high=mean + half)


def rows(quick: bool, *, fresh: bool = False, **_: object) -> Iterator[Row]:
    """Yield biases, by way and by sweep.

    Args:
        quick: Few repetitions.
        fresh: Compute again what the cache holds.
        **_: What other benchmarks are asked beside this.
    """
    yield from _biases(quick, fresh)
