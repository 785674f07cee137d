"""What a smooth unit takes beside GELU and PReLU: forward and backward of one tensor.

Subjects take turns in one process, with memory that is kept, on one thread, and some of them on two; a slope is trained
and its gradient counted where there is one.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row
from planish.nn import sau
from planish.nn.profiles import PROFILES
from planish.nn.smoothed import SmoothedLeakyReLU

OF_TWO = (
    "SAU gaussian",
    "SAU gaussian, width trained",
    "SAU gaussian, both for 64 channels, last",
    "SAU gaussian, both for 64 channels, first",
)


def _naive(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    t = x / s
    return a * x + (1 - a) * s * (
        t * 0.5 * (1 + torch.erf(t / math.sqrt(2))) + torch.exp(-t * t / 2) / 2.5066282746310002
    )


def rows(quick: bool, *, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield times of forward and backward, and their ratios to GELU's.

    Args:
        quick: One small tensor, few turns, nothing compiled.
        skipped: Takes what could not run, and why.
    """
    skipped = {} if skipped is None else skipped
    before = torch.get_num_threads()
    a, s = torch.tensor([0.15], requires_grad=True), torch.tensor([0.5])
    width = torch.tensor([0.5], requires_grad=True)
    slopes, widths = torch.full((64,), 0.15, requires_grad=True), torch.full((64,), 0.5, requires_grad=True)
    trained = (a, width, slopes, widths)
    subjects: dict[str, Callable[[Tensor], Tensor]] = {
        "GELU": F.gelu,
        "Leaky ReLU": lambda x: F.leaky_relu(x, 0.15),
        "PReLU": lambda x: F.prelu(x, a),
        "Softplus": F.softplus,
        "Mish": F.mish,
        "SAU, written out": lambda x: _naive(x, a, s),
        "SAU gaussian, by operations of torch": lambda x: SmoothedLeakyReLU.apply(x, a, s, "gaussian", 0),
    }
    for kernel in PROFILES:
        subjects[f"SAU {kernel}"] = lambda x, kernel=kernel: sau(x, a, s, kernel=kernel)  # type: ignore[misc]
    subjects["SAU gaussian, slope fixed"] = lambda x: sau(x, 0.15, s)
    subjects["SAU gaussian, width trained"] = lambda x: sau(x, a, width)
    subjects["SAU gaussian, both for 64 channels, last"] = lambda x: sau(x.view(-1, 64), slopes, widths).view(-1)
    subjects["SAU gaussian, both for 64 channels, first"] = lambda x: sau(x.view(2, 64, -1), slopes, widths).view(-1)
    if not quick:
        try:
            small = torch.randn(1 << 12, requires_grad=True)
            compiled = {
                "GELU, compiled": torch.compile(F.gelu, dynamic=True),
                "SAU gaussian, compiled": torch.compile(lambda x: sau(x, a, s), dynamic=True),
            }
            for f in compiled.values():
                f(small).sum().backward()
            subjects |= compiled
        except RuntimeError as error:  # no compiler on this machine
            skipped["compiled units"] = str(error).splitlines()[0]
    for threads, n in itertools.product((1, 2), (1 << 14,) if quick else (1 << 14, 1 << 17, 1 << 20, 1 << 23)):
        torch.set_num_threads(threads)
        x, g = torch.randn(n, requires_grad=True), torch.randn(n)
        here = {k: f for k, f in subjects.items() if threads == 1 or k in ("GELU", "PReLU") or k in OF_TWO}
        spent: dict[str, list[float]] = {name: [] for name in here}
        for turn in range(3 if quick else 13 if n >= 1 << 23 else 31):
            for name, f in here.items():
                for tensor in (x, *trained):
                    tensor.grad = None
                began = time.perf_counter()
                f(x).backward(g)
                if turn:  # the first warms up
                    spent[name].append(1e9 * (time.perf_counter() - began) / n)
        case = f"{n:,} numbers, forward and backward" + (", two threads" if threads == 2 else "")
        for name, times in spent.items():
            yield Row(case, name, "time", statistics.median(times), "ns a number", low=min(times), high=max(times))
            if name != "GELU":
                ratios = sorted(t / base for t, base in zip(times, spent["GELU"], strict=True))
                yield Row(case, name, "time", statistics.median(ratios), "ratio", "GELU", ratios[0], ratios[-1])
    torch.set_num_threads(before)
