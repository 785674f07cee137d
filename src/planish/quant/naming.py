"""Names on disk: a model's own, and those under which stock engines look for mixtures of experts.

A model in memory may name its parts otherwise than the checkpoints of its family do (transformers renames while it
loads). Checkpoints for stock engines get the family's names, and either kind is read.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from planish._support import CheckpointError, require
from planish.quant.directory import Checkpoint
from planish.quant.experts import Experts, checkpoint_names, fused_experts, unfuse
from planish.quant.layers import QLinear


def stock_names(model: nn.Module) -> dict[str, str]:
    """Return the family's name of every linear (by module) and every other tensor of a mixture of experts.

    Args:
        model: A model; one without experts that `unfuse` took apart keeps its own names, and the result is empty.

    Returns:
        Name on disk by name in the model; of linears without ".weight".

    Raises:
        CheckpointError: The model's saving code gives a part no single name.
        MissingExtra: The model is a transformers model and transformers is gone.

    Example:
        >>> stock_names(nn.Sequential(nn.Linear(4, 4)))
        {}
    """
    if not any(isinstance(module, Experts) for module in model.modules()):
        return {}
    names = checkpoint_names(model)
    linears = [n for n, m in model.named_modules() if n not in names and isinstance(m, (nn.Linear, QLinear))]
    inside = tuple(f"{name}." for name in [*names, *linears])
    others = [name for name in model.state_dict() if not name.startswith(inside)]
    if not any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__):
        return names | {name: name for name in [*linears, *others]}
    loading = require("transformers.core_model_loading", "transformers", "naming the parts of a checkpoint")
    owners = [*linears, *others]
    # numbers instead of values: which name a part goes by shows in where its number comes out
    coded = {f"{n}.weight" if i < len(linears) else n: torch.tensor(float(i)) for i, n in enumerate(owners)}
    try:
        found = {int(value): key for key, value in loading.revert_weight_conversion(model, coded).items()}
    except (RuntimeError, ValueError, IndexError) as error:  # a rule that joins or cuts tensors, not only names
        raise CheckpointError(f"a {type(model).__name__} stores some parts joined: {error!s:.100}.", "lossy") from None
    for number, owner in enumerate(owners):
        if number not in found:
            raise CheckpointError(f"`{owner}` has no name of its own in a {type(model).__name__}.", "lossy")
        names[owner] = found[number].removesuffix(".weight") if number < len(linears) else found[number]
    return names


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Return a checkpoint whose layers, tensors and float layers go by other names; those not listed keep theirs.

    Args:
        checkpoint: Its layers and tensors are shared, not copied.
        names: New by old, of linears (without ".weight") and of other tensors, as `stock_names` returns them.

    Returns:
        The same content under other names.

    Raises:
        CheckpointError: Two parts would get one name.
    """
    if not names:
        return checkpoint

    def tensor(name: str) -> str:
        owner, _, last = name.rpartition(".")
        return names.get(name) or (f"{names[owner]}.{last}" if owner in names else name)

    def layer(name: str) -> str:
        return names.get(name) or tensor(f"{name}.weight").removesuffix(".weight")

    layers = {layer(name): entry for name, entry in checkpoint.layers.items()}
    tensors = {tensor(name): entry for name, entry in checkpoint.tensors.items()}
    if len(layers) != len(checkpoint.layers) or len(tensors) != len(checkpoint.tensors):
        raise CheckpointError("the checkpoint holds a part twice, under the model's and the family's name.", "name")
    return replace(checkpoint, layers=layers, tensors=tensors, ignore=[layer(name) for name in checkpoint.ignore])


def fitted(model: nn.Module, checkpoint: Checkpoint) -> tuple[nn.Module, Checkpoint]:
    """Return a model taken apart as a checkpoint is, and the checkpoint under that model's names.

    Args:
        model: It stays as it is.
        checkpoint: Under the model's or the family's names.

    Returns:
        The model itself, or, where experts had to be taken apart, a copy of it on the meta device; and the checkpoint.

    Raises:
        CheckpointError: Two parts of the checkpoint have one name in the model.
    """
    kept = {name for name in fused_experts(model) if f"{name}.down_proj" in checkpoint.tensors}
    if len(kept) < len(fused_experts(model)):
        model = _on_meta(model)
        unfuse(model, keep=kept)
    return model, renamed(checkpoint, {stock: own for own, stock in stock_names(model).items()})


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have no values."""
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        memo |= {id(b): b.to("meta") for b in module._buffers.values() if b is not None}
    return copy.deepcopy(model, memo)
