"""Denoisers of digits in few bits: round to nearest, smoothing and SVDQuant, with and without planted outliers.

A transformer and a U-Net, trained here (`benchmarks/digits.py`), sampled in ten DDIM steps with guidance. Every method
is fitted to the calls of one sampling run of 40 pictures and then judged on pictures of other seeds: PSNR to the float
model's picture of the same seed, and by a network that nobody was tuned on: the class it sees and the Frechet distance
of its features to all real digits. Intervals are those of Student's t over the sampling seeds.

A method is a line in `SUBJECTS`; more can be added from outside. Layers that the papers leave in float (embeddings,
modulation, the ends) are left by all. Convolutions of the U-Net have 8 bits, but in rows that say "all": there they
have what linear layers have, groups of 64 in the weight and groups of 64 channels of a pixel in what enters them.

Every piece (model, method, seed) is kept in the cache, and a run that was interrupted goes on: `--models` chooses
models, `--only` methods.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from hashlib import sha256
from typing import Any, cast

from torch import Tensor, nn

from benchmarks import data, digits, harness
from benchmarks.harness import Row
from planish.diffusion import SKIP
from planish.plugins.diffusers import whole
from planish.quant import Affine, Method, QConv, QLinear, quantize, rtn, segquant, svdquant

REUSE_MEMORY = True
SEEDS, SAMPLES, CALIBRATED = 3, 200, 40
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's t at 97.5 %, by number of seeds


def nearest(bits: int, act_bits: int, group_size: int | None, *, convolutions: tuple[int, int] = (8, 8)) -> Method:
    """Round to nearest without zero points, one scale a row and token or a group of them."""
    weight = Affine(bits, group_size, symmetric=True, ragged=True)
    method = replace(rtn(), weight=weight, act=replace(weight, bits=act_bits, scale_dtype="float32"))
    return whole(method, bits=convolutions[0], act_bits=convolutions[1])


def with_branch(rank: int, **options: Any) -> Method:  # noqa: ANN401
    """SVDQuant with groups of 64 and 8-bit convolutions."""
    return whole(svdquant(rank=rank, ragged=True, **options))


def everywhere(rank: int, **options: Any) -> Method:  # noqa: ANN401
    """SVDQuant with groups of 64 in linear layers and convolutions."""
    return svdquant(rank=rank, ragged=True, **{"convolutions": True} | options)


def nearest_everywhere(*, zero_points: bool = False, image: bool = False) -> Method:
    """Round to nearest on the same grids, if wanted with zero points in all activations."""
    method = nearest(4, 4, 64)
    act = replace(cast(Affine, method.act), symmetric=not zero_points)
    own = replace(method, convolutions=False, act=replace(act, group_size=None)) if image else True
    return replace(method, act=act, convolutions=own)


def in_segments(**options: Any) -> Method:  # noqa: ANN401
    """SegQuant to nearest, 8 bits and one scale a tensor (of a segment)."""
    return segquant(calibrator="amax", convolutions=True, **options)


SUBJECTS: dict[str, Callable[[], Method] | None] = {
    "float": None,
    "W8A8": lambda: nearest(8, 8, None),
    "W4A8": lambda: nearest(4, 8, None, convolutions=(4, 8)),
    "W4A4 to nearest": lambda: nearest(4, 4, 64),
    "W4A4 smoothed": lambda: with_branch(0),
    "W4A4 SVDQuant": lambda: with_branch(16),
    "all W4A4 to nearest": nearest_everywhere,
    "all W4A4 to nearest with zero points": lambda: nearest_everywhere(zero_points=True),
    "all W4A4 to nearest by image": lambda: nearest_everywhere(zero_points=True, image=True),
    "all W4A4 smoothed": lambda: everywhere(0),
    "all W4A4 SVDQuant": lambda: everywhere(16),
    "all W4A4 SVDQuant by image": lambda: everywhere(16, convolutions="image"),
    "W8A8 a tensor": lambda: in_segments(patterns=(), sides="off"),
    "W8A8 a tensor SegQuant": in_segments,
}
"""Methods by name; None is the float model.

Convolutions: 8 bits on both sides, in W4A8 4 and 8, unless a name says more. "By image": what enters a
convolution has one scale an image.
"""
MODELS = {"dit": "digits, transformer", "unet": "digits, U-Net"}
ONLY = {name: (False, True) for name in SUBJECTS if name.startswith("all ")} | {"all W4A4 SVDQuant by image": (False,)}
"""What the U-Net alone is asked, as elsewhere there are no convolutions: without and with planted outliers."""
QUICK = ("float", "W4A4 to nearest", "W4A4 SVDQuant")


def cases() -> dict[str, tuple[str, bool]]:
    """Return model and whether outliers are planted, by the case's name."""
    return {
        f"{name}{', planted outliers' * planted}": (key, planted)
        for key, name in MODELS.items() for planted in (False, True)
    }  # fmt: skip


def fitted(
    model: nn.Module, method: Method, *, pictures: int = CALIBRATED, steps: int = digits.SAMPLING_STEPS
) -> float:
    """Quantize a denoiser of digits in place; return the seconds of processor time that it took."""
    calls = digits.record(model, n=pictures, steps=steps)
    began = time.process_time()
    quantize(model, calls, method, skip=SKIP)
    return time.process_time() - began


def sizes(model: nn.Module) -> dict[str, float]:
    """Return what the quantized layers take, and the share of it that float branches take."""
    layers = [m for m in model.modules() if isinstance(m, QLinear)]
    total = sum(t.nbytes for m in layers for t in m.state_dict().values())
    branch = sum(t.nbytes for m in layers for t in (m.down, m.up) if t is not None)
    before = sum(4 * m.in_features * m.out_features for m in layers)
    linear = sum(not isinstance(m, QConv) for m in layers)
    return {"size": total / before, "branch": branch / total, "layers": float(linear)} if layers else {}


def drawn(model: nn.Module, seed: int, quick: bool) -> Tensor:
    """Return the pictures of a seed."""
    return digits.draw(model, seed=seed, n=20 if quick else SAMPLES, steps=4 if quick else digits.SAMPLING_STEPS)


@cache
def reference(key: str, planted: bool, seed: int, quick: bool) -> Tensor:
    """Return the float model's pictures of a seed."""
    return drawn(digits.denoiser(key, planted=planted, quick=quick), seed, quick)


def piece(key: str, planted: bool, subject: str, seeds: int, *, quick: bool) -> dict[str, list[float]]:
    """Fit one method to one model and judge its pictures of every seed."""
    make, model = SUBJECTS[subject], digits.fresh(key, planted=planted, quick=quick)
    found: dict[str, list[float]] = {}
    if make is not None:
        few = {"pictures": 8, "steps": 4} if quick else {}
        found["fitting"] = [fitted(model, make(), **few)]
    for seed in range(seeds):
        wanted = reference(key, planted, seed, quick)
        began = time.process_time()
        pictures = wanted if make is None else drawn(model, seed, quick)
        spent = time.process_time() - began
        for name, value in asdict(digits.scores(pictures, wanted)).items():
            found.setdefault(name, []).append(value)
        found.setdefault("sampling", []).append(spent)
    return found | {name: [value] for name, value in sizes(model).items()}


def kept(key: str, planted: bool, subject: str, *, fresh: bool) -> dict[str, list[float]]:
    """Return a piece from the cache, or make it and keep it."""
    make = SUBJECTS[subject]
    folder = data.fingerprint(data.cache_dir() / f"digits-{key}"), data.fingerprint(data.cache_dir() / "digits-judge")
    facts = [*folder, planted, "" if make is None else repr(make()), SEEDS, SAMPLES, CALIBRATED, digits.GUIDANCE, SKIP]
    name = sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = data.cache_dir() / "benchmarks" / "diffusion" / f"{key}-{name}.json"
    if fresh or not path.exists():
        harness.write_json(path, piece(key, planted, subject, SEEDS, quick=False))
    found: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8"))
    return found


SHOWN = {
    "psnr": ("PSNR to float", "dB"), "frechet": ("Frechet distance", ""), "accuracy": ("class accuracy", ""),
    "size": ("size of its layers", "of float"), "branch": ("branch's share", ""), "fitting": ("fitting", "s"),
}  # fmt: skip


def rows(
    quick: bool,
    *,
    only: tuple[str, ...] | None = None,
    models: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
    **_: object,
) -> Iterator[Row]:
    """Yield the mean over sampling seeds of each figure, with its 95 % interval, by model and method.

    Args:
        quick: A transformer trained in seconds, few methods, two seeds of 20 pictures; no figure is kept.
        only: These methods.
        models: Cases whose name holds one of these.
        fresh: Do not use what an earlier run left in the cache.
        skipped: Filled with what is not at hand, and why.
    """
    for case, (key, planted) in cases().items():
        if (quick and (planted or key != "dit")) or (models is not None and not any(m in case for m in models)):
            continue
        try:
            digits.denoiser(key, quick=quick)
            digits.network("judge")
        except ImportError as error:  # scikit-learn or diffusers
            if skipped is not None:
                skipped[case] = str(error)
            continue
        for subject in SUBJECTS:
            if (only is not None and subject not in only) or (quick and subject not in QUICK):
                continue
            if subject in ONLY and (key != "unet" or planted not in ONLY[subject]):
                continue
            found = piece(key, planted, subject, 2, quick=True) if quick else kept(key, planted, subject, fresh=fresh)
            yield from shown(case, subject, found, SHOWN)


def shown(
    case: str, subject: str, found: dict[str, list[float]], labels: dict[str, tuple[str, str]]
) -> Iterator[Row]:  # fmt: skip
    """Yield the means of what was found, with their intervals."""
    for metric, (label, unit) in labels.items():
        values = found.get(metric)
        if not values or (subject == "float" and metric == "psnr"):
            continue
        mean, low, high = statistics.mean(values), None, None
        if len(values) > 1:
            spread = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
            low, high = mean - spread, mean + spread
        yield Row(case, subject, label, mean, unit, low=low, high=high)
