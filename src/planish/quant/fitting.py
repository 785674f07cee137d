"""A checkpoint into a model: everything that does not fit is refused before the first tensor is set."""

import torch
from torch import Tensor, nn

from planish._support import CheckpointError
from planish.quant import naming
from planish.quant.conv import is_conv
from planish.quant.directory import Checkpoint
from planish.quant.experts import Experts, fused_experts
from planish.quant.layers import QLinear
from planish.quant.parts import Quantized, Segments, in_place_of
from planish.quant.sites import weight_of
from planish.quant.transforms import Scale


def fill(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Put a checkpoint's layers and tensors into a model, all checked before the first one; return it by its names."""
    shape, checkpoint = naming.fitted(model, checkpoint)
    check(shape, checkpoint)
    for name in fused_experts(model):
        if isinstance(apart := shape.get_submodule(name), Experts):
            model.set_submodule(name, apart)  # on the meta device: the checkpoint holds all that goes into it
    slots, ties = check(model, checkpoint)
    for name, layer in checkpoint.layers.items():
        there = model.get_submodule(name)
        layer.training = there.training
        model.set_submodule(name, in_place_of(there, layer))
    _assign(model, slots, ties, checkpoint.tensors)
    return checkpoint


def check(model: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[int, list[str]]]:
    """Refuse a checkpoint that is not this model's; return the model's slots outside layers, and which are tied."""
    modules = dict(model.named_modules())
    for name, layer in checkpoint.layers.items():
        check_place(name, modules.get(name), layer)
    inside = tuple(name + "." for name in checkpoint.layers)
    slots = {k: v for k, v in model.state_dict(keep_vars=True).items() if not (inside and k.startswith(inside))}
    ties: dict[int, list[str]] = {}
    for name, tensor in slots.items():
        ties.setdefault(id(tensor), []).append(name)
    ties |= {-1 - i: group for i, group in enumerate(_promised_ties(model)) if group <= slots.keys()}  # type: ignore[misc]
    tied = {name: group for group in ties.values() for name in group}
    for name, tensor in checkpoint.tensors.items():
        slot = slots.get(name)
        if slot is None:
            raise CheckpointError(f"`{name}`: the model has no such tensor.", "name")
        if slot.shape != tensor.shape:
            raise CheckpointError(f"`{name}` must have shape {list(slot.shape)}; got {list(tensor.shape)}.", "shape")
        if slot.is_floating_point() != tensor.is_floating_point() or tensor.dtype.itemsize < 2 <= slot.dtype.itemsize:
            raise CheckpointError(f"`{name}` must be like {slot.dtype}; got {tensor.dtype}.", "dtype")
    for name in slots:
        if not any(other in checkpoint.tensors for other in tied.get(name, [name])):
            raise CheckpointError(f"`{name}` is missing.", "missing")
    return slots, ties


def check_place(name: str, there: nn.Module | None, layer: Quantized) -> None:
    """Refuse a layer for which the model has no dense layer of its size.

    Raises:
        CheckpointError: See above; the reason is "name" or "shape".
    """
    if there is None:
        raise CheckpointError(f"`{name}`: the model has no such layer.", "name")
    found = _features(there)
    if found is None or not name:
        raise CheckpointError(f"`{name}`: the model has {type(there).__name__} there, not a dense layer.", "shape")
    if found != (layer.in_features, layer.out_features):
        sizes = (
            f"the model has {found[0]} -> {found[1]} there, the checkpoint {layer.in_features} -> {layer.out_features}"
        )
        raise CheckpointError(f"`{name}`: {sizes}.", "shape")
    if is_conv(there):
        try:
            in_place_of(there, layer)
        except ValueError as error:
            raise CheckpointError(f"`{name}`: {error}", "shape") from None
    elif any(isinstance(p, Scale) and p.scale.numel() != found[0] for p in (getattr(layer, "transform", None),)):
        raise CheckpointError(f"`{name}`: the checkpoint has a convolution there, the model none.", "shape")


def _promised_ties(model: nn.Module) -> list[set[str]]:
    """Return groups of tensors that a transformers model ties only after loading."""
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return [{target, source} for target, source in pairs.items()]


def _assign(model: nn.Module, slots: dict[str, Tensor], ties: dict[int, list[str]], tensors: dict[str, Tensor]) -> None:
    """Give every slot its tensor; tied slots get one and the same."""
    shared: dict[str, Tensor] = {}
    for name, slot in slots.items():
        found = tensors.get(name)
        if isinstance(slot, nn.Parameter) and found is not None:
            shared[name] = nn.Parameter(found, requires_grad=slot.requires_grad and found.is_floating_point())
        elif found is not None:
            shared[name] = found
    for group in ties.values():
        first = next((name for name in group if name in shared), None)
        if first is not None:
            own = [name for name in group if name in shared and not torch.equal(shared[name], shared[first])]
            shared |= {name: shared[first] for name in group if name not in own}
    for name, tensor in shared.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, tensor)


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a layer, quantized or not, or None for anything else."""
    if is_conv(module):
        outputs, columns = weight_of(module).shape
        return columns, outputs
    if isinstance(module, (nn.Linear, QLinear, Segments)):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's, stored transposed
        rows, columns = module.weight.shape  # type: ignore[misc]
        return int(rows), int(columns)
    return None
