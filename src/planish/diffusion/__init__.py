"""Diffusion models, fast and smooth: caching, tuned schedules, even noise spaces, text; and small denoisers to try.

How to choose. *Faster*: `fit_cache` and `apply_cache` from twenty steps on, `cache_and_quantize` to quantize too,
`tune_schedule` and `wrap_scheduler` for models distilled to a few steps. *Smaller*: a whole pipeline is quantized by
`planish.plugins.diffusers.quantize_pipeline`; `capture` takes down the calls that a program makes, as calibration data
for `planish.quantize`; `watch_steps` gathers statistics of activations by timestep. *Smoother*: `train_smooth_lora`
trains an adapter that makes images follow their noise evenly, `istd` says how evenly, `interpolate` shows it;
`ddim_invert` and `NullTextInverter` bring real images into the noise space, `edit_by_prompt_switch` edits them.
*Text*: `TextDiffusionModel` with `SmoothieScheduler` writes all tokens at once; its siblings
`EmbeddingGaussianScheduler` and `SimplexScheduler` are other noises for the same network. *To try things on*:
`digits_dit` and `digits_unet` build small denoisers of stock classes, `train_denoiser` trains one, `sample` draws.

What speaks to diffusers needs `pip install 'planish[diffusers]'`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planish.diffusion.calls import PARTS, SKIP, Calls, capture, denoiser_of
    from planish.diffusion.denoisers import (
        digits_dit,
        digits_pipeline,
        digits_scheduler,
        digits_unet,
        null_class,
        sample,
        train_denoiser,
    )
    from planish.diffusion.embeddings import EmbeddingSpace
    from planish.diffusion.inversion import ddim_invert, ddim_sample
    from planish.diffusion.lora_files import add_lora, load_smooth_lora, save_smooth_lora, smooth_lora_config
    from planish.diffusion.noise_space import ISTDResult, interpolate, istd, slerp
    from planish.diffusion.null_text import NullTextInversion, NullTextInverter, edit_by_prompt_switch
    from planish.diffusion.pixels import Pixels
    from planish.diffusion.prediction import NoiseScheduler, predict_x0
    from planish.diffusion.smooth_diffusion import StepwiseVariationRegularizer, VariationStats
    from planish.diffusion.smooth_lora import SmoothLoraRun, train_smooth_lora
    from planish.diffusion.smoothie import SmoothieScheduler
    from planish.diffusion.symbols import SymbolTokenizer
    from planish.diffusion.text_model import TextDiffusionConfig, TextDiffusionModel
    from planish.diffusion.text_pipeline import TextDiffusionPipeline
    from planish.diffusion.text_schedulers import EmbeddingGaussianScheduler, SimplexScheduler
    from planish.diffusion.text_training import TextTrainingReport, train_text_diffusion
    from planish.diffusion.timesteps import StepStatistics, watch_steps
    from planish.diffusion.token_state import TokenState

_FILES = {
    "Calls": "calls",
    "EmbeddingGaussianScheduler": "text_schedulers",
    "EmbeddingSpace": "embeddings",
    "ISTDResult": "noise_space",
    "NoiseScheduler": "prediction",
    "NullTextInversion": "null_text",
    "NullTextInverter": "null_text",
    "PARTS": "calls",
    "Pixels": "pixels",
    "SKIP": "calls",
    "SimplexScheduler": "text_schedulers",
    "SmoothLoraRun": "smooth_lora",
    "SmoothieScheduler": "smoothie",
    "StepStatistics": "timesteps",
    "StepwiseVariationRegularizer": "smooth_diffusion",
    "SymbolTokenizer": "symbols",
    "TextDiffusionConfig": "text_model",
    "TextDiffusionModel": "text_model",
    "TextDiffusionPipeline": "text_pipeline",
    "TextTrainingReport": "text_training",
    "TokenState": "token_state",
    "VariationStats": "smooth_diffusion",
    "add_lora": "lora_files",
    "capture": "calls",
    "ddim_invert": "inversion",
    "ddim_sample": "inversion",
    "denoiser_of": "calls",
    "digits_dit": "denoisers",
    "digits_pipeline": "denoisers",
    "digits_scheduler": "denoisers",
    "digits_unet": "denoisers",
    "edit_by_prompt_switch": "null_text",
    "interpolate": "noise_space",
    "istd": "noise_space",
    "load_smooth_lora": "lora_files",
    "null_class": "denoisers",
    "predict_x0": "prediction",
    "sample": "denoisers",
    "save_smooth_lora": "lora_files",
    "slerp": "noise_space",
    "smooth_lora_config": "lora_files",
    "train_denoiser": "denoisers",
    "train_smooth_lora": "smooth_lora",
    "train_text_diffusion": "text_training",
    "watch_steps": "timesteps",
}

__all__ = [
    "PARTS",
    "SKIP",
    "Calls",
    "EmbeddingGaussianScheduler",
    "EmbeddingSpace",
    "ISTDResult",
    "NoiseScheduler",
    "NullTextInversion",
    "NullTextInverter",
    "Pixels",
    "SimplexScheduler",
    "SmoothLoraRun",
    "SmoothieScheduler",
    "StepStatistics",
    "StepwiseVariationRegularizer",
    "SymbolTokenizer",
    "TextDiffusionConfig",
    "TextDiffusionModel",
    "TextDiffusionPipeline",
    "TextTrainingReport",
    "TokenState",
    "VariationStats",
    "add_lora",
    "capture",
    "ddim_invert",
    "ddim_sample",
    "denoiser_of",
    "digits_dit",
    "digits_pipeline",
    "digits_scheduler",
    "digits_unet",
    "edit_by_prompt_switch",
    "interpolate",
    "istd",
    "load_smooth_lora",
    "null_class",
    "predict_x0",
    "sample",
    "save_smooth_lora",
    "slerp",
    "smooth_lora_config",
    "train_denoiser",
    "train_smooth_lora",
    "train_text_diffusion",
    "watch_steps",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: what needs diffusers loads on touch)
    if name in _FILES:
        return getattr(importlib.import_module(f"planish.diffusion.{_FILES[name]}"), name)
    raise AttributeError(f"module 'planish.diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
