"""How much quality is lost at 3 and 4 bits: every method of ours and every rival, on the same tokens.

A language model (SmolLM2-135M-Instruct) is scored on running text that calibration never saw, an encoder
(all-MiniLM-L6-v2) by how its embeddings move. Differences between subjects are paired by window; their 95 % intervals
are bootstrapped over windows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import data, quality
from benchmarks.driver import load_model, targets
from benchmarks.harness import Row
from benchmarks.subjects import NOTES, Case, Subject, chosen, scored, unable
from planish.quant.precision import widen

LANGUAGE, ENCODER = "SmolLM2-135M", "MiniLM-L6"
UNITS = {
    "nll": "nats/token",
    "kl": "nats/token",
    "top1": "share",
    "hidden": "relative MSE",
    "cosine": "1 - cosine",
    "similarity": "absolute error",
    "rank": "Spearman",
}
UNUSED = "pooler."  # an encoder's head for next-sentence prediction, which its sentence embeddings do not pass
COMPARED = {False: ("nll", "kl"), True: ("cosine", "hidden")}


@dataclass(frozen=True)
class Size:
    """How much of everything a run takes."""

    calibration: tuple[int, int]
    evaluation: tuple[int, int]
    grids: tuple[tuple[int, int | None], ...]
    subjects: tuple[str, ...] | None = None


FULL = Size((16, 512), (32, 512), ((4, 64), (3, 64), (4, None), (3, None)))
QUICK = Size((4, 128), (4, 128), ((4, 64),), ("rtn", "smoothquant+", "hqq"))


class Bench:
    """The float model of one case family, its evaluation tokens and its own scores."""

    def __init__(self, size: Size, *, encoder: bool) -> None:
        self.encoder = encoder
        self.path = data.encoder() if encoder else data.language_model()
        count, length = size.calibration
        # An encoder's positions end at 512, its trade is sentences: short windows, as many tokens.
        short = min(length, 128)
        shape = (count * length // short, short) if encoder else (count, length)
        self.calibration = data.windows(self.path, *shape, evaluation=False)
        count, length = size.evaluation
        shape = (count * length // short, short) if encoder else (count, length)
        self.evaluation = data.windows(self.path, *shape, evaluation=True)
        self.model: nn.Module = load_model(self.path)
        widen(self.model)  # the quickest dense kernel for all that is scored
        self.widths = {linear.in_features for linear in targets(self.model).values()}
        self.hidden = quality.hidden_states(self.model, self.evaluation.ids)

    def measure(self) -> dict[str, Tensor]:
        """Score the weights that are in the model now."""
        scores = quality.encoder_scores if self.encoder else quality.language_scores
        return scores(self.model, self.evaluation.ids, self.hidden)

    def score(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Score a set of dense weights; the model is float again afterwards."""
        with quality.DenseSwap(self.model, weights):
            return self.measure()


def _absolute(case: Case, name: str, scores: dict[str, Tensor], note: str) -> Iterator[Row]:
    for metric, values in scores.items():
        interval = quality.bootstrap(values)
        if metric == "nll":  # the interval of a mean of logarithms becomes that of a perplexity
            ppl = [math.exp(v) for v in (interval.value, interval.low, interval.high)]
            yield Row(case.name, name, "perplexity", ppl[0], "", None, ppl[1], ppl[2], note)
        yield Row(case.name, name, metric, interval.value, UNITS[metric], None, interval.low, interval.high, note)


def _differences(case: Case, results: dict[str, dict[str, Tensor]], metrics: tuple[str, ...]) -> Iterator[Row]:
    """Compare every subject of ours with rounding and with every rival, and all of them with float."""
    subjects = chosen(None)
    ours = [name for name in results if name in subjects and subjects[name].ours and name != "rtn"]
    theirs = [name for name in results if name in subjects and not subjects[name].ours]
    pairs = [(a, b) for a in ours for b in ("rtn", *theirs) if b in results]
    for metric in metrics:
        floats = [(a, "float") for a in results if a != "float" and metric == "nll"]
        for a, b in pairs + floats:
            interval = quality.bootstrap(results[a][metric] - results[b][metric])
            yield Row(
                case.name, a, f"{metric} difference", interval.value, UNITS[metric], b, interval.low, interval.high
            )


def _case(
    bench: Bench, case: Case, subjects: dict[str, Subject], *, fresh: bool, skipped: dict[str, str]
) -> Iterator[Row]:
    data_note = f"calibrated on {bench.calibration.source}; scored on {bench.evaluation.source}"
    results = {"float": bench.measure()}
    yield from _absolute(case, "float", results["float"], data_note)
    for name, subject in subjects.items():
        reason = unable(subject, case, bench.widths, encoder=bench.encoder)
        if reason is not None:
            skipped[f"{name} on {case.name}"] = reason
            continue
        try:
            line, results[name] = scored(
                subject,
                case,
                bench.path,
                bench.calibration,
                about=bench.evaluation.fingerprint,
                score=bench.score,
                fresh=fresh,
            )
        except RuntimeError as error:  # one subject that fails is told of, and does not lose the others' hours
            skipped[f"{name} on {case.name}"] = str(error)
            continue
        used = [n for n in line["left_float"] if not n.startswith(UNUSED)]
        if used:  # a subject that leaves layers alone would win unfairly
            skipped[f"{name} on {case.name}"] = f"it left {len(used)} linears in float, {used[0]} first"
            del results[name]
            continue
        yield from _absolute(case, name, results[name], NOTES.get(name, ""))
        yield Row(case.name, name, "quantizing", line["seconds"], "s")
    yield from _differences(case, results, COMPARED[bench.encoder])


def rows(
    quick: bool,
    *,
    against: tuple[str, ...] | None = None,
    only: tuple[str, ...] | None = None,
    grids: tuple[tuple[int, int | None], ...] | None = None,
    models: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
) -> Iterator[Row]:
    """Yield the rows of all cases.

    Args:
        quick: Few tokens, one grid, few subjects: that it runs, not what it says.
        against: Only rivals whose name holds one of these; None for all.
        only: Only the subjects with these names; None for all.
        grids: Only these (bits, group size); None for all.
        models: Only models whose name holds one of these; None for both.
        fresh: Do not use what an earlier run left in the cache.
        skipped: Filled with who could not enter which case, and why.
    """
    skipped = {} if skipped is None else skipped
    size = QUICK if quick else FULL
    if grids is not None:
        size = replace(size, grids=grids)
    subjects = {n: s for n, s in chosen(against, only).items() if size.subjects is None or n in size.subjects}
    with torch.inference_mode():
        for encoder, model in ((False, LANGUAGE), (True, ENCODER)):
            if models is not None and not any(part in model for part in models):
                continue
            bench = Bench(size, encoder=encoder)
            for bits, group_size in size.grids:
                yield from _case(bench, Case(model, bits, group_size), subjects, fresh=fresh, skipped=skipped)
