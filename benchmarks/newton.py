"""Gradient-normalized Newton beside SciPy's trust regions and Newton-CG: steps, and linear systems or products solved.

All stop where f is within 1e-8 of its least value (or, for logistic regression, where the gradient's norm is at most
1e-6). `solves` counts factorizations for dense methods, ours and trust-exact's alike, and Hessian products for
Newton-CG, trust-ncg and trust-krylov; evaluations are of f with its gradient.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row
from benchmarks.optim import spread
from planish.optim import Composite, LogSumExp, PowerNorm, gram, minimize_gns

GAP, MOST = 1e-8, 500


@dataclass(frozen=True)
class Problem:
    """A function, where it starts, its least value (None: stop by the gradient), and the approximations to be tried."""

    name: str
    function: Callable[[Tensor], Tensor]
    start: Tensor
    least: float | None
    ours: dict[str, dict[str, Any]]
    hessian: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]


def chebyshev(x: Tensor) -> Tensor:
    return torch.cat([(1 - x[:1]) / 2, x[1:] - 2 * x[:-1] ** 2 + 1])


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)])


def _problem(
    name: str,
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    least: float | None,
    ours: dict[str, Any],
    hessian: Callable[[Tensor], Tensor] | None = None,
) -> Problem:
    gradient = torch.func.grad(function)
    return Problem(name, function, start, least, ours, hessian or torch.func.jacrev(gradient), gradient)


def problems(seed: int, quick: bool, skipped: dict[str, str]) -> Iterator[Problem]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator) * 2 - 1

    for n in (60,) if quick else (60, 200):
        a, b = uniform(n, n), uniform(n)
        zero = torch.zeros(n, dtype=torch.float64)
        f = LogSumExp(a - LogSumExp(a, b).gradient(zero), b)  # its least value is at 0
        ours = {
            "exact": {"hess": f.hessian, "metric": f.metric},
            "weighted": {"hess": f.weighted, "metric": f.metric},
            "metric only": {"hess": "zero", "metric": f.metric},
        }
        yield _problem(f"soft maximum {n}", f, zero + 1, float(f(zero)), ours, f.hessian)
    n = 30 if quick else 200
    f = PowerNorm(chebyshev, 4)
    ours = {"exact": {"hess": "exact"}, "Gauss-Newton": {"hess": f.gauss_newton}}
    yield _problem(f"Chebyshev chain {n}, p = 4", f, (uniform(n) + 1) / 2, 0.0, ours)
    a, b = uniform(n // 2, n), uniform(n // 2)
    f = PowerNorm(lambda x: a @ x - b, 4)
    B = gram(a)
    ours = {
        "exact": {"hess": f.gauss_newton, "metric": B},
        "Fisher, rank 1": {"hess": f.fisher, "metric": B},
        "metric only": {"hess": "zero", "metric": B},
    }
    yield _problem(
        f"||Ax - b||^4 / 4, {n // 2} x {n}", f, torch.ones(n, dtype=torch.float64), 0.0, ours, f.gauss_newton
    )
    if seed:  # the rest has no randomness
        return
    corner = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    for p in (2, 5):
        f = PowerNorm(rosenbrock, p)
        ours = {"exact": {"hess": "exact"}, "Gauss-Newton": {"hess": f.gauss_newton}}
        yield _problem(f"Rosenbrock, p = {p}", f, corner, 0.0, ours)
    try:
        from sklearn.datasets import load_breast_cancer  # noqa: PLC0415
    except ImportError as error:
        skipped["logistic regression"] = str(error)
        return
    x, y = load_breast_cancer(return_X_y=True)
    x, signs = torch.from_numpy((x - x.mean(0)) / x.std(0)), torch.from_numpy(2.0 * y - 1)

    def logistic(w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-signs * (x @ w)).mean() + 5e-4 * w.square().sum()

    def loss(z: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-signs * z[:-30]) + 5e-4 * z[-30:].square().sum()

    f = Composite(loss, lambda w: torch.cat([x @ w, w]))
    ours = {"exact": {"hess": "exact"}, "Fisher": {"hess": "fisher"}, "nothing": {"hess": "zero"}}
    ours["exact, metric X'X/n"] = {"hess": "exact", "metric": gram(x) / len(x)}
    yield _problem("logistic regression, breast cancer", f, torch.zeros(30, dtype=torch.float64), None, ours)
    if float((f(torch.ones(30, dtype=torch.float64)) - logistic(torch.ones(30, dtype=torch.float64))).abs()) > 1e-12:
        raise ValueError("newton: the composite is not the logistic loss")


class Counted:
    """The same oracles for SciPy, with counts; it stops everybody at the same accuracy."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.evaluations, self.products, self.inner = problem, 0, 0, 0

    def fun(self, x: Any) -> float:  # noqa: ANN401  (arrays)
        """Return f, and count."""
        self.evaluations += 1
        return float(self.problem.function(torch.from_numpy(np.array(x))))

    def jac(self, x: Any) -> Any:  # noqa: ANN401
        """Return the gradient."""
        return self.problem.gradient(torch.from_numpy(np.array(x))).numpy()

    def hess(self, x: Any) -> Any:  # noqa: ANN401
        """Return the Hessian."""
        return self.problem.hessian(torch.from_numpy(np.array(x))).numpy()

    def hessp(self, x: Any, v: Any) -> Any:  # noqa: ANN401
        """Return a product with the Hessian, and count."""
        self.products += 1
        at, along = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(v))
        return torch.func.vjp(self.problem.gradient, at)[1](along)[0].numpy()

    def stop(self, intermediate_result: Any) -> None:  # noqa: ANN401
        """Stop where everybody stops."""
        if self.problem.least is not None:
            if intermediate_result.fun - self.problem.least <= GAP:
                raise StopIteration
        elif float(np.linalg.norm(self.jac(intermediate_result.x))) <= 1e-6:
            raise StopIteration


def _scipy(problem: Problem, method: str) -> tuple[float, float, float]:
    """Return iterations, solves and evaluations; infinite where the accuracy was not reached."""
    from scipy import optimize  # noqa: PLC0415
    from scipy.optimize._trustregion_exact import IterativeSubproblem  # noqa: PLC0415

    counted = Counted(problem)
    products = method in ("Newton-CG", "trust-ncg", "trust-krylov")
    plain = IterativeSubproblem.solve

    def solve(self: Any, radius: float) -> Any:  # noqa: ANN401  (SciPy tells nobody how often it factorizes)
        found = plain(self, radius)
        counted.inner += self.niter
        return found

    IterativeSubproblem.solve = solve
    tight = {"xtol": 1e-14} if method == "Newton-CG" else {"gtol": 1e-14}
    try:
        found = optimize.minimize(
            counted.fun, problem.start.numpy(), jac=counted.jac, method=method, callback=counted.stop,
            **({"hessp": counted.hessp} if products else {"hess": counted.hess}), options={"maxiter": MOST, **tight},
        )  # fmt: skip
    finally:
        IterativeSubproblem.solve = plain
    if problem.least is not None:
        reached = found.fun - problem.least <= GAP
    else:
        reached = float(np.linalg.norm(counted.jac(found.x))) <= 1e-6
    if not reached:
        return (math.inf,) * 3
    return float(found.nit), float(counted.products if products else counted.inner), float(counted.evaluations)


def _ours(problem: Problem, settings: dict[str, Any]) -> tuple[float, float, float]:
    def stop(intermediate_result: Any) -> None:  # noqa: ANN401
        if problem.least is not None and intermediate_result.fun - problem.least <= GAP:
            raise StopIteration

    gtol = 1e-13
    if problem.least is None:  # in the plain norm for all metrics alike

        def stop(intermediate_result: Any) -> None:  # noqa: ANN401
            if float(problem.gradient(intermediate_result.x).norm()) <= 1e-6:
                raise StopIteration

    found = minimize_gns(
        problem.function, problem.start, jac=problem.gradient, gtol=gtol, maxiter=MOST, callback=stop, **settings
    )
    if found.status != 99:
        return (math.inf,) * 3
    return float(found.nit), float(found.nsolve), float(found.nfev)


def rows(quick: bool, *, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield the mean counts over seeds of every approximation and every rival.

    Args:
        quick: Two seeds, small systems.
        skipped: Filled with what did not arrive, and why.
    """
    skipped = {} if skipped is None else skipped
    seeds = 2 if quick else 5
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for seed in range(seeds):
        for problem in problems(seed, quick, skipped):
            for name, settings in problem.ours.items():
                for regrow, label in (("first", ""), ("always", ", as published")):
                    key = (problem.name, f"planish {name}{label}")
                    found.setdefault(key, []).append(_ours(problem, {**settings, "regrow": regrow}))
            for method in ("trust-exact", "trust-ncg", "trust-krylov", "Newton-CG"):
                found.setdefault((problem.name, f"SciPy {method}"), []).append(_scipy(problem, method))
    for (case, subject), counts in found.items():
        if not any(math.isfinite(c[0]) for c in counts):
            skipped[f"{subject} on {case}"] = f"not there after {MOST} steps, or it gave up"
            continue
        kinds = ("iterations", "solves", "evaluations")
        for metric, values in zip(kinds, zip(*counts, strict=True), strict=True):
            yield spread(case, subject, metric, values, "")
