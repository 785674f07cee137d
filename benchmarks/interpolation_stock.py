"""Smooth adapters of the published kind, on attention alone, for diffusers' own transformer and U-Net of digits."""

import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import digits
from benchmarks.interpolation_digits import Batches, kept
from planish.diffusion import (
    ISTDResult,
    StepwiseVariationRegularizer,
    ddim_sample,
    istd,
    load_smooth_lora,
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


def found(name: str, *, steps: int = 150, fresh: bool = False) -> dict[str, list[dict[str, float]]]:
    """Measure every subject on one model."""
    told = {}
    for subject, weight in SUBJECTS.items():
        model = digits.fresh(name)
        train = partial(adapted, weight=weight, steps=steps)
        tell = partial(measure, pairs=60, images=300)
        told[subject] = [kept(folder_of(name, subject, steps), model, train, tell, fresh=fresh)]
    return told


def loaded(name: str, subject: str, cache: Path, *, steps: int = 150) -> nn.Module:
    """Return a model with an adapter of the cache on it."""
    model = digits.fresh(name)
    load_smooth_lora(model, cache / folder_of(name, subject, steps))
    return model
