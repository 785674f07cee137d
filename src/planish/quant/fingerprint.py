"""What a run of `quantize` depends on, as a few short texts: two runs with equal ones end with the same bytes."""

import hashlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import planish
from planish import kernels
from planish.quant.stream import Stream

if TYPE_CHECKING:
    from planish.quant.engine import Method, Walk


def fingerprint(walk: "Walk", method: "Method") -> dict[str, Any]:
    """Return what the result of a pass depends on.

    Args:
        walk: The float model, its batches and settings; weights on disk are read block by block.
        method: The method before it is planned.

    Returns:
        JSON-able values by what a person would call them: "model" (its structure), "weights", "batches", "method",
        "skip", "versions" (planish, torch, transformers), "machine" (device, threads, instruction set, kernels).
    """
    stream = walk.stream
    return {
        "model": _text_digest(_structure(walk.model)),
        "weights": _weights(stream),
        "batches": _batches(stream.batches),
        "method": repr(method),
        "skip": list(walk.skip),
        "versions": _versions(),
        "machine": _machine(stream.device),
    }


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs between two fingerprints, in words.

    Example:
        >>> differences({"method": "rtn()", "weights": "a"}, {"method": "rtn(bits=3)", "weights": "a"})
        ['method (rtn() there, rtn(bits=3) here)']
    """
    told = []
    for key in now:
        if stored.get(key) != now[key]:
            opaque = key in ("model", "weights", "batches")
            told.append(key if opaque else f"{key} ({_plain(stored.get(key))} there, {_plain(now[key])} here)")
    return told


def _plain(value: Any) -> str:  # noqa: ANN401  (JSON)
    return value if isinstance(value, str) else repr(value)


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _structure(model: nn.Module) -> str:
    """The model's modules with their settings, and the config it was built from."""
    config = getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        return repr(model)
    settings = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}  # type: ignore[union-attr]
    return f"{model!r}\n{sorted(settings.items())!r}"


def _weights(stream: Stream) -> str:
    """Digest every parameter and buffer, reading blocks from disk where that is where they are."""
    made = hashlib.blake2b(digest_size=16)
    on_disk = None if stream.whole else stream.weights
    inside = tuple(name + "." for name in stream.names if name)
    stream.load_rest()
    for name, tensor in _tensors(stream.model):
        if not (inside and name.startswith(inside)):
            _add(made, name, tensor)
    if stream.whole:
        return made.hexdigest()
    for block, module in zip(stream.names, stream.modules, strict=True):
        if on_disk is not None:
            on_disk.load(module, block)
        for name, tensor in _tensors(module):
            _add(made, f"{block}.{name}", tensor)
        if on_disk is not None:
            on_disk.release(module, block)
    return made.hexdigest()


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _add(made: "hashlib.blake2b", name: str, tensor: Tensor) -> None:
    """Take in a tensor: its name, dtype, shape and bytes."""
    made.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    made.update(flat.numpy().data)


def _batches(batches: list[Any]) -> str:
    made = hashlib.blake2b(digest_size=16)

    def take(path: str, value: Any) -> None:  # noqa: ANN401  (whatever the model takes)
        if isinstance(value, Tensor):
            _add(made, path, value)
        elif isinstance(value, Mapping):
            for key in value:
                take(f"{path}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for number, part in enumerate(value):
                take(f"{path}.{number}", part)
        else:
            made.update(f"{path}\0{value!r}\0".encode())

    take(str(len(batches)), batches)
    return made.hexdigest()


def _versions() -> dict[str, str]:
    loaded = sys.modules.get("transformers")  # whose code the model is, where it is one of theirs
    made = {"planish": planish.__version__, "torch": torch.__version__}
    return made if loaded is None else {**made, "transformers": str(loaded.__version__)}


def _machine(device: torch.device) -> dict[str, Any]:
    """Whatever else decides in which order floating-point sums are taken."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "matmul": torch.get_float32_matmul_precision(),
        "kernels": sorted({f"{row.op}: {row.kernel}" for row in kernels.backends()}),
    }
