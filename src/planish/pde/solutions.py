"""Several solutions of one problem, and where they go as eps falls."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from planish._support import NotConverged, bad, logger, require
from planish.pde.choquard import ChoquardProblem
from planish.pde.solver import GroundState, solve_ground_state

CATEGORY = {"circle": 2, "sphere": 2}
"""Lusternik-Schnirelmann category of some sets: the theorem promises at least so many solutions."""


def lower_bound(minima: str | Sequence[Sequence[float]], *, torus_dim: int | None = None) -> int:
    """Return how many positive solutions the theorem promises for small eps, by the set of the potential's minima.

    Args:
        minima: A list of points (their number), "circle" or "sphere" (2), or "torus" (k + 1).
        torus_dim: k of the torus.

    Raises:
        ValueError: The set is empty or unknown, or a torus comes without its dimension.

    Example:
        >>> lower_bound([[-1.0], [1.0]]), lower_bound("torus", torus_dim=2)
        (2, 3)
    """
    if minima == "torus":
        if torus_dim is None or torus_dim < 1:
            raise bad("lower_bound", "torus_dim", "at least 1", torus_dim)
        return torus_dim + 1
    if isinstance(minima, str):
        if minima not in CATEGORY:
            raise bad("lower_bound", "minima", "points, 'circle', 'sphere' or 'torus'", minima)
        return CATEGORY[minima]
    if not len(minima):
        raise bad("lower_bound", "minima", "at least one point", minima)
    return len({tuple(point) for point in minima})


def find_solutions(
    problem: ChoquardProblem,
    starts: Iterable[Sequence[float] | Tensor],
    *,
    tol: int | float = 1e-6,
    max_iter: int = 500,
    apart: int | float = 0.1,
    progress: Callable[[int, float], None] | None = None,
) -> list[GroundState]:
    """Solve from several starts and return the solutions that differ, lowest energy first.

    A start that does not converge is logged and left out.

    Args:
        problem: The problem.
        starts: Points in x, or functions on the grid.
        tol: Residual of each.
        max_iter: Steps of each.
        apart: Solutions nearer than this, relative to the first's norm, are one; default 0.1.
        progress: Called with (starts done, residual of the last).

    Raises:
        ValueError: There is no start, or an argument is out of range.
        NotConverged: No start converged; `best` is the state of the least residual.

    Example:
        >>> wells = lambda x: 1 + (w := (x[..., 0] ** 2 - 1) ** 2) / (1 + w)
        >>> problem = ChoquardProblem(wells, eps=0.25, half_width=24, n=401)
        >>> [round(s.peak[0], 2) for s in find_solutions(problem, [[-1.0], [1.0], [0.9]])]
        [-0.96, 0.96]
    """
    starts = list(starts)
    if not starts:
        raise bad("find_solutions", "starts", "at least one", starts)
    if not 0 < apart < 1:
        raise bad("find_solutions", "apart", "in (0, 1)", apart)
    found: list[GroundState] = []
    failed: list[GroundState] = []
    for count, start in enumerate(starts, 1):
        try:
            state = solve_ground_state(problem, start, tol=tol, max_iter=max_iter)
        except NotConverged as error:
            failed.append(error.best)  # type: ignore[arg-type]
            logger.warning("find_solutions, start %d: %s", count, error)
            state = failed[-1]
        else:
            if all((state.u - other.u).norm() > apart * other.u.norm() for other in found):
                found.append(state)
        if progress is not None:
            progress(count, state.residual)
    if not found:
        raise NotConverged(
            f"find_solutions: none of {len(starts)} starts converged.", min(failed, key=lambda s: s.residual)
        )
    return sorted(found, key=lambda s: (round(s.energy, 9), s.peak))


@dataclass(frozen=True)
class Sweep:
    """Solutions near one well for falling eps; `str` gives a table, `plot` a picture.

    Attributes:
        eps: The values, falling.
        states: One solution each.
        problems: The problem of each.
        well: Where the potential is least; (dim,).
        level: Ground level of the autonomous problem Z = inf Z, to which energies tend.

    Example:
        >>> well = lambda x: 1 + (w := (x[..., 0] - 1) ** 2) / (1 + w)
        >>> make = lambda eps: ChoquardProblem(well, eps=eps, half_width=14, n=141)
        >>> sweep: Sweep = concentration_sweep(make, [1.0], [1.0], level=0.67)
        >>> len(str(sweep).splitlines())
        2
    """

    eps: tuple[float, ...]
    states: tuple[GroundState, ...]
    problems: tuple[ChoquardProblem, ...]
    well: tuple[float, ...]
    level: int | float

    @property
    def distances(self) -> tuple[float, ...]:
        """Distance of each peak from the well."""
        return tuple(math.dist(state.peak, self.well) for state in self.states)

    def __str__(self) -> str:
        """Return a table."""
        lines = ["       eps        peak   distance     energy    - level   residual  steps"]
        for eps, state, away in zip(self.eps, self.states, self.distances, strict=True):
            lines.append(
                f"{eps:>10.4g}{state.peak[0]:>12.5f}{away:>11.5f}{state.energy:>11.5f}"
                f"{state.energy - self.level:>11.5f}{state.residual:>11.1e}{state.n_iter:>7}"
            )
        return "\n".join(lines)

    def plot(self, figure: Any = None) -> Any:  # noqa: ANN401  (matplotlib's Figure)
        """Draw solutions over the potential (in the plane, cuts), and both limits; return the figure.

        Args:
            figure: Figure to draw in; default a new one.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        plt = require("matplotlib.pyplot", "plot", "Sweep.plot")
        figure = plt.figure(figsize=(9.0, 3.8), layout="constrained") if figure is None else figure
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        colors = plt.get_cmap("viridis")([0.9 - 0.85 * i / max(len(self.eps) - 1, 1) for i in range(len(self.eps))])
        widest = 4 * max(1.0, *(abs(w) for w in self.well))
        for eps, state, problem, color in zip(self.eps, self.states, self.problems, colors, strict=True):
            x, cut = _cut(problem, state)
            shown = x.abs() <= widest
            left.plot(x[shown], cut[shown], color=color, linewidth=1.5, label=f"eps = {eps:.3g}")
        x, z = _cut(self.problems[0], replace(self.states[0], u=self.problems[0].z), at=self.states[0])
        behind = left.twinx()
        shown = x.abs() <= widest
        behind.fill_between(x[shown], z[shown], float(z.min()) * 0.6, color="0.85", zorder=0, linewidth=0)
        behind.set(ylabel="potential Z", ylim=(float(z.min()) * 0.6, float(z.max()) * 1.6))
        left.set(xlabel="x", ylabel="u", ylim=(0, None), zorder=1)
        left.patch.set_visible(False)
        left.legend(frameon=False, fontsize=8, loc="upper left")
        right.loglog(self.eps, self.distances, marker="o", label="peak to well")
        right.loglog(self.eps, [s.energy - self.level for s in self.states], marker="s", label="energy less its limit")
        right.set(xlabel="eps")
        right.set_xticks(self.eps, [f"{eps:.3g}" for eps in self.eps])
        right.minorticks_off()
        right.legend(frameon=False, fontsize=8)
        for ax in (left, right, behind):
            ax.spines["top"].set_visible(False)
        right.spines["right"].set_visible(False)
        return figure


def _cut(problem: ChoquardProblem, state: GroundState, at: GroundState | None = None) -> tuple[Tensor, Tensor]:
    """Return x and values along the first axis through the highest point."""
    index = torch.unravel_index((at or state).u.argmax(), state.u.shape)
    x, values = problem.eps * problem.points[..., 0], state.u
    for i in index[1:]:
        x, values = x[:, int(i)], values[:, int(i)]
    return x, values


def concentration_sweep(
    make: Callable[[float], ChoquardProblem],
    eps: Sequence[float],
    well: Sequence[float],
    *,
    level: int | float,
    tol: int | float = 1e-6,
    max_iter: int = 500,
    progress: Callable[[int, float], None] | None = None,
) -> Sweep:
    """Follow the solution near one well as eps falls.

    Args:
        make: Builds the problem for an eps.
        eps: Values above 0; solved in falling order.
        well: A point where the potential is least.
        level: Energy of the ground state for the constant potential inf Z, as `solve_ground_state` gives it.
        tol: Residual of each solution.
        max_iter: Steps of each.
        progress: Called with (solutions done, residual of the last).

    Raises:
        ValueError: There is no eps.
        NotConverged: A solution did not reach the tolerance; `best` is its state.

    Example:
        >>> wells = lambda x: 1 + (w := (x[..., 0] ** 2 - 1) ** 2) / (1 + w)
        >>> make = lambda eps: ChoquardProblem(wells, eps=eps, half_width=16 + 2 / eps, n=401)
        >>> sweep = concentration_sweep(make, [1.0, 0.5], [1.0], level=0.668)
        >>> [round(d, 2) for d in sweep.distances]
        [0.13, 0.07]
    """
    values = tuple(sorted({float(e) for e in eps}, reverse=True))
    if not values:
        raise bad("concentration_sweep", "eps", "at least one value", eps)
    problems = tuple(make(e) for e in values)
    states = []
    for problem in problems:
        states.append(solve_ground_state(problem, well, tol=tol, max_iter=max_iter))
        if progress is not None:
            progress(len(states), states[-1].residual)
    return Sweep(values, tuple(states), problems, tuple(map(float, well)), level)
