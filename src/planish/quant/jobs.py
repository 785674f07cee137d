"""The long job of the command line: a model on disk to a quantized one on disk, interrupted as often as need be.

State lies beside the target in `OUT.journal` until the target is whole. What is judged at the end is what was written:
the checkpoint is read back.
"""

import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import planish
from planish._support import bad
from planish.quant import METHODS, Affine, sources, texts
from planish.quant.disk import assemble, open_model
from planish.quant.evaluation import Evaluation, Progress, compare
from planish.quant.generation import PROMPTS, complete
from planish.quant.journal import Journal
from planish.quant.page import write_report


@dataclass(frozen=True)
class Job:
    """What to do; see `planish quantize --help` for each.

    Attributes:
        source: Directory of the float model.
        name: What the report calls it.
        out: Directory to be written.
        method: A key of `planish.quant.METHODS`.
        bits: Bits of a weight.
        group_size: Input channels that share a scale; None for the largest of 128, 64 and 32 that divides every layer.
        data: A text file; None for the language's reference.
        tokens: Tokens to calibrate on.
        eval_tokens: Tokens to be judged on, none of them calibrated on; 0 leaves the judgement out.
        window: Tokens of a window.
        layout: See `planish.quant.save`.
        fresh: Throw away what an interrupted run left.
        device: Where to compute.
        dtype: See `planish.quant.sources.open_model`.
        act_bits: Bits of an activation, one scale a token; None for what the method does by itself.
    """

    source: Path
    name: str
    out: Path
    method: str = "best"
    bits: int = 4
    group_size: int | None = None
    data: Path | None = None
    tokens: int = 32768
    eval_tokens: int = 8192
    window: int = 512
    layout: str = "auto"
    fresh: bool = False
    device: str = "cpu"
    dtype: str = "auto"
    act_bits: int | None = None


@dataclass(frozen=True)
class Done:
    """What came of it.

    Attributes:
        report: What `quantize` did, as text.
        evaluations: "base" and the quantized model, by the method's name; empty where nothing was judged.
        layout: What was written.
        page: The report.
    """

    report: str
    evaluations: dict[str, Evaluation]
    layout: str
    page: Path


def run(job: Job, *, say: Callable[[str], None], progress: Progress) -> Done:
    """Quantize a model on disk.

    Args:
        job: What to do.
        say: Told each choice in a sentence.
        progress: Called as progress(stage, done, total).

    Returns:
        What came of it.

    Raises:
        ValueError: A setting is out of range, the model is quantized already, or the journal is another run's.
        CheckpointError: The model cannot be read, or the result not written.
    """
    if job.method not in METHODS:
        raise bad("quantize", "method", f"one of {', '.join(METHODS)}", job.method)
    if sources.is_quantized(job.source):
        raise bad("quantize", "MODEL", "a float model", f"{job.name}, which is quantized already")
    tokenizer = sources.open_tokenizer(job.source)
    if job.dtype == "auto":
        model, weights = open_model(job.source)
    else:
        model, weights = sources.open_model(job.source, dtype=job.dtype), None
    size, scales = job.group_size, "float16"
    if getattr(model, "dtype", None) == torch.bfloat16:
        scales = "bfloat16"  # stock readers cast scales
    preset = METHODS[job.method]()
    if size is None and preset.weight.group_size is not None:
        size = sources.auto_group_size(model)
        say(f"groups of {size}: the largest of 128, 64 and 32 that divides every layer")
    asked: dict[str, Any] = {"bits": job.bits, "group_size": size, "scale_dtype": scales}
    own = "act_bits" in inspect.signature(METHODS[job.method]).parameters
    if own and job.act_bits is not None:
        asked["act_bits"] = job.act_bits
    method = METHODS[job.method](**asked)
    if job.act_bits is not None and not own:
        act = method.act if isinstance(method.act, Affine) else Affine(group_size=None, scale_dtype="float32")
        method = replace(method, act=replace(act, bits=job.act_bits))
    length = min(job.window, getattr(model.config, "max_position_embeddings", None) or job.window)
    fitted, held, data = _texts(job, tokenizer, length, say)
    journal = Journal(job.out.with_name(job.out.name + ".journal"), fresh=job.fresh)
    batches = [{"input_ids": window} for window in fitted]
    report = planish.quantize(
        model, batches, method, device=job.device, weights=weights, journal=journal, progress=progress
    )
    kept = sources.kept_dtype(job.source)
    if kept is not None:
        say(f"storing {sources.KEPT}")
    layout = assemble(journal, model, job.out, layout=job.layout, tokenizer=tokenizer, report=report, kept=kept)
    del model, weights
    shutil.rmtree(journal.path)
    whole: dict[str, Any] = {
        **report.to_json(),
        **sources.stored(job.out, kept),
        "model": job.name,
        "planish": planish.__version__,
        "subject": job.method,
        "data": data,
        "machine": {"threads": torch.get_num_threads(), "device": job.device},
    }
    write_report(job.out, whole)
    evaluations: dict[str, Evaluation] = {}
    if held:
        base = sources.open_model(job.source, dtype=job.dtype, device=job.device)
        small = sources.open_model(job.out, device=job.device)
        evaluations = compare(base, {job.method: small}, [{"input_ids": w} for w in held], progress=progress)
        whole["evaluations"] = {name: entry.to_json() for name, entry in evaluations.items()}
        whole["samples"] = []
        for done, prompt in enumerate(PROMPTS, 1):
            said = {"float": complete(base, tokenizer, prompt), job.method: complete(small, tokenizer, prompt)}
            whole["samples"].append({"prompt": prompt, "texts": said})
            progress("generate", done, len(PROMPTS))
    return Done(str(report), evaluations, layout, write_report(job.out, whole))


def _texts(
    job: Job,
    tokenizer: Any,  # noqa: ANN401
    length: int,
    say: Callable[[str], None],
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Return windows to calibrate on, windows to be judged on, and what the report says of them."""
    text = texts.read_text(job.data) if job.data else texts.reference_text()
    fitted, rest = texts.pick(texts.cut(tokenizer, text, length=length), job.tokens)
    found = texts.count(fitted)
    short = "" if found >= job.tokens else f", all there is: {job.tokens:,} were asked for"
    say(f"calibrating on {found:,} tokens of {text.name}{short}")
    data = {"calibrated_on": {"text": text.name, "tokens": found}}
    if not job.eval_tokens:
        return fitted, [], data
    judged = text if job.data and len(rest) * length >= job.eval_tokens else texts.library_text()
    windows = rest if judged is text else texts.cut(tokenizer, judged, length=length)
    held, _ = texts.pick(windows, job.eval_tokens)
    say(f"judging on {texts.count(held):,} tokens of {judged.name}, none of them calibrated on")
    return fitted, held, {**data, "evaluated_on": {"text": judged.name, "tokens": texts.count(held)}}
