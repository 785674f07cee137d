"""LoRA adapters on disk, as diffusers reads them; and the state of a training under way."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from planish._support import CheckpointError, bad, require
from planish.quant.files import write_shard

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""
_METADATA = "lora_adapter_metadata"
ADAPTER = "smooth"


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a temporary name, then rename; the same content gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_shard(partial, held, metadata)
    partial.replace(path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata.

    Raises:
        CheckpointError: The file is missing or is not of safetensors.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file.", "missing")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}).") from None


def prefix_of(model: nn.Module) -> str:
    """Return under which name pipelines keep a model: it begins the names of the adapter's tensors."""
    return "unet" if "unet" in type(model).__name__.lower() else "transformer"


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else value


def save_smooth_lora(model: nn.Module, path: str | Path, *, adapter: str = ADAPTER) -> Path:
    """Write a model's adapter where stock diffusers finds it, with `pipe.load_lora_weights(path)`.

    Models that load adapters themselves take `model.load_lora_adapter(path, prefix=..., use_safetensors=True)`, with
    prefix "unet" for UNets and "transformer" for the rest; any model takes `load_smooth_lora`.

    Args:
        model: With the adapter.
        path: Folder, made if absent; the file in it is replaced as a whole.
        adapter: The adapter's name; default "smooth".

    Returns:
        The file.

    Raises:
        ValueError: The model has no such adapter.
        MissingExtra: peft is not installed.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> _ = add_lora(net, smooth_lora_config(2, ["0"]))
        >>> save_smooth_lora(net, tempfile.mkdtemp()).name
        'pytorch_lora_weights.safetensors'
    """
    peft = require("peft", "diffusers", "save_smooth_lora")
    configs = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise bad("save_smooth_lora", "adapter", f"one of the model's ({', '.join(configs) or 'none'})", adapter)
    prefix = prefix_of(model)
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    settings = {f"{prefix}.{name}": _plain(value) for name, value in configs[adapter].to_dict().items()}
    file = Path(path) / WEIGHTS
    tensors = {f"{prefix}.{name}": tensor for name, tensor in state.items()}
    write(file, tensors, {_METADATA: json.dumps(settings, indent=2, sort_keys=True, default=str)})
    return file


def load_smooth_lora(model: nn.Module, path: str | Path, *, adapter: str = ADAPTER) -> None:
    """Put a saved adapter on any torch model, in place.

    Args:
        model: Of the architecture that the adapter was trained on, without an adapter of the name.
        path: The folder, or the file.
        adapter: The adapter's name; default "smooth".

    Raises:
        ValueError: The model has an adapter of that name.
        CheckpointError: The file is missing, unreadable, or of another model.
        MissingExtra: peft is not installed.

    Example:
        >>> import tempfile
        >>> nets = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
        >>> _ = nets[1].load_state_dict(nets[0].state_dict())
        >>> _ = add_lora(nets[0], smooth_lora_config(2, ["0"]))
        >>> _ = nets[0][0].lora_B["smooth"].weight.data.normal_()
        >>> load_smooth_lora(nets[1], save_smooth_lora(nets[0], tempfile.mkdtemp()))
        >>> x = torch.randn(3, 4)
        >>> torch.equal(nets[0](x), nets[1](x))
        True
    """
    peft = require("peft", "diffusers", "load_smooth_lora")
    file = Path(path)
    file = file / WEIGHTS if file.is_dir() else file
    tensors, metadata = read(file)
    prefix = prefix_of(model)
    state = {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
    if len(state) < len(tensors) or not state:
        raise CheckpointError(f"{file}: its tensors are not under `{prefix}.`: the adapter of another model.", "name")
    try:
        told: dict[str, Any] = json.loads(metadata[_METADATA])
        settings = {name.removeprefix(f"{prefix}."): value for name, value in told.items()}
        rank, alpha, targets = settings["r"], settings["lora_alpha"], settings["target_modules"]
    except (KeyError, ValueError, AttributeError, TypeError):
        raise CheckpointError(f"{file}: its metadata say nothing of an adapter.", "unreadable") from None
    modules = dict(model.named_modules())
    for name, tensor in state.items():
        base, _, part = name.rpartition(".lora_")
        weight = getattr(modules.get(base), "weight", None)
        if weight is None:
            raise CheckpointError(f"{file}: the model has no layer `{base}`.", "name")
        found = tuple(tensor.shape)
        wanted = (rank, weight.shape[1]) if part.startswith("A") else (weight.shape[0], rank)
        if found != wanted:
            raise CheckpointError(f"{file}: `{name}` must have shape {wanted}; got {found}.", "shape")
    add_lora(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), adapter=adapter)
    outcome = peft.set_peft_model_state_dict(model, state, adapter_name=adapter)
    absent = [name for name in outcome.missing_keys if "lora_" in name and f".{adapter}." in name]
    if absent:
        raise CheckpointError(f"{file}: nothing in it for `{absent[0]}`.", "missing")


def smooth_lora_config(rank: int = 8, target_modules: list[str] | str | None = None) -> Any:  # noqa: ANN401  (peft's, which need not be installed)
    """Return peft's LoraConfig of the paper: scale 1, on the projections of all attentions.

    Args:
        rank: >= 1; default 8.
        target_modules: Ends of layers' names, or a regular expression for whole names; default diffusers' to_q, to_k,
            to_v and to_out.0.

    Raises:
        ValueError: `rank` is below 1.
        MissingExtra: peft is not installed.

    Example:
        >>> smooth_lora_config().lora_alpha
        8
    """
    if rank < 1:
        raise bad("smooth_lora_config", "rank", "at least 1", rank)
    peft = require("peft", "diffusers", "smooth_lora_config")
    targets = ["to_q", "to_k", "to_v", "to_out.0"] if target_modules is None else target_modules
    return peft.LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)


def add_lora(
    model: nn.Module,
    config: object,
    *,
    adapter: str = ADAPTER,
    generator: torch.Generator | None = None,
) -> list[tuple[str, nn.Parameter]]:
    """Put an adapter on a model in place, freeze the rest, and return what is to be trained.

    The outputs do not change: one of each pair of factors starts at zero, the other is Gaussian of variance 1 / rank^2.

    Args:
        model: Any torch model.
        config: From `smooth_lora_config`.
        adapter: The adapter's name; default "smooth".
        generator: Source of the start.

    Raises:
        ValueError: The model has an adapter of that name, or no layer of the config's names.
        MissingExtra: peft is not installed.

    Example:
        >>> [name for name, _ in add_lora(nn.Sequential(nn.Linear(4, 4)), smooth_lora_config(2, ["0"]))]
        ['0.lora_A.smooth.weight', '0.lora_B.smooth.weight']
    """
    peft = require("peft", "diffusers", "add_lora")
    if adapter in getattr(model, "peft_config", {}):
        raise bad("add_lora", "adapter", "a name that the model has no adapter of", adapter)
    generator = generator or torch.Generator().manual_seed(0)
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws from torch's own generator; what it drew is replaced
            if callable(add := getattr(model, "add_adapter", None)):  # diffusers' own way, where a model has it
                add(config, adapter_name=adapter)
            else:
                peft.inject_adapter_in_model(config, model, adapter_name=adapter)
    except ValueError as error:
        if "target modules" not in str(error).lower():
            raise
        raise bad("add_lora", "target_modules", "names of the model's layers", config.target_modules) from None  # type: ignore[attr-defined]
    mine = []
    for name, parameter in model.named_parameters():
        trained = f".{adapter}." in name and "lora_" in name
        parameter.requires_grad_(trained)
        if trained:
            mine.append((name, parameter))
    with torch.no_grad():
        for name, parameter in mine:
            if "lora_A" in name:
                drawn = torch.randn(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_(drawn / config.r)  # type: ignore[attr-defined]
    return mine
