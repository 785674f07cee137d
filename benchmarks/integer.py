"""Ops of integer activations against PyTorch on the same machine: W4A8 products, encoding and rotation.

Subjects take turns, round after round, in one process; a product's weights are many copies of one shape, more than the
last cache holds, and each call takes the next. The floors are measured in the same run: the bytes of the packed weight
over the speed of a plain read for one row, and oneDNN's product of int8 matrices, which knows neither groups nor scales
nor 4 bits, for many rows.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.harness import Row, cores
from planish import kernels
from planish.kernels import ops

SIZE, GROUP = 4096, 128
TOUCHED = 256 << 20  # bytes of weights in turn, far more than the last cache
Subject = Callable[[int], object]


def _times(subjects: dict[str, Subject], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    turn = itertools.count()  # no two calls in a row use the same weights: one would find them in the cache
    for _ in range(rounds):
        for name, run in subjects.items():
            run(next(turn))  # untimed: PyTorch's threads spin for a while and would hold a core that the next one wants
            n = next(turn)
            start = time.perf_counter()
            run(n)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _compared(case: str, subjects: dict[str, Subject], rounds: int, ours: str) -> Iterator[Row]:
    seconds = _times(subjects, rounds)
    for name, values in seconds.items():
        scaled = [1e3 * value for value in values]
        yield Row(case, name, "median time", median(scaled), "ms", None, min(scaled), max(scaled), "[least, most]")
    for name, values in seconds.items():
        if name != ours:
            ratios = [theirs / mine for theirs, mine in zip(values, seconds[ours], strict=True)]
            yield Row(case, ours, "speed", median(ratios), "times", name, min(ratios), max(ratios), "[least, most]")


def _weights(quick: bool) -> tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    copies = 2 if quick else TOUCHED // (SIZE * SIZE // 2)
    packed = [
        (
            torch.randint(-(2**31), 2**31, (SIZE, SIZE // 8), generator=g).to(torch.int32),
            (torch.rand(SIZE, SIZE // GROUP, generator=g) / 100).half(),
            torch.randint(0, 16, (SIZE, SIZE // GROUP), generator=g).to(torch.uint8),
        )
        for _ in range(copies)
    ]
    return packed, [torch.randn(SIZE, SIZE, generator=g) / 64 for _ in range(2 if quick else TOUCHED // (4 * SIZE**2))]


def _products(quick: bool, threads: int) -> Iterator[Row]:
    packed, dense = _weights(quick)
    g = torch.Generator().manual_seed(1)
    integers = torch.randint(-8, 8, (SIZE, SIZE), generator=g).to(torch.int8).T
    block = torch.ones(TOUCHED // 4, dtype=torch.float32)
    for m in (1, 16) if quick else (1, 16, 128, 512):
        x = torch.randn(m, SIZE, generator=g)
        codes, step, _ = kernels.quantize_rows(x)

        def w4a8(n: int, x: torch.Tensor = x) -> object:
            xq, x_scale, _ = kernels.quantize_rows(x)
            weight = packed[n % len(packed)]
            return kernels.qgemm(xq, x_scale, *weight, bits=4, group_size=GROUP)

        def w4a8_encoded(n: int, codes: torch.Tensor = codes, step: torch.Tensor = step) -> object:
            return kernels.qgemm(codes, step, *packed[n % len(packed)], bits=4, group_size=GROUP)

        def float32(n: int, x: torch.Tensor = x) -> object:
            return F.linear(x, dense[n % len(dense)])

        def onednn(n: int, x: torch.Tensor = x) -> object:
            return torch.ops.mkldnn._linear_pointwise(x, dense[n % len(dense)], None, "none", [], "")

        def dequantized(n: int, x: torch.Tensor = x) -> object:
            weight = ops.dequantize(*packed[n % len(packed)], bits=4, group_size=GROUP, channels=SIZE)
            return F.linear(x, weight)

        ours = "planish, encoding included"
        subjects: dict[str, Subject] = {
            ours: w4a8,
            "planish, product alone": w4a8_encoded,
            "torch float32 (BLAS)": float32,
            "torch float32 (oneDNN)": onednn,
            "dequantize, then BLAS": dequantized,
        }
        if m == 1:
            floor = "plain read of as many bytes"
            rows = packed[0][0].numel()  # words of 4 bytes: as many floats
            subjects[floor] = lambda n, rows=rows: block[n * rows % (block.numel() - rows + 1) :][:rows].sum()
        else:
            floor = "oneDNN int8 x int8, no scales"
            subjects[floor] = lambda _, codes=codes: torch._int_mm(codes, integers)
        case = (
            f"W4A8, {SIZE} x {SIZE}, groups of {GROUP}, {m} row{'s' * (m > 1)}, {threads} thread{'s' * (threads > 1)}"
        )
        yield from _compared(case, subjects, 3 if quick else {1: 25, 16: 11, 128: 5, 512: 3}[m], ours)


def _encoding(quick: bool, threads: int) -> Iterator[Row]:
    for m in (1, 16) if quick else (1, 16, 128, 512):
        x = torch.randn(m, SIZE, generator=torch.Generator().manual_seed(2))
        for name, group in (("a row", None), (f"a group of {GROUP}", GROUP)):
            options = {"bits": 8, "group_size": group, "symmetric": True, "scale_dtype": torch.float32}

            def eager(_: int, x: torch.Tensor = x, group: int | None = group) -> object:
                parts = x.view(x.shape[0], -1, group or SIZE)
                scale = (parts.abs().amax(-1, keepdim=True) / 127.5).clamp_min_(torch.finfo(torch.float32).tiny)
                return (parts / scale).round_().clamp_(-128, 127).to(torch.int8), scale

            yield from _compared(
                f"encode, {m} x {SIZE}, a scale {name}, {threads} thread{'s' * (threads > 1)}",
                {
                    "planish": lambda _, x=x, group=group: kernels.quantize_rows(x, group_size=group),
                    "definition": lambda _, x=x, o=options: ops.quantize_rows_reference(x, **o),
                    "torch eager, short": eager,
                },
                5 if quick else 25,
                "planish",
            )


def _rotation(quick: bool, threads: int) -> Iterator[Row]:
    g = torch.Generator().manual_seed(3)
    for size in (128,) if quick else (16, 128, 1024):
        blocks, index = torch.randn(SIZE // size, size, size, generator=g), torch.randperm(SIZE, generator=g)
        for m in (1, 16) if quick else (1, 16, 128, 512):
            x = torch.randn(m, SIZE, generator=g)

            def bmm(_: int, x: torch.Tensor = x, blocks: torch.Tensor = blocks, index: torch.Tensor = index) -> object:
                parts = x[:, index].view(x.shape[0], *blocks.shape[:2]).transpose(0, 1)
                return torch.bmm(parts, blocks).transpose(0, 1).reshape(x.shape)

            yield from _compared(
                f"rotate, {m} x {SIZE}, blocks of {size}, {threads} thread{'s' * (threads > 1)}",
                {
                    "planish": lambda _, x=x, b=blocks, i=index: kernels.rotate(x, b, i),
                    "definition": lambda _, x=x, b=blocks, i=index: ops.rotate_reference(x, b, i),
                    "torch bmm": bmm,
                },
                5 if quick else {1: 25, 16: 15, 128: 7, 512: 5}[m],
                "planish",
            )


def rows(quick: bool, **_: object) -> Iterator[Row]:
    """Yield medians and the ratio of each subject's time to ours, on one thread and on all.

    Args:
        quick: Fewer rows and rounds, weights that stay in the cache.
        **_: What other benchmarks are asked beside this: these have neither models nor grids.
    """
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, cores()}):
            torch.set_num_threads(threads)
            for part in (_products, _encoding, _rotation):
                yield from part(quick, threads)
    finally:
        torch.set_num_threads(before)
