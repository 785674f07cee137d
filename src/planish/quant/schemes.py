"""What a layer on disk is: from a `quantization_config` and tensors to `QLinear`s, checked, and back.

Four dialects are read: compressed-tensors `pack-quantized`, AWQ (gemm), GPTQ and our own. Whatever can be told from
the tensors is told from them, and the config must agree; its regular expressions are never run.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from planish._support import CheckpointError
from planish.quant import layouts
from planish.quant.act_formats import Dual, Static, format_from_dict
from planish.quant.conv import QConv
from planish.quant.formats import FP4, SCALE_DTYPES, Affine, Format
from planish.quant.layers import QLinear
from planish.quant.packing import n_words
from planish.quant.parts import Quantized, Segments
from planish.quant.transforms import Chain, Permute, Rotate, Scale, Shift, Transform

FORMAT_VERSION = 1
_PARTS: dict[str, type[Transform]] = {"Scale": Scale, "Shift": Shift, "Permute": Permute, "Rotate": Rotate}
_BUFFERS = {"Scale": "scale", "Shift": "offset", "Permute": "index", "Rotate": "blocks"}
_DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


def read_layers(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    """Build the quantized layers of a checkpoint, every value checked.

    Args:
        config: The `quantization_config`; empty for a checkpoint in float.
        tensors: All tensors by name.

    Returns:
        The layers by name, and the tensors that belong to none.

    Raises:
        CheckpointError: A tensor is missing or unasked for, has a wrong shape, dtype or value, or the layout is not
            one that planish reads.
    """
    rest = dict(tensors)
    method = config.get("quant_method")
    if not config:
        layers: dict[str, Quantized] = {}
    elif method == "compressed-tensors":
        layers = _read_compressed(config, rest)
    elif method == "planish":
        layers = _read_own(config, rest)
    elif method in ("awq", "gptq"):
        layers = _read_transposed(str(method), config, rest)
    else:
        known = "compressed-tensors, planish, awq, gptq"
        raise CheckpointError(
            f"quantization_config: `quant_method` must be one of {known}; got {method!r:.60}.", "unsupported"
        )
    for name in layers:
        stray = [key for key in rest if key.startswith(name + ".")]
        if stray:
            raise CheckpointError(f"`{stray[0]}`: a quantized layer holds no such tensor.", "name")
    return layers, rest


def own_config(layers: Mapping[str, Quantized], ignore: Iterable[str]) -> dict[str, Any]:
    """Describe layers in our own dialect."""
    return {
        "quant_method": "planish",
        "format_version": FORMAT_VERSION,
        "ignore": list(ignore),
        "layers": {name: describe(name, layer) for name, layer in layers.items()},
    }


def describe(name: str, layer: Quantized) -> dict[str, Any]:
    """Describe one layer as JSON-able values: all that its tensors do not say."""
    if isinstance(layer, Segments):
        parts = [describe(f"{name}.parts.{i}", cast(QLinear, part)) for i, part in enumerate(layer.parts)]
        return {"mode": layer.mode, "parts": parts}
    made: dict[str, Any] = {"in": layer.in_features, "out": layer.out_features, "weight": layer.format.to_dict()}
    if layer.bias is not None:
        made["bias"] = _dtype_name(layer.bias)
    if layer.act is not None:
        made["act"] = layer.act.to_dict()
    if layer.transform is not None:
        made["transform"] = _describe_transform(name, layer.transform)
        if isinstance(layer, QConv):
            made["channels"] = layer.in_channels  # which it scales; "in" counts each for every place of the kernel
    if layer.down is not None:
        made["low_rank"] = {"rank": layer.down.shape[0], "dtype": _dtype_name(layer.down)}
    if layer.lora_down is not None:
        made["loras"] = {
            "dtype": _dtype_name(layer.lora_down),
            "parts": [{"name": n, "rank": rank, "scale": scale} for n, (rank, scale) in layer.loras.items()],
        }
    return made


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe_transform(name: str, transform: Transform) -> dict[str, Any]:
    kind = type(transform).__name__
    if isinstance(transform, Chain):
        return {"kind": "Chain", "parts": [_describe_transform(name, part) for part in transform.parts]}  # type: ignore[arg-type]
    if _PARTS.get(kind) is not type(transform):
        raise CheckpointError(f"`{name}`: a transform of kind {kind} cannot be written.", "unsupported")
    buffer = getattr(transform, _BUFFERS[kind])
    return {"kind": kind, "shape": list(buffer.shape), "dtype": _dtype_name(buffer)}


def empty_layer(name: str, entry: object) -> Quantized:
    """Build the empty layer, on the meta device, that a description asks for.

    Raises:
        CheckpointError: The description is not one that `describe` makes.
    """
    if not isinstance(entry, dict) or set(entry) != {"mode", "parts"}:
        return _empty_linear(name, entry)
    try:
        parts = [_empty_linear(f"{name}.parts.{i}", part) for i, part in enumerate(entry["parts"])]
        return Segments(parts, entry["mode"])
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"quantization_config, `{name}`: its segments are damaged: {error}", "shape") from None


def _empty_linear(name: str, entry: object) -> QLinear:
    """Build the empty `QLinear` of a description."""
    if not isinstance(entry, dict) or not {"in", "out", "weight"} <= set(entry) <= _FIELDS:
        raise CheckpointError(f"quantization_config, `{name}`: the layer's description is damaged.", "unsupported")
    low_rank = entry.get("low_rank") or {"rank": 0, "dtype": "float32"}
    if not (
        _count(entry["in"])
        and _count(entry["out"])
        and isinstance(low_rank, dict)
        and set(low_rank) == {"rank", "dtype"}
    ):
        raise CheckpointError(f"quantization_config, `{name}`: sizes of the layer are damaged.", "unsupported")
    loras, lora_dtype = _loras(name, entry.get("loras"))
    rank, bias = low_rank["rank"], entry.get("bias")
    named = [low_rank["dtype"], *([] if bias is None else [bias])]
    if (
        not all(isinstance(n, str) and n in SCALE_DTYPES for n in named)
        or type(rank) is not int
        or not 0 <= rank < 1 << 31
    ):
        raise CheckpointError(f"quantization_config, `{name}`: bias or low_rank is damaged.", "unsupported")
    weight = _format(name, entry["weight"])
    if not isinstance(weight, Affine | FP4):
        raise CheckpointError(f"quantization_config, `{name}`: a weight is Affine or FP4; got {weight}.", "unsupported")
    act = _format(name, entry["act"]) if entry.get("act") is not None else None
    try:
        layer = QLinear(
            entry["in"],
            entry["out"],
            weight,
            bias=False,
            act=act,
            rank=rank,
            dtype=SCALE_DTYPES[named[0]],
            device="meta",
        )
    except (ValueError, RuntimeError) as error:  # channels that do not divide; sizes past what torch can count
        raise CheckpointError(f"quantization_config, `{name}`: {error}", "shape") from None
    layer.loras = loras
    if loras:
        total = sum(rank for rank, _ in loras.values())
        layer.lora_down = torch.zeros(total, entry["in"], dtype=lora_dtype, device="meta")
        layer.lora_up = torch.zeros(entry["out"], total, dtype=lora_dtype, device="meta")
    if bias is not None:
        layer.bias = torch.zeros(entry["out"], dtype=SCALE_DTYPES[bias], device="meta")
    channels = entry.get("channels", entry["in"])
    fault = CheckpointError(f"quantization_config, `{name}`: channels of the layer are damaged.", "unsupported")
    if not isinstance(channels, int) or not _count(channels):
        raise fault
    if entry.get("transform") is not None:
        layer.transform = _empty_transform(name, entry["transform"], channels)
    if "channels" in entry and not isinstance(layer.transform, Scale):
        raise fault
    return layer


_FIELDS = {"in", "out", "weight", "bias", "act", "transform", "low_rank", "loras", "channels"}


def _loras(name: str, entry: object) -> tuple[dict[str, tuple[int, float]], torch.dtype]:
    """Read the adapters of a layer's description: rank and scale by name, and the dtype of all."""
    if entry is None:
        return {}, torch.float32
    fault = CheckpointError(f"quantization_config, `{name}`: loras is damaged.", "unsupported")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "parts"} or not isinstance(entry["parts"], list):
        raise fault
    found: dict[str, tuple[int, float]] = {}
    for part in entry["parts"]:
        if not isinstance(part, dict) or set(part) != {"name", "rank", "scale"}:
            raise fault
        key, rank, scale = part["name"], part["rank"], part["scale"]
        sound = isinstance(key, str) and key and key not in found and type(rank) is int and 0 < rank < 1 << 31
        if not sound or type(scale) not in (int, float) or not math.isfinite(scale):
            raise fault
        found[key] = rank, float(scale)
    if not found or not isinstance(entry["dtype"], str) or entry["dtype"] not in SCALE_DTYPES:
        raise fault
    return found, SCALE_DTYPES[entry["dtype"]]


def _empty_transform(name: str, entry: object, channels: int, depth: int = 0) -> Transform:
    fault = CheckpointError(f"quantization_config, `{name}`: the transform's description is damaged.", "unsupported")
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str) or depth > 8:
        raise fault
    if entry["kind"] == "Chain":
        if not isinstance(entry.get("parts"), list):
            raise fault
        return Chain(*(_empty_transform(name, part, channels, depth + 1) for part in entry["parts"]))
    kind, shape = entry["kind"], entry.get("shape")
    dtypes = {"int64": torch.int64, "int32": torch.int32} if kind == "Permute" else SCALE_DTYPES
    dtype = entry.get("dtype")
    if kind not in _PARTS or not isinstance(dtype, str) or dtype not in dtypes:
        raise fault
    if not isinstance(shape, list) or not all(_count(n) for n in shape):
        raise fault
    if kind == "Rotate":
        sound = (
            len(shape) == 3
            and shape[1] == shape[2]
            and channels % shape[1] == 0
            and shape[0] in (1, channels // shape[1])
        )
    else:
        sound = shape == [channels]
    if not sound:
        raise fault
    made = _PARTS[kind].__new__(_PARTS[kind])  # its values come from the file and are checked there
    nn.Module.__init__(made)
    made.register_buffer(_BUFFERS[kind], torch.empty(shape, dtype=dtypes[dtype], device="meta"))
    return made


def _count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _format(name: str, entry: object) -> Format:
    try:
        made = format_from_dict(entry)  # type: ignore[arg-type]
        grid = made.grid if isinstance(made, Static) else made
        size = getattr(grid, "group_size", None)
        flags = [getattr(grid, flag, False) for flag in ("symmetric", "ragged", "per_tensor", "unsigned")]
        bits = grid.bits if isinstance(grid, Affine | Dual) else 4
        sound = all(type(flag) is bool for flag in flags) and type(bits) is int and (size is None or _count(size))
        if not sound or (isinstance(grid, FP4) and size is None):
            raise ValueError("a field has a wrong type")
    except (TypeError, ValueError):
        raise CheckpointError(
            f"quantization_config, `{name}`: {entry!r:.100} is not a format.", "unsupported"
        ) from None
    return made


def fill(name: str, layer: Quantized, tensors: dict[str, Tensor]) -> Quantized:
    """Give an empty layer its tensors, taking them out of `tensors`; every value is checked first."""
    for key, empty in layer.state_dict().items():
        found = tensors.pop(f"{name}.{key}", None)
        if found is None:
            raise CheckpointError(f"`{name}.{key}` is missing.", "missing")
        if found.shape != empty.shape:
            raise CheckpointError(
                f"`{name}.{key}` must have shape {list(empty.shape)}; got {list(found.shape)}.", "shape"
            )
        if found.dtype != empty.dtype:
            raise CheckpointError(f"`{name}.{key}` must be {empty.dtype}; got {found.dtype}.", "dtype")
        _check_values(f"{name}.{key}", found)
        owner, _, last = key.rpartition(".")
        setattr(layer.get_submodule(owner), last, found)
    for path, part in layer.named_modules():
        if isinstance(part, QLinear) and part.weight_shape.tolist() != [part.out_features, part.in_features]:
            where, shape = ".".join(filter(None, (name, path))), [part.out_features, part.in_features]
            raise CheckpointError(f"`{where}.weight_shape` must be {shape}; got {part.weight_shape.tolist()}.", "range")
        if type(part) in (Permute, Rotate):
            buffer = getattr(part, _BUFFERS[type(part).__name__])
            try:
                type(part)(buffer)
            except ValueError as error:
                raise CheckpointError(f"`{name}.{path}`: {error}", "range") from None
    return layer


def _check_values(name: str, found: Tensor) -> None:
    if not found.is_floating_point():
        return
    found = found.float() if found.dtype.itemsize == 1 else found
    if not torch.isfinite(found).all():
        raise CheckpointError(f"`{name}` holds NaN or Inf.", "range")
    if name.endswith(("weight_scale", "weight_global_scale", ".scale")) and not (found > 0).all():
        raise CheckpointError(f"`{name}` must be above zero everywhere; got {found.min().item():.3g}.", "range")


def _read_own(config: Mapping[str, Any], rest: dict[str, Tensor]) -> dict[str, Quantized]:
    version, entries = config.get("format_version"), config.get("layers")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"quantization_config: format_version must be {FORMAT_VERSION}; got {version!r:.60}.", "unsupported"
        )
    if not isinstance(entries, dict):
        raise CheckpointError("quantization_config: `layers` must be an object.", "unsupported")
    return {name: fill(name, empty_layer(name, entry), rest) for name, entry in entries.items()}


def _read_compressed(config: Mapping[str, Any], rest: dict[str, Tensor]) -> dict[str, Quantized]:
    schemes = layouts.compressed_schemes(config)
    layers = {}
    for key in [key for key in rest if key.endswith(".weight_packed")]:
        name = key.removesuffix(".weight_packed")
        shape, packed, scale = (
            rest.get(f"{name}.{part}") for part in ("weight_shape", "weight_packed", "weight_scale")
        )
        if shape is None or scale is None or packed is None:
            raise CheckpointError(
                f"`{name}.{'weight_shape' if shape is None else 'weight_scale'}` is missing.", "missing"
            )
        if shape.shape != (2,) or shape.is_floating_point() or packed.ndim != 2 or scale.ndim != 2:
            raise CheckpointError(f"`{name}`: weight_shape, weight_packed or weight_scale has the wrong rank.", "shape")
        out, inp = shape.tolist()
        zero = f"{name}.weight_zero_point"
        groups = scale.shape[1]
        dtype = _DTYPE_NAMES.get(scale.dtype)
        if dtype is None:
            raise CheckpointError(f"`{name}.weight_scale`: dtype {scale.dtype} is not read.", "dtype")
        if not (_count(out) and _count(inp)) or not groups or inp % groups:
            raise CheckpointError(f"`{name}`: {groups} scales a row do not divide a weight of {[out, inp]}.", "shape")
        size = None if groups == 1 else inp // groups
        fits = [
            (bits, wanted)
            for bits, wanted, symmetric in schemes
            if n_words(inp, bits) == packed.shape[1]
            and (wanted == size or (groups == 1 and wanted == inp))
            and symmetric == (zero not in rest)
        ]
        if not fits:
            raise CheckpointError(f"`{name}`: no group of quantization_config describes its tensors.", "shape")
        affine = Affine(fits[0][0], fits[0][1], symmetric=zero not in rest, scale_dtype=dtype)
        rest[f"{name}.weight_shape"] = shape.to(torch.int64)
        entry = {"in": inp, "out": out, "weight": affine.to_dict()}
        if f"{name}.bias" in rest:
            entry["bias"] = _dtype_name(rest[f"{name}.bias"])
        layers[name] = fill(name, empty_layer(name, entry), rest)
    return layers


def _read_transposed(method: str, config: Mapping[str, Any], rest: dict[str, Tensor]) -> dict[str, Quantized]:
    """Read AWQ or GPTQ, whose tensors lie with the outputs last."""
    read = layouts.awq_reader(config) if method == "awq" else layouts.gptq_reader(config)
    layers: dict[str, Quantized] = {}
    for key in [key for key in rest if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        parts = {
            part: rest.pop(f"{name}.{part}")
            for part in ("qweight", "qzeros", "scales", "g_idx")
            if f"{name}.{part}" in rest
        }
        for part in ("qzeros", "scales"):
            if part not in parts:
                raise CheckpointError(f"`{name}.{part}` is missing.", "missing")
        bias = rest.pop(f"{name}.bias", None)
        weight = read(name, parts)
        _check_values(f"{name}.weight_scale", weight.scale)
        if bias is not None:
            if bias.shape != weight.shape[:1] or not bias.is_floating_point():
                raise CheckpointError(
                    f"`{name}.bias` must be {list(weight.shape[:1])} floats; got {list(bias.shape)}.", "shape"
                )
            _check_values(f"{name}.bias", bias)
        layers[name] = QLinear.of(weight, bias)
    return layers
