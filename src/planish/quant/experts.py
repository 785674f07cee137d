"""Mixtures of experts whose weights are stored as one tensor: taken apart into linears, where that is verified exact.

Newer models keep all experts of a block in two parameters, `gate_up_proj` (E, 2F, H) and `down_proj` (E, H, F), which
no layer-by-layer method can see. Such a module is replaced by one of plain linears only if both answer alike.

Legend: E experts, F features inside an expert, H channels, T tokens, K experts a token is sent to.
"""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from planish._support import CheckpointError, logger, require

_ARGUMENTS = ["self", "hidden_states", "top_k_index", "top_k_weights"]
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # relative; 3e-2 in half precision
_STAND_IN = 24  # features and channels of the experts that are compared when a model has no weights yet


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x)), or down(act(up(x))) where it has no gate.

    Args:
        gate_proj: H -> F, or None.
        up_proj: H -> F.
        down_proj: F -> H.
        act_fn: The activation.
    """

    def __init__(
        self, gate_proj: nn.Linear | None, up_proj: nn.Linear, down_proj: nn.Linear, act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn

    def forward(self, x: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens channels"]:
        """Return the expert's output."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))  # type: ignore[no-any-return]
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """The experts of a block as separate modules, called as the fused module was.

    Args:
        experts: E of them; they become the children "0" to "E-1".
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.visit_all = False

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens channels"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens channels"]:
        """Return the weighted sum of the outputs of the experts that each token is sent to."""
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.children()):
            token, place = torch.where(top_k_index == index)
            if token.numel():
                output = expert(hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, output.to(total.dtype))
            elif self.visit_all:
                expert(hidden_states[:1].clone())  # only to be seen: nothing of it enters the sum
        return total


@contextmanager
def visiting_all(module: nn.Module) -> Iterator[None]:
    """Call every expert at least once a run while inside, also those that no token is sent to; outputs stay."""
    found = [m for m in module.modules() if isinstance(m, Experts)]
    for experts in found:
        experts.visit_all = True
    try:
        yield
    finally:
        for experts in found:
            experts.visit_all = False


def unfuse(model: nn.Module, *, keep: Collection[str] = ()) -> list[str]:
    """Replace fused experts by separate linears, in place, where the output is verified unchanged.

    Args:
        model: A model or a block; one on the meta device is verified with a small stand-in of random weights.
        keep: Names of modules that stay fused.

    Returns:
        Names of the modules that were replaced; `fused_experts` names those that stay as they are.

    Example:
        >>> unfuse(torch.nn.Sequential(torch.nn.Linear(4, 4)))
        []
    """
    replaced = []
    for name in fused_experts(model):
        if name in keep:
            continue
        fused = model.get_submodule(name)
        separate = _separate(fused)
        if separate is None or not _same(fused, separate):
            logger.warning("experts of %s cannot be verified as separate layers: they stay in float", name)
            continue
        model.set_submodule(name, separate)
        replaced.append(name)
    return replaced


def fused_experts(model: nn.Module) -> list[str]:
    """Return the names of modules that hold the weights of many experts as one parameter.

    Example:
        >>> fused_experts(torch.nn.Conv1d(4, 4, 3))
        []
    """
    return [name for name, module in model.named_modules() if name and _stacked(module, "down_proj") is not None]


def checkpoint_names(model: nn.Module) -> dict[str, str]:
    """Return where stock engines look for each linear of an unfused expert, by its name in the model.

    The names are read off what the model's own saving code makes of its fused experts, so that they hold for every
    family that it knows. Anything else of the model (its routers) is renamed by that code alone.

    Args:
        model: A model whose experts were taken apart by `unfuse`.

    Returns:
        For each linear's name the name in the checkpoint, both without ".weight".

    Raises:
        CheckpointError: The saving code gives no separate name to an expert's linear.
        MissingExtra: The model is a transformers model and transformers is gone.

    Example:
        >>> checkpoint_names(torch.nn.Linear(4, 4))
        {}
    """
    coded: dict[str, Tensor] = {}
    owners: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            first = len(owners)  # each linear has a number, which survives slicing and renaming
            for index, expert in module.named_children():
                parts = [part for part in ("gate_proj", "up_proj", "down_proj") if getattr(expert, part) is not None]
                owners += [f"{path}.{index}.{part}" for part in parts]
            numbers = torch.arange(first, len(owners), dtype=torch.float64).reshape(len(module._modules), -1, 1)
            gated = numbers.shape[1] == 3
            coded[f"{path}.gate_up_proj" if gated else f"{path}.up_proj"] = numbers[:, :-1]
            coded[f"{path}.down_proj"] = numbers[:, -1:]
    if not coded:
        return {}
    if not any(c.__name__ == "PreTrainedModel" for c in type(model).__mro__):
        return {name: name for name in owners}
    loading = require("transformers.core_model_loading", "transformers", "naming the experts of a checkpoint")
    names = {
        owners[int(value)]: key.removesuffix(".weight")
        for key, tensor in loading.revert_weight_conversion(model, coded).items()
        for value in tensor.flatten().tolist()
        if tensor.numel() == 1
    }
    for owner in owners:
        if owner not in names:
            raise CheckpointError(f"checkpoint_names: `{owner}` has no name of its own in a {type(model).__name__}.")
    return names


def _stacked(module: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter, if it stacks one matrix an expert."""
    parameter = module._parameters.get(name)
    return parameter if parameter is not None and parameter.ndim == 3 else None


def _separate(fused: nn.Module) -> Experts | None:
    """The separate experts that a fused module most likely stands for; None where its parameters fit no layout."""
    gated = _stacked(fused, "gate_up_proj")
    up, down = gated if gated is not None else _stacked(fused, "up_proj"), _stacked(fused, "down_proj")
    act = getattr(fused, "act_fn", None)
    if up is None or down is None or not callable(act):
        return None
    if list(inspect.signature(type(fused).forward).parameters)[: len(_ARGUMENTS)] != _ARGUMENTS:
        return None
    first = fused._parameters.get("gate_up_proj_bias" if gated is not None else "up_proj_bias")
    last = fused._parameters.get("down_proj_bias")
    known = {id(p) for p in (up, down, first, last) if p is not None}
    if any(id(p) not in known for p in fused.parameters()):
        return None
    if getattr(fused, "is_transposed", False):
        up, down = up.mT, down.mT
    features = down.shape[-1]
    if up.shape != (down.shape[0], features * (2 if gated is not None else 1), down.shape[1]):
        return None
    joined = getattr(fused, "is_concatenated", True)
    halves = (slice(features), slice(features, None)) if joined else (slice(0, None, 2), slice(1, None, 2))
    experts = []
    for e in range(up.shape[0]):
        rows = [None, slice(None)] if gated is None else [*halves]
        gate, upper = (None if r is None else _linear(up[e, r], None if first is None else first[e, r]) for r in rows)
        if upper is not None:
            experts.append(Expert(gate, upper, _linear(down[e], None if last is None else last[e]), act))
    return Experts(experts).train(fused.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear with a copy of these rows: views would keep the fused tensor alive."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


@torch.no_grad()
def _same(fused: nn.Module, separate: Experts) -> bool:
    """Whether both answer alike when every expert gets tokens."""
    example = fused._parameters["down_proj"]
    if example is None:
        return False
    if example.device.type == "meta":
        stand_in = _stand_in(fused)
        again = _separate(stand_in)
        try:
            return again is not None and _same(stand_in, again)
        except RuntimeError as error:  # a forward that insists on the sizes of its config
            logger.debug("a stand-in of %s cannot be run: %s", type(fused).__name__, error)
            return False
    count = len(separate._modules)
    k = min(2, count)
    g = torch.Generator("cpu").manual_seed(0)
    channels = int(example.shape[2 if getattr(fused, "is_transposed", False) else 1])
    cpu = torch.device("cpu")  # said, as the caller may be building on another device by default
    x = torch.randn(2 * count, channels, generator=g, device=cpu).to(example)
    rows = torch.arange(2 * count, device=example.device)
    index = torch.stack([(rows + shift) % count for shift in range(k)], 1)
    share = torch.rand(2 * count, k, generator=g, device=cpu).to(example)
    with _eager(fused):
        theirs = fused(x, index, share)
    ours = separate(x, index, share)
    if theirs.shape != ours.shape or not bool(torch.isfinite(theirs).all()):
        return False
    gap = (ours - theirs).double().norm() / theirs.double().norm().clamp(min=1e-300)
    return bool(gap <= _TOLERANCE.get(example.dtype, 3e-2))


def _stand_in(fused: nn.Module) -> nn.Module:
    """The same module with few random features and channels, where its own parameters hold no values."""
    twin = fused.__class__.__new__(fused.__class__)
    twin.__dict__.update(fused.__dict__)
    g = torch.Generator("cpu").manual_seed(1)
    transposed = getattr(fused, "is_transposed", False)
    many = 2 if "gate_up_proj" in fused._parameters else 1
    features, channels = _STAND_IN, _STAND_IN + 8
    parameters: dict[str, Any] = {}
    for name, p in fused.named_parameters(recurse=False):
        first, last = (channels, features) if name.startswith("down") else (many * features, channels)
        shape = (first,) if p.ndim == 2 else (last, first) if transposed else (first, last)
        values = torch.randn(p.shape[0], *shape, generator=g, device="cpu") / _STAND_IN**0.5
        parameters[name] = nn.Parameter(values, requires_grad=False)
    twin._parameters = parameters
    return twin


@contextmanager
def _eager(fused: nn.Module) -> Iterator[None]:
    """Let a fused module compute by its own definition, not by a grouped kernel that knows few dtypes."""
    config = getattr(fused, "config", None)
    if config is None or not hasattr(config, "_experts_implementation"):
        yield
        return
    chosen = config._experts_implementation
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = chosen
