"""Caching a denoiser's features: schedules, corrections, bits, and other caches, on the digits' trained denoisers.

Pictures of ten classes, guided, by DDIM in 40 steps; three seeds. The error is that to the float model's pictures of
the same seeds without a cache; the Frechet distance and the accuracy are those of a network that nothing looked at.
Schedules and corrections are fitted on 32 other pictures. Every piece is kept in the cache as soon as it is done.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import data, digits
from benchmarks.harness import ROOT, Row
from benchmarks.pieces import interval, kept
from planish.diffusion import CachePlan, apply_cache, fit_cache, multiply_adds, remove_cache
from planish.quant import Affine, quantize, rtn, svdquant

logger = logging.getLogger("planish.benchmarks")
STEPS, SAMPLES, FITTED_ON, SEEDS = 40, 100, 32, 3
PICTURE = ROOT / "docs" / "papers" / "cachequant.png"
BITS = {
    "float": None,
    "W4A8": replace(rtn(bits=4, group_size=None), act=Affine(8, group_size=None)),
    "W4A4": replace(rtn(bits=4, group_size=64), act=Affine(4, group_size=64)),
    "W4A4 SVDQuant": svdquant(),
}
VALIDATED = "DPS, as validated"
ASKED: dict[str, Any] = {"validate": False}
PLAIN: dict[str, Any] = {"correction": None, "extrapolate": False, **ASKED}
OURS: dict[str, dict[str, Any]] = {
    "uniform": {"schedule": "uniform", **PLAIN},
    "uniform, corrected as published": {"schedule": "uniform", "extrapolate": False, **ASKED},
    "DPS": PLAIN,
    "DPS, corrected as published": {"extrapolate": False, **ASKED},
    "DPS, carried on": {"correction": None, **ASKED},
    "DPS, carried on and corrected": ASKED,
    VALIDATED: {},
}
KEPT = {"held still": "DPS", "carried on": "DPS, carried on", "corrected": "DPS, carried on and corrected"}
"""What validation may decide for, and the subject that it then is."""
FEW = ("uniform", "DPS", "DPS, carried on and corrected", VALIDATED)
CASES = [  # denoiser, bits, interval, subjects
    *(("dit", bits, 5, tuple(OURS)) for bits in ("float", "W4A8", "W4A4")),
    ("dit", "W4A4 SVDQuant", 5, FEW),
    *(("dit", bits, 10, FEW) for bits in ("float", "W4A4")),
    ("dit", "W4A4", 3, FEW),
    ("unet", "float", 5, FEW),
]


@cache
def model(name: str, bits: str) -> nn.Module:
    """Return a trained denoiser, quantized to order."""
    found = digits.denoiser(name)
    method = BITS[bits]
    if method is not None:
        quantize(found, digits.record(found, n=20)[::2], method)
    return found


def draw(name: str, bits: str, seed: int, n: int) -> Tensor:
    return digits.draw(model(name, bits), seed=seed, n=n, steps=STEPS)


@cache
def plan(name: str, bits: str, n: int, subject: str) -> CachePlan:
    """Fit a cache; of a quantized model by its own features, towards the float model's where it is corrected."""
    return fit_cache(model(name, bits), lambda: draw(name, bits, 1000, FITTED_ON), n, **OURS[subject])


@contextmanager
def ours(name: str, bits: str, n: int, subject: str) -> Iterator[None]:
    apply_cache(model(name, bits), plan(name, bits, n, subject))
    try:
        yield
    finally:
        remove_cache(model(name, bits))


class _Counter:
    """Counts the calls in which a transformer's last block computes."""

    def __init__(self, net: nn.Module) -> None:
        self.count = 0
        last: Any = net
        self.handle = last.transformer_blocks[-1].attn1.register_forward_hook(self)

    def __call__(self, *_: object) -> None:
        self.count += 1


@contextmanager
def first_block(name: str, bits: str, n: int, subject: str) -> Iterator[None]:
    """Diffusers' first-block cache, its threshold such that as many calls run in full as in our schedule."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache  # noqa: PLC0415
    from diffusers.hooks import hooks as machinery  # noqa: PLC0415

    net = model(name, bits)

    registry = machinery.HookRegistry.check_if_exists_or_initialize(net)
    calls = 0

    def begin(*_: object) -> None:
        nonlocal calls
        if calls % STEPS == 0:  # a run starts clean
            registry.reset_stateful_hooks(recurse=True)
            machinery._set_cache_context(net, machinery.CacheContext("run"))
        calls += 1

    def on(threshold: float) -> None:
        nonlocal calls
        calls = 0
        apply_first_block_cache(net, FirstBlockCacheConfig(threshold))
        registry.invalidate_child_registries_cache()

    def off() -> None:
        registry.remove_hook("fbc_leader_block_hook", recurse=True)
        registry.remove_hook("fbc_block_hook", recurse=True)
        registry.invalidate_child_registries_cache()

    watching = net.register_forward_pre_hook(begin)
    low, high = 0.0, 1.0
    for _ in range(7):
        middle, counter = (low + high) / 2, _Counter(net)
        on(middle)
        draw(name, bits, 1000, 8)
        off()
        counter.handle.remove()
        low, high = (middle, high) if counter.count > STEPS // n else (low, middle)
    on(high)
    try:
        yield
    finally:
        off()
        watching.remove()


RIVALS: dict[str, Callable[..., AbstractContextManager[None]]] = {
    "first-block cache of diffusers": first_block,
}


@dataclass(frozen=True)
class Setting:
    """One cache on one model."""

    name: str
    bits: str
    n: int
    subject: str

    def context(self) -> AbstractContextManager[None]:
        """Return what puts the cache on, and takes it off."""
        return RIVALS.get(self.subject, ours)(self.name, self.bits, self.n, self.subject)

    def pieces(self, seeds: int, samples: int, *, fresh: bool) -> list[dict[str, float]]:
        """Return what each seed's pictures are worth, and what they took."""
        if self.subject == VALIDATED:
            return replace(self, subject=self.decision(fresh=fresh)).pieces(seeds, samples, fresh=fresh)
        stem = f"v1 {self} {STEPS} {samples} {_weights(self.name)}"

        def make() -> list[dict[str, float]]:
            logger.info("%s", self)
            with self.context():
                net, found = model(self.name, self.bits), []
                macs = multiply_adds(net, lambda: draw(self.name, self.bits, 0, 2))
                for seed in range(seeds):
                    began = time.process_time()
                    pictures = draw(self.name, self.bits, seed, samples)
                    seconds = time.process_time() - began
                    found.append({"seconds": seconds, "macs": macs, **_scores(self.name, pictures, seed)})
            return found

        found: list[dict[str, float]] = kept("caching", f"{stem} {seeds}", make, fresh=fresh)
        return found

    def decision(self, *, fresh: bool) -> str:
        """Return the subject that validation decides for: its pictures are the same, bit for bit."""

        def make() -> str:
            logger.info("%s", self)
            return KEPT[plan(self.name, self.bits, self.n, VALIDATED).made_for["kept"]]

        key = f"v1 {self} {STEPS} {FITTED_ON} {_weights(self.name)}"
        found: str = kept("caching", key, make, fresh=fresh)
        return found


def _weights(name: str) -> str:
    return (data.cache_dir() / f"digits-{name}" / "fingerprint").read_text()


@cache
def _float(name: str, seed: int, samples: int) -> Tensor:
    return digits.draw(digits.denoiser(name), seed=seed, n=samples, steps=STEPS)


def _scores(name: str, pictures: Tensor, seed: int) -> dict[str, float]:
    true = _float(name, seed, len(pictures))
    found = digits.scores(pictures, true)
    error = float((pictures.clamp(-1, 1) - true.clamp(-1, 1)).double().square().mean())
    return {"psnr": found.psnr, "accuracy": found.accuracy, "frechet": found.frechet, "error": error}


def rows(quick: bool, *, fresh: bool = False, skipped: dict[str, str], **_: object) -> Iterator[Row]:
    """Yield errors, distances and costs of every setting; draw the picture of a full run.

    Args:
        quick: Few pictures, one seed, the float transformer alone.
        fresh: Measure again what the cache holds.
        skipped: Filled with what could not run, and why.
        **_: What other benchmarks are asked beside this.
    """
    torch.set_num_threads(1)
    seeds, samples = (1, 20) if quick else (SEEDS, SAMPLES)
    skipped["DeepCache"] = "takes UNet2DConditionModel alone; on the U-Net here its rule is the row `uniform`"
    skipped["cache-dit"] = (
        "puts one module in the place of all blocks, while this transformer reads the norm of its first"
    )
    pool: dict[str, list[dict[str, float]]] = {}
    for name, bits, n, subjects in CASES[: 1 if quick else None]:
        case = f"{'transformer' if name == 'dit' else 'U-Net'}, {bits}, one call in {n} in full"
        whole = Setting(name, "float", 1, "DPS").pieces(seeds, samples, fresh=fresh)
        alone = Setting(name, bits, 1, "DPS").pieces(seeds, samples, fresh=fresh)
        found = {"no cache": alone}
        for subject in subjects:
            found[subject] = Setting(name, bits, n, subject).pieces(seeds, samples, fresh=fresh)
        for rival in RIVALS if (name, bits, n) == ("dit", "float", 5) else ():
            try:
                found[rival] = Setting(name, bits, n, rival).pieces(seeds, samples, fresh=fresh)
            except Exception as error:  # somebody else's program
                skipped[rival] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            model.cache_clear()  # rivals may leave something behind
        yield from _table(case, found, whole, exact=bits == "float")
        if name == "dit":
            own = {k: v for k, v in found.items() if (bits, k) != ("float", "no cache")}
            pool |= {f"{bits}, {'no cache' if k == 'no cache' else f'one call in {n}, {k}'}": v for k, v in own.items()}
        if bits != "float":
            for subject in ("DPS", "DPS, carried on and corrected"):
                cached = Setting(name, "float", n, subject).pieces(seeds, samples, fresh=fresh)
                share = [j["error"] / (c["error"] + q["error"])
                         for j, c, q in zip(found[subject], cached, alone, strict=True)]  # fmt: skip
                yield Row(case, subject, "error together", interval(share)[0], "ratio", "the sum of both alone",
                          *interval(share)[1:])  # fmt: skip
    if not quick:
        for bits in ("W4A4", "W4A4 SVDQuant"):
            yield from _quickest(
                pool, f"{bits}, no cache", Setting("dit", "float", 1, "DPS").pieces(seeds, samples, fresh=False)
            )
        _picture(samples)


def _quickest(pool: dict[str, list[dict[str, float]]], alone: str, whole: list[dict[str, float]]) -> Iterator[Row]:
    """Yield the setting that takes least time among those within 1 dB of a quantized model without a cache."""

    def mean(pieces: list[dict[str, float]], key: str) -> float:
        return sum(p[key] for p in pieces) / len(pieces)

    least = mean(pool[alone], "psnr") - 1
    good = {name: pieces for name, pieces in pool.items() if mean(pieces, "psnr") >= least}
    name = min(good, key=lambda name: mean(good[name], "seconds"))
    case = f"transformer, the quickest within 1 dB of {alone}"
    for subject in dict.fromkeys((alone, name)):
        yield Row(case, subject, "PSNR to float", mean(pool[subject], "psnr"), "dB")
        faster = [w["seconds"] / p["seconds"] for w, p in zip(whole, pool[subject], strict=True)]
        yield Row(case, subject, "times faster than float", interval(faster)[0], "", None, *interval(faster)[1:])


def _table(
    case: str, found: dict[str, list[dict[str, float]]], whole: list[dict[str, float]], *, exact: bool
) -> Iterator[Row]:
    first = "uniform"
    for subject, pieces in found.items():
        columns = zip(*([p[key] for p in pieces] for key in ("psnr", "frechet", "accuracy")), strict=True)
        psnr, frechet, accuracy = zip(*columns, strict=True)
        if not (exact and subject == "no cache"):
            yield Row(case, subject, "PSNR to float", interval(list(psnr))[0], "dB", None, *interval(list(psnr))[1:])
        yield Row(case, subject, "Frechet distance", sum(frechet) / len(frechet), "")
        yield Row(case, subject, "accuracy", sum(accuracy) / len(accuracy), "")
        yield Row(case, subject, "multiply-adds over float's", pieces[0]["macs"] / whole[0]["macs"], "")
        share = sum(p["seconds"] for p in pieces) / sum(p["seconds"] for p in whole)
        yield Row(case, subject, "processor time over float's", share, "")
        if subject.startswith("DPS"):
            better = [a["psnr"] - b["psnr"] for a, b in zip(pieces, found[first], strict=True)]
            yield Row(case, subject, "PSNR", interval(better)[0], "dB more", first, *interval(better)[1:])


def _picture(samples: int) -> None:
    """Draw the same twelve pictures by each way at interval 5."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    lines = {"float, no cache": _float("dit", 0, samples)[:12]}
    for bits, subject in (("float", "uniform"), ("float", "DPS, carried on and corrected"), ("W4A4", "no cache"),
                          ("W4A4", "DPS, carried on and corrected")):  # fmt: skip
        setting = Setting("dit", bits, 1 if subject == "no cache" else 5, "DPS" if subject == "no cache" else subject)
        with setting.context():
            lines[f"{bits}, {subject}"] = draw("dit", bits, 0, samples)[:12]
    figure, axes = plt.subplots(len(lines), 1, figsize=(7, 0.85 * len(lines)))
    for ax, (title, pictures) in zip(axes, lines.items(), strict=True):
        ax.imshow(pictures[:, 0].permute(1, 0, 2).flatten(1).clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
        ax.set_title(title, fontsize=8, loc="left", pad=2)
        ax.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    plt.close(figure)
