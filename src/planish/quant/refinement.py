"""Improve the scales of a quantized model, one group of layers after the other, by trying.

The loop is independent of what is improved: a block while it is quantized, or a whole model. A trial runs from the
group's first layer on (see `replay`), batch after batch, and is given up early where it loses on each of the first.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad, logger
from planish.quant.fitness import Loss
from planish.quant.replay import Replay, Trace
from planish.quant.scales import Scales


class AskTell(Protocol):
    """An optimizer of a vector, as `RegularizedTournament` is one."""

    def ask(self) -> Float[Tensor, "k n"]:
        """Return points to be tried."""

    def tell(self, points: Float[Tensor, "k n"], fitnesses: list[float]) -> None:
        """Take in what they are worth, infinite for one that was given up."""


@dataclass(frozen=True)
class Visit:
    """What one visit to a group of layers did.

    Attributes:
        turn: The pass, from 1.
        group: The layers' parent.
        before: Loss at the start, on the data that is searched on.
        after: Loss at the end: not above `before`.
        held_before: Loss on the data held out; None where none is.
        held_after: The same at the end: not above `held_before`.
        accepted: Whether new scales were taken.
        evaluations: Trials made, the start included.
        runs: What they cost, in runs of one batch.
        seconds: How long it took.
    """

    turn: int
    group: str
    before: float
    after: float
    held_before: float | None
    held_after: float | None
    accepted: bool
    evaluations: int
    runs: int
    seconds: float


@dataclass
class Refinement:
    """What a search over scales did.

    Attributes:
        visits: One entry for every group of every pass.

    Example:
        >>> Refinement([Visit(1, "attention", 2.0, 1.5, 2.1, 1.8, True, 4, 20, 0.1)]).loss
        1.5
    """

    visits: list[Visit] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """Loss at the start and after each visit; it never rises."""
        return [self.visits[0].before, *(v.after for v in self.visits)]

    @property
    def held_losses(self) -> list[float]:
        """The same on the data held out; empty where none is."""
        first = self.visits[0].held_before
        return [] if first is None else [first, *(v.held_after for v in self.visits if v.held_after is not None)]

    @property
    def loss(self) -> float:
        """Loss at the end."""
        return self.visits[-1].after

    @property
    def evaluations(self) -> int:
        """Trials made, each visit's start included."""
        return sum(v.evaluations for v in self.visits)

    def __str__(self) -> str:
        """Return one line a pass."""
        lines = ["pass  loss        held out    accepted  trials  seconds"]
        for turn in sorted({v.turn for v in self.visits}):
            part = [v for v in self.visits if v.turn == turn]
            held = "-" if part[-1].held_after is None else f"{part[-1].held_after:.6g}"
            lines.append(
                f"{turn:<4}  {part[-1].after:<10.6g}  {held:<10}  {sum(v.accepted for v in part):>3} of {len(part):<2} "
                f" {sum(v.evaluations for v in part):>6}  {sum(v.seconds for v in part):>7.1f}"
            )
        return "\n".join(lines)


class Objective:
    """The loss of a model's outputs against targets, by batch, on the data searched on and on the data held out.

    Args:
        root: The model.
        run: Returns its output for a batch by number.
        targets: What the float model gives, one tensor a batch.
        masks: Which tokens count, one a batch, or None for all.
        loss: Of rows against rows.
        holdout: Share held out, in [0, 1): the last batches, or the last rows of each where batches are too few.

    Raises:
        ValueError: There are too few rows.
    """

    def __init__(
        self,
        root: nn.Module,
        run: Callable[[int], Tensor],
        targets: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        loss: Loss,
        holdout: float,
    ) -> None:
        self.root, self.run, self._loss = root, run, loss
        self._masks, self._holdout = masks, holdout
        self._targets = [_rows(t, m) for t, m in zip(targets, masks, strict=True)]
        held = round(holdout * len(targets))
        self._by_row = bool(holdout) and not 0 < held < len(targets)
        every = range(len(targets))
        self.fitted = every if self._by_row else every[: len(targets) - held]
        self.held = every if self._by_row else every[len(targets) - held :]
        for rows in self._targets:
            if len(rows) < (4 if self._by_row else 2):
                allowed = "batches of at least 2 rows, 4 where rows are held out"
                raise bad("Evolve", "batches", allowed, len(rows))

    def of(self, batch: int, output: Tensor, *, held: bool) -> float:
        """Return the loss of an output."""
        ours, theirs = _rows(output, self._masks[batch]), self._targets[batch].to(output.device)
        if self._by_row:
            cut = min(max(len(ours) - round(self._holdout * len(ours)), 2), len(ours) - 2)
            part = slice(cut, None) if held else slice(cut)
            ours, theirs = ours[part], theirs[part]
        work = torch.promote_types(ours.dtype, torch.float32)
        return float(self._loss(ours.to(work), theirs.to(work)))

    def mean(self, losses: Mapping[int, float], *, held: bool) -> float:
        """Return the mean over rows of losses by batch."""
        sizes = {i: len(self._targets[i]) for i in (self.held if held else self.fitted)}
        return sum(losses[i] * n for i, n in sizes.items()) / sum(sizes.values())


def _rows(output: Tensor, mask: Tensor | None) -> Float[Tensor, "rows channels"]:
    """Return an output as rows: tokens of a sequence, samples with all that belongs to them otherwise."""
    if output.ndim != 3:  # logits, or maps, of samples
        return output.flatten(1) if output.ndim > 1 else output[:, None]
    rows = output.flatten(0, 1)
    return rows if mask is None or mask.numel() != len(rows) else rows[mask.reshape(-1).to(rows.device)]


@torch.no_grad()
def refine(
    objective: Objective,
    groups: Mapping[str, Sequence[Scales]],
    optimizer: Callable[[str, Tensor, float, tuple[Tensor, Tensor]], AskTell],
    *,
    passes: int,
    cycles: int,
    reverse: bool,
    race: int | None,
    budget: int | None = None,
    cache: bool = True,
) -> Refinement:
    """Visit the groups, pass after pass, and leave each with the best scales found; see `Evolve` for the arguments.

    `optimizer(group, start, loss, bounds)` makes what a visit asks.
    """
    trace = Trace.of(objective.root, lambda: objective.run(0))
    starts = {name: trace.begins({s.module for s in scales}) for name, scales in groups.items()}
    if idle := [name for name, start in starts.items() if start is None]:
        raise bad("Evolve", "scope", "layers that the model calls", idle)
    order = sorted(groups, key=lambda name: starts[name] or 0, reverse=reverse)
    done = Refinement()
    for turn in range(1, passes + 1):
        for name in order:
            spent = done.evaluations if done.visits else 0
            if budget is not None and spent + 1 >= budget:
                return done
            left = cycles if budget is None else min(cycles, budget - spent - 1)
            done.visits.append(
                _Visitor(objective, list(groups[name]), trace, race, cache).visit(turn, name, optimizer, left)
            )
        logger.info("evolve: pass %d of %d, loss %.6g", turn, passes, done.loss)
    return done


class _Visitor:
    """One visit to one group of layers."""

    def __init__(self, objective: Objective, scales: list[Scales], trace: Trace, race: int | None, cache: bool) -> None:
        self.objective, self.scales, self.race, self.runs = objective, scales, race, 0
        self.replay = Replay(trace, {s.module for s in scales})
        if not cache:
            self.replay.forget()

    def visit(self, turn: int, name: str, optimizer: Callable[..., AskTell], cycles: int) -> Visit:
        began, objective = time.perf_counter(), self.objective
        start = torch.cat([s.value for s in self.scales])
        bounds = torch.cat([s.bounds[0] for s in self.scales]), torch.cat([s.bounds[1] for s in self.scales])
        now, held = self._start(name)
        before = objective.mean(now, held=False)
        held_before = objective.mean(held, held=True) if held else None
        if not math.isfinite(before):
            raise bad(f"Evolve, `{name}`", "model", "one whose loss is finite at the start", before)
        best, least, tried = start, before, 0
        asked = optimizer(name, start, before, bounds)
        while tried < cycles:
            points = asked.ask()
            fitnesses = []
            for point in points:
                if tried == cycles:  # an optimizer may ask for more than there is time for
                    fitnesses.append(math.inf)
                    continue
                tried += 1
                losses = self._trial(point, now)
                fitnesses.append(math.inf if losses is None else objective.mean(losses, held=False))
                if losses is not None and fitnesses[-1] < least:
                    best, least, now = point, fitnesses[-1], losses
            asked.tell(points, fitnesses)
        self._write(best)
        held_after, accepted = held_before, least < before
        if accepted and held_before is not None:
            held_after = objective.mean({i: self._loss(i, held=True) for i in objective.held}, held=True)
            if not held_after <= held_before:
                accepted, held_after = False, held_before
        if not accepted:
            self._write(start)
        else:
            for scales, value in self._split(best):
                scales.keep(value)
        seconds = time.perf_counter() - began
        after = least if accepted else before
        return Visit(turn, name, before, after, held_before, held_after, accepted, tried + 1, self.runs, seconds)

    def _start(self, name: str) -> tuple[dict[int, float], dict[int, float]]:
        """Run all batches, remembering what comes before the group; return the losses, fitted and held out."""
        objective = self.objective
        losses: dict[bool, dict[int, float]] = {False: {}, True: {}}
        for batch in sorted({*objective.fitted, *objective.held}):
            with self.replay.recording(batch):
                output = objective.run(batch)
            self.runs += 1
            if batch == 0:
                self._check(name, output)
            for held, those in ((False, objective.fitted), (True, objective.held)):
                if batch in those:
                    losses[held][batch] = objective.of(batch, output, held=held)
        return losses[False], losses[True]

    def _check(self, name: str, output: Tensor) -> None:
        """Make sure that a replayed run gives the same, bit for bit; do without it where it does not."""
        with self.replay.replaying(0):
            if torch.equal(self.objective.run(0), output):
                return
        self.replay.forget()
        logger.info("evolve: %s is tried with whole runs of the model", name)
        if not torch.equal(self.objective.run(0), output):
            raise bad(f"Evolve, `{name}`", "model", "one that gives finite and equal outputs twice", "others")

    def _loss(self, batch: int, *, held: bool) -> float:
        self.runs += 1
        with self.replay.replaying(batch):
            return self.objective.of(batch, self.objective.run(batch), held=held)

    def _trial(self, point: Tensor, now: Mapping[int, float]) -> dict[int, float] | None:
        """Return the losses of a point by batch; None once it lost to `now` on each of the first `race` batches."""
        self._write(point)
        losses: dict[int, float] = {}
        for batch in self.objective.fitted:
            losses[batch] = self._loss(batch, held=False)
            if math.isnan(losses[batch]):
                return None
            if len(losses) == self.race and all(losses[i] > now[i] for i in losses):
                return None
        return losses

    def _write(self, point: Tensor) -> None:
        for scales, value in self._split(point):
            scales.show(value)

    def _split(self, point: Tensor) -> list[tuple[Scales, Any]]:
        return list(zip(self.scales, point.split([s.holder.numel() for s in self.scales]), strict=True))
