"""Plans: decisions that look at the whole model before anything is rounded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from planish._support import bad
from planish.quant.candidates import OBJECTIVES, Choice, compare
from planish.quant.engine import Method, Walk, no_refine, no_transform
from planish.quant.local import SiteError
from planish.quant.moments import measure
from planish.quant.rounding import Nearest

GRANULARITIES = ("model", "kind", "layer")


@dataclass(frozen=True)
class SearchAlpha:
    """Search the strength of smoothing on the loss of the whole model, from coarse to fine.

    One alpha for the model comes from the full grid. "kind" then gives each kind of layer (queries with keys and
    values, outputs, ...) its own where the whole model gains. "layer" proposes an alpha for every single site by the
    error of the module around it, and takes the proposals, kind by kind, where the whole model gains. Meanwhile
    weights are rounded to nearest and not refined; at the end the method's own rounding step, or one of `rounds`, is
    taken if it lowers the loss.

    Args:
        granularity: "model" (the paper, default), "kind" or "layer".
        objective: See `planish.quant.search`. None stands for "kl" where the model has an output head, else
            "hidden_mse". Default "hidden_mse".
        steps: Points of the grid over [0, 1]; default 21, as published.
        drop: Give up an alpha whose error in some block is this many times the least; None follows all to the end, as
            published.
        tokens: How many of the calibration tokens the search runs on, at the least; default 4096.
        rounds: Rounding steps to choose from at the end, beside the method's own.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> SearchAlpha(steps=5).grid
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """

    granularity: str = "model"
    objective: str | None = "hidden_mse"
    steps: int = 21
    drop: float | None = None
    tokens: int = 4096
    rounds: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.granularity not in GRANULARITIES:
            raise bad("SearchAlpha", "granularity", f"one of {', '.join(GRANULARITIES)}", self.granularity)
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise bad("SearchAlpha", "objective", f"None or one of {', '.join(OBJECTIVES)}", self.objective)
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
        wanted, method = method, replace(method, round=Nearest(), refine=no_refine)
        plain = replace(method, transform=no_transform)
        curve = self._compare(walk, [plain, *(self._with(method, alpha=a) for a in self.grid)], "alpha")
        findings: dict[str, Any] = {
            "objective": self._judge(walk),
            "alpha": {"none" if a is None else a: x for a, x in zip((None, *self.grid), curve.losses, strict=True)},
        }
        if curve.best == 0 and self.granularity == "model":
            return self._rounded(walk, plain, wanted, {**findings, "chosen": None, "loss": curve.losses[0]})
        alpha = None if curve.best == 0 else self.grid[curve.best - 1]
        method, loss = replace(method, transform=replace(smooth, alpha=alpha)), curve.losses[curve.best]
        if self.granularity != "model":
            method, loss = self._refine_kinds(walk, method, loss)
            findings["kinds"] = dict(method.transform.exceptions)  # type: ignore[attr-defined]
        if self.granularity == "layer":
            method, loss = self._refine_layers(walk, method, loss)
        return self._rounded(walk, method, wanted, {**findings, "chosen": alpha, "loss": loss})

    def _rounded(self, walk: Walk, method: Method, wanted: Method, findings: dict[str, Any]) -> Method:
        """Bring the wanted rounding step, or another to choose from, back if the whole model gains by it."""
        steps = [step for step in (wanted.round, *self.rounds) if step != method.round]
        if steps:
            fine = [replace(method, round=step) for step in steps]
            choice = self._compare(walk, fine, "rounding")
            findings["rounding"] = {repr(s): x for s, x in zip(steps, choice.losses, strict=True)}
            if choice.losses[choice.best] < findings["loss"]:
                method, findings["loss"] = fine[choice.best], choice.losses[choice.best]
        return replace(method, refine=wanted.refine, findings=findings)

    def _compare(self, walk: Walk, methods: list[Method], stage: str) -> Choice:
        return compare(walk, methods, objective=self._judge(walk), drop=self.drop, stage=f"search {stage}")

    def _judge(self, walk: Walk) -> str:
        """Return the objective asked for; for None, "kl" where there is an output head, whose predictions count."""
        if self.objective is not None:
            return self.objective
        find: Callable[[], Any] | None = getattr(walk.stream.model, "get_output_embeddings", None)
        return "hidden_mse" if find is None or find() is None else "kl"

    @staticmethod
    def _with(method: Method, alpha: float | None = None, exceptions: dict[str, float | None] | None = None) -> Method:
        smooth: Any = method.transform
        if exceptions is None:
            return replace(method, transform=replace(smooth, alpha=alpha))
        return replace(method, transform=replace(smooth, exceptions=tuple(sorted(exceptions.items()))))

    def _refine_kinds(self, walk: Walk, method: Method, loss: float) -> tuple[Method, float]:
        """Try other alphas for each kind of site, one kind at a time and then those that helped together."""
        now: Any = method.transform
        tried: dict[str, list[float | None]] = {}
        for kind in self._kinds(walk):
            alpha = now.alpha_of(kind, kind)
            around = [0.25, 0.5] if alpha is None else [alpha + d for d in (-0.2, 0.2)]
            values = sorted({round(min(max(a, 0.0), 1.0), 6) for a in around} - {alpha})
            tried[kind] = [*([] if alpha is None else [None]), *values]
        pairs = [(kind, a) for kind, values in tried.items() for a in values]
        if not pairs:
            return method, loss
        singles = [self._with(method, exceptions={kind: a}) for kind, a in pairs]
        losses = self._compare(walk, singles, "alpha of kinds").losses
        candidates = [(method, loss), *zip(singles, losses, strict=True)]
        least: dict[str, tuple[float, float | None]] = {}
        for (kind, a), x in zip(pairs, losses, strict=True):
            if x < min(loss, least.get(kind, (loss,))[0]):
                least[kind] = (x, a)
        if len(least) > 1:
            joint = self._with(method, exceptions={kind: a for kind, (_, a) in least.items()})
            candidates.append((joint, self._compare(walk, [joint], "alpha of kinds together").losses[0]))
        return min(candidates, key=lambda pair: pair[1])

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
        with stream.looking(index, clean) as block:
            sites = walk.sites(block)
            clean = measure(block, sites) if measured else list(block.run())
            look(sites, block)
        if measured:
            walk.progress("propose", index + 1, len(stream.modules))
