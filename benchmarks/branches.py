"""What a byte buys: smaller groups, or a low-rank branch beside larger ones, at equal bytes.

Every ladder has a step of plain quantization with small groups, and the same with larger groups and a branch that may
take exactly the bytes which the smaller groups cost more. Weights only, on SmolLM2-135M-Instruct; scored on running
text that calibration never saw, paired by window.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import data, quality
from benchmarks.driver import load_model
from benchmarks.harness import Row
from planish import quant
from planish.quant.methods.gptq import Compensate
from planish.quant.methods.svdquant import svdquant
from planish.quant.precision import widen
from planish.quant.rounding import ClipOutput

Grid = tuple[int, int | None]
UNITS = {"nll": "nats/token", "kl": "nats/token", "top1": "share", "hidden": "relative MSE"}


@dataclass(frozen=True)
class Ladder:
    """Two grids of the same bits, the finer first."""

    bits: int
    fine: int
    coarse: int | None

    @property
    def name(self) -> str:
        """Say the case in words."""
        coarse = f"groups of {self.coarse}" if self.coarse else "one group a row"
        return f"SmolLM2-135M, {self.bits} bits, groups of {self.fine} or {coarse} and a branch"


SMALLER = "the same bytes in smaller groups"
Make = Callable[[int, int | None, int], Any]


def _branch(bits: int, group_size: int | None, budget: int, **settings: object) -> quant.Method:
    settings = {"symmetric": False, "act_bits": None, "smooth": None, "ragged": True, "iterations": 20} | settings
    return svdquant(bits=bits, group_size=group_size, budget=budget, **settings)


def _plain(preset: Callable[..., quant.Method]) -> Make:
    return lambda bits, group_size, budget: preset(bits=bits, group_size=group_size, ragged=True)


def _clipped(bits: int, group_size: int | None, budget: int) -> quant.Method:
    return replace(quant.rtn(bits=bits, group_size=group_size, ragged=True), round=ClipOutput())


# The pairs that are compared: (without a branch, on the fine grid), (with one, on the coarse grid).
PAIRS: Mapping[str, tuple[Make, Make]] = {
    "rtn": (_plain(quant.rtn), _branch),
    "clip": (_clipped, lambda b, g, n: _branch(b, g, n, inner=ClipOutput(), iterations=3)),
    "gptq": (_plain(quant.gptq), lambda b, g, n: _branch(b, g, n, inner=Compensate(), iterations=2)),
    "best": (
        _plain(quant.best),
        lambda b, g, n: _branch(b, g, n, inner=Compensate(clip=True), correct=0.5, iterations=2),
    ),
    "best, on the last residual alone": (
        _plain(quant.best),
        lambda b, g, n: _branch(b, g, n, last=Compensate(clip=True), correct=0.5),
    ),
}


@dataclass(frozen=True)
class Size:
    """How much of everything a run takes."""

    calibration: tuple[int, int]
    evaluation: tuple[int, int]
    ladders: tuple[Ladder, ...]
    pairs: tuple[str, ...]


FULL = Size(
    (16, 512), (32, 512), (Ladder(4, 32, 64), Ladder(3, 32, 64), Ladder(4, 64, None), Ladder(3, 64, None)), tuple(PAIRS)
)
QUICK = Size((2, 128), (2, 128), (Ladder(3, 32, 64),), ("rtn",))


class Bench:
    """The float model, its tokens, and its own scores."""

    def __init__(self, size: Size) -> None:
        self.path = data.language_model()
        self.calibration = data.windows(self.path, *size.calibration, evaluation=False)
        self.evaluation = data.windows(self.path, *size.evaluation, evaluation=True)
        self.model = load_model(self.path)
        self.hidden = quality.hidden_states(self.model, self.evaluation.ids)
        self.batches = [{"input_ids": part} for part in self.calibration.ids.split(4)]

    def run(self, method: quant.Method) -> tuple[dict[str, torch.Tensor], int, float]:
        """Quantize a copy and score it; return the scores, the bytes of its quantized layers, and the seconds."""
        model = copy.deepcopy(self.model)
        report = quant.quantize(model, self.batches, method)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, quant.QLinear)}
        size = sum(tensor.nbytes for layer in layers.values() for tensor in layer.state_dict().values())  # as on disk
        for name, layer in layers.items():
            model.set_submodule(name, layer.dequantize())
        widen(model)  # the quickest dense kernel for all that is scored
        return quality.language_scores(model, self.evaluation.ids, self.hidden), size, report.seconds


def _absolute(case: str, name: str, scores: dict[str, torch.Tensor], note: str = "") -> Iterator[Row]:
    for metric, values in scores.items():
        interval = quality.bootstrap(values)
        if metric == "nll":
            ppl = [math.exp(v) for v in (interval.value, interval.low, interval.high)]
            yield Row(case, name, "perplexity", ppl[0], "", None, ppl[1], ppl[2], note)
        yield Row(case, name, metric, interval.value, UNITS[metric], None, interval.low, interval.high, note)


def _ladder(bench: Bench, ladder: Ladder, pairs: tuple[str, ...]) -> Iterator[Row]:
    note = f"calibrated on {bench.calibration.source}; scored on {bench.evaluation.source}"
    for pair in pairs:
        plain, branched = PAIRS[pair]
        fine = f"{pair}, groups of {ladder.fine}"
        coarse = f"{pair}, {f'groups of {ladder.coarse}' if ladder.coarse else 'one group a row'}"
        results = {}
        results[fine] = bench.run(plain(ladder.bits, ladder.fine, 0))
        results[coarse] = bench.run(plain(ladder.bits, ladder.coarse, 0))
        budget = results[fine][1] - results[coarse][1]
        with_branch = f"{coarse} and a branch"
        results[with_branch] = bench.run(branched(ladder.bits, ladder.coarse, budget))
        for name, (scores, size, seconds) in results.items():
            yield from _absolute(ladder.name, name, scores, note)
            yield Row(ladder.name, name, "size", size / 1e6, "MB")
            yield Row(ladder.name, name, "quantizing", seconds, "s")
        for metric in ("kl", "nll"):
            gap = quality.bootstrap(results[with_branch][0][metric] - results[fine][0][metric])
            yield Row(
                ladder.name, with_branch, f"{metric} difference", gap.value, UNITS[metric], SMALLER, gap.low, gap.high
            )


def rows(
    quick: bool,
    *,
    against: tuple[str, ...] | None = None,
    only: tuple[str, ...] | None = None,
    grids: tuple[Grid, ...] | None = None,
    models: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
) -> Iterator[Row]:
    """Yield the rows of all ladders.

    Args:
        quick: Few tokens, one ladder: that it runs, not what it says.
        against: Not read: there are no rivals here.
        only: Only the pairs with these names; None for all.
        grids: Only ladders whose finer grid is one of these; None for all.
        models: Not read.
        fresh: Not read: nothing is kept between runs.
        skipped: Not filled: nothing can be unable here.
    """
    size = QUICK if quick else FULL
    bench = Bench(size)
    for ladder in size.ladders:
        if grids is None or (ladder.bits, ladder.fine) in grids:
            pairs = tuple(p for p in (size.pairs if only is None else only) if p in PAIRS)
            yield from _ladder(bench, ladder, pairs)
