"""Nothing is lost: every finished block lies on disk, and an interrupted run goes on where it stopped.

A journal is a directory. `journal.json` says which run it belongs to; `block-00007.safetensors` holds what block 7
became and `block-00007.json`, written after it, its checksums: a block without a sound pair was never finished.
`search-*` hold where a search stands (the hidden states of all its candidates, which may take more room than the
model), `decision-*.json` what it found. Every file appears under its name whole, and is on the disk by then.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from planish._support import CheckpointError, bad, warn_once
from planish.quant import files, schemes
from planish.quant.engine import Method, Walk, place
from planish.quant.fingerprint import differences, fingerprint
from planish.quant.parts import Quantized, in_place_of, quantized_layers
from planish.quant.report import BlockReport
from planish.quant.stream import Block

logger = logging.getLogger("planish")

FORMAT_VERSION = 1
_HEADER, _LOCK = "journal.json", "lock"
_OURS = (_HEADER, _LOCK, "block-*.json", "block-*.safetensors", "search-*", "decision-*.json", ".*.partial-*")


class Journal:
    """Keep a run of `quantize` in a directory, so that it can be killed at any moment and goes on.

    The run that goes on ends with the same bytes as one that was never interrupted. The directory belongs to one run:
    the same weights, batches, method, versions and number of threads. One process at a time may use it.

    Args:
        path: A directory; made when it is not there. It must be empty or a journal.
        fresh: Throw away what an earlier run left there. Default False: go on, or refuse if it was another run's.

    Example:
        >>> import tempfile, torch
        >>> from planish.quant import quantize, rtn
        >>> with tempfile.TemporaryDirectory() as home:
        ...     model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        ...     report = quantize(model, [torch.ones(4, 64)], rtn(group_size=32), journal=Journal(home))
        ...     sorted(p.name for p in Journal(home).path.iterdir())
        ['block-00000.json', 'block-00000.safetensors', 'journal.json', 'lock']
    """

    def __init__(self, path: str | Path, *, fresh: bool = False) -> None:
        self.path, self.fresh = Path(path), fresh

    @contextmanager
    def opened(self, walk: Walk, method: Method) -> Iterator[None]:
        """Hold the directory for one run.

        Args:
            walk: The run's model and data.
            method: Its method, before it is planned.

        Raises:
            ValueError: The directory holds another run, or is not a journal; the sentence says what differs.
            RuntimeError: Another process uses it.
            CheckpointError: It cannot be written.
        """
        with self._locked():
            now = {"format_version": FORMAT_VERSION, "blocks": walk.blocks, **fingerprint(walk, method)}
            if self.fresh or not (self.path / _HEADER).exists():
                self._clear()
                self._write_json(_HEADER, now)
            else:
                self._check(now)
                for left in self.path.glob(".*.partial-*"):  # the half-written file of a run that was killed
                    shutil.rmtree(left)
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory against other processes; the lock dies with its holder."""
        import fcntl  # noqa: PLC0415  (POSIX only: elsewhere the rest of this module still imports)

        handle = -1
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            holder = os.read(handle, 20).decode().strip() or "another"
            os.close(handle)
            raise RuntimeError(f"Journal: `{self.path}` is in use by process {holder}.") from None
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            raise CheckpointError(
                f"Journal: `{self.path}` cannot be written: {error.strerror or error}.", "unwritable"
            ) from None
        try:
            yield
        finally:
            os.close(handle)

    def _clear(self) -> None:
        """Remove what journals leave, and refuse to share a directory with anything else."""
        ours = {path for pattern in _OURS for path in self.path.glob(pattern)}
        strangers = sorted(path.name for path in self.path.iterdir() if path not in ours)
        if strangers:
            raise bad("Journal", "path", "an empty directory or a journal", f"{self.path}, which holds {strangers[0]}")
        for path in sorted(ours - {self.path / _LOCK}, key=lambda p: p.name != _HEADER):  # the header first
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _check(self, now: dict[str, Any]) -> None:
        """Refuse a directory that another run left."""
        try:
            stored = self._read_json(_HEADER)
        except CheckpointError as error:
            raise ValueError(f"Journal: {error} Give another directory, or fresh=True to start over.") from None
        if told := differences(stored, now):
            raise ValueError(
                f"Journal: `{self.path}` belongs to another run, which differs in {', '.join(told)}; "
                f"give another directory, or fresh=True to start over."
            )

    def restore(self, index: int, block: Block) -> BlockReport | None:
        """Put a finished block's layers in place and return its report; None if it is not finished.

        A block whose file is damaged is done again, and a warning says so.

        Args:
            index: Its number.
            block: The block, in float, with the float model's inputs: what it makes of them goes into the report.

        Returns:
            The report, its `clean` filled in.
        """
        pair = _block(index)
        if not (self.path / f"{pair}.json").exists():
            return None
        try:
            body, tensors = self._read(pair)
            layers, rest = _layers(body, {n: t.to(block.device, copy=True) for n, t in tensors.items()}, block.name)
            there = _state(block, layers)
            if {n: t.shape for n, t in there.items()} != {n: t.shape for n, t in rest.items()}:
                raise CheckpointError(f"`{pair}.safetensors` does not fit {block.name}.", "name")
        except CheckpointError as error:
            warn_once(f"Journal: block {block.name or 'model'} is done again: {error}")
            self._forget(pair)
            return None
        clean = list(block.run())
        place(block, layers)
        for name, tensor in there.items():
            tensor.data = rest[name].to(tensor.dtype)
        logger.info("journal: block %s was finished before", block.name or "model")
        return BlockReport(**body["report"], clean=clean)

    def store(self, index: int, block: Block, entry: BlockReport) -> None:
        """Keep a finished block.

        Raises:
            CheckpointError: The disk is full or read-only; blocks kept before are unharmed.
            TypeError: The block holds what cannot be rebuilt: a layer of an unknown class, or a transform that is
                applied outside a quantized layer.
        """
        layers = quantized_layers(block.module)
        for name, module in block.module.named_modules():
            if module._forward_pre_hooks:
                raise TypeError(f"Journal: `{block.name}.{name}` applies a transform outside a quantized layer.")
        for name in _state(block, layers):
            if name not in block.stored:
                raise TypeError(f"Journal: `{block.name}.{name}` was not in the float block and cannot be kept.")
        prefix = f"{block.name}." if block.name else ""
        tensors = {prefix + name: tensor for name, tensor in block.module.state_dict().items()}
        report = asdict(entry)
        report.pop("clean")
        described = {name: schemes.describe(name, layer) for name, layer in layers.items()}
        self._write(_block(index), tensors, {"block": block.name, "report": report, "layers": described})

    def recall(self, key: str) -> Any | None:  # noqa: ANN401  (JSON)
        """Return what was remembered under a key, or None; a damaged file is forgotten, and a warning says so."""
        path = self.path / _decision(key)
        if not path.exists():
            return None
        try:
            return self._read_json(path.name)["value"]
        except CheckpointError as error:
            warn_once(f"Journal: what was found for {key} is searched again: {error}")
            path.unlink()
            return None

    def remember(self, key: str, value: Any) -> None:  # noqa: ANN401  (JSON)
        """Keep a decision under a key, in place of an earlier one.

        Raises:
            CheckpointError: The disk is full or read-only.
        """
        (self.path / _decision(key)).unlink(missing_ok=True)
        self._write_json(_decision(key), {"key": key, "value": value})

    def attach(self, model: nn.Module) -> None:
        """Put all finished blocks into the model that was quantized, in place, mapped from the journal's files.

        For a model whose weights were read from disk and let go: it can be run and saved afterwards. Nothing is read
        before it is used, and what was read can be dropped again by the system.

        Args:
            model: The model that `quantize` was given.

        Raises:
            CheckpointError: A block is not finished, or its file is damaged or does not fit.
        """
        header = self._read_json(_HEADER)
        for index in range(header["blocks"]):
            body, tensors = self._read(_block(index))
            module = model.get_submodule(body["block"])
            layers, rest = _layers(body, tensors, body["block"])
            for name, layer in layers.items():
                there = module.get_submodule(name)
                layer.training = there.training
                module.set_submodule(name, in_place_of(there, cast(Quantized, layer)))
            for name, tensor in rest.items():
                owner, _, last = name.rpartition(".")
                holder = module.get_submodule(owner)
                made = nn.Parameter(tensor, requires_grad=False) if last in holder._parameters else tensor
                setattr(holder, last, made)
            if not body["block"]:  # its blocks were no chain, and it was processed whole
                return

    def pause(self, key: str, index: int, states: Mapping[int, list[Tensor]]) -> None:
        """Keep where a search stands: the hidden states of its candidates after block `index`.

        Raises:
            CheckpointError: The disk is full or read-only.
        """
        tensors = {f"{c}.{n}": state for c, hidden in states.items() for n, state in enumerate(hidden)}
        before = self._paused(key)
        self._write(f"{_search(key)}-{index:05d}", tensors, {"key": key, "index": index})
        for pair in before:
            self._forget(pair)

    def resume(self, key: str) -> tuple[int, dict[int, list[Tensor]]] | None:
        """Return what was last paused under a key, or None; damaged files are forgotten, and a warning says so."""
        for pair in self._paused(key):
            try:
                body, tensors = self._read(pair)
            except CheckpointError as error:
                warn_once(f"Journal: a search is done again from its start: {error}")
                self._forget(pair)
                continue
            states: dict[int, list[Tensor]] = {}
            for name in sorted(tensors, key=lambda name: [int(n) for n in name.split(".")]):
                states.setdefault(int(name.partition(".")[0]), []).append(tensors[name].clone())
            return body["index"], states
        return None

    def drop(self, key: str) -> None:
        """Forget what was paused under a key: it is decided."""
        for pair in self._paused(key):
            self._forget(pair)

    def _paused(self, key: str) -> list[str]:
        """Return the files of a search, latest first; after a kill there may be two."""
        return sorted((path.stem for path in self.path.glob(f"{_search(key)}-*.json")), reverse=True)

    def _write(self, pair: str, tensors: dict[str, Tensor], body: dict[str, Any]) -> None:
        """Write tensors, then the description that makes them count."""
        self._forget(pair)
        with files.writing(self.path / f"{pair}.safetensors", directory=False) as place_:
            sums = files.write_shard(place_, tensors)
        self._write_json(f"{pair}.json", {**body, "tensors": sums})

    def _read(self, pair: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a description and its tensors, mapped, every byte checked."""
        body = self._read_json(f"{pair}.json")
        tensors = files.map_file(self.path / f"{pair}.safetensors")
        if {name: files.digest(name, tensor) for name, tensor in tensors.items()} != body["tensors"]:
            raise CheckpointError(f"`{pair}.safetensors` is not what was written: its checksum differs.", "checksum")
        return body, tensors

    def _forget(self, pair: str) -> None:
        """Remove tensors and their description, that one first."""
        for suffix in ("json", "safetensors"):
            (self.path / f"{pair}.{suffix}").unlink(missing_ok=True)

    def _read_json(self, name: str) -> dict[str, Any]:
        body = files.read_json(self.path / name)
        if body.pop("digest", None) != _digest(body):
            raise CheckpointError(f"`{self.path / name}` is not what was written: its checksum differs.", "checksum")
        return body

    def _write_json(self, name: str, body: dict[str, Any]) -> None:
        body = json.loads(json.dumps(body))  # as it will be read: tuples become lists
        with files.writing(self.path / name, directory=False) as place_:
            files.write_json(place_, {**body, "digest": _digest(body)})


def _digest(body: dict[str, Any]) -> str:
    return files.digest_bytes(repr(sorted(body.items())).encode("utf-8", "backslashreplace"))


def _block(index: int) -> str:
    return f"block-{index:05d}"


def _search(key: str) -> str:
    return f"search-{files.digest_bytes(key.encode())}"


def _decision(key: str) -> str:
    return f"decision-{files.digest_bytes(key.encode())}.json"


def _layers(
    body: dict[str, Any], tensors: dict[str, Tensor], block: str
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Rebuild a block's quantized layers; return them and the tensors that belong to none, by name in the block."""
    prefix = f"{block}." if block else ""
    if not all(name.startswith(prefix) for name in tensors):
        raise CheckpointError(f"the file of block {block} holds tensors of another.", "name")
    rest = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    layers: dict[str, nn.Module] = {
        name: schemes.fill(name, schemes.empty_layer(name, entry), rest) for name, entry in body["layers"].items()
    }
    return layers, rest


def _state(block: Block, layers: dict[str, Any]) -> dict[str, Tensor]:
    """Return what a block keeps outside its quantized layers."""
    inside = tuple(f"{name}." for name in layers)
    state = block.module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not (inside and name.startswith(inside))}
