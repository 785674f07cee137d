"""Diffusion models: what a pipeline asks of its denoiser, taken down; and small denoisers to try things on.

How to choose: `capture` takes down the calls that a program makes, as calibration data for `planish.quantize`;
`watch_steps` gathers statistics of activations by timestep. A whole pipeline is quantized by
`planish.plugins.diffusers.quantize_pipeline`. `digits_dit` and `digits_unet` build small denoisers of stock classes,
`train_denoiser` trains one, `sample` draws from it, `digits_pipeline` makes it a stock pipeline.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planish.diffusion.calls import (
        PARTS,
        SKIP,
        Calls,
        capture,
        denoiser_of,
    )
    from planish.diffusion.denoisers import (
        digits_dit,
        digits_pipeline,
        digits_scheduler,
        digits_unet,
        null_class,
        sample,
        train_denoiser,
    )
    from planish.diffusion.pixels import (
        Pixels,
    )
    from planish.diffusion.timesteps import (
        StepStatistics,
        watch_steps,
    )

_FILES = {
    "PARTS": "calls",
    "SKIP": "calls",
    "Calls": "calls",
    "Pixels": "pixels",
    "StepStatistics": "timesteps",
    "capture": "calls",
    "denoiser_of": "calls",
    "digits_dit": "denoisers",
    "digits_pipeline": "denoisers",
    "digits_scheduler": "denoisers",
    "digits_unet": "denoisers",
    "null_class": "denoisers",
    "sample": "denoisers",
    "train_denoiser": "denoisers",
    "watch_steps": "timesteps",
}

__all__ = [
    "PARTS",
    "SKIP",
    "Calls",
    "Pixels",
    "StepStatistics",
    "capture",
    "denoiser_of",
    "digits_dit",
    "digits_pipeline",
    "digits_scheduler",
    "digits_unet",
    "null_class",
    "sample",
    "train_denoiser",
    "watch_steps",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: what needs diffusers loads on touch)
    if name in _FILES:
        return getattr(importlib.import_module(f"planish.diffusion.{_FILES[name]}"), name)
    raise AttributeError(f"module 'planish.diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
