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
    from planish.diffusion.cachequant import apply_cache, cache_and_quantize, cached_calls, fit_cache, remove_cache
    from planish.diffusion.calls import PARTS, SKIP, Calls, capture, denoiser_of
    from planish.diffusion.correction import fold_correction
    from planish.diffusion.costs import multiply_adds
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
    from planish.diffusion.grouping import StepDistances, dps_schedule, schedule_cost, steps_mask, uniform_schedule
    from planish.diffusion.inversion import ddim_invert, ddim_sample
    from planish.diffusion.lora_files import add_lora, load_smooth_lora, save_smooth_lora, smooth_lora_config
    from planish.diffusion.noise_space import ISTDResult, interpolate, istd, slerp
    from planish.diffusion.null_text import NullTextInversion, NullTextInverter, edit_by_prompt_switch
    from planish.diffusion.objectives import JAQLoss, ReferenceLoss
    from planish.diffusion.output_errors import OutputErrors, measure_output_errors
    from planish.diffusion.pixels import Pixels
    from planish.diffusion.plans import CachePlan
    from planish.diffusion.prediction import NoiseScheduler, predict_x0
    from planish.diffusion.qsched import TunedSchedule, tune_schedule
    from planish.diffusion.schedulers import linear_coefficients, scheduler_class, wrap_scheduler
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
    "CachePlan": "plans",
    "Calls": "calls",
    "EmbeddingGaussianScheduler": "text_schedulers",
    "EmbeddingSpace": "embeddings",
    "ISTDResult": "noise_space",
    "JAQLoss": "objectives",
    "NoiseScheduler": "prediction",
    "NullTextInversion": "null_text",
    "NullTextInverter": "null_text",
    "OutputErrors": "output_errors",
    "PARTS": "calls",
    "Pixels": "pixels",
    "ReferenceLoss": "objectives",
    "SKIP": "calls",
    "SimplexScheduler": "text_schedulers",
    "SmoothLoraRun": "smooth_lora",
    "SmoothieScheduler": "smoothie",
    "StepDistances": "grouping",
    "StepStatistics": "timesteps",
    "StepwiseVariationRegularizer": "smooth_diffusion",
    "SymbolTokenizer": "symbols",
    "TextDiffusionConfig": "text_model",
    "TextDiffusionModel": "text_model",
    "TextDiffusionPipeline": "text_pipeline",
    "TextTrainingReport": "text_training",
    "TokenState": "token_state",
    "TunedSchedule": "qsched",
    "VariationStats": "smooth_diffusion",
    "add_lora": "lora_files",
    "apply_cache": "cachequant",
    "cache_and_quantize": "cachequant",
    "cached_calls": "cachequant",
    "capture": "calls",
    "ddim_invert": "inversion",
    "ddim_sample": "inversion",
    "denoiser_of": "calls",
    "digits_dit": "denoisers",
    "digits_pipeline": "denoisers",
    "digits_scheduler": "denoisers",
    "digits_unet": "denoisers",
    "dps_schedule": "grouping",
    "edit_by_prompt_switch": "null_text",
    "fit_cache": "cachequant",
    "fold_correction": "correction",
    "interpolate": "noise_space",
    "istd": "noise_space",
    "linear_coefficients": "schedulers",
    "load_smooth_lora": "lora_files",
    "measure_output_errors": "output_errors",
    "multiply_adds": "costs",
    "null_class": "denoisers",
    "predict_x0": "prediction",
    "remove_cache": "cachequant",
    "sample": "denoisers",
    "save_smooth_lora": "lora_files",
    "schedule_cost": "grouping",
    "scheduler_class": "schedulers",
    "slerp": "noise_space",
    "smooth_lora_config": "lora_files",
    "steps_mask": "grouping",
    "train_denoiser": "denoisers",
    "train_smooth_lora": "smooth_lora",
    "train_text_diffusion": "text_training",
    "tune_schedule": "qsched",
    "uniform_schedule": "grouping",
    "watch_steps": "timesteps",
    "wrap_scheduler": "schedulers",
}

__all__ = [
    "PARTS",
    "SKIP",
    "CachePlan",
    "Calls",
    "EmbeddingGaussianScheduler",
    "EmbeddingSpace",
    "ISTDResult",
    "JAQLoss",
    "NoiseScheduler",
    "NullTextInversion",
    "NullTextInverter",
    "OutputErrors",
    "Pixels",
    "ReferenceLoss",
    "SimplexScheduler",
    "SmoothLoraRun",
    "SmoothieScheduler",
    "StepDistances",
    "StepStatistics",
    "StepwiseVariationRegularizer",
    "SymbolTokenizer",
    "TextDiffusionConfig",
    "TextDiffusionModel",
    "TextDiffusionPipeline",
    "TextTrainingReport",
    "TokenState",
    "TunedSchedule",
    "VariationStats",
    "add_lora",
    "apply_cache",
    "cache_and_quantize",
    "cached_calls",
    "capture",
    "ddim_invert",
    "ddim_sample",
    "denoiser_of",
    "digits_dit",
    "digits_pipeline",
    "digits_scheduler",
    "digits_unet",
    "dps_schedule",
    "edit_by_prompt_switch",
    "fit_cache",
    "fold_correction",
    "interpolate",
    "istd",
    "linear_coefficients",
    "load_smooth_lora",
    "measure_output_errors",
    "multiply_adds",
    "null_class",
    "predict_x0",
    "remove_cache",
    "sample",
    "save_smooth_lora",
    "schedule_cost",
    "scheduler_class",
    "slerp",
    "smooth_lora_config",
    "steps_mask",
    "train_denoiser",
    "train_smooth_lora",
    "train_text_diffusion",
    "tune_schedule",
    "uniform_schedule",
    "watch_steps",
    "wrap_scheduler",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: what needs diffusers loads on touch)
    if name in _FILES:
        return getattr(importlib.import_module(f"planish.diffusion.{_FILES[name]}"), name)
    raise AttributeError(f"module 'planish.diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
