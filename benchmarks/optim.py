"""Steps that know how curvature grows, beside gradient descent, clipping, momentum and Adam.

The settings are those of the papers' own programs (their gradient of phase retrieval is half the true one: steps and
clip levels are converted). Steps of heavy-ball momentum and Adam, which those programs lack, are the best of a grid for
each problem. A gradient evaluation is the gradient of one example: an inner step of SPIDER costs two batches. Every
number is the mean over seeds, with the 95 % interval of Student's t.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Row
from planish.optim import GeneralizedSmoothness, NormalizedGD, PhaseRetrieval, Spider

_log = logging.getLogger("benchmarks.optim")
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MARKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365}  # two-sided 95 % for that many seeds
CURVES = "phase retrieval, all data: f less the floor, by iteration"
ABOVE = 0.6  # the floor of the noise is about 7.6: the sheet's 8.16 is that much above it
CAP, DIVERGED = 20_000, 1e30


def spread(case: str, subject: str, metric: str, values: Sequence[float], unit: str, note: str = "") -> Row:
    """Return the mean of several seeds with its interval; what never happened in a seed is left out and noted."""
    known = np.array([v for v in values if math.isfinite(v)])
    if not len(known):
        raise ValueError(f"{subject}: no seed has a finite {metric}")
    if len(known) < len(values):
        note = f"{note} {subject}: in {len(values) - len(known)} of {len(values)} seeds not reached.".strip()
    mean = float(known.mean())
    if len(known) == 1:
        return Row(case, subject, metric, mean, unit, note=note)
    half = STUDENT[len(known)] * float(known.std(ddof=1)) / math.sqrt(len(known))
    return Row(case, subject, metric, mean, unit, None, mean - half, mean + half, note)


def momentum(lr: float) -> Make:
    return lambda params: torch.optim.SGD(params, lr, momentum=0.9)


def adam(lr: float) -> Make:
    return lambda params: torch.optim.Adam(params, lr)


def normalized(lr: float, beta: float, clip: float = 0.0, mu: float = 0.0) -> Make:
    return lambda params: NormalizedGD(params, lr, beta, clip, mu)


def half(lr: float, beta: float, clip: float = 0.0, mu: float = 0.0) -> Make:
    """Convert a setting for half the gradient into one for the gradient."""
    return normalized(lr * 2 ** (beta - 1), beta, 2 * clip, mu)


def descend(
    problem: nn.Module, make: Make, steps: int, measure: Callable[[], float], until: float = -math.inf
) -> list[float]:
    """Return what is measured before each step and at the end; stop below `until`, or when the loss diverges."""
    optimizer = make(list(problem.parameters()))
    seen = [measure()]
    for _ in range(steps):
        if seen[-1] < until:
            break
        optimizer.zero_grad()
        loss = problem()
        loss.backward()
        if not float(loss.detach()) < DIVERGED:
            seen.append(math.inf)
            break
        optimizer.step()
        seen.append(measure())
    return seen


def reset(problem: nn.Module, start: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, kept in zip(problem.parameters(), start, strict=True):
            p.copy_(kept)


def value_of(problem: nn.Module) -> float:
    with torch.no_grad():
        return float(problem())


class Quartics:
    """Phase retrieval in several seeds: starts, floors, and the constants that are estimated for each."""

    def __init__(self, seeds: int) -> None:
        self.problems = [PhaseRetrieval.random(generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
        self.starts = [[p.z.detach().clone()] for p in self.problems]
        self.known = [p.smoothness() for p in self.problems]
        self.floors = []
        for i, problem in enumerate(self.problems):
            self.floors.append(min(self.run(i, self.automatic(i), 1500)))
            reset(problem, self.starts[i])

    def automatic(self, i: int) -> Make:
        """Return the automatic step of one seed."""
        return lambda params: NormalizedGD(params, "auto", smoothness=self.known[i])

    def run(self, i: int, make: Make, steps: int, until: float = -math.inf) -> list[float]:
        """Return the objective along a descent from the start of one seed."""
        reset(self.problems[i], self.starts[i])
        return descend(self.problems[i], make, steps, partial(value_of, self.problems[i]), until)

    def hits(self, make: Callable[[int], Make], steps: int) -> list[float]:
        """Return the iterations to the target in each seed, infinite where it is not reached."""
        found = []
        for i, floor in enumerate(self.floors):
            seen = self.run(i, make(i), steps, floor + ABOVE)
            found.append(float(len(seen) - 1) if seen[-1] < floor + ABOVE else math.inf)
        return found

    def best(self, make: Callable[[float], Make], grid: Sequence[float], steps: int) -> float:
        """Return the step of a grid that reaches the target soonest."""
        scores = {lr: sum(min(h, 1e6) for h in self.hits(lambda _, lr=lr: make(lr), steps)) for lr in grid}
        return min(scores, key=lambda lr: scores[lr])


def deterministic(quartics: Quartics) -> Iterator[Row]:
    case, steps = "phase retrieval, all data", 500
    subjects: dict[str, Callable[[int], Make]] = {
        "GD": lambda _: half(8e-4, 0.0),
        "1/3-GD": lambda _: half(0.03, 1 / 3),
        "2/3-GD": lambda _: half(0.1, 2 / 3),
        "1-GD": lambda _: half(0.2, 1.0),
        "clipped GD": lambda _: half(0.9, 1.0, 100.0),
    }
    for name, make, grid in (
        ("momentum", momentum, (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)),
        ("Adam", adam, (0.3, 1.0, 2.0, 4.0)),
    ):
        lr = quartics.best(make, grid, steps)
        subjects[f"{name} {lr:g}"] = lambda _, make=make, lr=lr: make(lr)
    subjects["planish auto"] = quartics.automatic
    for name, make in subjects.items():
        paths = [quartics.run(i, make(i), steps) for i in range(len(quartics.floors))]
        above = [[f - floor for f in path] for path, floor in zip(paths, quartics.floors, strict=True)]
        hits = [next((t for t, f in enumerate(path) if f < ABOVE), math.inf) for path in above]
        if any(map(math.isfinite, hits)):
            yield spread(case, name, "iterations to 0.6 above the floor", hits, "")
        yield spread(case, name, f"f less the floor after {steps}", [path[-1] for path in above], "")
        for mark in MARKS:
            at = [path[mark] for path in above if mark < len(path)]
            if len(at) == len(above):
                yield Row(CURVES, name, f"{mark}", float(np.mean(at)), "")


def theory(quartics: Quartics, quick: bool) -> Iterator[Row]:
    """Iterations to a gradient of norm eps: the constant step that the theory names for it, and the automatic one."""
    power = {4: (2 / 3, 0.0, 12 / 4 ** (2 / 3)), 6: (4 / 5, 0.0, 30 / 6**0.8)}
    for k, constants in power.items():
        known = GeneralizedSmoothness(*constants)
        for eps in (1e-1,) if quick else (1e-1, 1e-2):
            case = f"x^{k} from 5, gradient {eps:g}"
            for name, beta, step in (
                ("theory, beta = alpha", known.alpha, known.stepsize(eps)),
                ("theory, beta = 1", 1.0, known.stepsize(eps, 1.0)),
                ("paper's step, beta = alpha", known.alpha, known.stepsize(eps, rule="paper")),
            ):
                taken = _scalar(k, eps, lambda g, step=step, beta=beta: step * g ** (1 - beta))
                yield Row(case, name, "iterations", taken, "")
            yield Row(case, "planish auto", "iterations", _scalar(k, eps, known.step_length), "")
    if quick:
        return
    case, eps = "phase retrieval, gradient 0.1", 0.1
    counts: dict[str, list[float]] = {"theory, beta = alpha": [], "planish auto": []}
    for i, known in enumerate(quartics.known):
        for name, taken in counts.items():
            problem = quartics.problems[i]
            reset(problem, quartics.starts[i])
            step = normalized(known.stepsize(eps), known.alpha) if name != "planish auto" else quartics.automatic(i)
            taken.append(_to_gradient(problem, step, eps))
    for name, taken in counts.items():
        yield spread(case, name, "iterations", taken, "")


def _scalar(k: int, eps: float, length: Callable[[float], float]) -> float:
    x, taken = 5.0, 0
    while k * x ** (k - 1) > eps:
        x -= length(k * x ** (k - 1))
        taken += 1
    return float(taken)


def _to_gradient(problem: nn.Module, make: Make, eps: float) -> float:
    optimizer = make(list(problem.parameters()))
    for taken in range(CAP):
        optimizer.zero_grad()
        problem().backward()
        if float(torch.cat([p.grad.flatten() for p in problem.parameters()]).norm()) <= eps:
            return float(taken)
        optimizer.step()
    return math.inf


def sampled(problem: nn.Module, n: int, make: Make, batch: int, budget: int, seed: int, twice: bool = True) -> float:
    """Step on random batches until the budget of gradient evaluations is spent; return how many were.

    `twice` counts both batches of SPIDER's inner steps; without it, one, as the authors' programs do.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = make(list(problem.parameters()))
    spent = 0
    while True:
        anchor = isinstance(optimizer, Spider) and optimizer.anchors
        cost = n if anchor else batch * (2 if isinstance(optimizer, Spider) and twice else 1)
        if spent + cost > budget:
            return float(spent)
        rows = slice(None) if anchor else torch.randint(n, (batch,), generator=generator)

        def closure(rows: Any = rows) -> torch.Tensor:  # noqa: ANN401  (a slice, or numbers)
            optimizer.zero_grad()
            loss = problem(rows)
            loss.backward()
            return loss

        optimizer.step(closure)
        spent += cost


def halved(name: str, make: Callable[[float], Make], step: float) -> dict[str, Make]:
    """Return a subject at the published step and at half of it: nobody shall win by the choice of it."""
    return {f"{name} {lr:g}": make(lr) for lr in (step, step / 2)}


def lowest(ends: dict[str, list[float]]) -> dict[str, list[float]]:
    """Keep of each subject the step with the lower mean; a name is the subject's and its step."""
    kept: dict[str, str] = {}
    for name, values in ends.items():
        subject = name.rpartition(" ")[0]
        if subject not in kept or sum(values) < sum(ends[kept[subject]]):
            kept[subject] = name
    return {name: ends[name] for name in kept.values()}


def stochastic(quartics: Quartics) -> Iterator[Row]:
    subjects: dict[str, Make] = {
        **halved("SGD", lambda lr: half(lr, 0.0), 2e-4),
        **halved("normalized SGD", lambda lr: half(lr, 1.0), 2e-3),
        **halved("normalized SGD, momentum", lambda lr: half(lr, 1.0, mu=1e-4), 3e-3),
        **halved("clipped SGD", lambda lr: half(lr, 1.0, 1000.0), 0.3),
        **{f"Adam {lr:g}": adam(lr) for lr in (0.01, 0.003, 0.001)},
        **halved("planish SPIDER", lambda lr: lambda params: Spider(params, lr, q=5), 0.01),
    }
    ends: dict[str, list[float]] = {}
    for i, (problem, floor) in enumerate(zip(quartics.problems, quartics.floors, strict=True)):
        quartics.run(i, half(0.1, 2 / 3), 100)
        warm = [problem.z.detach().clone()]
        for name, make in subjects.items():
            for counted in (True, False) if "SPIDER" in name else (True,):
                reset(problem, warm)
                sampled(problem, len(problem.y), make, 50, 25_000, seed=i, twice=counted)
                label = name if counted else name.replace("planish SPIDER", "SPIDER, counted as published,")
                ends.setdefault(label, []).append(value_of(problem) - floor)
    for name, values in lowest(ends).items():
        yield spread("phase retrieval, batches of 50, 25,000 gradients", name, "f less the floor", values, "")


def rows(quick: bool, **_: object) -> Iterator[Row]:
    """Yield iterations and objectives.

    Args:
        quick: Two seeds, small budgets.
    """
    torch.set_num_threads(1)
    quartics = Quartics(2 if quick else 5)
    for part in (deterministic(quartics), theory(quartics, quick), stochastic(quartics)):
        for row in part:
            _log.info("%s: %s: %s %.4g", row.case, row.subject, row.metric, row.value)
            yield row
