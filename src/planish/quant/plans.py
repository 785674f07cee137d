"""Plans: decisions that look at the whole model before anything is rounded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from planish._support import bad
from planish.quant.engine import Method, Walk, no_transform
from planish.quant.local import SiteError
from planish.quant.moments import measure
from planish.quant.rounding import Nearest
from planish.quant.search import OBJECTIVES, Choice, compare

GRANULARITIES = ("model", "kind", "layer")


@dataclass(frozen=True)
class SearchAlpha:
    """Search the strength of smoothing on the loss of the whole model, from coarse to fine.

    One alpha for the model comes from the full grid. "kind" then gives each kind of layer (queries with keys and
    values, outputs, ...) its own, one kind after another. "layer" proposes an alpha for every single site by the error
    of the module around it, and takes the proposals, kind by kind, where the whole model gains. Meanwhile weights are
    rounded to nearest; another rounding step is taken at the end if it lowers the loss.

    Args:
        granularity: "model" (the paper, default), "kind" or "layer".
        objective: See `planish.quant.search`.
        steps: Points of the grid over [0, 1]; default 21, as published.
        drop: Give up an alpha whose error in some block is this many times the least; None follows all to the end, as
            published.
        tokens: How many of the calibration tokens the search runs on, at the least; default 4096.

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
    tokens: int = 4096

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.granularity not in GRANULARITIES:
            raise bad("SearchAlpha", "granularity", f"one of {', '.join(GRANULARITIES)}", self.granularity)
        if self.objective not in OBJECTIVES:
            raise bad("SearchAlpha", "objective", f"one of {', '.join(OBJECTIVES)}", self.objective)
        if self.steps < 2:
            raise bad("SearchAlpha", "steps", "at least 2", self.steps)
        if self.tokens < 1:
            raise bad("SearchAlpha", "tokens", "at least 1", self.tokens)
        if self.drop is not None and not self.drop > 1:
            raise bad("SearchAlpha", "drop", "above 1 or None", self.drop)

    @property
    def grid(self) -> tuple[float, ...]:
        """The points."""
        return tuple(round(i / (self.steps - 1), 6) for i in range(self.steps))

    def __call__(self, walk: Walk, method: Method) -> Method:
        """Return the method with the alphas that were found."""
        smooth: Any = method.transform
        walk = walk.first(self.tokens)
        wanted, method = method, replace(method, round=Nearest())
        plain = replace(method, transform=no_transform)
        curve = self._compare(walk, [plain, *(self._with(method, alpha=a) for a in self.grid)], "alpha")
        findings: dict[str, Any] = {
            "objective": self.objective,
            "alpha": {"none" if a is None else a: x for a, x in zip((None, *self.grid), curve.losses, strict=True)},
        }
        if curve.best == 0 and self.granularity == "model":
            return self._rounded(walk, plain, wanted, {**findings, "chosen": None, "loss": curve.losses[0]})
        alpha = None if curve.best == 0 else self.grid[curve.best - 1]
        method, loss = replace(method, transform=replace(smooth, alpha=alpha)), curve.losses[curve.best]
        if self.granularity != "model":
            for kind in self._kinds(walk):
                method, loss = self._refine_kind(walk, method, loss, kind)
            findings["kinds"] = dict(method.transform.exceptions)  # type: ignore[attr-defined]
        if self.granularity == "layer":
            method, loss = self._refine_layers(walk, method, loss)
        return self._rounded(walk, method, wanted, {**findings, "chosen": alpha, "loss": loss})

    def _rounded(self, walk: Walk, method: Method, wanted: Method, findings: dict[str, Any]) -> Method:
        """Bring the wanted rounding step back if the whole model gains by it."""
        if wanted.round != method.round:
            fine = replace(method, round=wanted.round)
            choice = self._compare(walk, [fine], "rounding")
            if choice.losses[0] < findings["loss"]:
                method, findings = fine, {**findings, "loss": choice.losses[0]}
        return replace(method, findings=findings)

    def _compare(self, walk: Walk, methods: list[Method], stage: str) -> Choice:
        return compare(walk, methods, objective=self.objective, drop=self.drop, stage=f"search {stage}")

    @staticmethod
    def _with(method: Method, alpha: float | None = None, exceptions: dict[str, float | None] | None = None) -> Method:
        smooth: Any = method.transform
        if exceptions is None:
            return replace(method, transform=replace(smooth, alpha=alpha))
        return replace(method, transform=replace(smooth, exceptions=tuple(sorted(exceptions.items()))))

    def _refine_kind(self, walk: Walk, method: Method, loss: float, kind: str) -> tuple[Method, float]:
        """Try other alphas for one kind of site; keep the best on the whole model's loss."""
        now: Any = method.transform
        current = now.alpha_of(kind, kind)
        around = [0.25, 0.5, 0.75] if current is None else [current + d for d in (-0.3, -0.15, 0.15, 0.3)]
        values = [None, *sorted({round(min(max(a, 0.0), 1.0), 6) for a in around} - {current})]
        if current is None:
            values = values[1:]
        tried = [self._with(method, exceptions={**dict(now.exceptions), kind: a}) for a in values]
        choice = self._compare(walk, tried, f"alpha of {kind}")
        least = choice.losses[choice.best]
        return (tried[choice.best], least) if least < loss else (method, loss)

    def _refine_layers(self, walk: Walk, method: Method, loss: float) -> tuple[Method, float]:
        """Propose an alpha for every site, and take the proposals of those kinds for which the whole model gains."""
        now: Any = method.transform
        proposals = self._propose(walk, method)
        kinds = list(proposals)

        def taking(chosen: list[str]) -> Method:
            extra = {name: a for kind in chosen for name, a in proposals[kind].items()}
            return self._with(method, exceptions={**dict(now.exceptions), **extra})

        singles = [taking([kind]) for kind in kinds]
        choice = self._compare(walk, [taking(kinds), *singles], "alpha of layers")
        helpful = [kind for kind, x in zip(kinds, choice.losses[1:], strict=True) if x < loss]
        candidates = [(method, loss), (taking(kinds), choice.losses[0])]
        candidates += zip(singles, choice.losses[1:], strict=True)
        if 1 < len(helpful) < len(kinds):
            both = self._compare(walk, [taking(helpful)], "alpha of helpful layers")
            candidates.append((taking(helpful), both.losses[0]))
        return min(candidates, key=lambda pair: pair[1])

    def _kinds(self, walk: Walk) -> list[str]:
        kinds: dict[str, None] = {}

        def note(sites: Any, _block: Any) -> None:  # noqa: ANN401
            kinds.update(dict.fromkeys(s.kind for s in sites if s.producer is not None))

        _visit(walk, note, measured=False)
        return list(kinds)

    @torch.no_grad()
    def _propose(self, walk: Walk, method: Method) -> dict[str, dict[str, float | None]]:
        """Return for every kind of site the alpha of each of its sites that its own module likes best."""
        kept = walk.journal.recall("proposals") if walk.journal else None
        if kept is not None:
            return {k: dict(v) for k, v in kept.items()}
        smooth: Any = method.transform
        proposals: dict[str, dict[str, float | None]] = {}

        def propose(sites: Any, _block: Any) -> None:  # noqa: ANN401
            for site in sites:
                if site.producer is None or site.unseen:
                    continue
                judge = SiteError(site, self.tokens)
                errors: dict[float | None, float] = {None: judge.of(method, None)}
                for alpha in self.grid:
                    errors[alpha] = judge.of(method, smooth.scales(site, method, alpha))
                proposals.setdefault(site.kind, {})[site.name] = min(errors, key=errors.__getitem__)

        _visit(walk, propose, measured=True)
        if walk.journal:
            walk.journal.remember("proposals", proposals)
        return proposals


def _visit(walk: Walk, look: Callable[[Any, Any], None], *, measured: bool) -> None:
    """Show `look` the sites of every block of the float model."""
    stream = walk.stream
    clean = stream.start()
    for index in range(len(stream.modules)):
        block = stream.block(index, clean)
        sites = walk.sites(block)
        clean = measure(block, sites) if measured else list(block.run())
        look(sites, block)
        stream.put_back(block, index)
        if measured:
            walk.progress("propose", index + 1, len(stream.modules))
