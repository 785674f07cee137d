"""How does an optimizer fare on the worst function there is? Queries to a stationary point, per door of the chain."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planish._support import bad, require
from planish.complexity.instances import ZeroChain

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Score:
    """Queries of one optimizer on one chain; None where it gave up.

    Example:
        >>> Score("GD", 10, 85, 10).per_door, Score("GD", 10, None, 3).per_door
        (8.5, inf)
    """

    optimizer: str
    length: int
    queries: int | None
    most_progress: int

    @property
    def per_door(self) -> float:
        """Queries a door; infinite where it gave up. No zero-respecting method has less than 1."""
        return math.inf if self.queries is None else self.queries / self.length


@dataclass(frozen=True)
class Scores:
    """Scores of several optimizers on chains of several lengths; `str` gives a table.

    Attributes:
        rows: One score for each optimizer and length.

    Example:
        >>> scores = Scores((Score("GD", 5, 52, 5), Score("GD", 10, 85, 10)))
        >>> scores.worst("GD"), round(scores.slope("GD"), 2)
        (10.4, 0.71)
    """

    rows: tuple[Score, ...]

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Names, in the order given."""
        return tuple(dict.fromkeys(row.optimizer for row in self.rows))

    def worst(self, optimizer: str) -> float:
        """Return the worst-case score: the most queries a door over all lengths."""
        return max(row.per_door for row in self.rows if row.optimizer == optimizer)

    def slope(self, optimizer: str) -> float:
        """Return the slope of log queries over log length; NaN with fewer than two chains finished."""
        done = [(row.length, row.queries) for row in self.rows if row.optimizer == optimizer and row.queries]
        if len(done) < 2:
            return math.nan
        x, y = (torch.tensor(column, dtype=torch.float64).log() for column in zip(*done, strict=True))
        x, y = x - x.mean(), y - y.mean()
        return float((x @ y) / (x @ x))

    def __str__(self) -> str:
        """Return a table: a line an optimizer, a column a length, then queries a door and slope."""
        lengths = sorted({row.length for row in self.rows})
        wide = max(len(name) for name in (*self.optimizers, "T ="))
        lines = [f"{'T =':<{wide}}" + "".join(f"{n:>8}" for n in lengths) + "   worst / T   slope"]
        for name in self.optimizers:
            cells = {row.length: row.queries for row in self.rows if row.optimizer == name}
            shown = "".join(f"{'-' if cells[n] is None else cells[n]:>8}" for n in lengths)
            lines.append(f"{name:<{wide}}{shown}{self.worst(name):>12.2f}{self.slope(name):>8.2f}")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:  # noqa: ANN401  (matplotlib's Axes)
        """Draw queries over length with the bound that nobody passes, and return the axes.

        Args:
            ax: Axes to draw on; default new ones.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        plt = require("matplotlib.pyplot", "plot", "Scores.plot")
        ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")[1] if ax is None else ax
        lengths = sorted({row.length for row in self.rows})
        ends = []
        for name in self.optimizers:
            done = [(r.length, r.queries) for r in self.rows if r.optimizer == name and r.queries is not None]
            if done:
                (line,) = ax.plot(*zip(*done, strict=True), marker="o", markersize=4, linewidth=1.5)
                ends.append((done[-1], name, line.get_color()))
        ax.fill_between(lengths, [1] * len(lengths), lengths, color="0.9", linewidth=0)
        ax.plot(lengths, lengths, color="0.4", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="doors T", ylabel="queries to |grad f| <= eps")
        ax.set_ylim(bottom=min(lengths) * 0.6)
        ax.set_xlim(right=max(lengths) * 2.6)
        ax.set_xticks(lengths, [str(n) for n in lengths])
        ax.minorticks_off()
        said = {"textcoords": "offset points", "fontsize": 8, "color": "0.3", "ha": "right"}
        ax.annotate("nobody: one door a query", (lengths[-1], min(lengths)), (-6, 4), **said)
        lowest = -math.inf
        for (x, y), name, color in sorted(ends, key=lambda end: end[0][1]):
            at = max(math.log(y), lowest + 0.22)  # names do not overlap
            lowest = at
            ax.annotate(
                name, (x, math.exp(at)), (6, 0), textcoords="offset points", fontsize=8, color=color, va="center"
            )
        ax.spines[["top", "right"]].set_visible(False)
        return ax


def bench(
    optimizers: Mapping[str, Make],
    lengths: Sequence[int] = (5, 10, 20, 40),
    *,
    most: int = 1000,
    chain: Callable[[int], ZeroChain] = ZeroChain,
    progress: Callable[[str, int, int], None] | None = None,
) -> Scores:
    """Count the queries that optimizers need on hard chains, from the origin to a stationary point.

    Every evaluation of the closure is a query, wherever the optimizer makes it: line searches pay for theirs. A run
    ends at the first query whose point is stationary.

    Args:
        optimizers: Name -> a function that takes a list of one parameter and returns an optimizer.
        lengths: Numbers of doors, each >= 1.
        most: Give up after this many queries a door, >= 1; default 1000.
        chain: Builds the function for a length; default the plain unscaled `ZeroChain`.
        progress: Called with (name, runs done, runs).

    Returns:
        The scores.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> print(bench({"GD": lambda p: torch.optim.SGD(p, lr=1 / 20)}, (5, 10)))
        T =       5      10   worst / T   slope
        GD       52      85       10.40    0.71
    """
    if not optimizers:
        raise bad("bench", "optimizers", "at least one", optimizers)
    if not lengths or min(lengths) < 1:
        raise bad("bench", "lengths", "at least one, all at least 1", lengths)
    if most < 1:
        raise bad("bench", "most", "at least 1", most)
    rows = []
    for name, make in optimizers.items():
        for length in lengths:
            rows.append(_run(name, make, chain(length), most * length))
            if progress is not None:
                progress(name, len(rows), len(optimizers) * len(lengths))
    return Scores(tuple(rows))


class _Stationary(Exception):
    """The closure was called at a stationary point."""


def _run(name: str, make: Make, f: ZeroChain, most: int) -> Score:
    x = torch.zeros(f.dim, dtype=torch.float64, requires_grad=True)
    optimizer = make([x])
    progress: list[int] = []  # of every query

    def closure() -> Tensor:
        grad = f.grad(x.detach())
        progress.append(int(f.progress(x.detach())))
        if torch.linalg.vector_norm(grad) <= f.eps:
            raise _Stationary
        x.grad = grad
        return f.value(x)  # with its graph: Newton methods differentiate it once more

    queries = None
    try:
        while len(progress) < most:
            before = len(progress)
            optimizer.step(closure)  # type: ignore[arg-type]
            if len(progress) == before or not torch.isfinite(x).all():
                break
    except _Stationary:
        queries = len(progress)
    return Score(name, f.length, queries, max(progress, default=0))
