"""The command line: `planish`, or `python -m planish`.

Torch and everything above it is imported when a command runs, so that `--help` answers at once.
"""

import functools
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from planish import __version__
from planish._support import PlanishWarning, bad, keep_memory

app = typer.Typer(
    name="planish",
    help="Smooth it, then make it small: 4-bit models that stock engines load.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
P = ParamSpec("P")
MODEL = "A model directory, a GGUF file, a hub name, or the word `default`: the small model that comes with planish."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1 ...")]
Tokens = Annotated[int, typer.Option(min=2, help="How many tokens to read.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")]


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Make a command of a function: a user's mistake becomes one sentence on stderr and exit code 2."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        aloud = Console(stderr=True, soft_wrap=True)
        try:
            with _quiet(aloud):
                function(*args, **kwargs)
        except KeyboardInterrupt:
            aloud.print("interrupted; the same command again goes on where it can")
            raise typer.Exit(130) from None
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            if os.environ.get("PLANISH_DEBUG"):
                raise
            aloud.print(f"[red]error:[/red] {_plain(' '.join(str(error).split()))}", highlight=False)
            raise typer.Exit(2 if isinstance(error, ValueError | TypeError) else 1) from None

    return app.command()(run)


@contextmanager
def _quiet(aloud: Console) -> Iterator[None]:
    """Let our own warnings and log through as one line each, and other packages' chatter not at all."""
    logger = logging.getLogger("planish")
    handler = RichHandler(console=aloud, show_time=False, show_path=False, show_level=False)
    logger.addHandler(handler)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PlanishWarning)
            warnings.showwarning = lambda text, *_, **__: aloud.print(f"[yellow]note:[/yellow] {_plain(str(text))}")
            yield
    finally:
        logger.removeHandler(handler)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


@contextmanager
def _bars(aloud: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar with the time left for every stage that is reported."""
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=aloud) as shown:
        tasks: dict[str, Any] = {}

        def step(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done < shown.tasks[tasks[stage]].completed:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done, total=total)

        yield step


def _device(name: str) -> str:
    import torch  # noqa: PLC0415

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise bad("planish", "device", "auto, or a device of torch such as cpu or cuda:0", name) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise bad("planish", "device", "one that is there", name)
    return str(device)


def _decoder(model: Any) -> tuple[Any, str]:  # noqa: ANN401
    """Put the native decoder before a quantized model; return what is to be run and what it is."""
    from planish.quant import Decoder, QLinear  # noqa: PLC0415

    if not any(isinstance(module, QLinear) for module in model.modules()):
        return model, "run by transformers: a float model"
    decoder = Decoder(model)  # warns where it cannot run the model
    return decoder, str(decoder)


def _new(out: Path, name: str = "OUT") -> Path:
    """Refuse a target that is there, before the long work and not after it."""
    if out.exists():
        raise bad("planish", name, "a name that does not exist yet", str(out))
    if not os.access(out.absolute().parent, os.W_OK):
        raise bad("planish", name, "in a directory that can be written", str(out))
    return out


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Say which version this is.")] = False) -> None:
    if version:
        Console().print(__version__, highlight=False)
        raise typer.Exit


@command
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the checkpoint goes.")] = Path("demo-out"),
) -> None:
    """Quantize the embedded model, prove what it costs, and write a checkpoint with its report."""
    aloud, console = Console(stderr=True), Console()
    with aloud.status("starting torch"):
        from planish.quant import demo as show  # noqa: PLC0415
    with _bars(aloud) as progress:
        found = show.demo(out, say=lambda text: aloud.print(f"[dim]{_plain(text)}[/dim]"), progress=progress)
    console.print(_table(found.evaluations, found.runs))
    for sample in found.samples:
        console.print(f"\n[italic]{_plain(sample['prompt'])}[/italic]")
        for name, text in sample["texts"].items():
            console.print(f"  [bold]{name:<6}[/bold] {_plain(' '.join(text.split()))}", highlight=False)
    told = (
        "lossless: its interval contains zero"
        if found.evaluations[show.OURS].lossless
        else "its loss is that of the table"
    )
    console.print(f"\n{show.OURS}: {told}; intervals are of 95 %.")
    console.print(f"checkpoint {_sized(found.checkpoint)}\nreport     {found.page}", soft_wrap=True, highlight=False)


@command
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pipeline of diffusers. " + MODEL)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to be written; it must not exist yet.")],
    method: Annotated[
        str, typer.Option(help="best, smoothquant+, awq, gptq, rtn, duquant, svdquant, segquant, evol-q, nipq.")
    ] = "best",
    bits: Annotated[int, typer.Option(help="Bits of a weight.")] = 4,
    act_bits: Annotated[int | None, typer.Option(help="Bits of an activation, a token at a time.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale; if not given, 128, 64 or 32.")
    ] = None,
    data: Annotated[str, typer.Option(help="A text file, or auto: Python's own language reference.")] = "auto",
    tokens: Tokens = 32768,
    eval_tokens: Annotated[int, typer.Option(min=0, help="Tokens of other text to be judged on; 0 for none.")] = 8192,
    window: Window = 512,
    layout: Annotated[str, typer.Option(help="auto, compressed-tensors or planish.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on where an interrupted run stopped.")] = True,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    images: Annotated[int, typer.Option(min=1, help="A pipeline: pictures to calibrate on.")] = 16,
    steps: Annotated[int | None, typer.Option(min=1, help="A pipeline: steps of its sampler.")] = None,
) -> None:
    """Quantize a model to a new directory, with a report beside it; killed, it goes on."""
    aloud, console = Console(stderr=True), Console()
    _new(out)
    if (Path(model).expanduser() / "model_index.json").is_file():
        from planish.plugins import pipeline_job  # noqa: PLC0415

        task = pipeline_job.PipelineJob(Path(model).expanduser(), model, out, method, bits, group_size, act_bits,
                                        images, steps, not resume, _device(device), dtype)  # fmt: skip
        with _bars(aloud) as progress:
            told = pipeline_job.run(task, say=lambda text: aloud.print(f"[dim]{_plain(text)}[/dim]"), progress=progress)
        console.print(str(told), markup=False, highlight=False, soft_wrap=True)
        return
    with aloud.status("opening the model (a GGUF file is expanded once, which takes about a minute)"):
        from planish.quant import jobs, sources  # noqa: PLC0415

        source, where = sources.resolve(model), _device(device)
    text = None if data == "auto" else Path(data)
    job = jobs.Job(source, model, out, method, bits, group_size, text, tokens, eval_tokens, window, layout, not resume,
                   where, dtype, act_bits)  # fmt: skip
    with _bars(aloud) as progress:
        done = jobs.run(job, say=lambda text: aloud.print(f"[dim]{_plain(text)}[/dim]"), progress=progress)
    console.print(done.report, markup=False, highlight=False)
    if done.evaluations:
        console.print(_table(done.evaluations, {}))
    console.print(f"checkpoint {_sized(out)}, {done.layout}\nreport     {done.page}", soft_wrap=True, highlight=False)


@command
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="The float original to compare with.")] = None,
    data: Annotated[str, typer.Option(help="A text file, or auto: docstrings of Python's library.")] = "auto",
    tokens: Tokens = 8192,
    window: Window = 512,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Judge a model on text: perplexity, and against its float original, with confidence intervals."""
    aloud, console = Console(stderr=True), Console(soft_wrap=True)
    with aloud.status("opening the model"):
        import planish  # noqa: PLC0415
        from planish.quant import sources, texts  # noqa: PLC0415

        where = _device(device)
        text = texts.library_text() if data == "auto" else texts.read_text(Path(data))
        source = sources.resolve(model)
        tokenizer = sources.open_tokenizer(source)
        judged, path = _decoder(sources.open_model(source, device=where))
        base = None if against is None else sources.open_model(sources.resolve(against), device=where)
        most = getattr(judged.config, "max_position_embeddings", None) or window
        windows, _ = texts.pick(texts.cut(tokenizer, text, length=min(window, most)), tokens)
    aloud.print(f"[dim]judging on {texts.count(windows):,} tokens of {_plain(text.name)}; {_plain(path)}[/dim]")
    with _bars(aloud) as progress:
        found = planish.evaluate(judged, [{"input_ids": w} for w in windows], base, progress=progress)
    said = json.dumps(found.to_json(), indent=1) if as_json else str(found)
    console.print(said, markup=False, highlight=False)


@command
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The beginning of the text.")] = "The capital of France is",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt as a question to a chat model.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 64,
    device: Device = "auto",
) -> None:
    """Let a model continue a text, word by word as they come."""
    aloud, console = Console(stderr=True), Console(soft_wrap=True)
    with aloud.status("opening the model"):
        from planish.quant import generation, sources  # noqa: PLC0415

        where, source = _device(device), sources.resolve(model)
        tokenizer = sources.open_tokenizer(source)
        opened, path = _decoder(sources.open_model(source, device=where))
    aloud.print(f"[dim]{_plain(path)}[/dim]")
    asked = generation.as_chat(tokenizer, prompt) if chat else prompt
    if not chat:
        console.print(prompt, end="", markup=False, highlight=False)
    words = generation.Words(tokenizer, lambda text: console.print(text, end="", markup=False, highlight=False))
    generation.complete(opened, tokenizer, asked, tokens=tokens, streamer=words)
    console.print()


@command
def serve(
    model: Model,
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ENGINE ARGS]", help="After --: the engine's own arguments.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto (vLLM where it is installed), vllm or transformers.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    at_load: Annotated[bool, typer.Option("--at-load", help="Round a float model while it is read; vLLM.")] = False,
    group_size: Annotated[int | None, typer.Option(help="With --at-load: inputs that share a scale.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest request in tokens; vLLM.")] = None,
) -> None:
    """Serve a model: an OpenAI-compatible endpoint, by vLLM or transformers, with our layers in it."""
    aloud = Console(stderr=True, soft_wrap=True)
    with aloud.status("finding the model"):
        from planish.plugins.serve import plan  # noqa: PLC0415
        from planish.quant import sources  # noqa: PLC0415

        launch = plan(
            sources.resolve(model),
            model,
            engine=engine,
            host=host,
            port=port,
            at_load=at_load,
            group_size=group_size,
            dtype=dtype,
            max_model_len=max_model_len,
            extra=extra or (),
        )
    aloud.print(f"[dim]starting {launch.engine} on {host}:{port}[/dim]", highlight=False)
    launch.run()


@command
def export(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A quantized checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What to write; it must not exist yet.")],
    layout: Annotated[str, typer.Option(help="compressed-tensors, awq, gptq, gguf or planish.")],
    allow_rounding: Annotated[bool, typer.Option(help="gguf: let offsets be rounded to half precision.")] = False,
) -> None:
    """Write a checkpoint in another layout without quantizing again; what would lose anything is refused."""
    _new(out)
    with Console(stderr=True).status("writing"):
        from planish.quant import export as transcode  # noqa: PLC0415

        found = transcode(path, out, layout, allow_rounding=allow_rounding)
    change = "bit for bit the same weights" if not found["largest_change"] else "rounded offsets"
    Console(soft_wrap=True).print(f"{out}: {layout}, {change}", markup=False, highlight=False)


@command
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what is in a checkpoint, after checking every byte of it."""
    console = Console(soft_wrap=True)
    with Console(stderr=True).status("reading"):
        from planish.quant import inspect as look  # noqa: PLC0415

        found = look(path)
    if as_json:
        console.print(json.dumps(found, indent=1), markup=False, highlight=False)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in found.items():
        table.add_row(key.replace("_", " "), _plain(_said(key, value)))
    console.print(table)


def _said(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{count} x {what}" for what, count in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value / 1e6:,.1f} MB" if "bytes" in key and isinstance(value, int) else f"{value}"


def _sized(checkpoint: Path) -> str:
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return f"{checkpoint}: {size / 1e6:,.1f} MB"


def _table(evaluations: Mapping[str, Any], runs: Mapping[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for name in evaluations:
        table.add_column("float" if name == "base" else name, justify="right")

    def row(label: str, show: Callable[[str, Any], str]) -> None:
        table.add_row(label, *(show(name, entry) for name, entry in evaluations.items()))

    def figure(part: Any, form: str) -> str:  # noqa: ANN401
        if part is None:
            return "-"
        return f"{part.value:{form}}" + (
            f"\n[dim]{part.low:{form}} to {part.high:{form}}[/dim]" if part.low == part.low else ""
        )

    def paired(key: str, form: str) -> Callable[[str, Any], str]:
        return lambda name, entry: "-" if name == "base" else figure(getattr(entry, key), form)

    row("perplexity", lambda _, e: figure(e.perplexity, ".2f"))
    row("loss, nats/token", paired("difference", "+.3f"))
    row("KL, nats/token", paired("kl", ".3f"))
    row("same top token", paired("agreement", ".3f"))
    row("smooth ECE", lambda _, e: "-" if e.smooth_ece is None else f"{e.smooth_ece:.4f}")
    row("if calibrated", lambda _, e: "-" if e.calibration is None else f"{e.calibration.floor:.4f}")
    row("in memory, MB", lambda _, e: f"{e.bytes / 1e6:.1f}")
    row("tokens/s read", lambda _, e: f"{e.tokens_per_second:.0f}")
    if runs:
        row("quantized in, s", lambda name, _: f"{runs[name].seconds:.1f}" if name in runs else "-")
        row("peak memory, GB", lambda name, _: f"{runs[name].peak_bytes / 1e9:.2f}" if name in runs else "-")
    return table


def main() -> None:
    """Run the command line."""
    keep_memory()
    app()


if __name__ == "__main__":
    main()
