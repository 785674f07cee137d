"""diffusers reads and writes quantized denoisers once this module is imported; pipelines are quantized by one call.

    import planish.plugins.diffusers as small

    pipeline = DiffusionPipeline.from_pretrained(...)
    report = small.quantize_pipeline(pipeline, lambda: pipeline(prompts, num_inference_steps=20))
    pipeline.save_pretrained("small")            # and DiffusionPipeline.from_pretrained("small") reads it

The program that is passed is the calibration: whatever it asks of the denoiser, at the timesteps and on the branches of
guidance that it really uses, is what the layers are fitted to.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, nn

import planish
from planish._support import CheckpointError, bad, require
from planish.diffusion.calls import SKIP, Calls, capture, denoiser_of
from planish.quant import Affine, Journal, Method, QLinear, Report, fitting, rtn, schemes, svdquant
from planish.quant.parts import Quantized, in_place_of, quantized_layers
from planish.quant.stream import call_model, first_tensor

__all__ = ["PipelineReport", "PlanishConfig", "PlanishQuantizer", "attach", "quantize_pipeline", "whole"]

_why = "planish.plugins.diffusers"
_quantizers = require("diffusers.quantizers", "diffusers", _why)
_auto = require("diffusers.quantizers.auto", "diffusers", _why)
_config = require("diffusers.quantizers.quantization_config", "diffusers", _why)


class _Name(StrEnum):  # diffusers reads `.value` of it
    PLANISH = "planish"


class PlanishConfig(_config.QuantizationConfigMixin):  # type: ignore[misc, name-defined]
    """The `quantization_config` of a denoiser: what each quantized layer is.

    Args:
        layers: By name, as `planish.save` describes them.
        format_version: Version of the description.
        ignore: Dense layers left in float.
        **kwargs: Fields of later versions, kept.

    Example:
        >>> PlanishConfig(layers={}).to_dict()["quant_method"]
        'planish'
    """

    def __init__(
        self,
        layers: dict[str, Any],
        format_version: int = schemes.FORMAT_VERSION,
        ignore: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        kwargs.pop("quant_method", None)
        self.quant_method = _Name.PLANISH
        self.format_version = format_version
        self.layers = layers
        self.ignore = list(ignore or ())
        for name, value in kwargs.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds."""
        return {**self.__dict__, "quant_method": "planish"}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same: what diffusers prints."""
        return self.to_dict()


class PlanishQuantizer(_quantizers.base.DiffusersQuantizer):  # type: ignore[misc, name-defined]
    """Puts empty quantized layers into a denoiser that diffusers is about to fill, and checks what came.

    Tensors of quantized layers keep their own dtype, whichever is asked for: codes were chosen for their scales.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:  # noqa: ANN401
        version = self.quantization_config.format_version
        entries = self.quantization_config.layers
        if version != schemes.FORMAT_VERSION or not isinstance(entries, dict):
            raise CheckpointError(
                f"quantization_config: format_version must be {schemes.FORMAT_VERSION}; got {version!r:.60}.",
                "unsupported",
            )
        modules = dict(model.named_modules())
        for name, entry in entries.items():
            layer, there = schemes.empty_layer(name, entry), modules.get(name)
            fitting.check_place(name, there, layer)
            try:
                model.set_submodule(name, in_place_of(cast(nn.Module, there), layer))
            except ValueError as error:  # what a convolution cannot be
                raise CheckpointError(f"quantization_config, `{name}`: {error}", "unsupported") from None
        self._empty = {
            f"{name}.{key}": tensor
            for name in entries
            for key, tensor in model.get_submodule(name).state_dict().items()
        }
        _remember(model, self)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: object
    ) -> bool:
        """Tell whether a tensor is a quantized layer's."""
        return param_name in self._empty

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Refuse a tensor of another shape.

        Raises:
            CheckpointError: It has.
        """
        wanted, got = list(current_param.shape), list(loaded_param.shape)
        raise CheckpointError(f"`{param_name}` must have shape {wanted}; got {got}.", "shape")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *_: object,
        **__: object,
    ) -> None:
        """Put a tensor into its layer as it was written."""
        found, wanted = state_dict[param_name], self._empty[param_name]
        if found.dtype != wanted.dtype:
            raise CheckpointError(f"`{param_name}` must be {wanted.dtype}; got {found.dtype}.", "dtype")
        owner, last = param_name.rpartition(".")[::2]
        setattr(model.get_submodule(owner), last, found.to(target_device).contiguous())

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:  # noqa: ANN401
        for name in self.quantization_config.layers:
            layer = cast(Quantized, model.get_submodule(name))
            held = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
            schemes.fill(name, layer, {key: t for key, t in held.items() if t.device.type != "meta"})
        model.register_to_config(quantization_config=self.quantization_config)  # type: ignore[operator]

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what is to be written: layers that share a branch or factors each get their own copy."""
        taken: set[int] = set()
        made = {}
        for name, tensor in state_dict.items():
            place = tensor.untyped_storage().data_ptr()
            made[name] = tensor.clone() if place in taken else tensor
            taken.add(place)
        return made, {}

    @property
    def is_serializable(self) -> bool:
        """True: `save_pretrained` writes what `from_pretrained` reads."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for name, layer in quantized_layers(model).items():
            for part in layer.modules():
                if isinstance(part, QLinear) and part.act is not None:
                    raise ValueError(f"dequantize: `{name}` rounds its inputs to {part.act}; no dense layer equals it.")
            model.set_submodule(name, layer.dequantize())
        return model


def _remember(model: nn.Module, quantizer: PlanishQuantizer) -> None:
    """Tell a model of diffusers that, and how, it is quantized."""
    marked = cast(Any, model)
    marked.is_quantized, marked.quantization_method = True, _Name.PLANISH
    marked.register_to_config(quantization_config=quantizer.quantization_config)


def attach(model: nn.Module) -> None:
    """Let a model of diffusers that `planish.quantize` went through be written by `save_pretrained`.

    Args:
        model: It holds quantized layers.

    Raises:
        TypeError: It is not a model of diffusers.
        ValueError: It holds none.

    Example:
        >>> from planish.diffusion import digits_unet
        >>> attach(digits_unet(channels=(8, 8)))
        Traceback (most recent call last):
        ...
        ValueError: attach: `model` must be one with quantized layers; got 'UNet2DModel'.
    """
    if not hasattr(model, "register_to_config"):
        raise TypeError(f"attach: `model` must be a model of diffusers; got {type(model).__name__}.")
    layers = quantized_layers(model)
    if not layers:
        raise bad("attach", "model", "one with quantized layers", type(model).__name__)
    ignore = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantizer = PlanishQuantizer(PlanishConfig(**schemes.own_config(layers, ignore)), pre_quantized=True)
    _remember(model, quantizer)
    cast(Any, model).hf_quantizer = quantizer


def whole(method: Method, *, bits: int = 8, act_bits: int | None = 8) -> Method:
    """Let a method for linear layers round the convolutions of a U-Net as well, an image at a time.

    Args:
        method: What linear layers get.
        bits: Bits of a convolution's weight, one scale for each output channel. Default 8.
        act_bits: Bits of what enters it, one scale for each image; None leaves it in float. Default 8.

    Returns:
        The method.

    Raises:
        ValueError: A number of bits is out of range.

    Example:
        >>> whole(svdquant()).convolutions.weight.bits
        8
    """
    act = None if act_bits is None else Affine(act_bits, None, scale_dtype="float32")
    return replace(method, convolutions=replace(rtn(bits=bits, group_size=None), act=act))


@dataclass
class PipelineReport:
    """What `quantize_pipeline` did.

    Attributes:
        part: Which part of the pipeline was quantized.
        report: What `planish.quantize` says of it.
        calls: How many calls of the denoiser it was fitted to, of how many that were seen.
        error_by_step: Squared error of its answer relative to the float model's, on those calls, by timestep.
        ranges: Least and greatest range of what enters each layer over the timesteps.
    """

    part: str
    report: Report
    calls: tuple[int, int]
    error_by_step: dict[float, float]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Mean over the timesteps of the relative squared error."""
        return sum(self.error_by_step.values()) / len(self.error_by_step)

    def restless(self, count: int = 3) -> list[tuple[str, float]]:
        """Return the layers whose range changes most over the timesteps, and how many times."""
        found = [(name, high / low) for name, (low, high) in self.ranges.items() if low > 0]
        return sorted(found, key=lambda pair: -pair[1])[:count]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        steps = [[step, error] for step, error in sorted(self.error_by_step.items(), reverse=True)]
        return {
            **self.report.to_json(), "part": self.part, "calls": list(self.calls), "error_by_step": steps,
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
        }  # fmt: skip

    def __str__(self) -> str:
        """Return a summary that fits a terminal."""
        size, last = self.calls, min(self.error_by_step)
        first, level = max(self.error_by_step), -10 * math.log10(max(self.error, 1e-30))
        lines = [
            f"{self.part}: {self.report}",
            f"answers on {size[0]} of {size[1]} calls: {level:.1f} dB above the rounding, "
            f"{self.error_by_step[first]:.2g} at timestep {first:g}, {self.error_by_step[last]:.2g} at {last:g}",
        ]
        lines += [f"  {name}: range changes {times:.1f}-fold over the timesteps" for name, times in self.restless()]
        return "\n".join(lines)


def quantize_pipeline(
    pipeline: Any,  # noqa: ANN401  (any pipeline of diffusers)
    run: Callable[[], Any],
    method: Method | None = None,
    *,
    part: str | None = None,
    skip: Sequence[str] = SKIP,
    limit: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    journal: Journal | None = None,
) -> PipelineReport:
    """Quantize a pipeline's denoiser in place, fitted to what a run of the pipeline asks of it.

    Args:
        pipeline: One of diffusers'.
        run: Runs it, as it will be used: `lambda: pipeline(prompts, num_inference_steps=20)`.
        method: See `planish.quantize`; default `whole(svdquant(ragged=True))`: 4-bit weights and activations with a
            float branch in linear layers, 8 bits in convolutions.
        part: Which part; default the first of `planish.diffusion.PARTS` that there is.
        skip: Layers to leave in float, see `planish.quantize`; default `planish.diffusion.SKIP`.
        limit: Fit to a random sample of so many calls; default all.
        device: See `planish.quantize`.
        progress: See `planish.quantize`.
        journal: See `planish.quantize`. The run must then give the same calls every time: seed it.

    Returns:
        The report. The pipeline's own `save_pretrained` writes the quantized model.

    Raises:
        TypeError: It is not a pipeline of diffusers.
        ValueError: There is no such part; the run never called it; see `planish.quantize`.

    Example:
        >>> from planish.diffusion import digits_dit, digits_pipeline
        >>> pipeline = digits_pipeline(digits_dit(layers=1, heads=2))
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> run = lambda: pipeline([3, 7], num_inference_steps=2, output_type="np")
        >>> quantize_pipeline(pipeline, run, svdquant(group_size=32, rank=4, grid=2)).part
        'transformer'
    """
    part, model = denoiser_of(pipeline, part)
    if any(isinstance(module, QLinear) for module in model.modules()):
        raise bad("quantize_pipeline", "pipeline", f"one with a float {part}", "one that is quantized already")
    calls = capture(model, run, limit=limit, statistics=True)
    chosen = whole(svdquant(ragged=True)) if method is None else method
    report = planish.quantize(model, calls.inputs, chosen, skip=skip, device=device, progress=progress, journal=journal)
    attach(model)
    return PipelineReport(
        part, report, (len(calls.inputs), calls.seen), _errors(model, calls), calls.statistics.ranges()
    )


@torch.no_grad()
def _errors(model: nn.Module, calls: Calls) -> dict[float, float]:
    """Return the relative squared error of a model's answers by timestep."""
    gaps, sizes = dict[float, float](), dict[float, float]()
    for named, answer, time in zip(calls.inputs, calls.outputs, calls.times, strict=True):
        gap = first_tensor(call_model(model, named)) - answer
        gaps[time] = gaps.get(time, 0.0) + gap.double().square().sum().item()
        sizes[time] = sizes.get(time, 0.0) + answer.double().square().sum().item()
    return {time: gaps[time] / sizes[time] if sizes[time] else 0.0 for time in gaps}


if "planish" not in _auto.AUTO_QUANTIZER_MAPPING:  # a second import, under another name or after a reload
    _auto.AUTO_QUANTIZER_MAPPING["planish"] = PlanishQuantizer
    _auto.AUTO_QUANTIZATION_CONFIG_MAPPING["planish"] = PlanishConfig

# diffusers loads a part of a pipeline only from modules that somebody imported before.
importlib.import_module("planish.diffusion.pixels")
