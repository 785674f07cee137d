"""What cuts and two-sided activations gain: SegQuant piece by piece, on activations, layers and whole denoisers.

Activations: values behind SiLU and GELU into a random layer, one scale a tensor, in every form. Layers: the adaptive
norms of the trained transformer, weights alone. Denoisers: the digits' transformer and U-Net, weights and activations
of one scale a tensor (or a row and a token), the float model's pictures of the same seeds as the reference. Every
finished subject is kept in the cache: a run that was stopped goes on.
"""

import copy
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import digits
from benchmarks.data import cache_dir
from benchmarks.harness import Row, write_json
from planish.quant import quantize, segquant
from planish.quant.act_formats import Dual, Static
from planish.quant.formats import Affine
from planish.quant.parts import quantized_layers

VERSION = 2
PICTURES, SEEDS, CALIBRATED = 50, (0, 1, 2), 20
NONE: dict[str, Any] = {"patterns": (), "sides": "off"}
PIECES: dict[str, dict[str, Any]] = {
    "base": NONE,
    "cuts": {"sides": "off"},
    "two sides": {"patterns": (), "sides": "signed"},
    "both, as published": {"sides": "signed", "shared": False},
    "zero points, cuts": {"sides": "asymmetric"},
    "two unsigned sides": {"patterns": ()},
    "segquant": {},
}
CONFIGS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "transformer, W8A8, a scale a tensor": ("dit", {}, tuple(PIECES)),
    "transformer, W4A8, a scale a tensor": ("dit", {"bits": 4, "granularity": "tensor"}, ("base", "segquant")),
    "transformer, W4A8, a scale a row and a token": ("dit", {"bits": 4}, ("base", "segquant")),
    "U-Net, W8A8, a scale a tensor, to nearest, convolutions too": (
        "unet", {"calibrator": "amax", "convolutions": True}, ("base", "segquant"),
    ),
}  # fmt: skip


def rows(
    quick: bool, *, against: tuple[str, ...] | None = None, only: tuple[str, ...] | None = None,
    models: tuple[str, ...] | None = None, fresh: bool = False, skipped: dict[str, str] | None = None,
    **_: Any,  # noqa: ANN401
) -> Iterator[Row]:  # fmt: skip
    """Yield the rows of the three kinds; `models` chooses configurations of denoisers by a part of the name."""
    yield from activations(quick)
    if quick:
        return
    yield from layers()
    for case, (name, common, pieces) in CONFIGS.items():
        if models is None or any(m in case for m in models):
            wanted = tuple(p for p in pieces if only is None or p in only)
            yield from _denoisers(case, name, common, wanted, fresh=fresh)


def activations(quick: bool) -> Iterator[Row]:
    """Yield the errors of every form, relative to one symmetric scale a tensor, in the output and in the negatives."""
    for name, act in (("SiLU", F.silu), ("GELU", F.gelu)):
        for sigma in (1.0,) if quick else (1.0, 2.0):
            for bits in (8, 4):
                g = torch.Generator().manual_seed(0)
                x = act(sigma * torch.randn(4096, 256, generator=g, dtype=torch.float64))
                weight = torch.randn(128, 256, generator=g, dtype=torch.float64) / 16
                case = f"{name}, sigma {sigma:g}, {bits} bits"
                errors = {how: _errors(q - x, x, weight) for how, q in forms(x, bits).items()}
                for how, (negative, output) in errors.items():
                    base = errors["symmetric"]
                    yield Row(case, how, "output MSE", output / base[1], "x", "symmetric")
                    yield Row(case, how, "MSE of negatives", negative / base[0], "x", "symmetric")


def forms(x: Tensor, bits: int) -> dict[str, Tensor]:
    """Return an activation as each form codes it, one range a tensor."""
    low, high = x.min().item(), x.max().item()
    plain, affine = (Affine(bits, None, symmetric, scale_dtype="float64") for symmetric in (True, False))
    last = 2 ** (bits - 1) - 1  # the published step is max / last, ours max / (last + 1/2)
    return {
        "symmetric": Static(plain, 0.0, max(high, -low) * (last + 0.5) / last).fake(x),
        "symmetric, half a step wider": Static(plain, low, high).fake(x),
        "two signed scales": Static(Dual(bits), low, high).fake(x),
        "zero point": Static(affine, low, high).fake(x),
        "shifted, unsigned": Static(affine, 0.0, high - low).fake(x - low) + low,
        "two unsigned scales": Static(Dual(bits, unsigned=True), low, high).fake(x),
    }


def _errors(gap: Tensor, x: Tensor, weight: Tensor) -> tuple[float, float]:
    return gap[x < 0].square().mean().item(), (gap @ weight.T).square().mean().item()


def layers() -> Iterator[Row]:
    """Yield how much of the weights' Frobenius error a cut takes away from the trained adaptive norms."""
    model = digits.denoiser("dit")
    for bits in (8, 4):
        grid = Affine(bits, None, True, scale_dtype="float32", per_tensor=True)
        for number, block in enumerate(model.transformer_blocks):
            weight = block.norm1.linear.weight.detach()
            whole = (grid.fake(weight) - weight).norm()
            cut = torch.cat([grid.fake(part) - part for part in weight.chunk(6)]).norm()
            value = (cut / whole).item()
            yield Row(f"adaptive norms, W{bits}", f"block {number}", "Frobenius error when cut", value, "x", "whole")


def _denoisers(case: str, name: str, common: dict[str, Any], pieces: tuple[str, ...], *, fresh: bool) -> Iterator[Row]:
    found = {piece: _measured(case, name, common, piece, fresh=fresh) for piece in pieces}
    base = found.get("base")
    for piece, score in found.items():
        psnr = score["psnr"]
        mean, spread = _interval(psnr)
        yield Row(case, piece, "PSNR", mean, "dB", low=mean - spread, high=mean + spread)
        if base is not None and piece != "base":
            mean, spread = _interval([a - b for a, b in zip(psnr, base["psnr"], strict=True)])
            yield Row(case, piece, "PSNR gain", mean, "dB", "base", low=mean - spread, high=mean + spread)
        for metric, unit in (("accuracy", "share"), ("frechet", ""), ("cut layers", ""), ("two-sided layers", ""),
                             ("bytes", "MB"), ("quantizing", "s")):  # fmt: skip
            yield Row(case, piece, metric, score[metric], unit)


def _interval(values: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and half of its 95 % interval (Student, two degrees of freedom)."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, 4.303 * math.sqrt(variance / len(values))


def _measured(case: str, name: str, common: dict[str, Any], piece: str, *, fresh: bool) -> dict[str, Any]:
    """Quantize and judge one subject, or read what an earlier run found."""
    slug = "".join(c if c.isalnum() else "-" for c in f"{case}--{piece}".lower())
    path = cache_dir() / "segments" / f"{VERSION}-{slug}.json"
    if path.is_file() and not fresh:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    model = digits.denoiser(name)
    calls = digits.record(model, n=CALIBRATED)
    reference = [_drawn(name, model, seed) for seed in SEEDS]
    small = copy.deepcopy(model)
    began = time.process_time()
    report = quantize(small, calls, segquant(**common, **PIECES[piece]))
    seconds = time.process_time() - began
    pictures = [digits.draw(small, seed=seed, n=PICTURES) for seed in SEEDS]
    notes = [note for block in report.blocks for note in block.notes.values()]
    every = digits.scores(torch.cat(pictures), torch.cat(reference))
    made = {
        "psnr": [digits.psnr(p, r) for p, r in zip(pictures, reference, strict=True)],
        "accuracy": every.accuracy,
        "frechet": every.frechet,
        "cut layers": sum(note["cut"] is not None for note in notes),
        "two-sided layers": sum(_two_sided(layer) for layer in quantized_layers(small).values()),
        "bytes": report.bytes_after / 1e6,
        "quantizing": seconds,
    }
    write_json(path, made)
    return made


def _two_sided(layer: torch.nn.Module) -> bool:
    grids = [getattr(getattr(m, "act", None), "grid", getattr(m, "act", None)) for m in layer.modules()]
    return any(isinstance(g, Dual) or (isinstance(g, Affine) and not g.symmetric) for g in grids)


_references: dict[tuple[str, int], Tensor] = {}


def _drawn(name: str, model: torch.nn.Module, seed: int) -> Tensor:
    """Return the float model's pictures, drawn once."""
    if (name, seed) not in _references:
        _references[name, seed] = digits.draw(model, seed=seed, n=PICTURES)
    return _references[name, seed]
