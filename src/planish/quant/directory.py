"""A checkpoint directory as a value: its config, quantized layers, other tensors and provenance; read, written.

Beside the files that every reader knows lies `planish.json`, the manifest: a checksum of every tensor and JSON file
and the method that made them. Where it is present it is checked; a stock checkpoint without one is read as well.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from planish import __version__
from planish._support import CheckpointError
from planish.quant import files, layouts, schemes
from planish.quant.parts import Quantized

Layout = Literal["compressed-tensors", "planish", "awq", "gptq", "float"]

MANIFEST_VERSION = 1
REBUILT = ("config.json", "quantize_config.json", files.MANIFEST, files.INDEX, files.SINGLE)


@dataclass
class Checkpoint:
    """What lies in a directory.

    Attributes:
        config: `config.json` without its `quantization_config`.
        layers: Quantized layers by name.
        tensors: All other tensors by name.
        ignore: Dense layers left in float, by name.
        method: Text of the method that made it; empty where nobody said.
        layout: How it is, or was, written.
        checked: Whether a manifest vouched for every tensor.
    """

    config: dict[str, Any]
    layers: dict[str, Quantized]
    tensors: dict[str, Tensor]
    ignore: list[str] = field(default_factory=list)
    method: str = ""
    layout: str = "float"
    checked: bool = False


def read(path: Path) -> Checkpoint:
    """Read and check a checkpoint directory; tensors stay mapped from disk until they are used.

    Args:
        path: The directory.

    Returns:
        Its content.

    Raises:
        CheckpointError: Anything is absent, damaged, hostile or unknown.
    """
    if not path.is_dir():
        raise CheckpointError(f"`{path}` is not a directory.", "missing")
    manifest = files.read_json(path / files.MANIFEST) if (path / files.MANIFEST).exists() else None
    if manifest is not None:
        _check_manifest(manifest)
        for name, said in manifest["files"].items():
            if files.digest_file(path / name) != said:
                raise CheckpointError(f"`{name}` is not what was written: its checksum differs.", "checksum")
    config = files.read_json(path / "config.json")
    described = config.pop("quantization_config", None) or {}
    if not isinstance(described, dict):
        raise CheckpointError("`config.json`: quantization_config must be an object.")
    tensors = files.read_tensors(path)
    if manifest is not None:
        _check_tensors(manifest["tensors"], tensors)
    layers, rest = schemes.read_layers(described, tensors)
    ignore = described.get("ignore") or described.get("modules_to_not_convert") or []
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise CheckpointError("quantization_config: `ignore` must be a list of names.", "unsupported")
    return Checkpoint(
        config, layers, rest, list(ignore),
        method=manifest["method"] if manifest else "",
        layout=str(described["quant_method"]) if described else "float",
        checked=manifest is not None,
    )  # fmt: skip


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Check the manifest's own checksum and types."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    if manifest.get("digest") != _own_digest(body):
        raise CheckpointError(f"`{files.MANIFEST}` is not what was written: its checksum differs.", "checksum")
    if body.get("format_version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"`{files.MANIFEST}`: version {body.get('format_version')!r:.20} is not read.", "unsupported"
        )
    sums = (body.get("tensors"), body.get("files"))
    sound = all(isinstance(d, dict) and all(isinstance(v, str) for v in d.values()) for d in sums)
    if not sound or not isinstance(body.get("method"), str):
        raise CheckpointError(f"`{files.MANIFEST}`: tensors, files or method are damaged.")
    if any(set(name) & set("/\\\0") or name in ("", ".", "..") for name in body["files"]):
        raise CheckpointError(f"`{files.MANIFEST}` names a file outside its directory.", "name")


def _own_digest(body: Mapping[str, Any]) -> str:
    return files.digest_bytes(repr(sorted(body.items(), key=lambda item: item[0])).encode("utf-8", "backslashreplace"))


def _check_tensors(sums: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(sums.keys() ^ tensors.keys()):
        if name in sums:
            raise CheckpointError(f"`{name}` is missing.", "missing")
        raise CheckpointError(f"`{name}` was not written with this checkpoint.", "name")
    for name, tensor in tensors.items():
        if files.digest(name, tensor) != sums[name]:
            raise CheckpointError(f"`{name}` is not what was written: its checksum differs.", "checksum")


def encode(checkpoint: Checkpoint, layout: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Lay a checkpoint's layers out for writing.

    Args:
        checkpoint: Its content.
        layout: One of `Layout`.

    Returns:
        All tensors by name, and the `quantization_config`.

    Raises:
        CheckpointError: The layout cannot hold a layer exactly.
    """
    layers, ignore = checkpoint.layers, checkpoint.ignore
    tensors = dict(checkpoint.tensors)
    config: dict[str, Any] = {}
    stock = {n: layouts.plain(n, layout, q) for n, q in layers.items()} if layout not in ("planish", "float") else {}
    if layout in ("awq", "gptq"):
        make = layouts.awq_tensors if layout == "awq" else layouts.gptq_tensors
        for name, layer in stock.items():
            tensors |= make(name, layer)
        config = (layouts.awq_config if layout == "awq" else layouts.gptq_config)(stock, ignore)
    elif layout in ("compressed-tensors", "planish"):
        for name, made in layers.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in made.state_dict().items()}
        own = layout == "planish"
        config = schemes.own_config(layers, ignore) if own else layouts.compressed_config(stock, ignore)
    elif layers:
        raise CheckpointError("quantized layers cannot be written as an ordinary float checkpoint.", "lossy")
    return tensors, config


def write(checkpoint: Checkpoint, layout: str, place: Path) -> None:
    """Write a checkpoint into an existing (temporary) directory, the manifest last.

    Args:
        checkpoint: Its content.
        layout: One of `Layout`.
        place: May hold side files already; they are listed in the manifest.

    Raises:
        CheckpointError: The layout cannot hold a layer exactly.
    """
    tensors, described = encode(checkpoint, layout)
    config = dict(checkpoint.config)
    if described:
        config["quantization_config"] = described
    files.write_json(place / "config.json", config)
    if layout == "gptq":  # older readers look here
        files.write_json(place / "quantize_config.json", described)
    sums = files.write_tensors(place, tensors)
    write_manifest(place, sums, checkpoint.method, layout)


def write_manifest(place: Path, sums: Mapping[str, str], method: str, layout: str) -> None:
    """Write the checksums of tensors and of all JSON files but the report, which grows when the model is judged."""
    left = {files.MANIFEST, "report.json"}
    beside: Iterable[Path] = sorted(p for p in place.iterdir() if p.suffix == ".json" and p.name not in left)
    body: dict[str, Any] = {
        "format_version": MANIFEST_VERSION, "written_by": f"planish {__version__}", "layout": layout, "method": method,
        "tensors": dict(sums), "files": {p.name: files.digest_file(p) for p in beside},
    }  # fmt: skip
    files.write_json(place / files.MANIFEST, {**body, "digest": _own_digest(body)})
