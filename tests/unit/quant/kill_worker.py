"""Quantize a model from disk again and again, killing the process at moments drawn at random; print what came of it.

Run as `python kill_worker.py HOME METHOD KILLS`. Children are forked from this process, which has everything imported
and has never computed, so that a run costs what it computes and no more.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from planish.quant import Journal, assemble, open_model, quantize, rtn
from planish.quant.methods.smoothquant_plus import smoothquant_plus

METHODS = {
    "rtn": lambda: rtn(group_size=32),
    "smooth": lambda: smoothquant_plus(0.5, group_size=32),
    "search": lambda: smoothquant_plus(group_size=32),
}


def make(home: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=199,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(home / "float")


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 199, (2, 32), generator=generator) for _ in range(3)]


def job(home: Path, method: str, name: str) -> None:
    """The whole of what a user runs, and runs again."""
    model, weights = open_model(home / "float")
    journal = Journal(home / f"{name}.journal")
    quantize(model, batches(), METHODS[method](), weights=weights, journal=journal)
    assemble(journal, model, home / name, layout="planish")


def fork(home: Path, method: str, name: str) -> tuple[int, int]:
    """Start the job; return its process and a pipe that closes when it ends and says when it has begun."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    status = 1
    try:
        os.close(read)
        os.write(write, b"!")
        job(home, method, name)
        status = 0
    except BaseException:  # what a forked child must never let out of here
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(home: Path, method: str, name: str, delay: float | None = None) -> tuple[bool, float]:
    """Run the job, killed after `delay` seconds; return whether it came to its end, and its time."""
    child, pipe = fork(home, method, name)
    os.read(pipe, 1)
    began = time.perf_counter()
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(pipe)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"{name}: the job failed")
    return os.WIFEXITED(status), time.perf_counter() - began


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def main() -> None:
    home, method, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    make(home) if not (home / "float").exists() else None
    seconds = min(run(home, method, f"whole-{method}-{i}")[1] for i in range(2))
    wanted = contents(home / f"whole-{method}-0")
    same = contents(home / f"whole-{method}-1") == wanted
    moments = random.Random(method)
    told = []
    for number in range(kills):
        name = f"{method}-{number}"
        ended, _ = run(home, method, name, moments.uniform(0, seconds))
        left = sorted(p.name for p in (home / f"{name}.journal").glob("[!.]*")) if not ended else []
        half = (home / name).exists() and contents(home / name) != wanted
        if not (home / name).exists():
            run(home, method, name)
        told.append({
            "killed": not ended, "half": half, "identical": contents(home / name) == wanted,
            "blocks": sum(n.startswith("block") and n.endswith("json") for n in left),
            "searching": any(n.startswith("search") for n in left),
        })  # fmt: skip
    sys.stdout.write(json.dumps({"seconds": seconds, "repeatable": same, "runs": told}) + "\n")


main()
