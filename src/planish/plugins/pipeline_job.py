"""The long job of the command line for pipelines: one of diffusers on disk to a quantized one, with pictures of both.

Pipelines differ in what they are asked for; what is needed here (classes, prompts, or just a number of pictures) is
read off the signature of their call. Anything else is for `planish.plugins.diffusers.quantize_pipeline`.
"""

import base64
import inspect
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import planish
from planish._support import CheckpointError, bad, require
from planish.diffusion.calls import denoiser_of
from planish.plugins import diffusers as small
from planish.quant import METHODS, Affine, Journal, Method, QLinear
from planish.quant.page import write_report

PROMPTS = (
    "a red fox in fresh snow, photograph", "a wooden boat on a calm lake at dawn", "a bowl of lemons, oil painting",
    "an old street after rain, neon lights", "portrait of a smiling grandmother", "a lighthouse on a cliff, storm",
    "a stack of books beside a cup of tea", "a mountain valley seen from above",
)  # fmt: skip
SHOWN, WIDEST = 8, 256  # pictures of the report, and their sides in pixels
_JUDGED = 1000  # seeds of the pictures that are judged begin here; those of the calibration at 0


@dataclass(frozen=True)
class PipelineJob:
    """What to do; see `planish quantize --help` for each.

    Attributes:
        source: Directory of the float pipeline, with a model_index.json.
        name: What the report calls it.
        out: Directory to be written.
        method: A key of `planish.quant.METHODS`, for linear layers.
        bits: Bits of a weight.
        group_size: Input channels that share a scale; None for what the method does by itself.
        act_bits: Bits of an activation; None for what the method does by itself.
        images: Pictures to calibrate on.
        steps: Of the sampler; None for what the pipeline does by itself.
        fresh: Throw away what an interrupted run left.
        device: Where to compute.
        dtype: In which the pipeline is opened: auto (as diffusers does), float32, bfloat16 or float16.
    """

    source: Path
    name: str
    out: Path
    method: str = "svdquant"
    bits: int = 4
    group_size: int | None = None
    act_bits: int | None = None
    images: int = 16
    steps: int | None = None
    fresh: bool = False
    device: str = "cpu"
    dtype: str = "auto"


@dataclass(frozen=True)
class PipelineDone:
    """What came of it.

    Attributes:
        report: What was done.
        psnr: Of the quantized pipeline's pictures to the float one's of the same seeds, in dB; None where they agree
            in every pixel.
        page: The report.
    """

    report: small.PipelineReport
    psnr: float | None
    page: Path

    def __str__(self) -> str:
        """Return what a terminal is told."""
        close = "in every pixel as before" if self.psnr is None else f"{self.psnr:.1f} dB from float's, same seeds"
        return f"{self.report}\npictures {close}\npipeline {self.page.parent}\nreport   {self.page}"


def is_pipeline(source: Path) -> bool:
    """Tell whether a directory holds a pipeline of diffusers."""
    return (source / "model_index.json").is_file()


def run(job: PipelineJob, *, say: Callable[[str], None], progress: Callable[[str, int, int], None]) -> PipelineDone:
    """Quantize a pipeline on disk.

    Args:
        job: What to do.
        say: Told each choice in a sentence.
        progress: Called as progress(stage, done, total).

    Returns:
        What came of it.

    Raises:
        ValueError: A setting is out of range, the pipeline is quantized already, or asks for more than classes, prompts
            or a number of pictures.
        CheckpointError: The pipeline cannot be read, or the result not written.
    """
    if job.method not in METHODS:
        raise bad("quantize", "method", f"one of {', '.join(METHODS)}", job.method)
    if job.images < 1:
        raise bad("quantize", "images", "at least 1", job.images)
    pipeline = open_pipeline(job.source, dtype=job.dtype, device=job.device)
    part, model = denoiser_of(pipeline)
    if any(isinstance(module, QLinear) for module in model.modules()):
        raise bad("quantize", "MODEL", "a float pipeline", f"{job.name}, which is quantized already")
    draw = drawing(pipeline, steps=job.steps)
    method = small.whole(_method(job))
    say(f"calibrating the {part} on {job.images} pictures")
    before = draw(min(SHOWN, job.images), _JUDGED)
    journal = Journal(job.out.with_name(job.out.name + ".journal"), fresh=job.fresh)
    report = small.quantize_pipeline(pipeline, lambda: draw(job.images, 0), method, journal=journal, progress=progress)
    partial = Path(tempfile.mkdtemp(prefix=f".{job.out.name}.partial-", dir=job.out.absolute().parent))
    try:
        pipeline.save_pretrained(partial)
        partial.chmod(0o777 & ~_umask())
        say("reading back what was written: the pictures of the report are its own")
        again = drawing(open_pipeline(partial, dtype=job.dtype, device=job.device), steps=job.steps)
        after = again(len(before), _JUDGED)
        close = _psnr(before, after)
        shown = {
            "float": grid(before),
            job.method: grid(after),
            "difference, times 8": grid(_difference(before, after)),
        }
        whole: dict[str, Any] = {
            **report.to_json(), "model": job.name, "planish": planish.__version__, "subject": job.method,
            "pictures": [{"name": name, "png": png} for name, png in shown.items()], "psnr": close,
            "machine": {"threads": torch.get_num_threads(), "device": job.device},
        }  # fmt: skip
        write_report(partial, whole)
        partial.rename(job.out)
    except OSError as error:
        raise CheckpointError(f"`{job.out}` cannot be written: {error}", "unwritable") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(journal.path)
    return PipelineDone(report, close, job.out / "report.html")


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def open_pipeline(source: Path, *, dtype: str = "auto", device: str = "cpu") -> Any:  # noqa: ANN401  (any pipeline)
    """Open a pipeline on disk, without its progress bars.

    Raises:
        ValueError: `dtype` is unknown.
        CheckpointError: diffusers cannot read it.
        MissingExtra: diffusers is not installed.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise bad("quantize", "dtype", "auto, float32, bfloat16 or float16", dtype)
    kinds = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    diffusers = require("diffusers", "diffusers", "a pipeline")
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(source, local_files_only=True, **kinds)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"`{source}`: diffusers cannot read the pipeline ({text[:160]}).", "unreadable") from None
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "labels", None):  # a name for each class: read by diffusers, but not written again
        names: dict[int, list[str]] = {}
        for label, number in pipeline.labels.items():
            names.setdefault(number, []).append(label)
        pipeline.register_to_config(id2label={number: ", ".join(names[number]) for number in sorted(names)})
    return pipeline if device == "cpu" else pipeline.to(device)


def drawing(pipeline: Any, *, steps: int | None = None) -> Callable[[int, int], NDArray[np.float32]]:  # noqa: ANN401
    """Return the function from a number of pictures and a seed to pictures of a pipeline, (n, h, w, c) in [0, 1].

    Args:
        pipeline: One of diffusers'.
        steps: Of the sampler; default what it does by itself.

    Raises:
        ValueError: Its call asks for something else than classes, prompts or a number of pictures.
    """
    asked = inspect.signature(pipeline.__call__).parameters
    extra: dict[str, Any] = {"output_type": "np"} | ({} if steps is None else {"num_inference_steps": steps})
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    must = [name for name, p in asked.items() if p.default is p.empty and p.kind in named]
    unknown = [name for name in must if name not in ("class_labels", "prompt")]
    if unknown or not {"class_labels", "prompt", "batch_size"} & set(asked):
        kind, what = type(pipeline).__name__, ", ".join(unknown) or "neither classes, prompts nor a number of pictures"
        raise bad("quantize", "MODEL", "a pipeline that draws from classes, prompts or nothing", f"{kind}: {what}")

    def draw(count: int, seed: int) -> NDArray[np.float32]:
        given = dict(extra, generator=torch.Generator().manual_seed(seed))
        if "class_labels" in asked:
            classes = sorted(set(getattr(pipeline, "labels", {}).values())) or list(range(1000))
            given["class_labels"] = [classes[i * max(1, len(classes) // count) % len(classes)] for i in range(count)]
        elif "prompt" in asked:
            given["prompt"] = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
        else:
            given["batch_size"] = count
        found: NDArray[np.float32] = np.asarray(pipeline(**given).images, dtype=np.float32)
        return found

    return draw


def _method(job: PipelineJob) -> Method:
    preset = METHODS[job.method]
    asked: dict[str, Any] = {"bits": job.bits}
    if job.group_size is not None:
        asked["group_size"] = job.group_size
    own = "act_bits" in inspect.signature(preset).parameters
    if own and job.act_bits is not None:
        asked["act_bits"] = job.act_bits
    method = preset(**asked)
    if job.act_bits is not None and not own:
        given = method.act if isinstance(method.act, Affine) else Affine(group_size=None, scale_dtype="float32")
        method = replace(method, act=replace(given, bits=job.act_bits))
    weight, act = method.weight, method.act  # channels of denoisers seldom divide: the last group may be shorter
    if isinstance(weight, Affine) and weight.group_size is not None:
        method = replace(method, weight=replace(weight, ragged=True))
    if isinstance(act, Affine) and act.group_size is not None:
        method = replace(method, act=replace(act, ragged=True))
    return method


def _psnr(before: NDArray[np.float32], after: NDArray[np.float32]) -> float | None:
    error = float(np.mean((before.astype(np.float64) - after) ** 2))
    return None if error == 0 else float(-10 * np.log10(error))


def _difference(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.clip(8 * np.abs(before - after), 0, 1)
    return found


def grid(pictures: NDArray[np.float32]) -> str:
    """Lay pictures (n, h, w, c) side by side as one PNG, in base64; larger ones than the report shows are made smaller.

    Raises:
        MissingExtra: Pillow is not installed; diffusers brings it.
    """
    image = require("PIL.Image", "diffusers", "pictures in the report")
    tiles: Sequence[Any] = [
        image.fromarray((255 * np.clip(p, 0, 1)).round().astype(np.uint8).squeeze()).convert("RGB") for p in pictures
    ]
    for tile in tiles:
        tile.thumbnail((WIDEST, WIDEST))
    wide, high = tiles[0].size
    times = max(1, 64 // max(wide, high))  # small ones are made larger, pixel by pixel
    sheet = image.new("RGB", (len(tiles) * (wide * times + 4) - 4, high * times), (127, 127, 127))
    for i, tile in enumerate(tiles):
        sheet.paste(tile.resize((wide * times, high * times), image.Resampling.NEAREST), (i * (wide * times + 4), 0))
    held = io.BytesIO()
    sheet.save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode("ascii")
