"""What the one-pass search for alpha saves: the published grid on the default model, against 21 passes over it.

The naive search does, for every alpha, what a script around the paper would do: take a copy of the model, run it to
see its activations, smooth and quantize it, run it again, and compare with the float model's output, which is kept. The
one-pass search carries one stream of hidden states an alpha and reads a block once; with `drop` it gives up an alpha
that has fallen far behind. All three run in one process, on the same tokens and the same kernels.
"""

import copy
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.driver import load_model
from benchmarks.harness import Row
from planish.quant import search, smoothquant_plus
from planish.quant.candidates import loss
from planish.quant.engine import Walk, process
from planish.quant.moments import measure
from planish.quant.precision import restore, round_off

GRID = tuple(i / 20 for i in range(21))
DROP = 2.0


def naive(model: torch.nn.Module, batches: list[Tensor], alpha: float, clean: list[Tensor]) -> float:
    """Smooth and quantize a copy of the model with one alpha and return its loss against the kept float output."""
    twin = copy.deepcopy(model)
    method = smoothquant_plus(alpha, group_size=64)
    walk = Walk(twin, batches)
    stream = walk.stream
    inputs = hidden = stream.start()
    for index in range(len(stream.modules)):
        block = stream.block(index, inputs)
        sites = walk.sites(block)
        inputs = measure(block, sites)
        process(block, sites, method)
        round_off(block.module, block.stored, but=frozenset(block.finished))
        hidden = list(block.run(hidden))
        restore(block.module, block.stored)
    reference = Walk(model, batches).stream  # norm and head are the float model's
    reference.start()
    return loss(reference, clean, hidden, "hidden_mse")


def float_output(model: torch.nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Return what leaves the last block of the float model."""
    stream = Walk(model, batches).stream
    hidden = stream.start()
    for index in range(len(stream.modules)):
        with stream.looking(index, hidden) as block:
            hidden = list(block.run())
    return hidden


def rows(quick: bool, *, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield the losses' largest difference, the alphas found and the ratio of times.

    Args:
        quick: Five alphas and few tokens.
        skipped: Not used: nothing here can be skipped.
    """
    del skipped
    grid = GRID[::5] if quick else GRID
    count, length = (2, 64) if quick else (4, 256)
    path = data.language_model()
    tokens = data.windows(path, count, length, evaluation=False)
    batches = list(tokens.ids.split(2))
    model = load_model(path).requires_grad_(False)
    case = f"SmolLM2-135M, 4 bits, groups of 64, {len(grid)} alphas, {count * length} tokens"
    with torch.no_grad():
        began = time.perf_counter()
        clean = float_output(model, batches)
        slow = [naive(model, batches, alpha, clean) for alpha in grid]
        spent = {"naive": time.perf_counter() - began}
        methods = [smoothquant_plus(alpha, group_size=64) for alpha in grid]
        found = {}
        for name, drop in (("one pass", None), (f"one pass, drop={DROP:g}", DROP)):
            began = time.perf_counter()
            found[name] = search(model, batches, methods, drop=drop)
            spent[name] = time.perf_counter() - began
    best = min(range(len(grid)), key=slow.__getitem__)
    yield Row(case, "naive", "alpha", grid[best], "")
    yield Row(case, "naive", "loss", slow[best], "hidden MSE")
    yield Row(case, "naive", "time", spent["naive"], "s")
    for name, choice in found.items():
        kept = [(a, b) for a, b in zip(choice.losses, slow, strict=True) if a != float("inf")]
        yield Row(case, name, "alpha", grid[choice.best], "", "naive")
        yield Row(case, name, "loss", choice.losses[choice.best], "hidden MSE", "naive")
        yield Row(case, name, "largest difference of losses", max(abs(a - b) for a, b in kept), "hidden MSE", "naive")
        yield Row(case, name, "alphas followed to the end", float(len(kept)), "")
        yield Row(case, name, "time", spent[name], "s")
        yield Row(case, name, "time", spent[name] / spent["naive"], "ratio", "naive")
