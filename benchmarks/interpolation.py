"""Smooth Diffusion on handwritten digits: evenness of interpolations over lambda, and what it costs; a picture."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import interpolation_digits as small
from benchmarks.data import cache_dir
from benchmarks.harness import ROOT, Row
from planish.diffusion import interpolate, load_smooth_lora

PICTURE = ROOT / "docs" / "papers" / "smooth_diffusion.svg"
SEEDS = (0, 1, 2)
CONTROL = "LoRA, lambda 0"
SUBJECTS: dict[str, dict[str, object] | None] = {
    "no LoRA": None,
    CONTROL: {"weight": 0.0},
    "LoRA, lambda 0.1": {"weight": 0.1},
    "LoRA, lambda 1": {"weight": 1.0},
}
UNITS = {"right class": "%", "inversion's error": "1e-3", "time a step": "ms"}
COMPARED = ("ISTD", "std / mean step", "mean step")
T_95 = {2: 12.71, 3: 4.303}
"""Student's 97.5 % quantile for so many seeds."""


def _interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    mean = math.fsum(values) / len(values)
    if len(values) not in T_95:
        return mean, None, None
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = T_95[len(values)] * spread / math.sqrt(len(values))
    return mean, mean - half, mean + half


def table(case: str, found: dict[str, list[dict[str, float]]], note: str, *, intervals: bool = False) -> Iterator[Row]:
    for subject, runs in found.items():
        for metric in runs[0]:
            value = math.fsum(run[metric] for run in runs) / len(runs)
            yield Row(case, subject, metric, value, UNITS.get(metric, ""), note=note)
    for subject, runs in found.items():
        if subject in {CONTROL, "no LoRA"}:
            continue
        for metric in COMPARED:
            ratios = [one[metric] / none[metric] for one, none in zip(runs, found[CONTROL], strict=True)]
            value, low, high = _interval(ratios) if intervals else (math.fsum(ratios) / len(ratios), None, None)
            yield Row(f"{case}: over that of {CONTROL}", subject, metric, value, "", CONTROL, low, high)


def _residual(quick: bool, fresh: bool) -> dict[str, list[dict[str, float]]]:
    pretrained, steps, pairs, images = (60, 20, 8, 40) if quick else (1500, 400, 150, 500)
    seeds = SEEDS[:1] if quick else SEEDS
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for subject, settings in SUBJECTS.items():
            if quick and subject not in {"no LoRA", CONTROL, "LoRA, lambda 1"}:
                continue
            net = small.base(seed, pretrained)

            def train(net: nn.Module, seed: int = seed, settings: dict[str, object] | None = settings) -> float | None:
                return None if settings is None else small.adapted(net, seed, steps, **settings)  # type: ignore[arg-type]

            tell: Callable[[nn.Module], dict[str, float]] = partial(small.measure, pairs=pairs, images=images)
            name = f"interpolation-{pretrained}-{steps}-{seed}-{subject.replace(' ', '_').replace('/', '')}"
            found.setdefault(subject, []).append(small.kept(name, net, train, tell, fresh=fresh))
    return found


def rows(quick: bool, *, fresh: bool = False, **_: object) -> Iterator[Row]:
    """Yield what each adapter gives; draw the picture of a full run.

    Args:
        quick: One seed, few steps: tells nothing but that it runs.
        fresh: Measure again what the cache holds.
        **_: What other benchmarks are asked beside this.
    """
    note = (
        f"Every fifth level of Stable Diffusion's schedule; DDIM, {small.STEPS} steps, guidance {small.GUIDANCE:g}; "
        "images in [0, 1]; LoRA of rank 8 on every linear layer; means of three seeds; times on a busy machine; "
        "Frechet distance of pixels; error of inversion and return without guidance, images in [-1, 1]."
    )
    yield from table("digits, residual network, 150 pairs", _residual(quick, fresh), note, intervals=not quick)
    if not quick:
        draw_picture(PICTURE)


def strips(net: nn.Module, classes: Sequence[int], seed: int, frames: int = 11) -> Tensor:
    """Return images between two noises, (frames, pairs, 8, 8) in [0, 1]."""
    a, b = torch.randn(2, len(classes), 64, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor(list(classes))

    def generate(noise: Tensor) -> Tensor:
        return small.sampler(net)(noise, labels.repeat(len(noise) // len(labels)))

    images = (interpolate(generate, a, b, num_frames=frames) + 1) / 2
    return images.reshape(frames, len(classes), 8, 8)


def draw_picture(path: Path) -> None:
    """Draw walks of the control and of lambda 1, with the lengths of their steps."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    plt.rcParams.update({"svg.hashsalt": "planish", "font.size": 9})
    classes = (2, 3, 5, 8)
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained", width_ratios=(1.35, 1.35, 1))
    for axis, subject, colour in zip(axes[:2], (CONTROL, "LoRA, lambda 1"), ("#777777", "#2a6f97"), strict=True):
        net = small.base(0, 1500)
        load_smooth_lora(net, cache_dir() / f"interpolation-1500-400-0-{subject.replace(' ', '_')}")
        images = strips(net, classes, seed=3)
        tiles = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.0).permute(1, 2, 0, 3)
        axis.imshow(tiles.reshape(len(classes) * 10, -1), cmap="gray_r", vmin=0, vmax=1)
        axis.set_axis_off()
        axis.set_title(subject)
        many = small.walks(net, 150).per_pair
        share = many / many.mean(1, keepdim=True)
        for low, high, alpha in ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3)):
            band = share.quantile(torch.tensor([low, high], dtype=share.dtype), dim=0)
            axes[2].fill_between(range(1, 11), *band, color=colour, alpha=alpha, linewidth=0)
        axes[2].plot(range(1, 11), share.median(0).values, color=colour, label=subject)
    axes[2].axhline(1, color="black", linewidth=0.5)
    axes[2].set(xlabel="step of the walk", ylabel="its length over the walk's mean", ylim=(0.4, 1.75))
    axes[2].spines[["top", "right"]].set_visible(False)
    axes[2].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
