"""A published one-step U-Net in few bits: fields of terrain from noise, by adaptive-terrain-diffusion.

`python -m benchmarks diffusion --suite terrain`, after `pip install --no-deps adaptive-terrain-diffusion`. The network
(10.5 million weights, 196 convolutions, fields of 128 x 128) takes noise and a difficulty and answers in one call.
Methods are fitted to calls of their own and judged on fields of other seeds: PSNR to the float model's field from the
same noise, over its range, and how far the spread of heights is from the float model's, which rises with difficulty.
The embeddings of time and difficulty and the network's ends stay in float in all rows. Intervals are those of
Student's t over seeds. Every piece is kept in the cache.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks import data, diffusion, harness
from benchmarks.harness import Row
from benchmarks.onnx_module import GraphModule
from planish.quant import Method, quantize

CASE = "terrain, U-Net of one step"
SKIP = ("network.time_embed.*", "network.label_emb.*", "network.input_blocks.0.0", "network.out.2")
DIFFICULTIES = (0.1, 0.4, 0.7, 1.0)
SEEDS, CALIBRATED, SIGMA, SIDE = 3, 24, 80.0, 128
SAME = (
    "W8A8", "W4A8", "W4A4 to nearest", "all W4A4 to nearest", "all W4A4 to nearest with zero points",
    "all W4A4 to nearest by image", "W8A8 a tensor", "W8A8 a tensor SegQuant",
)  # fmt: skip
SUBJECTS = {name: cast(Callable[[], Method], diffusion.SUBJECTS[name]) for name in SAME} | {
    "W8A8 by pixel": lambda: by_pixel(8, 8),
    "W4A8 by pixel": lambda: by_pixel(4, 8),
    "all W4A4 smoothed": lambda: diffusion.everywhere(0, grid=4),
    "all W4A4 SVDQuant": lambda: diffusion.everywhere(16, grid=4),
    "all W4A4 SVDQuant of rank 32": lambda: diffusion.everywhere(32, grid=4),
    "all W4A8 SVDQuant": lambda: diffusion.everywhere(16, grid=4, act_bits=8),
}
"""Most are rows of `benchmarks.diffusion`. The search tries 7 pairs of exponents, not 39: convolutions are many.

"By pixel", as in rows that begin with "all": groups of 64 channels of a pixel share a scale; else an image does.
"""
QUICK = ("W4A4 to nearest",)


def by_pixel(bits: int, act_bits: int) -> Method:
    """Round to nearest with groups of 64 in weights and in the channels of a pixel."""
    return replace(diffusion.nearest(bits, act_bits, 64), convolutions=True)


def network() -> nn.Module:
    """Return the published network.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    return GraphModule(data.package_file("terrain_diffusion", "*.onnx"), "denoised").eval()


def calls(seed: int, difficulties: tuple[float, ...]) -> dict[str, Tensor]:
    """Return the arguments of one call: noise of a seed, a field for each difficulty."""
    random = torch.Generator().manual_seed(seed)
    n = len(difficulties)
    noise = SIGMA * torch.randn(n, 1, SIDE, SIDE, generator=random)
    return {"noisy": noise, "sigma": torch.full((n,), SIGMA), "difficulty": torch.tensor(difficulties)}


@torch.no_grad()
def fields(model: nn.Module, seed: int) -> Tensor:
    """Return the fields of a seed, one for each of the difficulties."""
    answer: Tensor = model(**calls(seed, DIFFICULTIES))
    return answer


def fitted(model: nn.Module, method: Method, pictures: int) -> float:
    """Quantize in place; return the seconds of processor time that it took."""
    random = torch.Generator().manual_seed(10_000)
    spread = torch.rand(pictures, generator=random).mul(0.9).add(0.1).split(4)
    batches = [calls(20_000 + i, tuple(part.tolist())) for i, part in enumerate(spread)]
    began = time.process_time()
    quantize(model, batches, method, skip=SKIP)
    return time.process_time() - began


def piece(subject: str, wanted: list[Tensor], pictures: int) -> dict[str, list[float]]:
    """Fit one method and judge its fields of every seed."""
    model = network()
    found: dict[str, list[float]] = {"fitting": [fitted(model, SUBJECTS[subject](), pictures)]}
    for seed, clean in enumerate(wanted):
        ours = fields(model, seed)
        error = (ours - clean).square().mean((1, 2, 3))
        psnr = 10 * ((clean.amax((1, 2, 3)) - clean.amin((1, 2, 3))).square() / error).log10()
        found.setdefault("psnr", []).append(psnr.mean().item())
        apart = (ours.std((1, 2, 3)) / clean.std((1, 2, 3)) - 1).abs()
        found.setdefault("spread", []).append(apart.amax().item())
        rises = (ours.std((1, 2, 3)).diff() > 0) | (clean.std((1, 2, 3)).diff() <= 0)
        found.setdefault("order", []).append(rises.float().mean().item())
    return found | {name: [value] for name, value in diffusion.sizes(model).items()}


SHOWN = {
    "psnr": ("PSNR to float", "dB"), "spread": ("largest error of the spread", "of float's"),
    "order": ("harder is rougher as in float", "of steps"), "size": ("size of its layers", "of float"),
    "branch": ("branch's share", ""), "fitting": ("fitting", "s"),
}  # fmt: skip


def rows(
    quick: bool,
    *,
    only: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
    **_: object,
) -> Iterator[Row]:
    """Yield the mean over seeds of each figure, with its 95 % interval, by method.

    Args:
        quick: One method, one seed, few pictures; no figure is kept.
        only: These methods.
        fresh: Do not use what an earlier run left in the cache.
        skipped: Filled with what is not at hand, and why.
    """
    try:
        clean = network()
    except FileNotFoundError as error:
        if skipped is not None:
            skipped[CASE] = str(error)
        return
    weights = data.package_file("terrain_diffusion", "*.onnx").read_bytes()
    wanted: list[Tensor] = []
    for subject in QUICK if quick else SUBJECTS:
        if only is not None and subject not in only:
            continue
        facts = [sha256(weights).hexdigest(), repr(SUBJECTS[subject]()), SEEDS, CALIBRATED, DIFFICULTIES, SKIP]
        name = sha256(json.dumps(facts).encode()).hexdigest()[:16]
        path = data.cache_dir() / "benchmarks" / "terrain" / f"{name}.json"
        if quick or fresh or not path.exists():
            wanted = wanted or [fields(clean, seed) for seed in range(1 if quick else SEEDS)]
            found = piece(subject, wanted, 4 if quick else CALIBRATED)
            if not quick:
                harness.write_json(path, found)
        else:
            found = json.loads(path.read_text(encoding="utf-8"))
        yield from diffusion.shown(CASE, subject, found, SHOWN)
