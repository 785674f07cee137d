r"""Evol-Q: move the scales of a quantized network a little, by evolution, where its outputs gain.

The loss of a coarsely quantized network as a function of its scales is ragged: codes jump as scales move, and a
gradient sees none of it. So scales are mutated and the better ones kept, the layers of one attention after the other,
from the last to the first, for several passes. The judge needs no labels: each output should be closer to the float
network's output for the same input than to its outputs for others.

    s' = |s + u|,  u ~ U(-epsilon, epsilon)^d                                                    (mutation)
    L = -2T mean_i log( exp(q_i . k_i / T) / sum_j exp(q_i . k_j / T) )                          (infoNCE)

================  =================================  ===========================================
paper             here                               shape, range
================  =================================  ===========================================
Delta             ``Scales.value``                   (rows * groups,), > 0
epsilon           ``mutation``                       >= 0; 1e-3, absolute
P, K              ``passes``, ``cycles``             10, 3
population, S     ``population``, ``tournament``     15, 10
q, k              outputs, quantized and float       (rows, classes), normalised
T                 ``temperature``                    > 0; 3.0
================  =================================  ===========================================

Differs from the paper and its code. Steps are shares of a scale and follow success, because one absolute step is large
for narrow channels and nothing for wide ones; a trial changes a tenth of them. Codes stay and the grid stretches, which
goes with any rounding; `codes="nearest"` rounds anew for every trial, as published. Part of the calibration data is
held out, and new scales are taken only where it agrees: the authors' program chooses among checkpoints by accuracy on
the test set. All layers move, not only attention. What comes before the layers that move is not computed again, and a
trial that loses on the first batches is given up. Inside `quantize` the judge is the block's own output, since no more
than a block is in memory; `evolve` takes a whole quantized model and judges its outputs, as published. There is no bias
correction of weights (their grid has integer zero points), no power-of-two factors, no logarithmic softmax. `published`
gives the authors' settings.

When to use: last, after any method, when the network is small enough to be run hundreds of times and the bits are few.
See ``docs/papers/evol_q.md``.

Reference:
    Frumkin, Gope and Marculescu, Jumping through Local Minima: Quantization in the Loss Landscape of Vision
    Transformers, 2023. https://arxiv.org/abs/2308.10814
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.quant.calls import moved_to, token_mask
from planish.quant.engine import Method
from planish.quant.evolution import RegularizedTournament
from planish.quant.fitness import LOSSES, Loss, loss_of
from planish.quant.formats import Affine
from planish.quant.layers import QLinear
from planish.quant.precision import Dense
from planish.quant.refinement import AskTell, Objective, Refinement, refine
from planish.quant.rounding import clipped
from planish.quant.scales import Scope, find_scales
from planish.quant.sites import Site, weight_of
from planish.quant.stream import Block, call_model, first_tensor


@dataclass(frozen=True)
class Evolve:
    """Improve the scales of a rounded block by evolution: a refining step, and the settings of `evolve`.

    Args:
        loss: What outputs are judged by: "mse" (default; of a block's output), "kl" (where outputs are predictions, and
            then the one to take), "infonce" (as published; it does not see the size of outputs, and does not only
            ask for agreement), "cosine", or a function of quantized and float outputs, (rows, channels) both.
        passes: How often all layers are visited; default 2.
        cycles: Trials in a visit; default 30.
        population: See `RegularizedTournament`; default 15.
        tournament: See `RegularizedTournament`; default 10.
        mutation: Largest change of a scale, at first where `adapt` is on; default 0.1.
        relative: As a share of the scale (default), else in its own units.
        share: Share of the scales that change in a trial, in (0, 1]; default 0.1.
        adapt: Let the size of changes follow success. Default True.
        scope: "all" (default), "attention", or a function of a layer's name and the layer.
        order: "reverse" (default: the last layers first) or "forward".
        codes: "fixed" (default): scales stretch a grid whose codes stay, which goes with any rounding. "nearest":
            codes follow, as published; only after rounding to nearest.
        temperature: Of "infonce"; default 3.0.
        holdout: Share of the data that does not judge trials but must agree to the result, in [0, 1); default 0.2.
        race: Give a trial up when it loses on each of this many first batches; None follows all to the end. Default 2.
        budget: Trials in all, the start of each visit included; None (default) for no limit.
        seed: Of the mutations; default 0.

    Raises:
        ValueError: An argument is out of range; when it runs, no layer is in the scope, there are too few rows of
            data, or the loss is not finite at the start.

    Example:
        >>> from dataclasses import replace
        >>> from planish.quant import smoothquant_plus
        >>> replace(smoothquant_plus(), refine=Evolve(passes=1)).refine.passes
        1
    """

    loss: str | Loss = "mse"
    passes: int = 2
    cycles: int = 30
    population: int = 15
    tournament: int = 10
    mutation: float = 0.1
    relative: bool = True
    share: float = 0.1
    adapt: bool = True
    scope: Scope = "all"
    order: str = "reverse"
    codes: str = "fixed"
    temperature: float = 3.0
    holdout: float = 0.2
    race: int | None = 2
    budget: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("passes", "cycles", "population", "tournament", "race", "budget"):
            value = getattr(self, name)
            if (value is not None or name not in ("race", "budget")) and (not isinstance(value, int) or value < 1):
                raise bad("Evolve", name, "an integer of at least 1", value)
        choices = {"loss": LOSSES, "scope": ("all", "attention"), "order": ("reverse", "forward"),
                   "codes": ("fixed", "nearest")}  # fmt: skip
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed and not (name in ("loss", "scope") and callable(value)):
                raise bad("Evolve", name, f"one of {', '.join(allowed)}", value)
        if not 0 <= self.mutation < (1 if self.relative else float("inf")):
            raise bad("Evolve", "mutation", "at least 0, and below 1 where it is relative", self.mutation)
        if not 0 < self.share <= 1:
            raise bad("Evolve", "share", "a float in (0, 1]", self.share)
        if not self.temperature > 0:
            raise bad("Evolve", "temperature", "a float above 0", self.temperature)
        if not 0 <= self.holdout < 1:
            raise bad("Evolve", "holdout", "a float in [0, 1)", self.holdout)

    @property
    def sees_clean(self) -> bool:
        """Whether the step wants to see the float block: it aims at what that gives."""
        return True

    def __call__(self, block: Block, method: Method) -> None:
        """Improve the scales of a block's layers, judged by the block's output."""
        if not block.finished:
            return
        if self.loss == "kl" and block.first is not None:
            raise bad(f"Evolve, block {block.name}", "loss", "another where outputs are no predictions", self.loss)
        layers = {name: layer for name, layer in block.finished.items() if isinstance(layer, QLinear)}
        if block.twin is None:
            raise RuntimeError(f"Evolve, block {block.name}: the float block is not at hand")
        targets, there = list(block.twin.run()), block.twin.module.get_submodule
        sources = (lambda name: weight_of(there(name))) if self.codes == "nearest" else None
        objective = Objective(
            block.module, lambda i: block.call(block.inputs[i], block.context[i]), targets, block.keep,
            loss_of(self.loss, self.temperature), self.holdout,
        )  # fmt: skip
        self._improve(objective, layers, sources)

    def _improve(
        self,
        objective: Objective,
        layers: dict[str, QLinear],
        sources: Callable[[str], Tensor] | None,
        optimizer: Callable[..., AskTell] | None = None,
        *,
        cache: bool = True,
    ) -> Refinement:
        standing = {n: q for n, q in layers.items() if objective.root.get_submodule(n) is not q}
        groups = find_scales(objective.root, self.scope, layers=standing, sources=sources)
        if not self.relative and any(s.holder.itemsize < 4 for scales in groups.values() for s in scales):
            raise bad("Evolve", "relative", "True where scales are stored in half precision", False)
        generator, steps = torch.Generator().manual_seed(self.seed), dict[str, float]()
        searches: dict[str, RegularizedTournament] = {}

        def tournament(name: str, start: Tensor, loss: float, bounds: tuple[Tensor, Tensor]) -> AskTell:
            if name in searches:
                steps[name] = searches[name].step  # a later visit goes on with the size that was found
            searches[name] = RegularizedTournament(
                start, fitness=loss, population=self.population, tournament=self.tournament,
                mutation=steps.get(name, self.mutation), relative=self.relative, share=self.share, adapt=self.adapt,
                bounds=bounds, generator=generator,
            )  # fmt: skip
            return searches[name]

        return refine(
            objective, groups, optimizer or tournament, passes=self.passes, cycles=self.cycles,
            reverse=self.order == "reverse", race=self.race, budget=self.budget, cache=cache,
        )  # fmt: skip


def published(*, bits: int = 4, seed: int = 0) -> Evolve:
    """Return the settings of the authors' code, without its choice of checkpoints by test accuracy.

    Args:
        bits: Of a weight; steps are 1e-4 at 8 bits and 1e-3 below. Scales must be stored in float32.
        seed: See `Evolve`.

    Example:
        >>> published(bits=8).mutation
        0.0001
    """
    return Evolve(
        "infonce", passes=10, cycles=3, mutation=1e-4 if bits >= 8 else 1e-3, relative=False, share=1.0, adapt=False,
        scope="attention", codes="nearest", holdout=0.0, race=None, seed=seed,
    )  # fmt: skip


@torch.no_grad()
def evolve(
    model: nn.Module,
    batches: Iterable[Any],
    reference: nn.Module | Sequence[Tensor],
    settings: Evolve | None = None,
    *,
    optimizer: Callable[..., AskTell] | None = None,
    cache: bool = True,
) -> Refinement:
    """Improve the scales of a quantized model in place, judged by its outputs, and say what was done.

    An exception on the way leaves the model with the scales of the last visit that was finished.

    Args:
        model: Anything that holds `QLinear` layers, or modules with `scale` and `zero_point` such as torch's
            `FakeQuantize` with observers off.
        batches: What the model takes; the batches are read once and kept.
        reference: The float model; or its outputs, one tensor a batch.
        settings: Default `Evolve()`.
        optimizer: Another to ask in each visit: optimizer(group, start, loss, bounds) returns one with `ask()` and
            `tell(points, losses)`. Default the tournament that `settings` describes.
        cache: Remember what comes before the layers of a visit. Default True; the result is the same.

    Returns:
        Losses, evaluations and seconds of every visit.

    Raises:
        ValueError: There are no batches, or targets do not match them; nothing is in the scope; the loss is not finite
            or not the same twice; codes "nearest" without a float model that was rounded to nearest.

    Example:
        >>> import copy
        >>> from planish.quant import quantize, rtn
        >>> float_net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> net, data = copy.deepcopy(float_net), [torch.randn(64, 32), torch.randn(64, 32)]
        >>> _ = quantize(net, data, rtn(bits=2, group_size=None))
        >>> done = evolve(net, data, float_net)
        >>> done.losses[-1] < done.losses[0]
        True
    """
    settings = settings or Evolve()
    data = list(batches)
    if not data:
        raise bad("evolve", "batches", "at least one batch of what the model takes", [])
    if isinstance(model, QLinear):
        raise bad("evolve", "model", "a module that holds layers", "a single QLinear; put it into a Sequential")
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        targets = _targets(reference, data)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
        sources = None
        if settings.codes == "nearest":
            if not isinstance(reference, nn.Module):
                raise bad("evolve", "reference", "the float model where codes are 'nearest'", "its outputs")
            sources = lambda name: weight_of(reference.get_submodule(name))  # noqa: E731
        with _stand_ins(model, layers):
            objective = Objective(
                model, lambda i: first_tensor(call_model(model, moved_to(data[i], device))), targets,
                [token_mask(batch) for batch in data], loss_of(settings.loss, settings.temperature), settings.holdout,
            )  # fmt: skip
            return settings._improve(objective, layers, sources, optimizer, cache=cache)
    finally:
        for module, mode in training.items():
            module.training = mode


def _targets(reference: nn.Module | Sequence[Tensor], data: list[Any]) -> list[Tensor]:
    if not isinstance(reference, nn.Module):
        targets = list(reference)
        if len(targets) != len(data):
            raise bad("evolve", "reference", f"{len(data)} outputs, one a batch", len(targets))
        return targets
    training = {module: module.training for module in reference.modules()}
    try:
        reference.eval()
        return [first_tensor(call_model(reference, batch)).clone() for batch in data]
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _stand_ins(model: nn.Module, layers: dict[str, QLinear]) -> Iterator[None]:
    """Let dense layers stand in for quantized ones that take float activations: they run faster, and can be changed."""
    try:
        for name, layer in layers.items():
            if layer.act is None:
                dense = layer.dequantize()
                if type(dense) is nn.Linear:
                    dense.__class__ = Dense
                model.set_submodule(name, dense)
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


@dataclass(frozen=True)
class ClipWeight:
    """Round to nearest after shrinking each group's range to where the squared error of its weights is least.

    Args:
        steps: How many shrink factors are tried, from 1 downwards; default 90.
        least: The smallest of them, in (0, 1); default 0.11, as in the authors' code.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> ClipWeight(steps=10)
        ClipWeight(steps=10, least=0.11)
    """

    steps: int = 90
    least: float = 0.11

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.steps < 2:
            raise bad("ClipWeight", "steps", "at least 2", self.steps)
        if not 0 < self.least < 1:
            raise bad("ClipWeight", "least", "a float in (0, 1)", self.least)

    def __call__(self, site: Site, method: Method) -> dict[str, nn.Module]:
        """Round the site's weights."""
        return clipped("ClipWeight", site, method, None, self.steps, self.least)


def evol_q(
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    ragged: bool = False,
    scale_dtype: str = "float16",
    act_bits: int | None = None,
    refine: Evolve | None = None,
) -> Method:
    """Shrink ranges, round to nearest, and let the scales of each block evolve.

    Args:
        bits: Bits of a weight; default 4.
        group_size: Input channels that share a scale; default None, one scale a row.
        symmetric: No zero points. Default False.
        ragged: Allow a shorter last group.
        scale_dtype: See `planish.quant.Affine`.
        act_bits: Bits of an activation, a row at a time; 8 in the paper. Default None, float.
        refine: The evolution; default `Evolve()`.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> evol_q(bits=3).refine.codes
        'fixed'
    """
    grid = Affine(bits, group_size, symmetric, ragged, scale_dtype)
    act = None if act_bits is None else Affine(act_bits, None, scale_dtype="float32")
    return Method("evol-q", grid, act, round=ClipWeight(), refine=refine or Evolve(), convolutions=True)
