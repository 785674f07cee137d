"""How optimizers fare on the worst function: queries a door of the hard chain, ours beside those of torch.

Every evaluation is a query, a line search's too. Each first-order method has the best step size of a small grid, so that
the comparison is of methods. The slopes of queries over 1 / eps are those that the theory gives: 2 for gradient descent,
1.5 for methods that use the Hessian.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import ROOT, Row
from planish.complexity import Score, Scores, StochasticOracle, ZeroChain, bench, query_lower_bound
from planish.optim import GradNormNewton, NormalizedGD, Spider

LENGTHS, QUICK_LENGTHS = (5, 10, 20, 40, 80), (5, 10)
STEPS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
PICTURE = ROOT / "docs" / "papers" / "hardness.svg"
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def families() -> dict[str, Callable[[float], Make]]:
    """Return name -> step size -> maker."""
    sgd = torch.optim.SGD
    return {
        "gradient descent": lambda lr: lambda p: sgd(p, lr=lr),
        "momentum": lambda lr: lambda p: sgd(p, lr=lr, momentum=0.9),
        "Nesterov": lambda lr: lambda p: sgd(p, lr=lr, momentum=0.9, nesterov=True),
        "Adam": lambda lr: lambda p: torch.optim.Adam(p, lr=lr),
        "L-BFGS": lambda _: lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
        "NormalizedGD": lambda lr: lambda p: NormalizedGD(p, lr=lr),
        "Spider": lambda lr: lambda p: Spider(p, lr=lr),
        "GradNormNewton": lambda _: lambda p: GradNormNewton(p),
    }


def scored(lengths: tuple[int, ...]) -> tuple[Scores, dict[str, float]]:
    """Return every family's scores at its best step, and that step."""
    rows: list[Score] = []
    chosen: dict[str, float] = {}
    for name, family in families().items():
        tried = {}
        for lr in STEPS:
            tried[lr] = bench({name: family(lr)}, lengths, most=100)
            if family(lr) is not family(lr) and name in {"L-BFGS", "GradNormNewton"}:
                break  # it has no step size
        best = min(tried, key=lambda lr: (tried[lr].worst(name), lr))
        chosen[name] = best
        rows += tried[best].rows
    return Scores(tuple(rows)), chosen
