"""What the hooks of a cache share: which call of which branch this is, whether it runs in full, what it reuses."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from planish._support import bad, require
from planish.diffusion.plans import CachePlan

_hooks = require("diffusers.hooks.hooks", "diffusers", "A cache for a denoiser")


@dataclass
class Branch:
    """What one branch of guidance remembers between its calls."""

    step: int = 0
    timestep: float | None = None
    shape: tuple[int, ...] | None = None
    feature: Tensor | None = None
    before: Tensor | None = None  # the feature of the refresh before
    refreshed: int = 0
    gap: int = 0  # calls between the last two refreshes
    other: Tensor | None = None  # how far the blocks moved a second stream (text)


class Branches(_hooks.StateManager):  # type: ignore[misc, name-defined]
    """A state for each name that `cache_context` gives, or for each of `count` calls in turn where it gives none."""

    def __init__(self, count: int) -> None:
        self.count, self.calls = count, 0
        self.states: dict[object, Branch] = {}
        self.named: str | None = None

    def set_context(self, context: Any) -> None:  # noqa: ANN401  (of diffusers; a string in older versions)
        """Take the name of the branch that is called next."""
        self.named = getattr(context, "name", context)

    def next(self) -> Branch:
        """Return the state of the branch that is being called."""
        key: object = self.named
        if key is None:
            key, self.calls = self.calls % self.count, self.calls + 1
        return self.states.setdefault(key, Branch())

    def reset(self, *_: object, **__: object) -> None:
        """Forget everything."""
        self.states.clear()
        self.named, self.calls = None, 0


class Session:
    """What the hooks of one model share: the plan, the branch being called, and whether this call runs in full.

    Args:
        plan: What to do; None runs every call in full.
        branches: See `CachePlan`.
        watch: Shown the feature of every call that was computed, as watch(step, branch, feature); what it returns
            takes the feature's place.
        every: Compute every call, also those that the plan would skip, and let `watch` replace the feature.

    Attributes:
        seconds: For every call, whether it ran in full and how long it took.
    """

    def __init__(
        self,
        plan: CachePlan | None = None,
        *,
        branches: int = 1,
        watch: Callable[[int, Branch, Tensor], Tensor] | None = None,
        every: bool = False,
    ) -> None:
        self.plan, self.watch, self.every = plan, watch, every
        self.branches = Branches(branches if plan is None else plan.branches)
        self.starts = None if plan is None else set(plan.schedule)
        self.branch, self.full, self.computing = Branch(), True, True
        self.entry: tuple[Tensor, Tensor | None] | None = None
        self.on_call: Callable[[int, Branch, dict[str, Any]], None] | None = None
        self.seconds: list[tuple[bool, float]] = []
        self._began = 0.0

    def begin(self, call: dict[str, Any]) -> None:
        """Start a call of the model, given by the names of its arguments."""
        branch = self.branches.next()
        sample = next(v for v in call.values() if isinstance(v, Tensor))
        shape, now = tuple(sample.shape), _timestep(call)
        plan = self.plan
        if plan is not None:
            if plan.shape is not None and shape[1:] != tuple(plan.shape):
                raise bad("apply_cache", "plan", f"made for samples of {shape[1:]}", tuple(plan.shape))
            if plan.timesteps is not None and now is not None:
                expected = plan.timesteps[branch.step] if branch.step < plan.steps else None
                if expected is None or not _same(expected, now):
                    if not _same(plan.timesteps[0], now):
                        raise ValueError(
                            f"apply_cache: `plan` must be made for this scheduler and number of steps; call "
                            f"{branch.step} came at timestep {now:g}, the plan has "
                            f"{'no more than ' + str(plan.steps) if expected is None else format(expected, 'g')}."
                        )
                    self._restart(branch)
            elif branch.step >= plan.steps or (branch.shape is not None and branch.shape != shape):
                self._restart(branch)
        self.branch, branch.timestep = branch, now
        # a changed batch in the middle of a run leaves nothing that could be reused
        self.full = self.starts is None or branch.step in self.starts or branch.shape != shape or branch.feature is None
        if branch.shape != shape:
            branch.feature = branch.before = branch.other = None
        branch.shape = shape
        self.computing = self.full or self.every
        if self.on_call is not None:
            self.on_call(branch.step, branch, call)
        self._began = time.perf_counter()

    def _restart(self, branch: Branch) -> None:
        branch.__dict__.update(Branch().__dict__)

    def end(self) -> None:
        """End the call."""
        self.seconds.append((self.full, time.perf_counter() - self._began))
        self.branch.step += 1
        self.entry = None

    def abort(self) -> None:
        """Forget a run that an exception ended."""
        self.branches.reset()
        self.entry = None

    def computed(self, feature: Tensor) -> Tensor:
        """Take a feature that was computed and return what goes on in its place: itself, unless someone fits."""
        branch = self.branch
        if self.full and self.plan is not None:
            branch.before, branch.gap = branch.feature, branch.step - branch.refreshed
            branch.feature, branch.refreshed = feature.detach(), branch.step
        return feature if self.watch is None else self.watch(branch.step, branch, feature)

    def reused(self, axis: int) -> Tensor:
        """Return what stands for the feature of a call that is skipped."""
        plan, branch = self.plan, self.branch
        assert plan is not None and branch.feature is not None  # noqa: S101  (a first call runs in full)
        fit = plan.corrections[branch.step] if plan.corrections else None
        return stand_in(branch, fit, extrapolate=plan.extrapolate, axis=axis)


def stand_in(branch: Branch, fit: Callable[..., Tensor] | None, *, extrapolate: bool, axis: int) -> Tensor:
    """Return the cached feature, carried on and corrected."""
    x = branch.feature
    assert x is not None  # noqa: S101
    way = moved(branch) if extrapolate else None
    if fit is not None:
        return fit(x, way, axis=axis)
    return x if way is None else x + way


def moved(branch: Branch) -> Tensor | None:
    """Return how far the feature would come by now if it went on as between the last two refreshes."""
    if branch.before is None or branch.feature is None or branch.gap == 0:
        return None
    return (branch.feature - branch.before) * ((branch.step - branch.refreshed) / branch.gap)


def _timestep(call: dict[str, Any]) -> float | None:
    for name in ("timestep", "timesteps", "t"):
        value = call.get(name)
        if isinstance(value, Tensor) and value.numel():
            return float(value.flatten()[0])
        if isinstance(value, int | float):
            return float(value)
    return None


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-4 * max(1.0, abs(a))
