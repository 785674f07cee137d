"""How much is lost with weights and activations in 4 bits: a scale a row of the weight, a scale a token.

`python -m benchmarks quant --suite outliers`. SmolLM2-135M-Instruct on running text that calibration
never saw; a few of its channels, and its first token, carry activations far larger than the rest. Another recipe is one
more line in `recipes`.
"""

import gc
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import data, quality, subjects
from benchmarks.driver import load_model
from benchmarks.harness import Row, write_json

logger = logging.getLogger("benchmarks")
CASE = "SmolLM2-135M, W4A4, a scale a row and a token"
COMPARED = (("nll", "float"), ("kl", "hadamard"))


@dataclass(frozen=True)
class Size:
    """How much of everything a run takes: (windows, length)."""

    calibration: tuple[int, int]
    evaluation: tuple[int, int]
    names: tuple[str, ...] | None = None


NAMES = (
    "rtn", "smoothing", "hadamard", "hadamard, clipped", "smoothing + hadamard, clipped", "duquant",
    "duquant + branch of rank 16", "best", "best + branch of rank 16",
)  # fmt: skip
"""What a full run takes; variants run by name, with --only."""

FULL = Size((16, 512), (32, 512), NAMES)
QUICK = Size((2, 64), (2, 64), ("rtn", "hadamard", "duquant"))


def recipes() -> dict[str, Callable[[], object]]:
    """Name what competes; each returns a `planish.quant.Method`."""
    from planish.quant import Affine, LowRank, best, duquant, rtn  # noqa: PLC0415
    from planish.quant.methods.duquant import DuRotate, Hadamard  # noqa: PLC0415
    from planish.quant.methods.gptq import Compensate  # noqa: PLC0415
    from planish.quant.methods.smoothquant_plus import Smooth  # noqa: PLC0415

    act = Affine(4, None, scale_dtype="float32")
    plain = replace(rtn(group_size=None), act=act, online=True)
    clipped = {"weight": Affine(4, None, clip=0.8), "act": replace(act, clip=0.9)}
    level = Smooth(0.6, exceptions=(("mlp.down_proj", None),))
    return {
        "rtn": lambda: plain,
        "smoothing": lambda: replace(plain, transform=Smooth(0.5)),
        "hadamard": lambda: replace(plain, transform=Hadamard(64)),
        "hadamard, clipped": lambda: replace(plain, transform=Hadamard(64), **clipped),
        "smoothing + hadamard, clipped": lambda: replace(plain, transform=Hadamard(64, Smooth(0.6)), **clipped),
        "duquant": duquant,
        "duquant, one matrix a layer": lambda: duquant(shared=True),
        "duquant, permuted first": lambda: duquant(order="permute"),
        "duquant, symmetric": lambda: duquant(symmetric=True),
        "duquant, down not smoothed": lambda: replace(duquant(), transform=DuRotate(level)),
        "duquant + branch of rank 16": lambda: replace(duquant(), round=LowRank(16)),
        "duquant + gptq": lambda: replace(duquant(weight_clip=1.0), round=Compensate(clip=True)),
        "best": lambda: best(group_size=None, act_bits=4),
        "best + branch of rank 16": lambda: replace(
            best(group_size=None, act_bits=4), round=LowRank(16, last=Compensate(clip=True))
        ),
    }


Scored = tuple[dict[str, float], dict[str, Tensor]]


def _kept(
    name: str,
    what: dict[str, str],
    windows: tuple[data.Windows, data.Windows],
    make: Callable[[Path], dict[str, float]],
    *,
    fresh: bool,
) -> Scored:
    """Return what an earlier run with the same code, data and settings kept, or what `make` writes and says."""
    what |= {"calibration": windows[0].fingerprint, "evaluation": windows[1].fingerprint}
    what |= {"weights": data.fingerprint(data.language_model())}
    key = sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    folder = data.cache_dir() / "benchmarks"
    line_path, score_path = folder / f"outliers-{key}.json", folder / f"outliers-{key}.safetensors"
    if not fresh and line_path.exists() and score_path.exists():
        return json.loads(line_path.read_text())["line"], load_file(score_path)
    logger.info("%s: %s", CASE, name)
    folder.mkdir(parents=True, exist_ok=True)
    partial = score_path.with_suffix(".partial")
    line = make(partial)
    partial.replace(score_path)
    write_json(line_path, {"what": what, "line": line})
    return line, load_file(score_path)


def _ours(name: str, method: object, calibration: data.Windows, evaluation: data.Windows, *, fresh: bool) -> Scored:
    """Quantize and score here."""
    import planish  # noqa: PLC0415

    def make(out: Path) -> dict[str, float]:
        model = load_model(data.language_model())
        reference = quality.hidden_states(model, evaluation.ids)
        line = {"seconds": 0.0}
        if method is not None:
            start = time.perf_counter()
            planish.quantize(model, [{"input_ids": ids} for ids in calibration.ids.split(4)], method)
            line["seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        save_file(quality.language_scores(model, evaluation.ids, reference), out)
        line["scoring"] = time.perf_counter() - start
        del model
        gc.collect()
        return line

    what = {"method": repr(method), "sources": subjects._sources(subjects._ours("outliers"))}
    return _kept(name, what, (calibration, evaluation), make, fresh=fresh)


RIVALS = {
    "llm-compressor spinquant": "spinquant",
    "llm-compressor spinquant + gptq": "spinquant, gptq",
    "llm-compressor quip + gptq": "quip, gptq",
    "auto-round hadamard": "hadamard",
}
"""Names of rows to methods of `benchmarks.rivals.rotated`."""


def _rival(name: str, calibration: data.Windows, evaluation: data.Windows, *, fresh: bool) -> Scored:
    """Let a rival quantize and score itself in its own environment.

    Raises:
        RuntimeError: It failed.
    """
    driver = subjects.Subject("benchmarks.rivals.rotated", RIVALS[name])

    def make(out: Path) -> dict[str, float]:
        tokens = out.with_suffix(".tokens")
        save_file({"input_ids": calibration.ids.contiguous(), "evaluation": evaluation.ids.contiguous()}, tokens)
        options = ("--method", driver.method, "--model", data.language_model(), "--tokens", tokens, "--out", out)
        try:
            return subjects.launch(driver, options, about=CASE)
        finally:
            tokens.unlink(missing_ok=True)

    what = {"method": driver.method, "sources": subjects._sources(driver)}
    return _kept(name, what, (calibration, evaluation), make, fresh=fresh)


def rows(
    quick: bool,
    *,
    against: tuple[str, ...] | None = None,
    only: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
    **_other: object,
) -> Iterator[Row]:
    """Yield the rows of all recipes.

    Args:
        quick: Few tokens, few recipes: that it runs, not what it says.
        against: Only rivals whose name holds one of these; None for all.
        only: Only the recipes and rivals with these names, and float; None for all.
        fresh: Do not use what an earlier run left in the cache.
        skipped: Filled with who could not run, and why.
    """
    skipped = {} if skipped is None else skipped
    size = QUICK if quick else FULL
    path = data.language_model()
    calibration = data.windows(path, *size.calibration, evaluation=False)
    evaluation = data.windows(path, *size.evaluation, evaluation=True)
    wanted = size.names if only is None else only
    methods: dict[str, object] = {"float": None}
    methods |= {name: make() for name, make in recipes().items() if wanted is None or name in wanted}
    note = f"calibrated on {calibration.source}; scored on {evaluation.source}"
    results: dict[str, dict[str, Tensor]] = {}
    rivals = [name for name in RIVALS if _enters(name, wanted if only else None, against, quick=quick, skipped=skipped)]
    for name in (*methods, *rivals):
        try:
            if name in methods:
                line, scores = _ours(name, methods[name], calibration, evaluation, fresh=fresh)
            else:
                line, scores = _rival(name, calibration, evaluation, fresh=fresh)
        except RuntimeError as error:  # one that fails is told of, and does not lose the others' hours
            skipped[name] = str(error)
            continue
        results[name] = scores
        for metric, values in scores.items():
            found = quality.bootstrap(values)
            if metric == "nll":  # the interval of a mean of logarithms becomes that of a perplexity
                ppl = [math.exp(v) for v in (found.value, found.low, found.high)]
                yield Row(CASE, name, "perplexity", ppl[0], "", None, ppl[1], ppl[2], note)
            yield Row(CASE, name, metric, found.value, _UNITS[metric], None, found.low, found.high, note)
        if name != "float":
            yield Row(CASE, name, "quantizing", line["seconds"], "s")
    for metric, baseline in COMPARED:
        for name in results:
            if name in ("float", baseline) or baseline not in results:
                continue
            found = quality.bootstrap(results[name][metric] - results[baseline][metric])
            yield Row(CASE, name, f"{metric} difference", found.value, "nats/token", baseline, found.low, found.high)


def _enters(
    name: str, only: tuple[str, ...] | None, against: tuple[str, ...] | None, *, quick: bool, skipped: dict[str, str]
) -> bool:
    """Say whether a rival is wanted and can run."""
    if quick or (only is not None and name not in only):
        return False
    if against is not None and not any(part in name for part in against):
        return False
    if subjects.interpreter(subjects.Subject("benchmarks.rivals.rotated", "")) is None:
        skipped[name] = "the rivals' environment is not there; build it with `make rivals`"
        return False
    return True


_UNITS = {"nll": "nats/token", "kl": "nats/token", "top1": "share", "hidden": "relative MSE"}
