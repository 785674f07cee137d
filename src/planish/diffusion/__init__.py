"""Diffusion models whose images follow their noise smoothly: a LoRA for it, its measure, inversion and editing.

How to choose: `train_smooth_lora` trains an adapter that stock diffusers loads; `StepwiseVariationRegularizer` is its
loss, for a training loop of your own. `istd` says how even a model's interpolations are, `interpolate` makes one.
`ddim_invert` and `NullTextInverter` bring real images into the noise space, `edit_by_prompt_switch` edits them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planish.diffusion.inversion import ddim_invert, ddim_sample
    from planish.diffusion.lora_files import add_lora, load_smooth_lora, save_smooth_lora, smooth_lora_config
    from planish.diffusion.noise_space import ISTDResult, interpolate, istd, slerp
    from planish.diffusion.null_text import NullTextInversion, NullTextInverter, edit_by_prompt_switch
    from planish.diffusion.prediction import NoiseScheduler, predict_x0
    from planish.diffusion.smooth_diffusion import StepwiseVariationRegularizer, VariationStats
    from planish.diffusion.smooth_lora import SmoothLoraRun, train_smooth_lora

_FILES = {
    "ISTDResult": "noise_space",
    "NoiseScheduler": "prediction",
    "NullTextInversion": "null_text",
    "NullTextInverter": "null_text",
    "SmoothLoraRun": "smooth_lora",
    "StepwiseVariationRegularizer": "smooth_diffusion",
    "VariationStats": "smooth_diffusion",
    "add_lora": "lora_files",
    "ddim_invert": "inversion",
    "ddim_sample": "inversion",
    "edit_by_prompt_switch": "null_text",
    "interpolate": "noise_space",
    "istd": "noise_space",
    "load_smooth_lora": "lora_files",
    "predict_x0": "prediction",
    "save_smooth_lora": "lora_files",
    "slerp": "noise_space",
    "smooth_lora_config": "lora_files",
    "train_smooth_lora": "smooth_lora",
}

__all__ = [
    "ISTDResult",
    "NoiseScheduler",
    "NullTextInversion",
    "NullTextInverter",
    "SmoothLoraRun",
    "StepwiseVariationRegularizer",
    "VariationStats",
    "add_lora",
    "ddim_invert",
    "ddim_sample",
    "edit_by_prompt_switch",
    "interpolate",
    "istd",
    "load_smooth_lora",
    "predict_x0",
    "save_smooth_lora",
    "slerp",
    "smooth_lora_config",
    "train_smooth_lora",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: any public name)
    if name in _FILES:
        return getattr(importlib.import_module(f"planish.diffusion.{_FILES[name]}"), name)
    raise AttributeError(f"module 'planish.diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FILES})
