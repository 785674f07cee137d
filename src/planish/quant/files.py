"""Files of a checkpoint: safetensors and JSON, read with suspicion and written so that a half never shows.

Nothing else is ever read. Every fault of a file, however hostile, is one `CheckpointError`.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from planish._support import CheckpointError

_T = TypeVar("_T")

SHARD_BYTES = 2_000_000_000
SINGLE, INDEX, MANIFEST = "model.safetensors", "model.safetensors.index.json", "planish.json"

_HEADER_BYTES, _JSON_BYTES = 100_000_000, 200_000_000  # more than the largest known models need
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, refusing duplicate keys, foreign types and anything that is not plain JSON."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            raise ValueError("a key appears twice")
        return made

    raw = _read_bytes(path, _JSON_BYTES)
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise CheckpointError(f"`{path.name}` is not valid JSON: {_short(error)}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path.name}` must hold a JSON object; got {type(value).__name__}.")
    return value


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Map all tensors of a directory into memory; nothing is copied until it is used.

    Args:
        directory: Holds `model.safetensors`, or shards with their index.

    Returns:
        The tensors by name.

    Raises:
        CheckpointError: A file is absent, damaged or hostile, or index and shards disagree.
    """
    return _gather(directory, map_file)


def find_tensors(directory: Path) -> dict[str, "Span"]:
    """Find where all tensors of a directory lie, without mapping or reading them.

    Raises:
        CheckpointError: See `read_tensors`.
    """
    return _gather(directory, lambda path: _spans(path)[1])


def _gather(directory: Path, read: Callable[[Path], dict[str, _T]]) -> dict[str, _T]:
    """Apply a reader of one file to all shards of a directory."""
    if (directory / SINGLE).is_file():
        return read(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise CheckpointError(f"`{directory}` holds neither `{SINGLE}` nor `{INDEX}`.", "missing")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"`{INDEX}`: `weight_map` must be an object; got {type(weight_map).__name__}.")
    tensors: dict[str, _T] = {}
    for file in sorted({_plain_name(value) for value in weight_map.values()}):
        found = read(directory / file)
        said = {name for name, value in weight_map.items() if value == file}
        for name in sorted(said ^ found.keys()):
            which = "names" if name in said else "does not name"
            raise CheckpointError(f"`{INDEX}` {which} tensor `{name}` of `{file}`.", "name")
        tensors |= found
    return tensors


def _plain_name(value: object) -> str:
    text = value if isinstance(value, str) and value.isprintable() else ""
    if not text.endswith(".safetensors") or set(text) & set("/\\") or text[0] == "." or len(text) > 200:
        raise CheckpointError(
            f"`{INDEX}` points to {_short(value)}, which is not the plain name of a safetensors file.", "name"
        )
    return text


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: its file, the bytes in it, and what they are."""

    path: Path
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, name: str) -> Tensor:
        """Read the tensor into fresh memory, aligned as torch aligns."""
        made = torch.empty(self.shape, dtype=self.dtype)
        room = made.reshape(-1).view(torch.uint8).numpy().data
        with _reading(self.path), self.path.open("rb") as stream:
            stream.seek(self.start)
            got = stream.readinto(room) if room.nbytes else 0
        if got != room.nbytes:
            raise CheckpointError(f"`{self.path.name}`, `{name}`: only {got} of its {room.nbytes} bytes are there.")
        return made


def _spans(path: Path) -> tuple[int, dict[str, Span]]:
    """Read the header of a safetensors file, checking its every claim; return the file's size and its tensors."""
    size = _size(path)
    where = f"`{path.name}`"
    with _reading(path), path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_BYTES):
            raise CheckpointError(f"{where}: a header of {length} bytes does not fit a file of {size}.")
        raw = stream.read(length)
    header = _header(raw, where)
    start = 8 + length
    spans = sorted((e["data_offsets"][0], e["data_offsets"][1], name) for name, e in header.items())
    at = 0
    for low, high, name in spans:
        if low != at:
            raise CheckpointError(f"{where}, `{name}`: its bytes overlap another tensor's or leave a gap.")
        at = high
    if start + at != size:
        raise CheckpointError(f"{where}: its tensors end at byte {start + at}, the file at {size}.")
    return size, {
        name: Span(path, start + low, start + high, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
        for low, high in [entry["data_offsets"]]
    }


def map_file(path: Path) -> dict[str, Tensor]:
    """Map the tensors of one safetensors file into memory; nothing is copied until it is used.

    Raises:
        CheckpointError: The file is absent, damaged or hostile.
    """
    size, spans = _spans(path)
    with _reading(path):
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name, span in spans.items():
        part = mapped[span.start : span.stop]
        if span.start % span.dtype.itemsize:  # a legal file need not be aligned, a tensor must
            part = part.clone()
        if span.dtype == torch.bool and part.numel() and int(part.max()) > 1:
            raise CheckpointError(f"`{path.name}`, `{name}`: a boolean is neither 0 nor 1.", "range")
        tensors[name] = part.view(span.dtype).reshape(span.shape)
    return tensors


def _header(raw: bytes, where: str) -> dict[str, dict[str, Any]]:
    """Parse a header; what comes back has the types, shapes and sizes it claims."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            raise ValueError("a name appears twice")
        return made

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: its header is not valid JSON: {_short(error)}.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: its header must be a JSON object.")
    header.pop("__metadata__", None)  # free text; nothing here reads it
    for name, entry in header.items():
        if not name.isprintable():
            raise CheckpointError(f"{where}: {_short(name)} is not a tensor's name.", "name")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where}, `{name}`: its entry must hold dtype, shape and data_offsets.")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(f"{where}, `{name}`: dtype {_short(dtype)} is not known.", "dtype")
        if not _counts(shape) or len(shape) > 8:
            raise CheckpointError(f"{where}, `{name}`: shape {_short(shape)} is not a list of sizes.", "shape")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise CheckpointError(f"{where}, `{name}`: data_offsets {_short(offsets)} are not a span.")
        if math.prod(shape) * _DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
            raise CheckpointError(
                f"{where}, `{name}`: {dtype} {_short(shape)} does not take {_short(offsets[1] - offsets[0])} bytes.",
                "shape",
            )
    return header


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def digest(name: str, tensor: Tensor) -> str:
    """Return the checksum of a tensor: name, dtype, shape and bytes (BLAKE2b, 16 bytes, hexadecimal)."""
    made = hashlib.blake2b(f"{name}\0{_NAMES[tensor.dtype]}\0{list(tensor.shape)}\0".encode(), digest_size=16)
    made.update(_bytes(tensor))
    return made.hexdigest()


def digest_bytes(raw: bytes) -> str:
    """Return the checksum of a file's bytes or of a text."""
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """Return the checksum of a small file."""
    return digest_bytes(_read_bytes(path, 1 << 30))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors as safetensors, in shards of at most `SHARD_BYTES` where there are many.

    Args:
        directory: An existing directory.
        tensors: By name, on any device.

    Returns:
        The checksum of each tensor.

    Raises:
        CheckpointError: A tensor's dtype is not one that safetensors knows.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    sums: dict[str, str] = {}
    if len(shards) == 1:
        return write_shard(directory / SINGLE, shards[0])
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sums |= write_shard(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sums


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """Write one safetensors file, a tensor at a time: no second copy of the model in memory, the same bytes every time.

    Returns:
        The checksum of each tensor.

    Raises:
        CheckpointError: A tensor's dtype is not one that safetensors knows.
    """
    # Whole cache lines first, then by width: mapped matrices lie aligned, as allocated ones do, and give the same bits.
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % 64 > 0, -tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"`{name}`: dtype {tensor.dtype} cannot be written.", "dtype")
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]
        }  # fmt: skip
        at += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    sums = {}
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            stream.write(_bytes(tensors[name]))
            sums[name] = digest(name, tensors[name])
    return sums


@contextlib.contextmanager
def writing(target: Path, *, directory: bool = True) -> Iterator[Path]:
    """Give a temporary place next to `target`; when the body ends well it is synced to disk and takes the name.

    Args:
        target: The final name; must not exist, save as an empty directory.
        directory: Whether the place is a directory or a file yet to be made.

    Yields:
        The temporary path.

    Raises:
        CheckpointError: The target exists, the place cannot be written, or the disk is full; nothing is left behind.
    """
    if target.is_symlink() or (target.exists() and not (directory and target.is_dir() and not any(target.iterdir()))):
        raise CheckpointError(f"`{target}` exists already; choose a new name or remove it first.", "exists")
    holder: Path | None = None
    try:
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        place = holder / target.name
        if directory:
            place.mkdir()
        yield place
        for path in [*(place.rglob("*") if directory else ()), place, target.parent]:
            _sync(path)
        place.rename(target)
        _sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise CheckpointError(
                f"`{target}` exists already; choose a new name or remove it first.", "exists"
            ) from None
        raise CheckpointError(f"`{target}` cannot be written: {error.strerror or error}.", "unwritable") from None
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_side_files(source: Path, target: Path, leave: Iterable[str]) -> None:
    """Copy the files beside the tensors (tokenizer, templates, licence) that `leave` does not name."""
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and path.suffix in {".json", ".txt", ".model", ".jinja", ".md", ""}
            and path.name not in leave
        ):
            shutil.copyfile(path, target / path.name)


def _size(path: Path) -> int:
    with _reading(path):
        if not path.is_file():
            raise CheckpointError(f"`{path}` is not there.", "missing")
        return path.stat().st_size


def _read_bytes(path: Path, limit: int) -> bytes:
    size = _size(path)
    if size > limit:
        raise CheckpointError(f"`{path.name}` of {size} bytes is larger than the {limit} that are read.")
    with _reading(path):
        return path.read_bytes()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.from_file
        raise CheckpointError(f"`{path}` cannot be read: {_short(error)}.") from None


def _short(value: object) -> str:
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 120 else text[:117] + "..."
