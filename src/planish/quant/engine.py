"""The pass: a loop one can read.

A method is a record of steps; a paper is a function that returns such a record. The engine knows no method by name.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad, warn_once
from planish.quant import fold
from planish.quant.admission import check_layers
from planish.quant.experts import unfuse
from planish.quant.formats import Affine, Format, Weight
from planish.quant.layers import QLinear
from planish.quant.moments import measure
from planish.quant.parts import Segments, in_place_of
from planish.quant.paused import pausing
from planish.quant.precision import Dense, restore, round_off
from planish.quant.record import Record
from planish.quant.report import BlockReport, Report
from planish.quant.rounding import Nearest
from planish.quant.sites import Site, find_sites, rebind, set_weight, weight_of
from planish.quant.snapshot import Snapshot, own
from planish.quant.stacks import find_stacks
from planish.quant.stream import Block, Stream, Weights, tensors_in
from planish.quant.transforms import Transform

logger = logging.getLogger("planish")


def no_transform(site: Site, method: "Method") -> Transform | None:
    """Leave the activation as it is."""
    return None


def no_refine(block: Block, method: "Method") -> None:
    """Leave the rounded block as it is."""


def no_plan(walk: "Walk", method: "Method") -> "Method":
    """Take the method as it is: nothing about it depends on the whole model."""
    return method


@dataclass(frozen=True, repr=False)
class Method:
    """A way to quantize, as a record of steps; composing methods is `dataclasses.replace`.

    Attributes:
        name: What the report and the checkpoint call it.
        weight: Grid of the weights.
        act: Grid of the activations; None keeps them in float.
        plan: Looks at the whole model before the pass and returns the method made concrete (a searched alpha).
        transform: Exact: the site -> what its activation is to go through, or None.
        round: Lossy: the site, already transformed -> its new layers by name.
        refine: After a block is rounded: may adjust its scales.
        online: Keep a transform that cannot be folded, at the price of one more operation in every forward and of a
            checkpoint that stock engines do not read. Default False: such a transform is left out.
        convolutions: Round convolutions as well, by this method's own grids and rounding, or by those of another method
            given here. Default False: they stay in float.
        feed: Which inputs the rounding step sees: "quantized" (what the blocks before really give) or "float".
        findings: What the plan found on its way (JSON-able), for the report.

    Example:
        >>> from dataclasses import replace
        >>> from planish.quant import rtn
        >>> from planish.quant.rounding import Clip
        >>> replace(rtn(bits=3, group_size=64), round=Clip()).round
        Clip(steps=20, least=0.5)
    """

    name: str = "rtn"
    weight: Weight = field(default_factory=Affine)
    act: Format | None = None
    plan: Callable[["Walk", "Method"], "Method"] = no_plan
    transform: Callable[[Site, "Method"], Transform | None] = no_transform
    round: Callable[[Site, "Method"], dict[str, nn.Module]] = field(default_factory=Nearest)
    refine: Callable[[Block, "Method"], None] = no_refine
    online: bool = False
    convolutions: "bool | Method" = False
    feed: str = "quantized"
    findings: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.feed not in ("quantized", "float"):
            raise bad("Method", "feed", "'quantized' or 'float'", self.feed)

    def of(self, convolution: bool) -> "Method":
        """Return the method for a linear layer or a convolution: this one, or that of `convolutions`."""
        return self.convolutions if convolution and isinstance(self.convolutions, Method) else self

    @property
    def folds(self) -> bool:
        """Whether a transform may want to go into the layer before; else nobody looks for such layers."""
        wants = self.transform is not no_transform and getattr(self.transform, "fold", True)
        return wants or getattr(self.plan, "folds", self.plan is not no_plan)

    def __repr__(self) -> str:
        """Return the provenance: every step that differs from doing nothing, the same in every process."""
        parts = [f"weight={self.weight}"]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in ("name", "weight", "findings") and value is not item.default:
                parts.append(f"{item.name}={getattr(value, '__name__', None) or repr(value)}")
        return f"{self.name}({', '.join(parts)})"


class Walk:
    """A model, its batches and what is known of its blocks: what `quantize` and the searches walk over.

    Args:
        model: Any module.
        batches: See `quantize`.
        skip: See `quantize`.
        device: See `quantize`.
        weights: See `quantize`.
        progress: Called as progress(stage, done, total) after every block.
        journal: See `quantize`.
        convolutions: Whether convolutions make sites.
        probe: Whether it is wanted which layers can absorb a transform; looking for them takes many runs of a block.

    Raises:
        ValueError: See `quantize`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        skip: Sequence[str] = ("lm_head",),
        device: torch.device | str | None = None,
        weights: Weights | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        journal: Record | None = None,
        convolutions: bool = False,
        probe: bool = True,
    ) -> None:
        if any(isinstance(m, QLinear) for m in model.modules()):
            raise bad("quantize", "model", "a float model", "one that holds QLinear layers already")
        self.model, self.skip = model, tuple(skip)
        unfuse(model)  # experts kept as one tensor become linears; the function stays the same
        self.stream = Stream(model, batches, device=device, weights=weights)
        self.blocks = sum(len(names) for names, _ in find_stacks(model))
        self.journal, self.convolutions, self.probe = journal, convolutions, probe
        self.progress = progress or (lambda stage, done, total: None)
        self.known: dict[Any, list[Site]] = {}

    def first(self, tokens: int) -> "Walk":
        """Return the same walk over the first batches only, as many as hold `tokens` tokens or rows."""
        chosen, seen = [], 0
        for batch in self.stream.batches:
            if seen >= tokens:
                break
            chosen.append(batch)
            data = next(tensors_in(batch))
            seen += data.numel() // data.shape[-1] if data.is_floating_point() else data.numel()
        part = copy.copy(self)
        part.stream = Stream(self.model, chosen, device=self.stream.device, weights=self.stream.weights)
        return part

    def streams(self) -> list[Stream]:
        """Return a stream for every stack of blocks: for an encoder-decoder two, to be walked one after the other."""
        whole, many = self.stream, len(find_stacks(self.model))
        if many == 1:
            return [whole]
        return [Stream(self.model, whole.batches, device=whole.device, weights=whole.weights, stack=i)
                for i in range(many)]  # fmt: skip

    def skipped(self, block: str) -> Callable[[str], bool]:
        """Return the test of names in a block: True for layers that stay in float."""
        prefix = block + "." if block else ""

        def test(name: str) -> bool:
            full = prefix + name
            return any(fnmatchcase(full, p) or full.endswith("." + p) or full == p for p in self.skip)

        return test

    def sites(self, block: Block) -> list[Site]:
        """Return the sites of a block, probing each shape of block once."""
        how = {"convolutions": self.convolutions, "probe": self.probe}
        return find_sites(block, self.skipped(block.name), self.known, **how)


def process(block: Block, sites: list[Site], method: Method, *, trial: bool = False) -> dict[str, bool]:
    """Apply a method's exact steps, then its lossy ones, to one block in place.

    The block is left with dense layers that hold the rounded values, so that what follows runs at full speed; the
    layers proper lie in `block.finished` until `settle` puts them in.

    Args:
        block: The block, in float.
        sites: Its sites, with moments.
        method: The steps.
        trial: Whether only what the block computes is wanted: layers are made only where their values are not at hand.

    Returns:
        For each site that a transform was meant for, whether it was folded.
    """
    sites = [site for site in sites if method.convolutions or not site.convolution]
    folded: dict[str, bool] = {}
    with pausing(block):
        for site in sites:  # 1. smooth: exact
            transform = fold.wanted(site, method)
            if transform is not None:
                folded[site.kind] = fold.apply(block, transform, site, online=method.of(site.convolution).online)
        if any(getattr(step, "sees_clean", False) for step in (method.round, method.refine)):
            block.twin = Block(
                block.name, copy.deepcopy(block.module), block.clean or block.inputs,
                block.clean_context or block.context, block.keep, block.first, block.device,
            )  # fmt: skip
        for site in sites:  # 2. round: lossy
            own = method.of(site.convolution)
            step = Nearest() if site.unseen else own.round
            exact = own.act is None and site.online is None and method.refine is no_refine
            if trial and isinstance(step, Nearest) and exact:
                for name, weight in step.values(site, own).items():
                    set_weight(site.consumers[name], weight)
            else:
                place(block, step(site, own))
    method.refine(block, method)  # 3. refine
    block.twin = None
    return folded


def place(block: Block, layers: dict[str, nn.Module]) -> None:
    """Put rounded layers into a block, as dense stand-ins where that computes the same."""
    for name, layer in layers.items():
        there = block.module.get_submodule(name)
        if isinstance(layer, QLinear | Segments):  # one from a journal does not know yet what it replaces
            layer = in_place_of(there, layer)  # noqa: PLW2901
        round_off(layer, block.stored, prefix=name + ".")
        block.finished[name] = layer
        stand_in: nn.Module = layer
        if isinstance(layer, QLinear) and layer.act is None:
            dtype = weight_of(there).dtype
            stand_in = layer.dequantize(dtype).to(dtype)  # scales may be wider than the block
            stand_in.__class__ = Dense if type(stand_in) is nn.Linear else type(stand_in)
        block.module.set_submodule(name, stand_in)


def settle(block: Block) -> None:
    """Put the quantized layers proper in the place of their stand-ins."""
    for name, layer in block.finished.items():
        block.module.set_submodule(name, layer)
    block.finished.clear()


def trial(block: Block, sites: list[Site], inputs: list[Tensor], method: Method) -> list[Tensor]:
    """Return what a copy of a block, quantized by `method`, makes of `inputs`; the block stays as it is.

    What the folds of a site were found to be is noted in `sites`: the next trial need not look again.
    """
    twin = Block(block.name, copy.deepcopy(block.module), inputs, block.context, block.keep, block.first, block.device)
    twin.clean = block.inputs
    own = [rebind(site, twin) for site in sites]
    process(twin, own, method, trial=True)
    for site, judged in zip(sites, own, strict=True):
        site.verdict = judged.verdict
    return list(twin.run())


@torch.no_grad()
def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    method: Method | None = None,
    *,
    skip: Sequence[str] = ("lm_head",),
    device: torch.device | str | None = None,
    weights: Weights | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    journal: Record | None = None,
) -> Report:
    """Quantize a model's linear layers in place, block by block, and say what was done.

    An exception on the way leaves the model as it was (experts kept as one tensor come apart into linears even so);
    therefore a model in memory keeps its float weights until the last block is done.

    Args:
        model: Any module; its blocks are found. Layers outside the blocks, and those that `skip` names, stay in float.
        batches: Calibration data: any iterable of what the model takes (tensors, tuples, or dicts such as
            `{"input_ids": ...}`). Ours are measured with 8,192 tokens; fewer overfit more.
        method: What to do; default `planish.quant.best()`.
        skip: Layers to leave in float: full names, last parts of names, or shell patterns. Default the output head.
        device: Where blocks are processed, one at a time; default where the model is.
        weights: Source of parameters for a model on the meta device, read block by block. With a journal, finished
            blocks go back to meta and lie in the journal only; without one the quantized model stays in memory.
        progress: Called as progress(stage, done, total) after every block.
        journal: Where finished blocks and decisions are kept, so that an interrupted run goes on; see
            `planish.quant.journal`.

    Returns:
        The report: errors by block, what was folded, sizes, seconds.

    Raises:
        ValueError: There are no batches; the model is quantized already; a weight or activation is not finite (the
            sentence names the layer and the batch); a layer's channels do not divide into groups.

    Example:
        >>> import torch
        >>> from planish.quant import rtn
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> report = quantize(model, [torch.randn(32, 64)], rtn(group_size=32))
        >>> len(report.blocks), type(model[0]).__name__
        (1, 'QLinear')
    """
    if method is None:
        from planish.quant.methods.best import best  # noqa: PLC0415  (methods import the engine)

        method = best()
    began = time.perf_counter()
    walk = Walk(model, batches, skip=skip, device=device, weights=weights, progress=progress, journal=journal,
                convolutions=bool(method.convolutions), probe=method.folds)  # fmt: skip
    with journal.opened(walk, method) if journal else nullcontext():
        return _walk_blocks(walk, method, began)


def _walk_blocks(walk: Walk, method: Method, began: float) -> Report:
    """Plan, then process block after block; those that the journal holds are put in place instead."""
    model = walk.model
    method = method.plan(walk, method)
    report = Report.start(model, method)
    with Snapshot(model) as before:
        done: list[tuple[Stream, list[Tensor], list[Tensor]]] = []
        for stream in walk.streams():
            done.append((stream, *_process_blocks(walk, stream, done, method, report, before)))
            if stream.whole:
                break
    report.finish(model, seconds=time.perf_counter() - began)
    return report


def _process_blocks(
    walk: Walk,
    stream: Stream,
    done: list[tuple[Stream, list[Tensor], list[Tensor]]],
    method: Method,
    report: Report,
    before: Snapshot,
) -> tuple[list[Tensor], list[Tensor]]:
    """Process block after block in place, or take them from the journal; return what leaves the last, float first.

    `done` holds the stacks before this one with what left them in the float and in the quantized model.
    """
    journal, first = walk.journal, len(report.blocks)
    clean = hidden = stream.start([(s, c) for s, c, _ in done])  # enters a block in the float and the quantized model
    contexts = stream.contexts
    if done:
        hidden = stream.start([(s, h) for s, _, h in done])
    for index in range(len(stream.modules)):
        block = stream.block(index, clean)
        block.context = contexts[index]
        if stream.weights is None:
            own(block.module)
        check_layers(block, walk.skipped(block.name), method)
        sites = walk.sites(block)  # of a restored block too: later ones reuse what the first of a shape showed
        entry = kept = journal.restore(first + index, block) if journal else None
        if entry is None:
            clean = measure(block, sites)
            entry = BlockReport.of(block, sites)
            if entry.unseen:
                warn_once(
                    f"quantize, block {block.name}: no token was sent to {', '.join(entry.unseen)}; what nothing is "
                    "known of is rounded to nearest. More batches may reach them."
                )
            block.clean, block.clean_context = block.inputs, block.context
            if method.feed == "quantized":
                block.inputs, block.context = hidden, stream.contexts[index]
            entry.folded = process(block, sites, method)
            round_off(block.module, block.stored, but=frozenset(block.finished))
        else:
            clean = entry.clean
        del sites  # they hold the block's float layers
        block.context = stream.contexts[index]
        hidden = list(block.run(hidden))
        entry.finish(block, clean, hidden)
        settle(block)
        before.release(walk.model)
        restore(block.module, block.stored)
        if journal:
            if kept is None:
                journal.store(first + index, block, entry)
            stream.release(index)  # without a journal the quantized layers are nowhere else
        report.add(entry)
        walk.progress("quantize", first + index + 1, first + 1 if stream.whole else walk.blocks)
    return clean, hidden
