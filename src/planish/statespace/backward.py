"""Draws from the backward kernel: which particle at t - 1 did this particle at t come from?

P(J = l) is proportional to w_{t-1}^l m_t(xi_{t-1}^l, xi_t^i). Four ways, of one law:

exact      weigh all N candidates: O(N) a draw
rejection  propose by w, accept with probability m over its bound: O(1) a draw, but with no limit in sight
hybrid     at most `max_trials` proposals, then exactly: what Dau and Chopin (2022) recommend; small tables at once
mcmc       from the ancestor, a few independent Metropolis steps proposed by w; exact only in the limit, unless the
           ancestor itself is such a draw (then its steps leave the law as it is)

Reference:
    Dau and Chopin, On the complexity of backward smoothing algorithms, 2022. https://arxiv.org/abs/2207.00976
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor

from planish._support import NotConverged, bad
from planish.statespace.draws import Ladder, uniform
from planish.statespace.models import StateSpaceModel
from planish.statespace.particles import Cloud, check_count

Kind = Literal["hybrid", "exact", "rejection", "mcmc"]
_ELEMENTS = 2**22  # of one table of densities: what does not fit is done in parts
_SMALL = 2**14  # a table that is weighed sooner than rounds of trials are run
_PATIENCE = 10**6  # trials after which plain rejection is hopeless


@dataclass(frozen=True)
class Backward:
    """How backward indices are drawn.

    Attributes:
        kind: "hybrid", "exact", "rejection" or "mcmc".
        max_trials: Proposals at most before hybrid weighs all candidates; None for N.
        mcmc_steps: Metropolis steps of a draw.
    """

    kind: Kind = "hybrid"
    max_trials: int | None = None
    mcmc_steps: int = 2

    def check(self, where: str) -> None:
        """Refuse settings out of range."""
        if self.kind not in get_args(Kind):
            raise bad(where, "backward", f"one of {', '.join(get_args(Kind))}", self.kind)
        if self.max_trials is not None:
            check_count(where, "max_trials", self.max_trials, 1)
        check_count(where, "mcmc_steps", self.mcmc_steps, 1)

    def draw(
        self, where: str, model: StateSpaceModel, before: Cloud, after: Cloud, wanted: Bool[Tensor, "clouds n m"],
        indices: Int[Tensor, "clouds n m"], generator: torch.Generator | None,
    ) -> int:  # fmt: skip
        """Fill the wanted entries of `indices` by independent draws; return how many densities were evaluated."""
        n, m = wanted.shape[1:]
        task = _Task(where, model, before, after, generator)
        todo = wanted.flatten().nonzero()[:, 0]
        if not len(todo):
            return 0
        owner = todo // m  # which particle of all clouds it is for
        if self.kind == "mcmc":
            found = task.metropolis(owner, self.mcmc_steps)
        elif self.kind == "exact" or (self.kind == "hybrid" and len(todo) * n <= _SMALL):
            found = task.weigh(owner)
        else:
            limit = _PATIENCE if self.kind == "rejection" else self.max_trials or n
            found = task.reject(owner, limit)
            left = (found < 0).nonzero()[:, 0]
            if len(left) and self.kind == "rejection":
                raise NotConverged(
                    f"{where}: {len(left)} draws were rejected {limit} times at t = {after.t}; take backward='hybrid'."
                )
            if len(left):
                found[left] = task.weigh(owner[left])
        indices.view(-1)[todo] = found - owner // n * n
        return task.evaluated


class _Task:
    """Draws for particles of one step; owners and candidates are counted through all clouds."""

    def __init__(
        self, where: str, model: StateSpaceModel, before: Cloud, after: Cloud, generator: torch.Generator | None
    ) -> None:
        self.where, self.model, self.before, self.after, self.generator = where, model, before, after, generator
        self.n, self.t = before.x.shape[1], after.t
        self.sources, self.targets = before.x.flatten(0, 1), after.x.flatten(0, 1)
        self.ladder: Ladder | None = None
        self.evaluated = 0

    def _propose(self, rows: Tensor, block: int, everywhere: bool) -> Tensor:
        """Propose `block` candidates for each row; `everywhere` says that all clouds have as many rows, in order."""
        self.ladder = self.ladder or Ladder(self.before.weights)
        if everywhere and len(rows) % self.ladder.batch == 0:
            drawn = self.ladder.draw_each(len(rows) // self.ladder.batch * block, self.generator)
            return drawn.reshape(len(rows), block)
        return self.ladder.draw(rows[:, None].expand(-1, block), self.generator)

    def _log_m(self, sources: Num[Tensor, "*b d"], targets: Num[Tensor, "*c d"]) -> Tensor:
        made = self.model.transition(self.t, sources).log_prob(targets)
        self.evaluated += made.numel()
        if not bool(made.amax() < math.inf):
            raise ValueError(f"{self.where}: the transition at t = {self.t} has no density: it is not finite.")
        return made

    def reject(self, owner: Tensor, limit: int) -> Tensor:
        """Propose and accept, in rounds of twice as many trials each; -1 where all were refused."""
        bound = self.model.log_transition_bound(self.t, self.before.x)
        bound = bound.to(self.before.log_weights).expand(len(self.before.x))
        found = torch.full_like(owner, -1)
        left, tried, block = torch.arange(len(owner), device=owner.device), 0, 1
        while len(left) and tried < limit:
            block = min(block, limit - tried, max(1, _ELEMENTS // len(left)))
            who = owner if len(left) == len(owner) else owner[left]
            rows = who // self.n
            proposed = self._propose(rows, block, who is owner)
            over = self._log_m(self.sources[proposed], self.targets[who][:, None]) - bound[rows][:, None]
            if over.amax() > 1e-3:
                raise bad(
                    self.where, "log_transition_bound", "a bound: no density may exceed it",
                    f"{float(over.max()):.3g} more at t = {self.t}",
                )  # fmt: skip
            hit = uniform(tuple(over.shape), over, self.generator).log() < over
            some, first = hit.max(-1)
            found[left[some]] = proposed[some, first[some]]
            left, tried, block = left[~some], tried + block, 2 * block
        return found

    def weigh(self, owner: Tensor) -> Tensor:
        """Weigh every candidate, in tables of bounded size."""
        parts = []
        for who in owner.split(max(1, _ELEMENTS // self.n)):
            rows = who // self.n
            log_m = self._log_m(self.before.x[rows], self.targets[who][:, None])
            chances = self.before.log_weights[rows] + log_m
            top = chances.amax(-1, keepdim=True)
            if (top == -math.inf).any():
                raise ValueError(
                    f"{self.where}: a particle at t = {self.t} could have come from none of those before it; the "
                    "transition needs a density."
                )
            steps = (chances - top).exp().double().cumsum(-1)
            u = uniform((len(who), 1), steps, self.generator) * steps[:, -1:]
            parts.append(torch.searchsorted(steps, u, right=True)[:, 0].clamp_(max=self.n - 1) + rows * self.n)
        return torch.cat(parts) if parts else owner

    def metropolis(self, owner: Tensor, steps: int) -> Tensor:
        """Start from the ancestor and move by independent proposals."""
        ancestors = self.after.ancestors
        assert ancestors is not None  # there is a step before  # noqa: S101
        rows = owner // self.n
        here = ancestors.flatten()[owner] + rows * self.n
        log_here = self._log_m(self.sources[here], self.targets[owner])
        for _ in range(steps):
            there = self._propose(rows, 1, True)[:, 0]
            log_there = self._log_m(self.sources[there], self.targets[owner])
            taken = uniform(tuple(rows.shape), log_here, self.generator).log() < log_there - log_here
            here, log_here = torch.where(taken, there, here), torch.where(taken, log_there, log_here)
        return here
