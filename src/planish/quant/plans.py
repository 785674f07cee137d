"""Plans: decisions that look at the whole model before anything is rounded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planish._support import bad
from planish.quant.engine import Method, Walk, no_transform
from planish.quant.search import OBJECTIVES, compare

GRANULARITIES = ("model", "kind", "layer")


@dataclass(frozen=True)
class SearchAlpha:
    """Search the strength of smoothing on the loss of the whole model.

    Args:
        granularity: "model", "kind" or "layer".
        objective: See `planish.quant.search`.
        steps: Points of the grid over [0, 1]; default 21, as published.
        drop: See `planish.quant.search`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> SearchAlpha(steps=5).grid
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """

    granularity: str = "model"
    objective: str = "hidden_mse"
    steps: int = 21
    drop: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.granularity not in GRANULARITIES:
            raise bad("SearchAlpha", "granularity", f"one of {', '.join(GRANULARITIES)}", self.granularity)
        if self.objective not in OBJECTIVES:
            raise bad("SearchAlpha", "objective", f"one of {', '.join(OBJECTIVES)}", self.objective)
        if self.steps < 2:
            raise bad("SearchAlpha", "steps", "at least 2", self.steps)

    @property
    def grid(self) -> tuple[float, ...]:
        """The points."""
        return tuple(round(i / (self.steps - 1), 6) for i in range(self.steps))

    def __call__(self, walk: Walk, method: Method) -> Method:
        """Return the method with the alpha that was found."""
        smooth = method.transform
        plain = replace(method, transform=no_transform)
        candidates = [plain, *(replace(method, transform=replace(smooth, alpha=a)) for a in self.grid)]
        choice = compare(walk, candidates, objective=self.objective, drop=self.drop)
        return replace(candidates[choice.best], findings={"alpha": dict(zip(("none", *self.grid), choice.losses))})
