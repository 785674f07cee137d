"""Whether carrying features on and correcting them pays: judged by where samples end that were held out of the fit.

Every call's correction may be nearer to the truth, on samples left out of it as well, and yet the pictures end farther
from those without a cache: errors of one direction add up along a trajectory. So each way is run to the end, from the
noise of one and the same run. Corrections are cross-validated there: each half of a batch goes on with what the other
half taught.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from planish._support import bad, warn_once
from planish.diffusion.cache_fitting import Place, Run, observe, run_along
from planish.diffusion.cache_hooks import Cut
from planish.diffusion.cache_session import Session
from planish.diffusion.correction import ChannelMap, Match, Moments
from planish.diffusion.plans import CachePlan
from planish.quant.stream import first_tensor

STILL, CARRIED, CORRECTED = "held still", "carried on", "corrected"


@dataclass
class Trajectory:
    """What a run asked and was told.

    Attributes:
        first: The sample of its first call.
        last: That of its last.
        answers: What the model said, for as long as it was asked about one and the same sample.
    """

    first: Tensor | None = None
    last: Tensor | None = None
    answers: list[Tensor] = field(default_factory=list)

    def end(self) -> Float[Tensor, "samples values"]:
        """Return what is compared: what enters the last call, or all answers where nothing ever changed."""
        if self.first is None or self.last is None:
            raise bad("fit_cache", "run", "a function that calls the model", "one that never did")
        still = self.last.shape == self.first.shape and torch.equal(self.last, self.first)
        return torch.stack(self.answers, 1).flatten(1) if still else self.last.flatten(1)


@contextmanager
def followed(model: nn.Module) -> Iterator[Trajectory]:
    """Take down what a model is asked."""
    found, signature = Trajectory(), inspect.signature(type(model).forward)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = signature.bind_partial(module, *args, **kwargs).arguments
        found.last = next(v for v in call.values() if isinstance(v, Tensor)).detach().clone()
        found.first = found.last if found.first is None else found.first

    def after(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], out: Any) -> None:  # noqa: ANN401
        if found.first is found.last or torch.equal(cast(Tensor, found.first), cast(Tensor, found.last)):
            found.answers.append(first_tensor(out).detach())

    handles = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def halves(rows: int) -> Bool[Tensor, "rows"]:
    """Return which samples are of the second half: halves share no image where guidance stacks a batch twice.

    Example:
        >>> halves(8).int().tolist()
        [0, 0, 1, 1, 0, 0, 1, 1]
    """
    return (4 * torch.arange(rows) // rows) % 2 == 1


@dataclass(frozen=True)
class Crossed:
    """A correction of which each half of a batch gets what the other half taught."""

    taught: tuple[ChannelMap, ChannelMap]

    def __call__(self, x: Tensor, moved: Tensor | None, *, axis: int) -> Tensor:
        """Correct a feature whose channels lie along `axis`."""
        second = halves(len(x)).to(x.device).view(-1, *[1] * (x.ndim - 1))
        by_first, by_second = (fit(x, moved, axis=axis) for fit in self.taught)
        return torch.where(second, by_first, by_second)


class Validation:
    """Runs of one model from one and the same noise.

    Args:
        model: Without a cache.
        run: Draws a batch of samples with it.
    """

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model, self.run = model, run
        self.state = torch.get_rng_state()
        devices = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.device_states = torch.cuda.get_rng_state_all() if devices else []
        self.true = Trajectory()

    def watched(self) -> None:
        """Run as the caller would, and keep where it ends as the truth."""
        with followed(self.model) as self.true:
            self.run()

    def again(self) -> Trajectory:
        """Run with the random numbers of the first run."""
        with torch.random.fork_rng(range(len(self.device_states))), followed(self.model) as found:
            torch.set_rng_state(self.state)
            for device, state in enumerate(self.device_states):
                torch.cuda.set_rng_state(state, device)
            self.run()
        return found

    def decide(
        self, cut: Cut, plan: CachePlan, match: Match | None, reference: nn.Module | None, folds: int
    ) -> tuple[CachePlan, bool]:
        """Return the plan, carried on or not, and whether corrections are worth being fitted.

        Raises:
            ValueError: The run draws too few samples.
        """
        if not plan.extrapolate and match is None:
            return plan, False
        bare = replace(plan, extrapolate=False)
        if len(plan.schedule) == plan.steps and reference is None:  # nothing is reused
            return plan, match is not None
        ends = {STILL: self._cached(cut, bare)}
        truth = self.true if reference is None else self._of(reference)
        if not _comparable(truth, ends[STILL]):
            warn_once(
                "fit_cache: `run` draws other samples at every call, so nothing can be held out: features are neither "
                "carried on nor corrected. Seed it, or pass validate=False."
            )
            return bare, False
        if plan.extrapolate:
            ends[CARRIED] = self._cached(cut, plan)
        if match is not None:
            ends[CORRECTED] = self._corrected(cut, plan, match, reference, folds)
        goal = truth.end()
        errors = {name: (found.end() - goal).double().square().mean(1) for name, found in ends.items()}
        chosen = best(errors)
        made_for = {**plan.made_for, **{f"error {name}": float(e.mean()) for name, e in errors.items()}, "kept": chosen}
        kept = bare if chosen == STILL else plan
        return replace(kept, made_for=made_for), chosen == CORRECTED

    def _cached(self, cut: Cut, plan: CachePlan) -> Trajectory:
        ends: list[Trajectory] = []
        observe(self.model, lambda: ends.append(self.again()), cut, Session(plan))
        return ends[0]

    def _of(self, reference: nn.Module) -> Trajectory:
        """Return where the run ends with another model's answers."""
        self.model.forward = reference.forward
        try:
            return self.again()
        finally:
            del self.model.forward

    def _corrected(
        self, cut: Cut, plan: CachePlan, match: Match, reference: nn.Module | None, folds: int
    ) -> Trajectory:  # fmt: skip
        sums: dict[Place, tuple[Moments, Moments]] = {}

        def fitted(place: Place, x: Tensor, y: Tensor, way: Tensor | None, axis: int) -> Crossed:
            second = halves(len(x))
            if min(int(second.sum()), int((~second).sum())) < folds:
                raise bad("fit_cache", "run", f"a function that draws {2 * folds} samples a batch or more", len(x))
            both = sums.setdefault(place, (Moments(folds), Moments(folds)))
            for moments, rows in zip(both, (~second, second), strict=True):
                moments.add(x[rows], y[rows], None if way is None else way[rows], axis=axis)
            return Crossed((both[0].fit(match), both[1].fit(match)))

        ends: list[Trajectory] = []
        run_along(self.model, lambda: ends.append(self.again()), cut, plan, reference, fitted)
        return ends[0]


def _comparable(a: Trajectory, b: Trajectory) -> bool:
    if a.first is None or b.first is None or a.last is None or b.last is None:
        return False
    return a.last.shape == b.last.shape and torch.equal(a.first, b.first)


def best(errors: dict[str, Float[Tensor, "samples"]]) -> str:
    """Return the way with the least error among those that are better than holding still, chance apart.

    Args:
        errors: Of every sample, by way; that of `STILL` among them.

    Returns:
        The way; `STILL` unless another gains more than the standard error of its gain over the samples.

    Example:
        >>> one = torch.ones(4)
        >>> best({STILL: one, CARRIED: torch.tensor([0.1, 3.5, 0.1, 0.1])}), best({STILL: one, CARRIED: 0.5 * one})
        ('held still', 'carried on')
    """
    for name in sorted(errors, key=lambda way: float(errors[way].mean())):
        gain = errors[STILL] - errors[name]
        chance = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
        if name == STILL or float(gain.mean()) > chance:
            return name
    return STILL
