"""The runs from which a cache plan is made: one to watch, one to take times, one to fit corrections along."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.diffusion.cache_hooks import NAME, Cut, attach, detach, find_cut
from planish.diffusion.cache_session import Branch, Session, moved, stand_in
from planish.diffusion.correction import ChannelMap, Match, Moments
from planish.diffusion.grouping import StepDistances
from planish.diffusion.plans import CachePlan

Run = Callable[[], object]
Place = tuple[str | None, int]
"""What is corrected: the output of the layer of that name (None: the cached feature) at a call."""
Fitted = Callable[[Place, Tensor, Tensor, Tensor | None, int], Callable[..., Tensor]]
"""Returns the correction at a place, given what stands there, what should, how far it went, and the channels' axis."""


def known(cost: float) -> float | None:
    """Return a cost, None where it is not known."""
    return (
        cost if not math.isnan(cost) else None
    )  # a schedule of the user's own may reach farther than distances are kept


class Watched:
    """What a run without a cache shows: distances of features, timesteps, the shape of a sample."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.distances: list[StepDistances] = []
        self._of: dict[int, StepDistances] = {}
        self.timesteps: list[float] | None = []
        self.shape: tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        """Calls seen, of each branch."""
        return self.distances[0].steps if self.distances else 0

    def feature(self, step: int, branch: Branch, feature: Tensor) -> Tensor:
        """Take the feature of one call."""
        if id(branch) not in self._of:
            self._of[id(branch)] = StepDistances(self.window)
            self.distances.append(self._of[id(branch)])
        self._of[id(branch)].add(feature)
        if branch.shape is not None:
            self.shape = branch.shape[1:]
        seen = branch.timestep
        if seen is None:
            self.timesteps = None
        elif self.timesteps is not None and step == len(self.timesteps):
            self.timesteps.append(seen)
        return feature


def observe(model: nn.Module, run: Run, cut: Cut, session: Session, watched: Watched | None = None) -> None:
    """Run once under a session, and leave the model as it was."""
    check_free("fit_cache", model)
    try:
        attach(model, session, cut)
        run()
    finally:
        detach(model)
    if watched is not None and len({d.steps for d in watched.distances}) > 1:
        counts = [d.steps for d in watched.distances]
        raise bad("fit_cache", "branches", "such that each is called equally often", counts)


def groups_within(model: nn.Module, run: Run, cut: Cut, branches: int, budget: int | float) -> tuple[int, int]:
    """Return how many calls can run in full within a time, and how many calls there are."""
    probe = Session(CachePlan((0, 1, 2), 1_000_000, cut.region, branches=branches))
    observe(model, run, cut, probe)
    full = [s for whole, s in probe.seconds if whole]
    reusing = [s for whole, s in probe.seconds if not whole]
    if not reusing:
        raise bad("fit_cache", "run", "of more than three steps, to be given a budget", len(full))
    states = probe.branches.states
    steps, width = max(b.step for b in states.values()), len(states)
    slow, fast = min(full) * width, sorted(reusing)[len(reusing) // 2] * width
    if budget < slow + (steps - 1) * fast:
        raise bad(
            "fit_cache", "budget", f"at least {slow + (steps - 1) * fast:.3g} s, what one full call and {steps - 1} "
            "that reuse take here", budget,
        )  # fmt: skip
    groups = int((budget - steps * fast) / (slow - fast)) if slow > fast else steps
    return max(1, min(groups, steps)), steps


def fit_corrections(
    model: nn.Module, run: Run, cut: Cut, plan: CachePlan, match: Match, reference: nn.Module | None, folds: int
) -> CachePlan:
    """Run once more along the cached trajectory, fitting each call's correction before it is used."""
    fits: list[ChannelMap | None] = [None] * plan.steps
    outputs: dict[str, list[ChannelMap | None]] = {}
    sums: dict[object, Moments] = {}

    def fitted(place: Place, x: Tensor, y: Tensor, way: Tensor | None, axis: int) -> ChannelMap:
        moments = sums.setdefault(place, Moments(folds))
        if len(x) < folds:
            raise bad("fit_cache", "run", f"a function that draws {folds} samples a batch or more", len(x))
        moments.add(x, y, way, axis=axis)
        name, step = place
        into = fits if name is None else outputs.setdefault(name, [None] * plan.steps)
        into[step] = found = moments.fit(match)
        return found

    run_along(model, run, cut, plan, reference, fitted)
    return replace(plan, corrections=fits, outputs=outputs)


def run_along(
    model: nn.Module, run: Run, cut: Cut, plan: CachePlan, reference: nn.Module | None, fitted: Fitted
) -> None:
    """Run along the cached trajectory with every call computed, and go on with what `fitted` makes of the cached."""
    target: list[Tensor] = []

    def feature(step: int, branch: Branch, computed: Tensor) -> Tensor:
        if session.full or branch.feature is None:
            return computed
        way = moved(branch) if plan.extrapolate else None
        true = target.pop() if target else computed
        fit = fitted((None, step), branch.feature, true, way, cut.axis)
        return stand_in(branch, fit, extrapolate=plan.extrapolate, axis=cut.axis)

    def output(name: str, step: int, x: Tensor, out: Tensor, axis: int) -> Tensor:
        exact = twin.get_submodule(name)(x)
        if torch.equal(exact, out):
            return out
        return fitted((name, step), out, exact, None, axis)(out, None, axis=axis)

    def ask(step: int, branch: Branch, call: dict[str, Any]) -> None:
        if not session.full:
            twin(**call)

    def keep(step: int, branch: Branch, computed: Tensor) -> Tensor:
        target[:] = [computed]
        return computed

    session = Session(plan, watch=feature, every=True)
    twin = model if reference is None else reference
    check_free("fit_cache", model)
    try:
        hooks = attach(model, session, cut)
        if reference is not None:
            check_free("fit_cache", reference)
            attach(reference, Session(branches=plan.branches, watch=keep), find_cut(reference, plan.region))
            session.on_call = ask
            for hook in hooks.values():
                hook.fitting = output
        run()
    finally:
        detach(model)
        if reference is not None:
            detach(reference)


def check_free(where: str, model: nn.Module) -> None:
    """Refuse a model that has a cache already."""
    if any(NAME in getattr(getattr(m, "_diffusers_hook", None), "hooks", ()) for m in model.modules()):
        raise bad(where, "model", "without a cache; `remove_cache` takes it off", "one that has one")


def checked(model: nn.Module, check: Callable[[], Tensor], plan: CachePlan) -> CachePlan:
    """Return the plan, or the same without corrections and extrapolation where that ends nearer to no cache at all."""
    bare = replace(plan, corrections=(), outputs={}, extrapolate=False)
    true, ends = check(), []
    if not isinstance(true, Tensor) or not torch.equal(true, check()):
        raise bad("fit_cache", "check", "a function that returns the same samples every time", type(true).__name__)
    for candidate in (plan, bare):
        try:
            attach(model, Session(candidate), find_cut(model, plan.region))
            ends.append(float((check() - true).square().mean()))
        finally:
            detach(model)
    made_for = {**plan.made_for, "error corrected": ends[0], "error uncorrected": ends[1]}
    return replace(plan if ends[0] < ends[1] else bare, made_for=made_for)
