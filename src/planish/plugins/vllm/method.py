"""How one of vLLM's linear layers gets its 4-bit weight: read, or rounded as soon as its float weight has arrived.

vLLM hands every tensor of a checkpoint to the parameter of its name. Ours are empty and only pass it on, so that a
float weight lives from the moment it is read to the moment it is rounded: a worker never holds more than one layer in
float.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import CheckpointError, bad, require, warn_once
from planish.plugins.vllm import parts
from planish.quant import schemes
from planish.quant.formats import Affine
from planish.quant.layers import QLinear
from planish.quant.layouts import not_plain

_why = "planish.plugins.vllm"
_linear = require("vllm.model_executor.layers.linear", "vllm", _why)
_kernels = require("vllm.model_executor.kernels.linear", "vllm", _why)
_parameter = require("vllm.model_executor.parameter", "vllm", _why)
_platforms = require("vllm.platforms", "vllm", _why)
_scalars = require("vllm.scalar_type", "vllm", _why)

Where = tuple[int, ...]
Layer = Any  # one of vLLM's: its types are not known here


@dataclass
class Stored:
    """A layer, or several joined, whose codes lie in the checkpoint.

    Attributes:
        entries: Descriptions by name, in the order in which vLLM joins them.
    """

    entries: Mapping[str, Any]

    def tensors(self, where: Where) -> dict[str, torch.dtype]:
        """Return the names of a part's tensors, and their dtypes."""
        return {key: tensor.dtype for key, tensor in self._empty(where)[1].state_dict().items()}

    def _empty(self, where: Where) -> tuple[str, QLinear]:
        names = list(self.entries)
        name = names[where[0]] if len(names) > 1 else names[0]
        entry = {key: value for key, value in self.entries[name].items() if key != "bias"}  # vLLM adds the bias itself
        return name, parts.check_servable(name, schemes.empty_layer(name, entry))

    def biased(self) -> bool:
        """Return whether a layer has a bias."""
        return any(entry.get("bias") is not None for entry in self.entries.values())

    def make(self, where: Where, tensors: dict[str, Tensor], cut: "Cut") -> QLinear:
        """Build a part as this worker holds it."""
        name, layer = self._empty(where)
        schemes.fill(name, layer, {f"{name}.{key}": tensor.clone() for key, tensor in tensors.items()})
        if cut.columns is not None:
            return parts.take_columns(name, layer, *cut.columns)
        return parts.take_rows(layer, cut.rows(where))


@dataclass
class AtLoad:
    """Round to nearest, with the settings of `PlanishConfig`; one value for all layers, which agree on a group size."""

    bits: int = 4
    group_size: int | str | None = None
    symmetric: bool = False
    scale_dtype: str | None = None
    seen: dict[str, int] = field(default_factory=dict)
    prefix: str = ""

    def __post_init__(self) -> None:
        """Check the settings."""
        size = self.group_size
        if size is not None and size != "row" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise bad("planish", "group_size", 'a positive integer, "row" or None', size)
        if not isinstance(self.symmetric, bool):
            raise bad("planish", "symmetric", "True or False", self.symmetric)
        Affine(self.bits, None, self.symmetric, scale_dtype=self.scale_dtype or "float16")  # refuses the rest

    def join(self, prefix: str) -> "AtLoad":
        """Return these settings for one more layer."""
        return AtLoad(self.bits, self.group_size, self.symmetric, self.scale_dtype, self.seen, prefix)

    def tensors(self, where: Where) -> dict[str, torch.dtype]:
        """Return the names of a part's tensors, and their dtypes."""
        return {"weight": torch.get_default_dtype()}

    def biased(self) -> bool:
        """Return whether a layer has a bias that vLLM does not know of."""
        return False

    def format(self, dtype: torch.dtype) -> Affine:
        """Return the format for a weight stored in `dtype`; by now all layers are known, and a size can be chosen."""
        size = self.group_size
        if size is None:
            fits = [g for g in (128, 64, 32) if all(inputs % g == 0 for inputs in self.seen.values())]
            if not fits:
                worst = min(self.seen, key=lambda name: self.seen[name] & -self.seen[name])
                raise ValueError(
                    f"`{worst}`: {self.seen[worst]} inputs of a worker divide into no groups of 128, 64 or 32; "
                    'give group_size, or group_size="row".'
                )
            size = fits[0]
        kept = self.scale_dtype or ("bfloat16" if dtype is torch.bfloat16 else "float16")
        return Affine(self.bits, None if size == "row" else int(size), self.symmetric, scale_dtype=kept)

    def make(self, where: Where, tensors: dict[str, Tensor], cut: "Cut") -> QLinear:
        """Cut the float weight to what this worker holds, then round it."""
        weight = tensors["weight"]
        if cut.columns is not None:
            weight = weight[:, slice(*cut.columns)]
        else:
            spans = cut.rows(where)
            weight = weight[slice(*spans[0])] if len(spans) == 1 else torch.cat([weight[slice(*s)] for s in spans])
        try:
            return QLinear.of(self.format(weight.dtype).encode(weight))
        except ValueError as error:
            raise ValueError(f"`{self.prefix}`: {error}") from None


@dataclass
class Cut:
    """What one worker holds of a layer: ranges of outputs of each joined part, or one range of inputs."""

    own: list[int]
    full: list[int]
    rank: int
    workers: int
    columns: tuple[int, int] | None

    def rows(self, where: Where) -> list[parts.Span]:
        """Return the outputs of the parts `where`, which lie below each other in the checkpoint."""
        spans, above = [], 0
        for part in where:
            copies = max(1, self.workers * self.own[part] // self.full[part])  # heads fewer than workers are repeated
            start = above + self.rank // copies * self.own[part]
            spans.append((start, start + self.own[part]))
            above += self.full[part]
        return [(0, above)] if spans[0][0] == 0 and sum(b - a for a, b in spans) == above else spans


class _Loading:
    """A layer's tensors on their way: those of parts not complete yet, and the parts made."""

    def __init__(self, prefix: str, cut: Cut, device: torch.device) -> None:
        self.prefix, self.cut, self.device = prefix, cut, device
        self.waiting: dict[Where, dict[str, Tensor]] = {}
        self.made: dict[Where, QLinear] = {}
        self.placed: list[str] = []

    def complete(self) -> bool:
        return sorted(part for where in self.made for part in where) == list(range(len(self.cut.own)))


class PlanishLinearMethod(_linear.LinearMethodBase):  # type: ignore[misc, name-defined]
    """Makes the weight of one of vLLM's linear layers.

    Args:
        source: Where the weight comes from.
    """

    def __init__(self, source: Stored | AtLoad) -> None:
        self.source = source

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,  # noqa: ANN401
    ) -> None:
        """Register empty parameters that pass on what they are given."""
        rank, workers = int(getattr(layer, "tp_rank", 0)), int(getattr(layer, "tp_size", 1))
        prefix = str(getattr(layer, "prefix", ""))
        columns = None
        if input_size_per_partition != input_size:
            columns = rank * input_size_per_partition, (rank + 1) * input_size_per_partition
        cut = Cut(list(output_partition_sizes), _full_sizes(layer, output_size), rank, workers, columns)
        state = layer.planish = _Loading(prefix, cut, torch.empty(0).device)
        layer.params_dtype = params_dtype
        if isinstance(self.source, AtLoad):
            self.source.seen[prefix] = input_size_per_partition
        elif self.source.biased() and not getattr(layer, "has_bias", True):
            raise ValueError(f"`{prefix}` has a bias in the checkpoint and none in vLLM's model: it cannot be served.")
        wanted: dict[str, torch.dtype] = {}
        for part in range(len(output_partition_sizes)):
            wanted |= self.source.tensors((part,))
        for key, dtype in wanted.items():
            owner: nn.Module = layer
            *path, last = key.split(".")
            for step in path:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = getattr(owner, step)
            param = nn.Parameter(torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)
            param.weight_loader = self._loader(layer, key)  # type: ignore[attr-defined]
            owner.register_parameter(last, param)
            if key.partition(".")[0] not in state.placed:
                state.placed.append(key.partition(".")[0])

    def _loader(self, layer: Layer, key: str) -> Any:  # noqa: ANN401
        def load(param: nn.Parameter, loaded: Tensor, shard: str | int | Where | None = None) -> None:
            state: _Loading = layer.planish
            where = _where(shard, len(state.cut.own))
            tensors = state.waiting.setdefault(where, {})
            tensors[key] = loaded
            if tensors.keys() >= self.source.tensors(where).keys():
                del state.waiting[where]
                state.made[where] = self.source.make(where, tensors, state.cut).to(state.device)
                if state.complete():
                    ordered = [state.made.pop(where) for where in sorted(state.made)]
                    layer.quantized = parts.join(ordered)
                    parts.set_activation_bits(layer.quantized)

        return load

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Take the empty parameters away; on a GPU hand plain layers to vLLM's own kernels.

        Raises:
            CheckpointError: A tensor never came.
        """
        state: _Loading | None = getattr(layer, "planish", None)
        if state is None:
            return
        made = getattr(layer, "quantized", None)
        if made is None:
            raise CheckpointError(f"`{state.prefix}`: tensors of its weight are missing in the checkpoint.", "missing")
        for name in state.placed:
            delattr(layer, name)
        del layer.planish
        layer.kernel = None
        if not _platforms.current_platform.is_cpu():
            self.hand_over(layer, state.prefix)

    def hand_over(self, layer: Layer, prefix: str) -> None:
        """Give a layer to the kernel that vLLM chooses for compressed-tensors, where one can hold it."""
        made = layer.quantized
        why = not_plain(made) if isinstance(made, QLinear) else "its parts differ"
        if why is None and made.format.bits not in (4, 8):
            why = "it has other than 4 or 8 bits"
        if why is None:
            try:
                layer.kernel = _stock_kernel(layer, made)
                return
            except ValueError as error:
                why = str(error)
        warn_once(f"planish: `{prefix}` runs on the slow reference, as no kernel of vLLM takes it: {why}.")

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's output."""
        if layer.kernel is not None:
            y: Tensor = layer.kernel.apply_weights(layer, x, bias)
            return y
        y = parts.run(layer.quantized, x)
        return y if bias is None else y + bias


def _full_sizes(layer: Layer, output_size: int) -> list[int]:
    """Return the outputs of each joined part before it is cut; vLLM counts repeated heads as if they were more."""
    heads = getattr(layer, "total_num_heads", None)
    if heads is not None:
        kv, size = layer.total_num_kv_heads, layer.head_size
        return [int(heads * size), int(kv * size), int(kv * getattr(layer, "v_head_size", size))]
    return [int(n) for n in getattr(layer, "output_sizes", [output_size])]


def _where(shard: str | int | Where | None, count: int) -> Where:
    if shard is None:
        return tuple(range(count))
    if isinstance(shard, str):
        return ("qkv".index(shard),)
    return (shard,) if isinstance(shard, int) else tuple(shard)


def _stock_kernel(layer: Layer, made: QLinear) -> Any:  # noqa: ANN401
    """Register a plain layer's tensors as vLLM's compressed-tensors scheme does, and return the kernel over them."""
    bits, inp, out = made.format.bits, made.in_features, made.out_features
    kinds = {(4, True): "uint4b8", (8, True): "uint8b128", (4, False): "uint4", (8, False): "uint8"}
    dtype: torch.dtype = layer.params_dtype
    config = _kernels.MPLinearLayerConfig(
        full_weight_shape=(inp, out), partition_weight_shape=(inp, out),
        weight_type=getattr(_scalars.scalar_types, kinds[bits, made.format.symmetric]), act_type=dtype,
        group_size=-1 if made.format.group_size is None else made.format.group_size,
        zero_points=not made.format.symmetric,
    )  # fmt: skip
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    kernel = _kernels.choose_mp_linear_kernel(config)(config, *names)

    def packed(data: Tensor, dim: int) -> Any:  # noqa: ANN401
        return _parameter.PackedvLLMParameter(
            data=data, input_dim=1, output_dim=0, packed_dim=dim, packed_factor=32 // bits, weight_loader=None
        )

    layer.register_parameter("weight_packed", packed(made.weight_packed, 1))
    scale = made.weight_scale.to(dtype)
    layer.register_parameter(
        "weight_scale", _parameter.GroupQuantScaleParameter(data=scale, input_dim=1, output_dim=0, weight_loader=None)
    )
    if made.weight_zero_point is not None:
        layer.register_parameter("weight_zero_point", packed(made.weight_zero_point, 0))
    del layer.quantized
    kernel.process_weights_after_loading(layer)
    return kernel
