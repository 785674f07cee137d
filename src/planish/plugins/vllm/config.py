"""The quantization method `planish` of vLLM: what each of a model's layers becomes.

With a checkpoint of our own layout, its `quantization_config` says so. With a float checkpoint and
`quantization="planish"`, every linear layer is rounded to nearest while it is read; settings stand in `hf_overrides`:

    settings = {"quant_method": "planish", "group_size": 64}
    LLM("smoothed", quantization="planish", hf_overrides={"quantization_config": settings})
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from planish._support import CheckpointError, bad, require
from planish.plugins.vllm.method import AtLoad, PlanishLinearMethod, Stored
from planish.quant import schemes

__all__ = ["PlanishConfig"]

_why = "planish.plugins.vllm"
_base = require("vllm.model_executor.layers.quantization.base_config", "vllm", _why)
_linear = require("vllm.model_executor.layers.linear", "vllm", _why)
_embedding = require("vllm.model_executor.layers.vocab_parallel_embedding", "vllm", _why)

_SETTINGS = {"bits", "group_size", "symmetric", "scale_dtype", "ignore"}


class PlanishConfig(_base.QuantizationConfig):  # type: ignore[misc, name-defined]
    """What `quantization_config` says, in our own layout or for rounding at load.

    Args:
        layers: Descriptions of quantized layers by name, as `planish.save` writes them; None to round a float
            checkpoint while it is read.
        ignore: Layers left in float, by name or by the last part of a name.
        bits: Bits of a weight when rounding at load, 1 to 8; default 4.
        group_size: Inputs that share a scale; "row" for one scale a row; default the largest of 128, 64 and 32 that
            divides the inputs of every layer, as a worker holds it.
        symmetric: No zero points. Default False.
        scale_dtype: Default "bfloat16" for checkpoints in bfloat16, else "float16".

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        ignore: list[str] | None = None,
        bits: int = 4,
        group_size: int | str | None = None,
        symmetric: bool = False,
        scale_dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.layers = None if layers is None else dict(layers)
        self.ignore = list(ignore or ())
        self.at_load = AtLoad(bits, group_size, symmetric, scale_dtype)

    def get_name(self) -> str:
        """Return the method's name."""
        return "planish"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that an engine may run in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least capability of a GPU: that of vLLM's own 4-bit kernels, to which plain layers go there."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: everything stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PlanishConfig":
        """Read a `quantization_config`.

        Raises:
            CheckpointError: Its version is not one that planish reads.
            ValueError: A setting is unknown or out of range.
        """
        if "layers" in config:
            version = config.get("format_version")
            if version != schemes.FORMAT_VERSION:
                raise CheckpointError(
                    f"quantization_config: format_version must be {schemes.FORMAT_VERSION}; got {version!r:.60}.",
                    "unsupported",
                )
            return cls(layers=config["layers"], ignore=config.get("ignore"))
        settings = {key: value for key, value in config.items() if key != "quant_method"}
        if unknown := sorted(settings.keys() - _SETTINGS):
            raise bad("planish", "quantization_config", f"of the settings {', '.join(sorted(_SETTINGS))}", unknown[0])
        return cls(None, **settings)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:  # noqa: ANN401
        """Return how a layer is made, or None where it stays as vLLM makes it.

        Raises:
            ValueError: The layer is quantized in a way that vLLM's structure cannot hold.
        """
        names = self._names(prefix)
        if isinstance(layer, _linear.LinearBase):
            if self.layers is None:
                kept = any(prefix == name or prefix.endswith(f".{name}") for name in (*self.ignore, "lm_head"))
                return _linear.UnquantizedLinearMethod() if kept else PlanishLinearMethod(self.at_load.join(prefix))
            entries = {name: self.layers[name] for name in names if name in self.layers}
            if not entries:
                return _linear.UnquantizedLinearMethod()
            if len(entries) < len(names):
                left = next(name for name in names if name not in entries)
                raise ValueError(
                    f"`{prefix}`: vLLM joins {', '.join(names)} in one layer, but `{left}` is not quantized."
                )
            return PlanishLinearMethod(Stored(entries))
        inside = [name for name in self.layers or () if name == prefix or name.startswith(f"{prefix}.")]
        if inside:
            what = "embeddings and heads" if isinstance(layer, _embedding.VocabParallelEmbedding) else "experts"
            raise ValueError(
                f"`{inside[0]}` is quantized, but the method planish serves linear layers only, not {what}: "
                "leave it in float (skip=), or save it as compressed-tensors."
            )
        return None

    def _names(self, prefix: str) -> list[str]:
        """Return the checkpoint's names of the layers that vLLM has joined under `prefix`."""
        if self.layers is not None and prefix in self.layers:
            return [prefix]
        parent, _, last = prefix.rpartition(".")
        joined = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{name}" if parent else name for name in joined]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:  # noqa: ANN401
        """Rename the layers as vLLM renames the model's."""
        if self.layers is not None:
            self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)
