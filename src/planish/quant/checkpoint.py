"""Save and load: the common language where it is enough, our own where it is not.

Layers that stock engines know (an `Affine` weight, every transform folded) are written as compressed-tensors
`pack-quantized`, which transformers and vLLM read without planish; anything else keeps the same tensor names plus
`transform.*`, `down` and `up`, under `quant_method: planish`. Only safetensors and JSON are ever read.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import CheckpointError, bad, require, warn_once
from planish.quant import directory, files, fitting, layouts, naming, schemes
from planish.quant.directory import Checkpoint
from planish.quant.experts import unfuse
from planish.quant.layers import QLinear
from planish.quant.parts import Quantized, Segments, quantized_layers
from planish.quant.precision import HALF
from planish.quant.report import Report

_LAYOUTS = ("auto", "compressed-tensors", "planish")
_NO_ROUTERS = (nn.Linear, nn.Embedding, QLinear, Segments)
_COUNTS = 1_000_000  # no field of a config that counts things is larger


def save(
    model: nn.Module,
    path: str | Path,
    *,
    layout: str = "auto",
    rounded: bool = True,
    tokenizer: Any | None = None,  # noqa: ANN401  (any transformers tokenizer or processor)
    report: Report | None = None,
    kept: torch.dtype | None = None,
) -> str:
    """Write a model as a Hugging Face directory; the model stays as it is.

    The directory appears under its name whole or not at all.

    Args:
        model: A quantized model; with `config` and `generation_config`, as transformers' models have, they are
            written too.
        path: A name that does not exist yet.
        layout: "compressed-tensors" (stock engines read it), "planish" (holds everything), or "auto", the default: the
            first where it holds every layer exactly, else the second, with a warning that says why.
        rounded: False writes a float (smoothed) model, without quantized layers, as an ordinary directory.
        tokenizer: Written beside the model.
        report: Written as `report.json`; its method becomes the checkpoint's provenance.
        kept: Half precision in which float32 matrices outside quantized layers are written, where that is exact (see
            `round_kept`); readers widen them again. Default: everything as it is.

    Returns:
        The layout that was written: "compressed-tensors", "planish" or "float".

    Raises:
        ValueError: `layout` is unknown; the model has no quantized layers and `rounded` is True, or has some and
            `rounded` is False; `kept` is not a half precision.
        CheckpointError: The layout asked for, or `kept`, cannot hold a layer; the target exists; the disk is
            full or read-only.

    Example:
        >>> import tempfile, torch
        >>> from planish.quant import load, quantize, rtn, save
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = make()
        >>> _ = quantize(model, [torch.randn(4, 64)], rtn(group_size=32))
        >>> with tempfile.TemporaryDirectory() as home:
        ...     layout = save(model, home + "/small")
        ...     twin = load(home + "/small", into=make())
        >>> layout, torch.equal(twin(torch.ones(1, 64)), model(torch.ones(1, 64)))
        ('planish', True)
    """
    if layout not in _LAYOUTS:
        raise bad("save", "layout", f"one of {', '.join(_LAYOUTS)}", layout)
    if kept not in (None, *HALF):
        raise bad("save", "kept", "torch.float16, torch.bfloat16 or None", kept)
    layers = quantized_layers(model)
    if rounded != bool(layers):
        wanted = "a model with QLinear layers (quantize it first, or pass rounded=False)"
        raise bad("save", "model", wanted if rounded else "a float model when rounded=False", type(model).__name__)
    if isinstance(model, Quantized):
        raise bad("save", "model", "a module that holds layers", "a single layer; put it into a Sequential")
    hub = _is_hub_model(model)
    config = _config(model)
    checkpoint = Checkpoint(
        config, layers, {n: _narrowed(n, t, kept) for n, t in _float_tensors(model, layers).items()},
        ignore=[name for name, m in model.named_modules() if isinstance(m, nn.Linear)] + _routers(model),
        method=report.method if report is not None else "",
    )  # fmt: skip
    layout = _layout(layout, model, layers, hub) if layers else "float"
    if layout != "planish":
        checkpoint = naming.renamed(checkpoint, naming.stock_names(model))
    with files.writing(Path(path)) as place:
        if hub and getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(place)  # type: ignore[union-attr, operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        if report is not None:
            files.write_json(place / "report.json", report.to_json())
        directory.write(checkpoint, layout, place)
    return layout


def _is_hub_model(model: nn.Module) -> bool:
    return hasattr(model, "config") and callable(getattr(model.config, "to_diff_dict", None))


def _config(model: nn.Module) -> dict[str, Any]:
    """Return the model's config without what an earlier quantization left in it (GGUF files loaded by transformers)."""
    if not _is_hub_model(model):
        return {"model_type": "planish", "class": type(model).__name__, "dtype": str(_dtype(model))[6:]}
    made: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    for stale in ("quantization_config", "_pre_quantization_dtype", "_name_or_path"):
        made.pop(stale, None)
    made["architectures"] = [type(model).__name__]
    made["dtype"] = str(_dtype(model)).removeprefix("torch.")
    return made


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which a model runs: that of most of its float values outside quantized layers."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in model.parameters():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.get_default_dtype()


def _float_tensors(model: nn.Module, layers: dict[str, Quantized]) -> dict[str, Tensor]:
    """Return the tensors outside quantized layers; of tied ones only the first."""
    inside = tuple(name + "." for name in layers)
    made: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        if inside and name.startswith(inside):
            continue
        if tensor.device.type == "meta":
            raise bad("save", "model", "a model whose tensors are all loaded", f"`{name}` on the meta device")
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        made[name] = tensor
    return made


def _narrowed(name: str, tensor: Tensor, kept: torch.dtype | None) -> Tensor:
    """Return a float32 matrix in half precision, refused where that would change it; anything else as it is."""
    if kept is None or tensor.ndim < 2 or tensor.dtype != torch.float32:
        return tensor
    half = tensor.to(kept)
    if not torch.equal(half.float(), tensor):
        raise layouts.lossy(name, str(kept)[6:], "not all its values are; round_kept makes them so")
    return half


@torch.no_grad()
def round_kept(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the float32 matrices outside quantized layers to values of half precision, in place; they stay float32.

    For models whose source was no finer (a GGUF file): `save(..., kept=dtype)` then writes them at half the size, and
    what is judged in memory is what will be read from disk.

    Args:
        model: A quantized model.
        dtype: torch.float16 or torch.bfloat16.

    Raises:
        ValueError: `dtype` is neither, or a value is too large for it; the sentence names the tensor.

    Example:
        >>> model = torch.nn.Linear(1, 2)
        >>> _ = torch.nn.init.constant_(model.weight, 0.1)
        >>> round_kept(model, torch.float16)
        >>> model.weight.dtype, bool(model.weight[0] == torch.tensor(0.1).half())
        (torch.float32, True)
    """
    if dtype not in HALF:
        raise bad("round_kept", "dtype", "torch.float16 or torch.bfloat16", dtype)
    made = [(n, p, p.to(dtype).float()) for n, p in model.named_parameters() if p.ndim > 1 and p.dtype == torch.float32]
    for name, _, rounded in made:
        if not torch.isfinite(rounded).all():
            raise bad("round_kept", "model", f"one whose values fit {str(dtype)[6:]}", f"larger ones in `{name}`")
    for _, parameter, rounded in made:
        parameter.data = rounded


def _widened(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Let a model that its config calls float32 be that, in place; on disk some of it may have been narrower."""
    if config.get("dtype", config.get("torch_dtype")) == "float32":
        for parameter in model.parameters():
            if parameter.dtype in HALF:
                parameter.data = parameter.data.float()
    return model


def _routers(model: nn.Module) -> list[str]:
    """Return modules that hold a matrix of their own without being a Linear: stock engines may build them as one."""
    held = {n: m._parameters.get("weight") for n, m in model.named_modules() if not isinstance(m, _NO_ROUTERS)}
    return [name for name, weight in held.items() if weight is not None and weight.ndim == 2]


def _layout(layout: str, model: nn.Module, layers: dict[str, Quantized], hub: bool) -> str:
    """Decide between the common layout and ours."""
    if layout == "planish" or (layout == "auto" and not hub):  # stock engines build only what transformers describes
        return "planish"
    dense = _dense_names(model) if hub else set(layers)
    dtype = _dtype(model)
    for name, layer in layers.items():
        why = layouts.not_compressed(layer, dtype)
        if why is None and name not in dense:
            why = "stock readers expect something other than nn.Linear there"
        if why is None:
            continue
        if layout == "compressed-tensors":
            raise layouts.lossy(name, layout, why)
        warn_once(f"saved in planish's own layout, which stock engines read only through its plugin: `{name}`: {why}.")
        return "planish"
    return "compressed-tensors"


def _dense_names(model: nn.Module) -> set[str]:
    """Return what is nn.Linear in the model that a stock reader builds from the config."""
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    unfuse(skeleton)  # in a checkpoint, every expert has its own linears
    return {name for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)}


def load(path: str | Path, *, into: nn.Module | None = None, device: torch.device | str | None = None) -> nn.Module:
    """Read a checkpoint directory: ours, or a stock compressed-tensors, AWQ or GPTQ one.

    Everything is checked before a model is touched. Weights are mapped from disk and read when they are used.

    Args:
        path: The directory.
        into: A module of the right structure, filled in place and returned; its dense layers are exchanged for
            quantized ones where the checkpoint has them, and dtypes become the checkpoint's. Default: the model that
            `config.json` describes, built by transformers.
        device: Where the model goes; default where it is, the CPU for a new one.

    Returns:
        The model, in eval mode when it is new.

    Raises:
        CheckpointError: Something is absent, damaged, hostile or unknown, or does not fit the model, which then stays
            as it was; `reason` says which of a closed list.
        MissingExtra: transformers is needed and not installed.

    Example:
        >>> load("no/such/place")
        Traceback (most recent call last):
        ...
        planish._support.CheckpointError: `no/such/place` is not a directory.
    """
    checkpoint = directory.read(Path(path))
    if into is not None:
        fitting.fill(into, checkpoint)
        _widened(into, checkpoint.config)
        return into if device is None else into.to(device)
    model = skeleton(checkpoint)
    checkpoint = fitting.fill(model, checkpoint)
    _widened(model, checkpoint.config)
    if (Path(path) / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        transformers = require("transformers", "transformers", "load")
        with _foreign("generation_config.json"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    if checkpoint.layers:  # so that transformers' own save_pretrained says what the tensors are
        model.config.quantization_config = schemes.own_config(checkpoint.layers, checkpoint.ignore)  # type: ignore[union-attr]
    model.eval()
    return model if device is None else model.to(device)


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Build the model that a checkpoint's config describes, its parameters on the meta device.

    Raises:
        CheckpointError: The config is hostile or damaged, or the checkpoint does not fit the model.
        MissingExtra: transformers is not installed.
    """
    transformers = require("transformers", "transformers", "load")
    accelerate = require("accelerate", "transformers", "load")
    config = checkpoint.config
    kind, names = config.get("model_type"), config.get("architectures")
    if kind == "planish":
        raise CheckpointError(
            "`config.json` describes no transformers model: pass `into=`, a module to fill.", "unsupported"
        )
    if not isinstance(kind, str) or not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("`config.json` must name `model_type` and `architectures`.", "unsupported")
    _check_counts(config, len(checkpoint.tensors) + len(checkpoint.layers))
    builder = getattr(transformers, names[0], None) if names[0].isidentifier() else None
    if not (isinstance(builder, type) and issubclass(builder, transformers.PreTrainedModel)):
        raise CheckpointError(f"`config.json`: transformers has no architecture {names[0]!r:.60}.", "unsupported")
    with _foreign("config.json"):
        made = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            probe: nn.Module = builder._from_config(copy.deepcopy(made))  # type: ignore[attr-defined]
    fitting.check(*naming.fitted(probe, checkpoint))  # sizes that the tensors confirm are safe to build
    if sum(b.numel() for b in probe.buffers()) > _COUNTS * 256:
        raise CheckpointError("`config.json`: the model would hold more buffers than any known one.", "range")
    with _foreign("config.json"), accelerate.init_empty_weights(include_buffers=False):
        model: nn.Module = builder._from_config(made)  # type: ignore[attr-defined]
    return model


def _check_counts(config: dict[str, Any], tensors: int) -> None:
    """Refuse a config that would build more layers than the checkpoint has tensors, before it is built."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, tensors)
        if type(value) is int and (key.startswith(("num_", "n_")) or "layers" in key):
            most = tensors if "layer" in key else _COUNTS
            if not -1 <= value <= most:
                raise CheckpointError(f"`config.json`: {key} must be at most {most}; got {value}.", "range")


@contextlib.contextmanager
def _foreign(file: str) -> Iterator[None]:
    """Turn whatever transformers makes of a hostile file into one sentence: its own types are not a closed list."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"`{file}`: transformers cannot build the model ({text[:160]}).", "unsupported") from None


def inspect(path: str | Path) -> dict[str, Any]:
    """Say what is in a checkpoint, after checking it.

    Args:
        path: A checkpoint directory.

    Returns:
        JSON-able facts: `layout`, `method` (provenance, empty where nobody said), `checked` (whether a manifest vouched
        for every byte), `bytes`, `quantized_bytes`, `parameters`, `bits_per_weight` of the quantized layers, `formats`
        (layers by format), `transforms`, `low_rank`, `float_layers`, `architecture`.

    Raises:
        CheckpointError: See `load`.

    Example:
        >>> inspect("no/such/place")
        Traceback (most recent call last):
        ...
        planish._support.CheckpointError: `no/such/place` is not a directory.
    """
    found = directory.read(Path(path))
    formats: dict[str, int] = {}
    parts = [p for q in found.layers.values() for p in q.modules() if isinstance(p, QLinear)]
    for layer in parts:
        text = str(layer.format) + (f", inputs {layer.act}" if layer.act is not None else "")
        formats[text] = formats.get(text, 0) + 1
    quantized = sum(t.nbytes for q in found.layers.values() for t in q.state_dict().values())
    weights = sum(q.in_features * q.out_features for q in found.layers.values())
    names = found.config.get("architectures") or [found.config.get("class")]
    return {
        "layout": found.layout,
        "architecture": names[0] if isinstance(names, list) and names else None,
        "method": found.method,
        "checked": found.checked,
        "bytes": quantized + sum(t.nbytes for t in found.tensors.values()),
        "quantized_bytes": quantized,
        "parameters": weights + sum(t.numel() for t in found.tensors.values()),
        "bits_per_weight": 8 * quantized / weights if weights else None,
        "formats": formats,
        "transforms": sum(q.transform is not None for q in parts),
        "low_rank": sum(q.down is not None for q in parts),
        "float_layers": found.ignore,
    }
