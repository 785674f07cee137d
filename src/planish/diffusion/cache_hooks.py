"""Where a cache cuts into a denoiser, as hooks of diffusers: a clock on the model, and what is skipped below it.

A transformer reuses how far its blocks from the second on moved the hidden state; a U-Net reuses what enters the last
residual block of its last level. Each branch of guidance has a state and a count of calls of its own.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad, require
from planish.diffusion.cache_session import Session

_hooks = require("diffusers.hooks.hooks", "diffusers", "A cache for a denoiser")
_helpers = require("diffusers.hooks._helpers", "diffusers", "A cache for a denoiser")

NAME = "planish_cache"
BLOCK_LISTS = (
    *("blocks", "transformer_blocks", "single_transformer_blocks", "layers", "visual_transformer_blocks"),
    "temporal_transformer_blocks",
)
OUTPUT_LAYERS = ("proj_out_2", "proj_out")


class Clock(_hooks.ModelHook):  # type: ignore[misc, name-defined]
    """On the model: counts the calls of each branch."""

    _is_stateful = True

    def __init__(self, session: Session, signature: inspect.Signature) -> None:
        super().__init__()
        self.session, self.signature = session, signature
        self.states = session.branches  # diffusers looks for it among a hook's attributes

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the model as one call of its branch."""
        if kwargs.get("down_block_additional_residuals") is not None:
            raise ValueError("apply_cache: a U-Net's cache skips the blocks that a ControlNet adds to; remove one.")
        call = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                call.update(call.pop(name, {}))
        self.session.begin(call)
        try:
            out = self.fn_ref.original_forward(*args, **kwargs)
        except BaseException:
            self.session.abort()
            raise
        self.session.end()
        return out

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget everything: a pipeline is done."""
        self.session.branches.reset()
        return module


class BlockHook(_hooks.ModelHook):  # type: ignore[misc, name-defined]
    """On a transformer's block that is skipped in calls that reuse; the first adds what the whole region would."""

    def __init__(self, session: Session, block: nn.Module, *, first: bool, last: bool) -> None:
        super().__init__()
        self.session, self.first, self.last = session, first, last
        try:
            self.layout = _helpers.TransformerBlockRegistry.get(type(block))
        except ValueError:  # a class that diffusers does not know: one stream, the first argument
            self.layout = _helpers.TransformerBlockMetadata(0, None, _first_argument(block))
            self.layout._cls = type(block)

    def _read(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        names = [self.layout.hidden_states_argument_name]
        if self.layout.return_encoder_hidden_states_index is not None:
            names.append(self.layout.encoder_hidden_states_argument_name)
        found = [self.layout._get_parameter_from_args_kwargs(name, args, kwargs) for name in names]
        return found[0], found[1] if len(found) > 1 else None

    def _split(self, out: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        if isinstance(out, Tensor):
            return out, None
        other = self.layout.return_encoder_hidden_states_index
        return out[self.layout.return_hidden_states_index or 0], None if other is None else out[other]

    def _join(self, hidden: Tensor, other: Tensor | None) -> Any:  # noqa: ANN401
        if other is None:
            return hidden
        at = self.layout.return_hidden_states_index
        return (hidden, other) if at == 0 else (other, hidden)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Compute, or pass through."""
        session = self.session
        hidden, other = self._read(args, kwargs)
        if not session.computing:
            if self.first:
                hidden = hidden + session.reused(-1)
                if other is not None and session.branch.other is not None:
                    other = other + session.branch.other
            return self._join(hidden, other)
        if self.first:
            session.entry = hidden, other
        out = self.fn_ref.original_forward(*args, **kwargs)
        if self.last and session.entry is not None:
            (start, start_other), (end, end_other) = session.entry, self._split(out)
            if end.shape != start.shape:
                raise ValueError(
                    f"apply_cache: `region` must keep the hidden state's shape; it went from {tuple(start.shape)} to "
                    f"{tuple(end.shape)}."
                )
            feature = end - start
            if session.full and start_other is not None and end_other is not None:
                session.branch.other = (end_other - start_other).detach()
            given = session.computed(feature)
            if given is not feature:
                out = self._join(start + given, end_other)
        return out


class PassHook(_hooks.ModelHook):  # type: ignore[misc, name-defined]
    """On a part of a U-Net that is skipped: gives what came in wherever its output would have stood."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.layout: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Compute, or pass through."""
        if self.session.computing:
            out = self.fn_ref.original_forward(*args, **kwargs)
            self.layout = _filled(out, None)
            return out
        return _filled(self.layout, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _filled(layout: Any, value: Any) -> Any:  # noqa: ANN401
    if isinstance(layout, tuple):
        return tuple(_filled(item, value) for item in layout)
    return value


class EntryHook(_hooks.ModelHook):  # type: ignore[misc, name-defined]
    """On the last residual block of a U-Net: keeps, or gives, all that it takes but the skip from the very start."""

    def __init__(self, session: Session, skip: int) -> None:
        super().__init__()
        self.session, self.skip = session, skip

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Replace the part of the input that is cached."""
        x, session = args[0], self.session
        feature, skipped = x[:, : -self.skip], x[:, -self.skip :]
        if session.computing:
            given = session.computed(feature)
            if given is feature:
                return args, kwargs
        else:
            given = session.reused(1)
        return (torch.cat([given.to(x), skipped], 1), *args[1:]), kwargs


class OutputHook(_hooks.ModelHook):  # type: ignore[misc, name-defined]
    """On a layer that meets the feature: corrects its outputs, or shows them to who fits a correction."""

    def __init__(self, session: Session, name: str, axis: int) -> None:
        super().__init__()
        self.session, self.name, self.axis = session, name, axis
        self.fitting: Callable[[str, int, Tensor, Tensor, int], Tensor] | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Compute, then correct."""
        out = self.fn_ref.original_forward(*args, **kwargs)
        step = self.session.branch.step
        if self.fitting is not None:
            return self.fitting(self.name, step, args[0], out, self.axis)
        plan = self.session.plan
        fits = plan.outputs.get(self.name) if plan is not None else None
        fit = fits[step] if fits else None
        return out if fit is None else fit(out, None, axis=self.axis)


@dataclass
class Cut:
    """Where a model is cut: hooks by module name, and the layers that meet the feature."""

    hooks: dict[str, Callable[[Session], Any]] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)  # layer -> axis of its channels
    axis: int = -1
    region: tuple[int, int] | None = None


def find_cut(model: nn.Module, region: tuple[int, int] | None = None) -> Cut:
    """Find where a denoiser is cut.

    Args:
        model: A transformer or a U-Net of diffusers.
        region: First and last block of a transformer that are skipped; default all but the first.

    Returns:
        The cut.

    Raises:
        ValueError: The model has neither lists of blocks nor a U-Net's levels, or the region is not in it.
    """
    if all(hasattr(model, name) for name in ("conv_in", "down_blocks", "up_blocks", "conv_out")):
        return _unet_cut(model, region)
    blocks = [
        (f"{name}.{i}", block)
        for name, child in model.named_children()
        if name in BLOCK_LISTS and isinstance(child, nn.ModuleList)
        for i, block in enumerate(child)
    ]
    if len(blocks) < 2:
        raise bad(
            "apply_cache", "model", f"a U-Net of diffusers, or hold two blocks under one of {', '.join(BLOCK_LISTS)}",
            type(model).__name__,
        )  # fmt: skip
    first, last = region or (1, len(blocks) - 1)
    if not 0 <= first <= last < len(blocks):
        raise bad("apply_cache", "region", f"two of the blocks 0 to {len(blocks) - 1} in order", region)
    cut = Cut(axis=-1, region=(first, last))
    for i, (name, block) in enumerate(blocks[first : last + 1], first):
        cut.hooks[name] = lambda s, b=block, i=i: BlockHook(s, b, first=i == first, last=i == last)  # type: ignore[misc]
    if last == len(blocks) - 1:
        cut.outputs = {n: -1 for n in OUTPUT_LAYERS if isinstance(getattr(model, n, None), nn.Module)}
        cut.outputs = dict(list(cut.outputs.items())[:1])
    return cut


def _unet_cut(model: nn.Module, region: tuple[int, int] | None) -> Cut:
    if region is not None:
        raise bad("apply_cache", "region", "None for a U-Net, which is cut before its last residual block", region)
    net: Any = model
    last = net.up_blocks[-1]
    if any(hasattr(b, "skip_conv") for b in (*net.down_blocks, *net.up_blocks)) or not hasattr(last, "resnets"):
        raise bad("apply_cache", "model", "a U-Net of plain residual levels", type(last).__name__)
    top = f"up_blocks.{len(net.up_blocks) - 1}"
    skipped = [f"down_blocks.{i}" for i in range(len(net.down_blocks))]
    skipped += ["mid_block"] * (getattr(net, "mid_block", None) is not None)
    skipped += [f"up_blocks.{i}" for i in range(len(net.up_blocks) - 1)]
    skipped += [f"{top}.resnets.{i}" for i in range(len(last.resnets) - 1)]
    skipped += [f"{top}.attentions.{i}" for i in range(len(getattr(last, "attentions", ())) - 1)]
    entry, width = f"{top}.resnets.{len(last.resnets) - 1}", int(net.conv_in.out_channels)
    hooks: dict[str, Callable[[Session], Any]] = dict.fromkeys(skipped, PassHook)
    hooks[entry] = lambda session: EntryHook(session, width)
    meets = {f"{entry}.{n}": 1 for n in ("conv1", "conv_shortcut") if getattr(last.resnets[-1], n, None) is not None}
    return Cut(hooks, meets, axis=1)


def attach(model: nn.Module, session: Session, cut: Cut) -> dict[str, OutputHook]:
    """Put the hooks of a session on a model; return those on its output layers."""
    outputs = {}
    for name, make in cut.hooks.items():
        _registry(model.get_submodule(name)).register_hook(make(session), NAME)
    for name, axis in cut.outputs.items():
        outputs[name] = OutputHook(session, name, axis)
        _registry(model.get_submodule(name)).register_hook(outputs[name], NAME)
    clock = Clock(session, inspect.signature(model.forward))
    _registry(model).register_hook(clock, NAME)
    _forget_children(model)
    return outputs


def detach(model: nn.Module) -> bool:
    """Take the hooks off; return whether there were any."""
    there = NAME in _registry(model).hooks
    _registry(model).remove_hook(NAME, recurse=True)
    _forget_children(model)
    for module in model.modules():  # leave no trace where nobody else hooks in
        left = module.__dict__.get("_diffusers_hook")
        if left is not None and not left.hooks:
            del module._diffusers_hook
            forward: Any = module.__dict__.get("forward")
            if getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module:
                del module.__dict__["forward"]
    return there


def _registry(module: nn.Module) -> Any:  # noqa: ANN401
    return _hooks.HookRegistry.check_if_exists_or_initialize(module)


def _forget_children(model: nn.Module) -> None:
    forget = getattr(_registry(model), "invalidate_child_registries_cache", None)
    if forget is not None:
        forget()


def _first_argument(block: nn.Module) -> str:
    return next(n for n in inspect.signature(type(block).forward).parameters if n != "self")
