"""The demonstration: a real language model to 4 bits, and the proof, in a few minutes on two cores.

The embedded default model three times, in float, rounded to nearest, and by the best method we have: judged on text
that none of them was calibrated on, side by side, with one run of the float model for all.
"""

import copy
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import planish
from planish._support import bad
from planish.quant import METHODS, sources, texts
from planish.quant.checkpoint import round_kept
from planish.quant.evaluation import Evaluation, Progress, compare
from planish.quant.generation import PROMPTS, complete
from planish.quant.page import write_report

OURS, RIVAL = "best", "rtn"
CALIBRATION_TOKENS, EVALUATION_TOKENS, LENGTH = 8192, 4096, 256


@dataclass(frozen=True)
class Run:
    """What it took to make one of the models.

    Attributes:
        seconds: Wall time of `quantize`.
        peak_bytes: Most memory the process held meanwhile, the float model included.
    """

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Demo:
    """What the demonstration found.

    Attributes:
        evaluations: By name: "base", "rtn" and "best".
        runs: By name: "rtn" and "best".
        samples: For each prompt, texts by name.
        checkpoint: Where the quantized model lies.
        page: The report.
    """

    evaluations: dict[str, Evaluation]
    runs: dict[str, Run]
    samples: list[dict[str, Any]]
    checkpoint: Path
    page: Path


def demo(out: Path, *, say: Callable[[str], None], progress: Progress) -> Demo:
    """Quantize the embedded default model, prove what it costs, and write checkpoint and report.

    Args:
        out: The checkpoint's directory; an earlier demonstration there is replaced.
        say: Told each step in a sentence.
        progress: Called as progress(stage, done, total).

    Returns:
        The figures.

    Raises:
        ValueError: `out` exists and is not an earlier demonstration.
        MissingExtra: The default model is not installed.
    """
    if out.exists() and not (out / "report.json").is_file():
        raise bad("demo", "OUT", "a new name or an earlier demonstration's", str(out))
    say("opening the embedded model (expanding it the first time takes about a minute)")
    source = sources.resolve("default")
    tokenizer, base = sources.open_tokenizer(source), sources.open_model(source)
    size, kept = sources.auto_group_size(base), sources.kept_dtype(source)
    read, judged = texts.reference_text(), texts.library_text()
    fitted, _ = texts.pick(texts.cut(tokenizer, read, length=LENGTH), CALIBRATION_TOKENS)
    held, _ = texts.pick(texts.cut(tokenizer, judged, length=LENGTH), EVALUATION_TOKENS)
    say(f"groups of {size}: the largest of 128, 64 and 32 that divides every layer")
    say(f"calibrating on {texts.count(fitted):,} tokens of {read.name}")
    models, runs, reports = {}, {}, {}
    for name in (RIVAL, OURS):
        model = copy.deepcopy(base)
        began, resettable = time.perf_counter(), reset_peak()
        method = METHODS[name](bits=4, group_size=size)
        step = _named(progress, name)
        seen = fitted if name == OURS else fitted[:1]  # rounding to nearest looks at no data
        reports[name] = planish.quantize(model, [{"input_ids": w} for w in seen], method, progress=step)
        runs[name] = Run(time.perf_counter() - began, peak_bytes(resettable))
        if kept is not None:
            round_kept(model, kept)  # before it is judged: what is stored is what was measured
        models[name] = model
    if kept is not None:
        say(f"storing {sources.KEPT}")
    say(f"judging on {texts.count(held):,} tokens of {judged.name}, none of it seen before")
    evaluations = compare(base, models, [{"input_ids": w} for w in held], progress=progress)
    samples = []
    for done, prompt in enumerate(PROMPTS, 1):
        said = {"float": complete(base, tokenizer, prompt), OURS: complete(models[OURS], tokenizer, prompt)}
        samples.append({"prompt": prompt, "texts": said})
        progress("generate", done, len(PROMPTS))
    discard(out)
    planish.save(models[OURS], out, tokenizer=tokenizer, report=reports[OURS], kept=kept)
    report = {
        **reports[OURS].to_json(),
        **sources.stored(out, kept),
        "model": source.name.rpartition("-")[0],
        "planish": planish.__version__,
        "subject": OURS,
        "evaluations": {name: entry.to_json() for name, entry in evaluations.items()},
        "data": {
            "calibrated_on": {"text": read.name, "tokens": texts.count(fitted)},
            "evaluated_on": {"text": judged.name, "tokens": texts.count(held)},
        },
        "samples": samples,
        "machine": {
            "threads": torch.get_num_threads(),
            "peak memory while quantizing": f"{runs[OURS].peak_bytes / 1e9:.2f} GB, the float model included",
        },
    }
    return Demo(evaluations, runs, samples, out, write_report(out, report))


def discard(out: Path) -> None:
    """Remove an earlier demonstration: the files of a checkpoint, and nothing that is not one."""
    if not out.exists():
        return
    for path in out.iterdir():
        if path.is_dir() or path.suffix not in {".json", ".safetensors", ".html", ".jinja", ".txt", ".model"}:
            raise bad("demo", "OUT", "a new name or an earlier demonstration's", f"{out}, which holds {path.name}")
    for path in out.iterdir():
        path.unlink()
    out.rmdir()


def reset_peak() -> bool:
    """Forget the process's peak memory so far; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes(since_reset: bool) -> int:
    """Return the most memory the process held, since the reset or, where there was none, since it began."""
    if since_reset:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _named(progress: Progress, name: str) -> Progress:
    def step(stage: str, done: int, total: int) -> None:
        progress(f"{name}: {stage}", done, total)

    return step
