"""`python -m benchmarks.text_memory V (streamed|dense)`: what a step of Smoothie's sampler needs for V tokens.

Each measurement is a process of its own: peak resident memory over a step less what was resident before it (embeddings
and libraries), and seconds of the step.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import REUSE_MEMORY, ROOT, Row
from planish._support import release_memory
from planish.diffusion import EmbeddingSpace, SmoothieScheduler

BATCH, LENGTH, DIM = 8, 32, 64
SIZES = (1024, 4096, 16384, 65536, 262144)
DENSE = (1024, 4096, 16384, 65536)
_STATUS = Path("/proc/self/status")


def _resident(key: str) -> float:
    """Return VmRSS or VmHWM in MiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def measure(size: int, how: str) -> dict[str, float]:
    """Return MiB and seconds of one step: what the network sees, and the state after its prediction."""
    generator = torch.Generator().manual_seed(0)
    space = EmbeddingSpace(torch.randn(size, DIM, generator=generator))
    scheduler = SmoothieScheduler().set_space(space)
    scheduler.set_timesteps(10)
    ids = torch.randint(size, (BATCH, LENGTH), generator=generator)
    state = scheduler.corrupt(ids, 0.5, generator)
    prediction = space.encode(ids)
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = _resident("VmRSS"), time.perf_counter()
    if how == "dense":
        noise = torch.randn(BATCH, LENGTH, size, generator=generator)
        dense = scheduler.add_noise(scheduler.original(prediction), noise, 0.5)
        del noise
        scheduler.scale_model_input(dense, 0.5)
        scheduler.step(prediction, 0.5, dense, generator)
    else:
        scheduler.scale_model_input(state, 0.5)
        after = scheduler.step(prediction, 0.5, state, generator).prev_sample
        scheduler.scale_model_input(after, 0.4)
    space.nearest(prediction)
    return {"seconds": time.perf_counter() - began, "mib": _resident("VmHWM") - before}


def memory_rows(quick: bool) -> Iterator[Row]:
    """Yield peak memory and time of a step against the size of the vocabulary."""
    plain = {k: v for k, v in os.environ.items() if k not in REUSE_MEMORY}  # freed memory is given back and so counted
    for size in SIZES[:3] if quick else SIZES:
        case = f"One step of sampling, {size} tokens, {BATCH} x {LENGTH} positions, {DIM} features"
        for how in ("streamed", "dense"):
            if how == "dense" and size not in DENSE:
                continue
            command = [sys.executable, "-m", "benchmarks.text_memory", str(size), how]
            run = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
            found = json.loads(run.stdout)
            yield Row(case, how, "memory above the embeddings", found["mib"], "MiB")
            yield Row(case, how, "time", found["seconds"], "s")


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), sys.argv[2])))
