"""How optimizers fare on the worst function: queries a door of the hard chain, ours beside those of torch.

Every evaluation is a query, a line search's too. Methods with a step size are shown at 1/20, safe for them all, and
at the best of a grid: huge steps go through each door as soon as it is shown, within one query of the bound.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import ROOT, Row
from planish.complexity import Score, Scores, StochasticOracle, ZeroChain, bench, geometric_queries
from planish.optim import GradNormNewton, NormalizedGD, Spider

LENGTHS, QUICK_LENGTHS = (5, 10, 20, 40), (3, 6)
SAFE = 0.05
STEPS = (5.0, 1.0, 0.2, 0.1, 0.02)
PICTURE = ROOT / "docs" / "papers" / "hardness.svg"
Make = Callable[[list[Tensor]], torch.optim.Optimizer]

STEPPED: dict[str, Callable[[float], Make]] = {
    "gradient descent": lambda lr: lambda p: torch.optim.SGD(p, lr=lr),
    "momentum": lambda lr: lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Nesterov": lambda lr: lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "Adam": lambda lr: lambda p: torch.optim.Adam(p, lr=lr),
    "NormalizedGD": lambda lr: lambda p: NormalizedGD(p, lr=lr),
    "Spider": lambda lr: lambda p: Spider(p, lr=lr, q=5),
}
STEPLESS: dict[str, Make] = {
    "L-BFGS": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
    "GradNormNewton": GradNormNewton,
}


def scored(lengths: tuple[int, ...], steps: tuple[float, ...]) -> tuple[Scores, dict[str, tuple[float, float]]]:
    """Return every method's scores, at the safe step where it has one, and its best score with its step."""
    rows: list[Score] = list(bench(STEPLESS, lengths, most=100).rows)
    chosen: dict[str, tuple[float, float]] = {}
    for name, make in STEPPED.items():
        tried = {lr: bench({name: make(lr)}, lengths, most=100) for lr in (SAFE, *steps)}
        chosen[name] = min((tried[lr].worst(name), lr) for lr in tried)
        rows += tried[SAFE].rows
    return Scores(tuple(rows)), chosen


def slope(make: Callable[[ZeroChain], Make], order: int, targets: dict[float, int]) -> float:
    """Return the slope of log queries over log 1 / eps, on the chains whose gap leaves room for so many doors."""
    counts = []
    coarse = max(targets)
    room = targets[coarse] / ZeroChain.for_target(coarse, order=order, delta=1e6).length * 1e6
    for eps in targets:
        f = ZeroChain.for_target(eps, order=order, delta=room * 1.001)
        (row,) = bench({"it": make(f)}, (f.length,), chain=lambda _, f=f: f).rows
        counts.append(row.queries if row.queries is not None else math.nan)
    return math.log(counts[-1] / counts[0]) / math.log(max(targets) / min(targets))


def stochastic(success: float, runs: int, length: int = 10) -> float:
    """Return the mean queries of a method that opens each door as soon as it sees it."""
    f = ZeroChain(length)
    oracle = StochasticOracle(f, success, generator=torch.Generator().manual_seed(0))
    x, queries = torch.zeros(runs, length, dtype=torch.float64), 0
    while (active := (f.progress(x, 1.0) < length)).any():
        queries += int(active.sum())
        g = oracle(x)
        x = torch.where(active[:, None] & (g != 0), -2.0 * g.sign(), x)
    return queries / runs


def rows(quick: bool, **_: object) -> Iterator[Row]:
    """Yield queries a door and slopes; draw the picture of a full run.

    Args:
        quick: Short chains, one step size.
        **_: What other benchmarks are asked beside this.
    """
    scores, chosen = scored(QUICK_LENGTHS if quick else LENGTHS, () if quick else STEPS)
    case = "queries to a stationary point of the chain, from the origin"
    for name in scores.optimizers:
        for row in scores.rows:
            if row.optimizer == name and row.queries is not None:
                yield Row(case, name, f"T = {row.length}", row.queries, "")
        yield Row(case, name, "worst, a door", scores.worst(name), "")
        if name in chosen:
            yield Row(case, name, "worst, a door, at its best step", chosen[name][0], "")
            yield Row(case, name, "that step", chosen[name][1], "")
    if not quick:
        axes = scores.plot()
        axes.figure.savefig(PICTURE, metadata={"Date": None})
    case = "slope of log queries over log 1 / eps"
    first = {2e-3: 10, 1e-3: 40} if quick else {2e-3: 100, 1e-3: 400}
    gd = slope(lambda f: lambda p: torch.optim.SGD(p, lr=152 / 20 / f.lipschitz), 1, first)
    yield Row(case, "gradient descent, order 1", "measured", gd, "")
    yield Row(case, "gradient descent, order 1", "theory", 2.0, "")
    second = {4e-3: 4, 1e-3: 32} if quick else {4e-3: 70, 1e-3: 566}
    newton = slope(lambda _: lambda p: GradNormNewton(p, 10.0), 2, second)
    yield Row(case, "GradNormNewton, order 2", "measured", newton, "")
    yield Row(case, "GradNormNewton, order 2", "theory", 1.5, "")
    case = "mean queries for 10 doors, each shown with probability q"
    for success in (0.5, 0.2, 0.05):
        mean = stochastic(success, 50 if quick else 2000)
        yield Row(case, f"q = {success}", "measured", mean, "")
        yield Row(case, f"q = {success}", "T / q", geometric_queries(10, success)[0], "")
