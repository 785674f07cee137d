"""Robust regression of life expectancies, its dual by a penalized divergence: normalized steps beside plain ones.

Psi is the worst expectation near the data, at the best dual variable. All starts are random; with batches
everybody starts from 30 normalized steps and spends the same number of gradients.
"""

import csv
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from benchmarks.data import shared_data
from benchmarks.harness import Row
from benchmarks.optim import Make, adam, descend, halved, lowest, momentum, normalized, reset, sampled, spread
from planish.optim import PenalizedDRO, Spider


def life_expectancy() -> tuple[torch.Tensor, torch.Tensor]:
    """Return standardized features and target of the WHO table, rows in a fixed random order; the target leaks nowhere.

    Raises:
        FileNotFoundError: The shared data is absent.
    """
    folder = shared_data()
    path = None if folder is None else folder / "tables" / "life_expectancy.csv"
    if path is None or not path.exists():
        raise FileNotFoundError("the shared data is absent (PLANISH_DATA)")
    with path.open(encoding="utf-8") as file:
        table = [{name.strip(): cell for name, cell in row.items()} for row in csv.DictReader(file)]
    table = [row for row in table if row["Life expectancy"]]
    names = [name for name in table[0] if name not in ("Country", "Life expectancy")]
    numbers = {"Developing": "0", "Developed": "1"}
    x = np.array([[float(numbers.get(row[n], row[n]) or "nan") for n in names] for row in table])
    x = np.where(np.isnan(x), np.nanmedian(x, axis=0), x)
    y = np.array([float(row["Life expectancy"]) for row in table])
    x = x.clip(*np.quantile(x, (0.02, 0.98), axis=0))  # populations and incomes have long tails
    x = x[:, x.std(0) > 0]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    order = np.random.default_rng(0).permutation(len(y))[:2000]
    return torch.from_numpy(x[order]), torch.from_numpy(y[order])


def rows(quick: bool, *, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield Psi after so much work.

    Args:
        quick: Two seeds, a small budget.
        skipped: Filled with what could not run, and why.
    """
    skipped, seeds = {} if skipped is None else skipped, 2 if quick else 5
    torch.set_num_threads(1)
    try:
        x, y = life_expectancy()
    except FileNotFoundError as error:
        skipped["robust regression"] = str(error)
        return
    problems = [
        PenalizedDRO(x, y, start=torch.randn(x.shape[1], dtype=x.dtype, generator=torch.Generator().manual_seed(s)))
        for s in range(seeds)
    ]
    starts = [[p.detach().clone() for p in problem.parameters()] for problem in problems]

    def ends(make: Make, steps: int) -> list[float]:
        found = []
        for problem, start in zip(problems, starts, strict=True):
            reset(problem, start)
            seen = descend(problem, make, steps, lambda: 0.0)
            found.append(problem.robust() if math.isfinite(seen[-1]) else math.inf)
        return found

    def tuned(make: Callable[[float], Make], grid: Sequence[float]) -> tuple[float, list[float]]:
        return min(((lr, ends(make(lr), 50)) for lr in grid), key=lambda pair: sum(pair[1]))

    case = "robust regression, all data, 50 steps"
    yield spread(case, "start", "Psi", [problem.robust() for problem in problems], "")
    for name, make in (("1-GD", normalized(0.2, 1.0)), ("clipped GD", normalized(0.3, 1.0, 10.0))):
        yield spread(case, name, "Psi", ends(make, 50), "")
    for name, make, grid in (
        ("GD", lambda lr: normalized(lr, 0.0), (1e-5, 3e-5, 1e-4, 3e-4)),
        ("momentum", momentum, (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)),
        ("Adam", adam, (0.03, 0.1, 0.3, 1.0)),
    ):
        lr, values = tuned(make, grid)
        yield spread(case, f"{name} {lr:g}", "Psi", values, "")
    subjects: dict[str, Make] = {
        **halved("SGD", lambda lr: normalized(lr, 0.0), 2e-4),
        **halved("normalized SGD", lambda lr: normalized(lr, 1.0), 0.008),
        **halved("clipped SGD", lambda lr: normalized(lr, 1.0, 100.0), 0.05),
        **halved("Adam", adam, 0.003),
        **halved("planish SPIDER", lambda lr: lambda params: Spider(params, lr, q=20), 0.004),
    }
    budget = 20_000 if quick else 250_000
    results: dict[str, list[float]] = {}
    for i, (problem, start) in enumerate(zip(problems, starts, strict=True)):
        reset(problem, start)
        descend(problem, normalized(0.2, 1.0), 30, lambda: 0.0)
        warm = [p.detach().clone() for p in problem.parameters()]
        for name, make in subjects.items():
            reset(problem, warm)
            sampled(problem, len(y), make, 50, budget, seed=i)
            results.setdefault(name, []).append(problem.robust())
    for name, values in lowest(results).items():
        yield spread(f"robust regression, batches of 50, {budget:,} gradients", name, "Psi", values, "")
