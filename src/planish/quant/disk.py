"""A model larger than memory: weights read from a checkpoint when a block's turn comes, results that never gather.

    model, weights = open_model("Llama-3-8B")
    journal = Journal("work")
    quantize(model, batches, method, weights=weights, journal=journal)
    assemble(journal, model, "Llama-3-8B-4bit")

Tensors are read into fresh memory, not mapped: what is let go is gone at once, and every tensor is aligned like one
that torch made, so that the results are those of a model in memory, bit for bit.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import CheckpointError, bad, release_memory, require
from planish.quant import files
from planish.quant.checkpoint import round_kept, save
from planish.quant.journal import Journal
from planish.quant.layers import QLinear
from planish.quant.report import Report

logger = logging.getLogger("planish")


class SafetensorsWeights:
    """Parameters of a model on the meta device, read from a directory of safetensors files block by block.

    Args:
        path: Directory with `model.safetensors`, or shards and their index.
        model: The model, its parameters on the meta device; persistent buffers go there too and are read as well.

    Raises:
        CheckpointError: A file is absent or damaged, or its names or shapes are not the model's.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as home:
        ...     save_file({"0.weight": torch.ones(2, 2)}, home + "/model.safetensors")
        ...     model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False, device="meta"))
        ...     SafetensorsWeights(home, model).load(model[0], "0")
        ...     model[0].weight.sum().item()
        4.0
    """

    def __init__(self, path: str | Path, model: nn.Module) -> None:
        spans = files.find_tensors(Path(path))
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to("meta")
        wanted = _slots(model)
        names = _match(model, set(wanted), set(spans))
        if names is None:
            stray = sorted(spans.keys() ^ wanted.keys())[0]
            raise CheckpointError(f"`{stray}` is in only one of the model and `{path}`.", "name")
        self._spans = {name: spans[stored] for name, stored in names.items()}
        for name, span in self._spans.items():
            if span.shape != tuple(wanted[name].shape):
                sizes = f"must have shape {list(wanted[name].shape)}; got {list(span.shape)}"
                raise CheckpointError(f"`{span.path.name}`, `{names[name]}` {sizes}.", "shape")
        homes: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    homes.setdefault(id(parameter), []).append((module, name))
        # only of tied parameters: whatever is held here keeps its weights in memory
        self._tied = {(id(m), n): group for group in homes.values() if len(group) > 1 for m, n in group}

    def load(self, module: nn.Module, name: str, *, recurse: bool = True) -> None:
        """Read the parameters and buffers of the submodule `name` that are on the meta device."""
        for inner, part in module.named_modules(prefix=name) if recurse else [(name, module)]:
            if isinstance(part, QLinear):
                raise bad("SafetensorsWeights.load", "module", "a float model's", f"`{inner}`, which is quantized")
            for last, tensor in [*part._parameters.items(), *part._buffers.items()]:
                if tensor is None or tensor.device.type != "meta":
                    continue
                full = f"{inner}.{last}" if inner else last
                made = self._spans[full].read(full).to(tensor.dtype)
                if last in part._buffers:
                    part._buffers[last] = made
                    continue
                self._set(part, last, nn.Parameter(made, requires_grad=False))

    def release(self, module: nn.Module, name: str) -> None:
        """Send the parameters and persistent buffers of the submodule `name` back to the meta device."""
        for part in module.modules():
            part.__dict__.pop("_zeros", None)  # a quantized layer's unpacked zero points
            for last, parameter in part._parameters.items():
                if parameter is not None:
                    self._set(part, last, nn.Parameter(parameter.to("meta"), requires_grad=False))
            for last, buffer in part._buffers.items():
                if buffer is not None and last not in part._non_persistent_buffers_set:
                    part._buffers[last] = buffer.to("meta")
        release_memory()

    def _set(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Put a parameter into a module, and wherever else it is tied to."""
        for home, slot in self._tied.get((id(module), name), [(module, name)]):
            home._parameters[slot] = parameter


def open_model(path: str | Path) -> tuple[nn.Module, SafetensorsWeights | None]:
    """Build the transformers model of a directory without its weights, and the source to read them from.

    Args:
        path: A local Hugging Face directory with `config.json` and safetensors.

    Returns:
        The model in eval mode, parameters on the meta device and tied as they will be, and its weights. Where the
        checkpoint's tensors are not the model's one to one (experts stored singly and run together, quantized
        checkpoints), the model is loaded into memory whole, the log says why, and the second part is None.

    Raises:
        CheckpointError: The directory holds no model, or a damaged one.
        MissingExtra: transformers is not installed.

    Example:
        >>> import tempfile, transformers
        >>> with tempfile.TemporaryDirectory() as home:
        ...     config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
        ...     transformers.GPT2LMHeadModel(config).save_pretrained(home)
        ...     model, weights = open_model(home)
        >>> model.lm_head.weight.device.type, type(weights).__name__
        ('meta', 'SafetensorsWeights')
    """
    path = Path(path)
    transformers = require("transformers", "transformers", "open_model")
    accelerate = require("accelerate", "transformers", "open_model")
    stored = files.read_json(path / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        sentence = f"`{path}`: transformers cannot read its config: {error!s:.160}"
        raise CheckpointError(sentence, "unsupported") from None
    names = stored.get("architectures") or [""]
    builder = getattr(transformers, str(names[0]), transformers.AutoModelForCausalLM)
    if "quantization_config" in stored:
        return _in_memory(builder, path, "it is quantized already")
    spans = files.find_tensors(path)
    dtype = config.dtype or next((s.dtype for s in spans.values() if s.dtype.is_floating_point), torch.float32)
    with accelerate.init_empty_weights(include_buffers=False):  # rotary frequencies and their like are computed
        build = builder._from_config if hasattr(builder, "_from_config") else builder.from_config
        model: nn.Module = build(config, dtype=dtype)
    model.tie_weights()  # type: ignore[operator]
    if kept := [*_kept_in_float32(model, dtype)]:
        return _in_memory(builder, path, f"it keeps {kept[0]} in float32")
    if _match(model, set(_slots(model)), set(spans)) is None:
        return _in_memory(builder, path, "its tensors are not the model's one to one")
    model.requires_grad_(False).eval()
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, SafetensorsWeights(path, model)


def _in_memory(builder: Any, path: Path, why: str) -> tuple[nn.Module, None]:  # noqa: ANN401  (a transformers class)
    logger.warning("open_model: `%s` is loaded into memory whole: %s.", path, why)
    model: nn.Module = builder.from_pretrained(path, local_files_only=True, dtype="auto")
    return model.requires_grad_(False).eval(), None


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return what transformers would load in float32 although the model is in half precision."""
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept


def assemble(
    journal: Journal,
    model: nn.Module,
    path: str | Path,
    *,
    layout: str = "auto",
    tokenizer: Any | None = None,  # noqa: ANN401  (any transformers tokenizer or processor)
    report: Report | None = None,
    kept: torch.dtype | None = None,
) -> str:
    """Write the checkpoint of a model whose finished blocks lie in a journal; the model can be run afterwards.

    Blocks are mapped from the journal and written tensor by tensor, so that the model is never held whole.

    Args:
        journal: What `quantize` was given; all its blocks are finished.
        model: What `quantize` was given, in place: its finished blocks become those of the journal.
        path: See `planish.quant.save`.
        layout: See `planish.quant.save`.
        tokenizer: See `planish.quant.save`.
        report: See `planish.quant.save`.
        kept: See `planish.quant.save`; values are rounded to it first, in the model too.

    Returns:
        The layout that was written.

    Raises:
        CheckpointError: A block is not finished or damaged, or the target cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from planish.quant import Journal, load, quantize, rtn
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> with tempfile.TemporaryDirectory() as home:
        ...     model, journal = make(), Journal(home + "/work")
        ...     _ = quantize(model, [torch.ones(4, 64)], rtn(group_size=32), journal=journal)
        ...     layout = assemble(journal, model, home + "/small")
        ...     twin = load(home + "/small", into=make())
        >>> layout, torch.equal(twin(torch.ones(1, 64)), model(torch.ones(1, 64)))
        ('planish', True)
    """
    journal.attach(model)
    if kept is not None:
        round_kept(model, kept)
    return save(model, path, layout=layout, tokenizer=tokenizer, report=report, kept=kept)


def _slots(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer, tied ones under each of their names."""
    return model.state_dict(keep_vars=True)


def _match(model: nn.Module, wanted: set[str], stored: set[str]) -> dict[str, str] | None:
    """Find which stored tensor each of a model's is, or None if that is not one to one.

    A stored name may lack, or have on top, the prefix of the model's trunk; tied tensors may be stored once; names that
    the model's class declares obsolete are passed over.
    """
    tensors: dict[int, list[str]] = {}
    for name, tensor in _slots(model).items():
        tensors.setdefault(id(tensor), []).append(name)
    prefix = f"{getattr(model, 'base_model_prefix', '') or '-'}."
    obsolete = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    for rename in (str, lambda name: prefix + name, lambda name: name.removeprefix(prefix)):
        found = {rename(name): name for name in stored}
        unused = {n for n in found.keys() - wanted if not any(p.search(n) for p in obsolete)}
        names: dict[str, str] = {}
        for group in tensors.values():
            first = next((name for name in group if name in found), None)
            if first is not None:
                names |= {name: found.get(name, found[first]) for name in group}
        if not unused and names.keys() == wanted and len(found) == len(stored):
            return names
    return None
