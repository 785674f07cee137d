"""The Choquard equation: ground levels, concentration, time per solve; plain descent beside the preconditioned one."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import ROOT, Row
from planish._support import NotConverged
from planish.pde import ChoquardProblem, ExpNonlinearity, FractionalLaplacian1D, concentration_sweep, solve_ground_state

PICTURE = ROOT / "docs" / "papers" / "choquard.svg"


def flat(x: Tensor) -> Tensor:
    return torch.ones_like(x[..., 0])


def wells(x: Tensor) -> Tensor:
    w = (x[..., 0] ** 2 - 1) ** 2
    return 1 + w / (1 + w)


def timed(run: Callable[[], object], times: int = 3) -> float:
    """Return the least processor time of some runs, in seconds."""
    best = float("inf")
    for _ in range(times):
        began = time.process_time()
        run()
        best = min(best, time.process_time() - began)
    return best


def _solved(problem: ChoquardProblem, name: str, case: str, *, preconditioned: bool) -> Iterator[Row]:
    began = time.process_time()
    try:
        state = solve_ground_state(problem, preconditioned=preconditioned, max_iter=400)
    except NotConverged as error:
        state = error.best  # type: ignore[assignment]
    yield Row(case, name, "energy", state.energy, "")
    yield Row(case, name, "steps", state.n_iter, "")
    yield Row(case, name, "processor time", time.process_time() - began, "s")
    yield Row(case, name, "residual", state.residual, "")
    if state.pohozaev is not None:
        yield Row(case, name, "Pohozaev's defect", abs(state.pohozaev), "")


def rows(quick: bool, **_: object) -> Iterator[Row]:
    """Yield levels, the sweep and times; draw the picture of a full run.

    Args:
        quick: Small boxes, few eps.
        **_: What other benchmarks are asked beside this.
    """
    case = "ground state of the flat problem, N = 1, s = 1/2, q = 4, step 0.05"
    for half_width in (10,) if quick else (20, 40, 80):
        for preconditioned in (True, False):
            problem = ChoquardProblem(flat, half_width=half_width, n=40 * half_width + 1)
            name = f"box {half_width}, {'preconditioned' if preconditioned else 'plain'}"
            yield from _solved(problem, name, case, preconditioned=preconditioned)
    if not quick:
        case = "ground state of the flat problem, N = 2, s = 1/2, q = 6, step 0.25"
        f = ExpNonlinearity(terms=3, exponent=4 / 3)
        for half_width in (8, 12):
            problem = ChoquardProblem(flat, dim=2, q=6, mu=1.0, nonlinearity=f, half_width=half_width, n=8 * half_width)
            yield from _solved(problem, f"box {half_width}, preconditioned", case, preconditioned=True)
    case = "one energy and gradient of [u]_4^4 on a line"
    for n in (200,) if quick else (400, 800, 1600, 3200):
        u = torch.randn(n, dtype=torch.float64)
        for name, dense in (("Fourier", False), ("all pairs", True)):
            seminorm = FractionalLaplacian1D(n, 0.05, s=0.5, r=4, dense=dense)
            yield Row(case, name, f"n = {n}", 1e3 * timed(lambda s=seminorm, u=u: (s.energy(u), s(u))), "ms")
    level = solve_ground_state(ChoquardProblem(flat, half_width=40, n=801)).energy
    eps = (1.0, 0.5) if quick else (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
    sweep = concentration_sweep(
        lambda e: ChoquardProblem(wells, eps=e, half_width=24 + 2 / e, n=round(20 * (24 + 2 / e)) + 1),
        eps, [1.0], level=level,
    )  # fmt: skip
    case = f"two wells at x = -1, 1; energy of the flat problem {level:.4f}"
    for e, state, away in zip(sweep.eps, sweep.states, sweep.distances, strict=True):
        yield Row(case, f"eps = {e:g}", "peak", state.peak[0], "")
        yield Row(case, f"eps = {e:g}", "distance to the well", away, "")
        yield Row(case, f"eps = {e:g}", "energy", state.energy, "")
        yield Row(case, f"eps = {e:g}", "steps", state.n_iter, "")
    if not quick:
        sweep.plot().savefig(PICTURE, metadata={"Date": None})
