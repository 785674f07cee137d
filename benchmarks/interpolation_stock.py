"""Smooth adapters of the published kind, on attention alone, for diffusers' own transformer and U-Net of digits."""

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import digits
from benchmarks.harness import Row
from benchmarks.interpolation import table
from benchmarks.interpolation_digits import Batches, kept
from planish.diffusion import (
    ISTDResult,
    StepwiseVariationRegularizer,
    ddim_sample,
    istd,
    train_smooth_lora,
)
from planish.diffusion.denoisers import digits_scheduler, null_class

STEPS, GUIDANCE = 20, 2.0
NAMES = {"dit": "digits, DiTTransformer2DModel", "unet": "digits, UNet2DModel"}
SUBJECTS = {"LoRA, lambda 0": 0.0, "LoRA, lambda 1": 1.0, "LoRA, lambda 10": 10.0}


def sampler(model: nn.Module):  # noqa: ANN201
    """Return (noise, classes) -> images in [-1, 1] under guidance."""
    null = null_class(model)

    def draw(noise: Tensor, classes: Tensor) -> Tensor:
        made = ddim_sample(
            model, noise, digits_scheduler(), cond={"class_labels": classes},
            null_cond={"class_labels": torch.full_like(classes, null)}, steps=STEPS, guidance_scale=GUIDANCE,
        )  # fmt: skip
        return made.clamp(-1, 1)

    return draw


def walks(model: nn.Module, pairs: int) -> ISTDResult:
    """Measure a model's interpolations: the same noises and classes for all models."""
    noises = torch.randn(2, pairs, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    return istd(sampler(model), noises, torch.arange(pairs) % 10, data_range=2.0, pairs_per_call=10)


def measure(model: nn.Module, pairs: int, images: int) -> dict[str, float]:
    """Return what is told of a model: evenness, and what it may have cost."""
    found = walks(model, pairs)
    classes = torch.arange(images) % 10
    made = sampler(model)(torch.randn(images, 1, 8, 8, generator=torch.Generator().manual_seed(8)), classes)
    right = (digits.network("judge")(made).argmax(1) == classes).float().mean()
    return {
        "ISTD": found.istd,
        "std / mean step": found.cv,
        "largest / mean step": found.max_over_mean,
        "mean step": found.mean_step,
        "Frechet distance": digits.distance(made),
        "right class": 100 * float(right),
    }


def adapted(model: nn.Module, weight: float, steps: int) -> float:
    """Train an adapter of rank 8 on the attentions, in place; return the processor's seconds a step."""
    from diffusers import DDPMScheduler  # noqa: PLC0415

    began = time.process_time()
    train_smooth_lora(
        model, Batches(1, 64, key="class_labels", null=null_class(model), square=True),
        DDPMScheduler.from_config(digits_scheduler().config), steps=steps, lr=1e-3,
        regularizer=StepwiseVariationRegularizer(weight), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return (time.process_time() - began) / steps


def folder_of(name: str, subject: str, steps: int) -> str:
    """Name a subject's folder in the cache."""
    return f"interpolation-{name}-{steps}-{subject.replace(' ', '_')}"


def rows(quick: bool, *, fresh: bool = False, **_: object) -> Iterator[Row]:
    """Yield what each adapter gives, on the transformer and on the U-Net.

    Args:
        quick: Few steps, pairs and images: tells nothing but that it runs.
        fresh: Measure again what the cache holds.
        **_: What other benchmarks are asked beside this.
    """
    steps, pairs, images = (2, 3, 20) if quick else (150, 60, 300)
    note = (
        f"LoRA of rank 8 on attentions, as published, {steps} steps; squared cosine, velocity predicted; DDIM, "
        f"{STEPS} steps, guidance {GUIDANCE:g}; images in [0, 1]; one seed; Frechet distance of a judge's features."
    )
    for name, case in NAMES.items():
        found = {}
        for subject, weight in SUBJECTS.items():
            train = partial(adapted, weight=weight, steps=steps)
            tell = partial(measure, pairs=pairs, images=images)
            folder = f"interpolation-{name}-{steps}-{subject.replace(' ', '_')}"
            found[subject] = [kept(folder, digits.fresh(name), train, tell, fresh=fresh)]
        yield from table(f"{case}, {pairs} pairs", found, note)
