"""transformers reads and writes our checkpoints once this module is imported.

    import planish.plugins.transformers
    model = AutoModelForCausalLM.from_pretrained("llama-4bit")   # QLinear layers; generate and save_pretrained work

    model.generate(ids, past_key_values=QuantizedCache())        # keys and values in 4 bits

Only `quant_method: planish` needs it; compressed-tensors checkpoints load in stock transformers, or by `planish.load`.
"""

from typing import Any

import torch
from torch import nn

from planish._support import CheckpointError, require
from planish.plugins.kv_cache import QuantizedCache
from planish.quant import fitting, schemes
from planish.quant.experts import Experts, fused_experts, unfuse
from planish.quant.layers import QLinear
from planish.quant.parts import quantized_layers

__all__ = ["PlanishConfig", "PlanishQuantizer", "QuantizedCache"]

_why = "planish.plugins.transformers"
_quantizers = require("transformers.quantizers", "transformers", _why)
_auto = require("transformers.quantizers.auto", "transformers", _why)
_loading = require("transformers.core_model_loading", "transformers", _why)
_config = require("transformers.utils.quantization_config", "transformers", _why)


class PlanishConfig(_config.QuantizationConfigMixin):  # type: ignore[misc, name-defined]
    """The `quantization_config` of a planish checkpoint.

    Args:
        layers: What each quantized layer is, as `planish.save` describes it.
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
        self.quant_method = "planish"
        self.format_version = format_version
        self.layers = layers
        self.ignore = list(ignore or ())
        for name, value in kwargs.items():
            setattr(self, name, value)


class PlanishQuantizer(_quantizers.HfQuantizer):  # type: ignore[misc, name-defined]
    """Puts empty `QLinear` layers into a model that transformers is about to fill."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:  # noqa: ANN401
        version = self.quantization_config.format_version
        if version != schemes.FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config: format_version must be {schemes.FORMAT_VERSION}; got {version!r:.60}.",
                "unsupported",
            )
        entries = self.quantization_config.layers
        trunk = f"{model.base_model_prefix}."  # AutoModel: no head, and names without the trunk's
        inside = tuple(f"{name.removeprefix(trunk)}." for name in fused_experts(model))
        if any(name.removeprefix(trunk).startswith(inside) for name in entries):
            unfuse(model)
        modules = dict(model.named_modules())
        for name, entry in entries.items():
            layer = schemes.empty_layer(name, entry)
            place = name if name in modules else name.removeprefix(trunk)
            fitting.check_place(name, modules.get(place), layer)
            model.set_submodule(place, layer)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Return the model's rules for names, without those that join experts which have been taken apart."""
        if any(isinstance(module, Experts) for module in model.modules()):
            weight_conversions = [c for c in weight_conversions if not isinstance(c, _loading.WeightConverter)]
        rules: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return rules

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` writes what `from_pretrained` reads."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return False: codes have no gradient."""
        return False

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in quantized_layers(model).items():
            for part in layer.modules():
                if isinstance(part, QLinear) and part.act is not None:
                    raise ValueError(f"dequantize: `{name}` rounds its inputs to {part.act}; no dense layer equals it.")
            model.set_submodule(name, layer.dequantize().to(dtype))
        return model


if "planish" not in _auto.AUTO_QUANTIZER_MAPPING:  # a second import, under another name or after a reload
    _quantizers.register_quantization_config("planish")(PlanishConfig)
    _quantizers.register_quantizer("planish")(PlanishQuantizer)
