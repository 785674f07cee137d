"""Diffusion models: small denoisers of stock classes to try things on.

How to choose: `digits_dit` and `digits_unet` build, `train_denoiser` trains, `sample` draws; `digits_pipeline` wraps the
transformer into a stock pipeline that saves and loads like any other.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planish.diffusion.denoisers import (
        digits_dit,
        digits_pipeline,
        digits_scheduler,
        digits_unet,
        null_class,
        sample,
        train_denoiser,
    )
    from planish.diffusion.pixels import Pixels

_FILES = {
    "Pixels": "pixels",
    "digits_dit": "denoisers",
    "digits_pipeline": "denoisers",
    "digits_scheduler": "denoisers",
    "digits_unet": "denoisers",
    "null_class": "denoisers",
    "sample": "denoisers",
    "train_denoiser": "denoisers",
}

__all__ = [
    "Pixels",
    "digits_dit",
    "digits_pipeline",
    "digits_scheduler",
    "digits_unet",
    "null_class",
    "sample",
    "train_denoiser",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: any public name; what needs diffusers loads on touch)
    if name in _FILES:
        return getattr(importlib.import_module(f"planish.diffusion.{_FILES[name]}"), name)
    raise AttributeError(f"module 'planish.diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
