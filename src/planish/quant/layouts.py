"""Layouts of stock engines: compressed-tensors, AWQ (gemm) and GPTQ, from and to codes, scales and zero points.

Writers refuse whatever the layout cannot hold exactly, and say why. Legend: O outputs, I inputs, G groups of a row.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from planish._support import CheckpointError
from planish.quant.conv import QConv
from planish.quant.formats import FP4, SCALE_DTYPES, Affine, QTensor
from planish.quant.layers import QLinear
from planish.quant.packing import pack, unpack
from planish.quant.parts import Quantized, Segments

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble k of a word holds column order[k] of its eight
_AWQ_INVERSE = [0, 4, 1, 5, 2, 6, 3, 7]


def lossy(name: str, layout: str, why: str) -> CheckpointError:
    """Build the error of a layer that a layout cannot hold exactly."""
    return CheckpointError(f"`{name}` cannot be written as {layout} without loss: {why}.", "lossy")


def not_plain(layer: Quantized) -> str | None:
    """Say why no stock layout can hold a layer, or None where they can."""
    if isinstance(layer, Segments):
        return "it is cut into segments"
    if isinstance(layer.format, FP4):
        return "its weights are four-bit floats"
    if isinstance(layer, QConv):
        return "it is a convolution"
    if layer.transform is not None:
        return "a transform stays online"
    if layer.act is not None:
        return f"its inputs are rounded to {layer.act}"
    if layer.down is not None:
        return "it has a low-rank branch"
    if layer.loras:
        return f"it carries the adapter {next(iter(layer.loras))!r}"
    if layer.format.group_size is not None and layer.in_features % layer.format.group_size:
        return f"{layer.in_features} inputs leave a shorter last group of {layer.format.group_size}"
    return None


def plain(name: str, layout: str, layer: Quantized) -> QLinear:
    """Return a layer that a stock layout can hold, or refuse."""
    why = not_plain(layer)
    if why is not None or not isinstance(layer, QLinear):
        raise lossy(name, layout, why or "it is no single layer")
    return layer


def not_compressed(layer: Quantized, dtype: torch.dtype) -> str | None:
    """Say why compressed-tensors cannot hold a layer for a model that runs in `dtype`, or None where it can.

    Stock readers cast scales to the model's dtype, so a scale must survive that.
    """
    if (why := not_plain(layer)) is not None or not isinstance(layer, QLinear):
        return why
    if layer.format.bits < 2:
        return "stock readers know 2 to 8 bits"
    scale = layer.weight_scale
    if not torch.equal(scale.to(dtype).to(scale.dtype), scale):
        name = str(dtype).removeprefix("torch.")
        return (
            f"readers cast {layer.format.scale_dtype} scales to the model's {name}; quantize with scale_dtype={name!r}"
        )
    return None


def compressed_config(layers: Mapping[str, QLinear], ignore: Iterable[str]) -> dict[str, Any]:
    """Describe plain layers as a `quantization_config` of compressed-tensors."""
    ignore = list(ignore)
    kinds: dict[tuple[int, int | None, bool], list[str]] = {}
    for name, layer in layers.items():
        kind = (layer.format.bits, layer.format.group_size, layer.format.symmetric)
        kinds.setdefault(kind, []).append(name)
    groups = {}
    for number, ((bits, size, symmetric), names) in enumerate(kinds.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": size, "dynamic": False,
                "strategy": "channel" if size is None else "group",
            },
            "input_activations": None, "output_activations": None, "format": "pack-quantized",
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None, "global_compression_ratio": None,
        "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


def compressed_schemes(config: Mapping[str, Any]) -> list[tuple[int, int | None, bool]]:
    """Read the (bits, group size, symmetric) of a compressed-tensors config, refusing what we do not run."""
    where = "quantization_config"
    if (
        config.get("format") not in ("pack-quantized", "mixed-precision")
        or config.get("quantization_status", "compressed") != "compressed"
    ):
        raise CheckpointError(
            f"{where}: only compressed `pack-quantized` is read; got {config.get('format')!r:.60}.", "unsupported"
        )
    for option in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = config.get(option)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise CheckpointError(f"{where}: `{option}` is not supported.", "unsupported")
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise CheckpointError(f"{where}: `config_groups` must be an object.", "unsupported")
    schemes: list[tuple[Any, int | None, Any]] = []
    for label, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or group.get("input_activations") or group.get("output_activations"):
            raise CheckpointError(f"{where}, `{label}`: only weights alone may be quantized.", "unsupported")
        bits, size, symmetric = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric", True)
        strategy = weights.get("strategy") or ("group" if size else "channel")
        size = None if strategy == "channel" or size == -1 else size
        sound = type(bits) is int and 1 <= bits <= 8 and type(symmetric) is bool and weights.get("type", "int") == "int"
        if not sound or strategy not in ("group", "channel") or not (size is None or (type(size) is int and size > 0)):
            raise CheckpointError(f"{where}, `{label}`: this kind of weights is not read.", "unsupported")
        if weights.get("actorder") not in (None, "weight", "static", False):
            raise CheckpointError(f"{where}, `{label}`: reordered groups (actorder) are not read.", "unsupported")
        schemes.append((bits, size, symmetric))
    return schemes


def _stored_groups(
    name: str, layout: str, config: Mapping[str, Any], parts: Mapping[str, Tensor], inp: int, out: int, bits: int
) -> int:
    """Check shapes and dtypes of AWQ or GPTQ tensors and return the group size."""
    size = config.get("group_size", config.get("q_group_size", 128))
    if type(size) is not int or size == 0 or size < -1:
        raise CheckpointError(
            f"quantization_config: `group_size` must be -1 or above 0; got {size!r:.60}.", "unsupported"
        )
    size = inp if size == -1 else size
    scales, zeros = parts["scales"], parts["qzeros"]
    groups = -(-inp // size) if size else 0
    if not inp or inp % size or scales.shape != (groups, out) or zeros.shape != (groups, out * bits // 32):
        raise CheckpointError(f"`{name}`: the shapes of its {layout} tensors do not agree.", "shape")
    if zeros.dtype != torch.int32 or scales.dtype not in SCALE_DTYPES.values():
        raise CheckpointError(
            f"`{name}`: qzeros must be int32 and scales float; got {zeros.dtype}, {scales.dtype}.", "dtype"
        )
    return size


def _as_qtensor(codes: Tensor, zero: Tensor, scales: Tensor, bits: int, size: int, symmetric: bool) -> QTensor:
    dtype = next(name for name, dtype in SCALE_DTYPES.items() if dtype == scales.dtype)
    group = None if size == codes.shape[1] else size
    made = Affine(bits, group, symmetric=symmetric, scale_dtype=dtype)
    return QTensor(codes, scales.T.contiguous(), None if symmetric else zero, made)


def awq_reader(config: Mapping[str, Any]) -> Callable[[str, Mapping[str, Tensor]], QTensor]:
    """Return the function that reads one layer's AWQ tensors."""
    bits, version = config.get("bits", config.get("w_bit", 4)), config.get("version", "gemm")
    if bits != 4 or type(bits) is not int or not isinstance(version, str) or version.lower() != "gemm":
        raise CheckpointError(
            f"quantization_config: AWQ is read at 4 bits, version gemm; got {bits!r:.20}, {version!r:.20}.",
            "unsupported",
        )

    def read(name: str, parts: Mapping[str, Tensor]) -> QTensor:
        q = _words(name, parts)
        inp, out = q.shape[0], q.shape[1] * 8
        size = _stored_groups(name, "AWQ", config, parts, inp, out, 4)
        codes, zero = (_awq_unpack(t).T.contiguous() for t in (q, parts["qzeros"]))
        return _as_qtensor(codes, zero, parts["scales"], 4, size, symmetric=False)

    return read


def gptq_reader(config: Mapping[str, Any]) -> Callable[[str, Mapping[str, Tensor]], QTensor]:
    """Return the function that reads one layer's GPTQ tensors."""
    bits, kind = config.get("bits"), config.get("checkpoint_format", "gptq")
    if type(bits) is not int or bits not in (2, 4, 8) or kind not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"quantization_config: GPTQ is read at 2, 4 or 8 bits; got {bits!r:.20}, {kind!r:.20}.", "unsupported"
        )

    def read(name: str, parts: Mapping[str, Tensor]) -> QTensor:
        q = _words(name, parts)
        inp, out = q.shape[0] * 32 // bits, q.shape[1]
        if out * bits % 32:
            raise CheckpointError(f"`{name}`: {out} outputs do not fill whole words.", "shape")
        size = _stored_groups(name, "GPTQ", config, parts, inp, out, bits)
        if "g_idx" in parts and not torch.equal(parts["g_idx"].cpu().long(), torch.arange(inp) // size):
            raise CheckpointError(f"`{name}.g_idx`: reordered groups (desc_act) are not read.", "unsupported")
        codes = unpack(q.T.contiguous(), bits, inp)
        zero = unpack(parts["qzeros"], bits, out).T.contiguous()
        if kind == "gptq":  # stores z - 1
            if int(zero.max()) == (1 << bits) - 1:
                raise CheckpointError(
                    f"`{name}.qzeros`: readers disagree on a stored {(1 << bits) - 1} in GPTQ v1.", "range"
                )
            zero = zero + 1
        symmetric = config.get("sym") is True and bool((zero == 1 << (bits - 1)).all())
        return _as_qtensor(codes, zero, parts["scales"], bits, size, symmetric)

    return read


def _words(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    q = parts["qweight"]
    if q.ndim != 2 or q.dtype != torch.int32 or not q.numel():
        raise CheckpointError(f"`{name}.qweight` must be a matrix of int32; got {q.dtype} {list(q.shape)}.", "dtype")
    return q


def _awq_pack(codes: UInt8[Tensor, "rows columns"]) -> Int32[Tensor, "rows words"]:
    return pack(codes.unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1), 4)


def _awq_unpack(words: Int32[Tensor, "rows words"]) -> UInt8[Tensor, "rows columns"]:
    codes: Tensor = unpack(words.contiguous(), 4, words.shape[1] * 8).unflatten(1, (-1, 8))[..., _AWQ_INVERSE]
    return codes.flatten(1)


def half_scales(name: str, layout: str, layer: QLinear) -> Tensor:
    """Return a layer's scales in float16, (O, G), or refuse where that changes one."""
    scale = layer.weight_scale
    half = scale.to(torch.float16)
    if not torch.equal(half.to(scale.dtype), scale):
        raise lossy(name, layout, f"its {layer.format.scale_dtype} scales are not all float16 values")
    return half


def awq_tensors(name: str, layer: QLinear) -> dict[str, Tensor]:
    """Write one layer as AWQ (gemm)."""
    why = not_plain(layer)
    if why is None and layer.format.bits != 4:
        why = f"AWQ has 4 bits, the layer {layer.format.bits}"
    if why is None and layer.out_features % 8:
        why = f"{layer.out_features} outputs are not a multiple of 8"
    if why is not None:
        raise lossy(name, "AWQ", why)
    made = {
        "qweight": _awq_pack(layer.weight.codes.T.contiguous()),
        "qzeros": _awq_pack(layer.zeros().T.contiguous()),
        "scales": half_scales(name, "AWQ", layer).T.contiguous(),
    }
    return _named(name, made, layer)


def gptq_tensors(name: str, layer: QLinear) -> dict[str, Tensor]:
    """Write one layer as GPTQ v1."""
    bits, zero = layer.format.bits, layer.zeros()
    why = not_plain(layer)
    if why is None and bits not in (2, 4, 8):
        why = f"GPTQ has 2, 4 or 8 bits, the layer {bits}"
    if why is None and (layer.out_features * bits % 32 or layer.in_features * bits % 32):
        why = f"a weight of {[layer.out_features, layer.in_features]} does not fill whole words"
    if why is None and int(zero.min()) < 1:
        why = "a zero point is 0, which readers of v1 (it stores z - 1) decode in different ways"
    if why is not None:
        raise lossy(name, "GPTQ", why)
    size = layer.in_features // layer.weight_scale.shape[1]
    made = {
        "qweight": layer.weight_packed.T.contiguous(),
        "qzeros": pack((zero - 1).T.contiguous(), bits),
        "scales": half_scales(name, "GPTQ", layer).T.contiguous(),
        "g_idx": (torch.arange(layer.in_features) // size).to(torch.int32),
    }
    return _named(name, made, layer)


def _named(name: str, made: dict[str, Tensor], layer: QLinear) -> dict[str, Tensor]:
    if layer.bias is not None:
        made["bias"] = layer.bias
    return {f"{name}.{part}": tensor for part, tensor in made.items()}


def one_scheme(layers: Mapping[str, QLinear], layout: str) -> tuple[int, int, bool]:
    """Return the (bits, group size or -1, symmetric) that all layers share, or refuse: AWQ and GPTQ name only one."""
    if not layers:
        raise CheckpointError(f"there is no quantized layer to write as {layout}.", "missing")
    widths = {q.format.bits for q in layers.values()}
    sizes: set[int] | None = None
    for layer in layers.values():
        groups = layer.weight_scale.shape[1]
        fits = {layer.in_features // groups} | ({-1} if groups == 1 else set())  # one group a row goes by both names
        sizes = fits if sizes is None else sizes & fits
    if len(widths) > 1 or not sizes:
        raise CheckpointError(f"{layout} has one width and one group size for all layers; these differ.", "lossy")
    bits, size = widths.pop(), max(sizes)
    symmetric = all(bool((q.zeros() == q.format.middle).all()) for q in layers.values())
    return bits, size, symmetric


def awq_config(layers: Mapping[str, QLinear], ignore: Iterable[str]) -> dict[str, Any]:
    """Describe layers as a `quantization_config` of AWQ."""
    _, size, _ = one_scheme(layers, "AWQ")
    return {
        "quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": list(ignore) or None,
    }  # fmt: skip


def gptq_config(layers: Mapping[str, QLinear], ignore: Iterable[str]) -> dict[str, Any]:
    """Describe layers as a `quantization_config` of GPTQ."""
    bits, size, symmetric = one_scheme(layers, "GPTQ")
    return {
        "quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": False,
        "checkpoint_format": "gptq", "lm_head": any(name.endswith("lm_head") for name in layers),
    }  # fmt: skip
