"""An optimizer to ask for points and to tell what they are worth: a tournament in a small population."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad

GROWTH = 1.5
"""Factor of the step after a success; four failures undo it, so that one success in five keeps it."""


class RegularizedTournament:
    """Improve a vector by mutating the best of a few members of a population, and dropping the worst.

    Ask and tell, as in `cma` or `nevergrad`. The best point is never lost.

    Args:
        x0: Start, (n,); all members are copies of it.
        fitness: What the start is worth, the less the better; None (default) asks for it first.
        population: Members kept, at least 1. Default 15.
        tournament: Members drawn, with replacement, of which the best becomes the parent; at least 1. Default 10.
        mutation: Largest change of a coordinate, at least 0; uniform on both sides. Default 1e-3.
        relative: Take the change as a share of the coordinate. Default False: in its own units, and the magnitude of
            the result.
        share: Share of coordinates that change, in (0, 1]; default 1.
        adapt: Let the size of changes follow success: more than one in five makes it larger. Default False.
        bounds: Lowest and highest values, each a number or (n,).
        generator: Source of randomness; default a fixed one. The global state is neither read nor set.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> search = RegularizedTournament(torch.tensor([3.0, 1.0]), mutation=0.2, relative=True, adapt=True)
        >>> for _ in range(300):
        ...     x = search.ask()
        ...     search.tell(x, (x - 2).square().sum(-1))
        >>> search.best[1] < 0.01
        True
    """

    def __init__(
        self,
        x0: Float[Tensor, "n"],
        *,
        fitness: float | None = None,
        population: int = 15,
        tournament: int = 10,
        mutation: float = 1e-3,
        relative: bool = False,
        share: float = 1.0,
        adapt: bool = False,
        bounds: tuple[Tensor | float, Tensor | float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        where = "RegularizedTournament"
        if x0.ndim != 1 or not x0.numel() or not bool(torch.isfinite(x0).all()):
            raise bad(where, "x0", "a vector of finite values", tuple(x0.shape) if x0.ndim != 1 else x0)
        for name, number in (("population", population), ("tournament", tournament)):
            if not isinstance(number, int) or number < 1:
                raise bad(where, name, "an integer of at least 1", number)
        if not 0 <= mutation < math.inf:
            raise bad(where, "mutation", "a finite number of at least 0", mutation)
        if not 0 < share <= 1:
            raise bad(where, "share", "a float in (0, 1]", share)
        if fitness is not None and math.isnan(fitness):
            raise bad(where, "fitness", "a number", fitness)
        self._tournament, self._relative, self._share, self._adapt = tournament, relative, share, adapt
        self._low, self._high = bounds or (-math.inf, math.inf)
        self._generator = generator or torch.Generator().manual_seed(0)
        self._size = population
        self._start = x0.detach().double().clone()
        self._members: list[tuple[float, Tensor]] = []
        self.step = float(mutation)
        if fitness is not None:
            self._members = [(float(fitness), self._start)] * population

    @property
    def best(self) -> tuple[Float[Tensor, "n"], float]:
        """The best point so far and what it is worth; infinite before anything was told."""
        return (self._members[0][1], self._members[0][0]) if self._members else (self._start, math.inf)

    def ask(self, n: int = 1) -> Float[Tensor, "k n"]:
        """Return `n` points to be tried; the start first, where nothing is known of it."""
        points: list[Tensor] = []
        for _ in range(n):
            if not self._members and not points:
                points.append(self._start)
                continue
            parent = self._start
            if self._members:
                drawn = torch.randint(len(self._members), (self._tournament,), generator=self._generator)
                parent = self._members[int(drawn.min())][1]  # members are sorted, the best first
            points.append(self._mutated(parent))
        return torch.stack(points)

    def _mutated(self, parent: Tensor) -> Tensor:
        change = self.step * (2 * torch.rand(parent.shape, generator=self._generator, dtype=torch.float64) - 1)
        if self._share < 1:
            chosen = torch.rand(parent.shape, generator=self._generator, dtype=torch.float64) < self._share
            change = torch.where(chosen, change, 0.0)
        child = parent * (1 + change) if self._relative else (parent + change).abs()
        return torch.clamp(child, *(torch.as_tensor(b, dtype=torch.float64) for b in (self._low, self._high)))

    def tell(self, points: Float[Tensor, "k n"], fitnesses: Float[Tensor, "k"] | list[float]) -> None:
        """Take in what points are worth; infinite for one that was given up.

        Raises:
            ValueError: There is not one fitness a point, or one is not a number.
        """
        values = [float(f) for f in fitnesses]
        if len(values) != len(points) or any(math.isnan(f) for f in values):
            raise bad("RegularizedTournament.tell", "fitnesses", f"{len(points)} numbers", values)
        for point, fitness in zip(points, values, strict=True):
            member = (fitness, point.detach().double().clone())
            if not self._members:
                self._members = [member] * self._size
                continue
            if self._adapt:
                self.step *= GROWTH if fitness < self.best[1] else GROWTH**-0.25
                self.step = min(self.step, 0.5) if self._relative else self.step  # no coordinate comes near zero
            self._members = sorted([*self._members, member], key=lambda entry: entry[0])[: self._size]
