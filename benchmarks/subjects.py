"""Who competes, how each is run in a process of its own, and the cache of what such a run gave."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import data
from benchmarks.harness import REUSE_MEMORY, ROOT, cores, write_json

logger = logging.getLogger("benchmarks")


@dataclass(frozen=True)
class Case:
    """One grid on one model: `group_size` None is one group a row; `name` is what the rows call it."""

    model: str
    bits: int
    group_size: int | None

    @property
    def name(self) -> str:
        """Say the case in words."""
        return f"{self.model}, {self.bits} bits, {f'groups of {self.group_size}' if self.group_size else 'per channel'}"


@dataclass(frozen=True)
class Subject:
    """A method of one driver.

    Attributes:
        driver: Module that `python -m` runs.
        method: The driver's `--method`.
        ours: Whether planish's own interpreter runs it (else the rivals').
        symmetric: Which integer grid it is asked for.
        iters: Training iterations, where the driver trains.
        ragged: Whether it can split a row that its groups do not divide.
        encoders: Whether it can quantize a model without a causal head.
    """

    driver: str
    method: str
    ours: bool = False
    symmetric: bool = False
    iters: int = 0
    ragged: bool = False
    encoders: bool = True


def _ours(method: str) -> Subject:
    return Subject("benchmarks.ours", method, ours=True, ragged=True)


SUBJECTS: Mapping[str, Subject] = {
    "rtn": _ours("rtn"),
    "best": _ours("best"),
    "gptq (ours)": _ours("gptq"),
    "hqq": Subject("benchmarks.rivals.hqq", "hqq"),
    "llm-compressor gptq": Subject("benchmarks.rivals.llmcompressor", "gptq"),
    "smoothquant+": _ours("smoothquant_plus"),
    "smoothquant+ by layer": _ours("smoothquant_plus_layer"),
    "awq (ours)": _ours("awq"),
    "llm-compressor awq": Subject("benchmarks.rivals.llmcompressor", "awq", encoders=False),
    "auto-round opt-rtn symmetric": Subject("benchmarks.rivals.autoround", "rtn", symmetric=True),
    "auto-round rtn": Subject("benchmarks.rivals.autoround", "rtn"),
    "auto-round neuqi": Subject("benchmarks.rivals.autoround", "neuqi"),
    "auto-round 20 iterations": Subject("benchmarks.rivals.autoround", "train", iters=20),
}

NOTES: Mapping[str, str] = {
    "hqq": "hqq keeps a float zero point (or a scale and a zero of 16 bits each); all others an integer one.",
    "auto-round opt-rtn symmetric": "auto-round searches at 0 iterations only on the symmetric grid.",
}


def chosen(against: tuple[str, ...] | None, only: tuple[str, ...] | None = None) -> dict[str, Subject]:
    """Return ours and the rivals whose names hold one of `against` (all for None), or just those named in `only`."""

    def keep(name: str, subject: Subject) -> bool:
        if only is not None:
            return name in only
        return subject.ours or against is None or any(part in name for part in against)

    return {name: subject for name, subject in SUBJECTS.items() if keep(name, subject)}


def interpreter(subject: Subject) -> Path | None:
    """Return the Python that runs a subject; None where the rivals' environment has not been built."""
    if subject.ours:
        return Path(sys.executable)
    path = Path(os.environ.get("PLANISH_RIVALS") or ROOT / ".venv-rivals" / "bin" / "python")
    return path if path.exists() else None


def unable(subject: Subject, case: Case, widths: set[int], *, encoder: bool) -> str | None:
    """Say why a subject cannot enter a case, None when it can."""
    if interpreter(subject) is None:
        return "the rivals' environment is not there; build it with `make rivals`"
    if encoder and not subject.encoders:
        return "it scales norms that only the next linears read, and a post-norm encoder has none"
    if case.group_size and any(width % case.group_size for width in widths) and not subject.ragged:
        return f"it cannot split rows of {sorted(widths)} channels in groups of {case.group_size}"
    return None


def run(
    subject: Subject, case: Case, model: Path, tokens: Path, out: Path | None, *, threads: int = 0
) -> dict[str, Any]:
    """Run a driver in a process of its own and return the line it printed.

    Raises:
        RuntimeError: The driver failed; the message ends with what it said last.
    """
    options = ["--method", subject.method, "--model", model, "--tokens", tokens, "--bits", case.bits]
    options += ["--group-size", case.group_size or 0, "--iters", subject.iters, "--threads", threads]
    options += ["--symmetric"] if subject.symmetric else []
    options += ["--out", out] if out else []
    return launch(subject, options, about=case.name)


def launch(subject: Subject, options: Sequence[object], *, about: str) -> dict[str, Any]:
    """Run a subject's driver with these options in its own environment and return the line it printed.

    Raises:
        RuntimeError: The driver failed; the message ends with what it said last.
    """
    command = [str(interpreter(subject)), "-m", subject.driver, *map(str, options)]
    environment = os.environ | REUSE_MEMORY | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"run: {subject.driver} {subject.method} on {about} failed:\n{last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _sources(subject: Subject) -> str:
    """Fingerprint the code a subject's result depends on: its rooms for ours, the pins for a rival."""
    driver = ROOT / Path(*subject.driver.split(".")).with_suffix(".py")
    if subject.ours:
        import planish  # noqa: PLC0415

        package = Path(planish.__file__).parent
        rooms = [path for room in ("quant", "linalg") for path in sorted((package / room).rglob("*.py"))]
        files = [package / "_support.py", *rooms]
    else:
        files = [ROOT / "benchmarks" / name for name in ("rivals.txt", "rivals-nodeps.txt")]
    digest = sha256()
    for path in (driver, *files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def timed(subject: Subject, case: Case, model: Path, tokens: Path, take: int, *, fresh: bool) -> dict[str, Any]:
    """Run a driver once with all cores and keep its line, so that a long series of takes can be stopped and resumed."""
    what = asdict(subject) | asdict(case) | {"tokens": tokens.name, "take": take, "weights": data.fingerprint(model)}
    what |= {"sources": _sources(subject)}
    key = sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    path = data.cache_dir() / "benchmarks" / f"{key}.json"
    if not fresh and path.exists():
        return json.loads(path.read_text())["line"]
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("take %d: %s %s", take, subject.driver, subject.method)
    line = run(subject, case, model, tokens, None, threads=cores())
    write_json(path, {"what": what, "line": line})
    return line


Score = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def scored(
    subject: Subject, case: Case, model: Path, calibration: data.Windows, *, about: str, score: Score, fresh: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Quantize in a process of its own, score the dense weights, keep both results; or return what is kept.

    Args:
        subject: Who.
        case: On what grid.
        model: The float model's directory.
        calibration: The tokens it may look at.
        about: What the scores depend on beside these (the evaluation tokens' fingerprint).
        score: Dense weights -> a score per window for each metric.
        fresh: Ignore what is kept.

    Returns:
        The driver's line and the scores.
    """
    what = asdict(subject) | asdict(case) | {"calibration": calibration.fingerprint, "about": about}
    what |= {"weights": data.fingerprint(model), "sources": _sources(subject)}
    key = sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    folder = data.cache_dir() / "benchmarks"
    line_path, score_path = folder / f"{key}.json", folder / f"{key}.safetensors"
    if not fresh and line_path.exists() and score_path.exists():
        return json.loads(line_path.read_text())["line"], load_file(score_path)
    folder.mkdir(parents=True, exist_ok=True)
    tokens, weights = folder / f"{key}.tokens", folder / f"{key}.weights"
    save_file({"input_ids": calibration.ids}, tokens)
    logger.info("%s: %s %s", case.name, subject.driver, subject.method)
    try:
        line = run(subject, case, model, tokens, weights)
        scores = score(load_file(weights))
    finally:
        tokens.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)  # half a gigabyte each; the scores are what is kept
    partial = score_path.with_suffix(".partial")
    save_file(scores, partial)
    partial.replace(score_path)
    write_json(line_path, {"what": what, "line": line})
    return line, scores
