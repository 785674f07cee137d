"""What a model is made of, held by reference, so that an exception on the way leaves it as it was."""

from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn


@dataclass
class _Part:
    """One module: its class, what it holds, and the values of its tensors."""

    module: nn.Module
    kind: type[nn.Module]
    held: list[tuple[dict[Any, Any], dict[Any, Any]]]
    values: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, module: nn.Module) -> "_Part":
        own = (module._modules, module._parameters, module._buffers, module._forward_pre_hooks)
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        return cls(module, type(module), [(d, dict(d)) for d in own], [(t, t.data) for t in tensors])

    def put_back(self) -> None:
        self.module.__class__ = self.kind
        for now, before in self.held:
            now.clear()
            now.update(before)
        for tensor, data in self.values:
            tensor.data = data


class Snapshot:
    """Hold a model's modules and tensors while inside; an exception puts all of them back.

    Nothing is copied: who writes into a tensor gives it memory of its own first (`own`). Float weights that were
    replaced meanwhile are let go at the end only.

    Args:
        model: Any module.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> try:
        ...     with Snapshot(model):
        ...         model[0] = torch.nn.ReLU()
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     type(model[0]).__name__
        'Linear'
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = [_Part.of(module) for module in model.modules()]

    def __enter__(self) -> "Snapshot":
        """Return the snapshot itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put everything back where an exception passes."""
        if kind is not None:
            for part in self._parts:
                part.put_back()
        self._parts.clear()

    def release(self, model: nn.Module) -> None:
        """Free the working memory of modules that are no longer in the model: they get back what they had."""
        there = {id(module) for module in model.modules()}
        for part in self._parts:
            if id(part.module) not in there:
                part.put_back()


def own(module: nn.Module) -> None:
    """Give the tensors of a module memory of their own, so that writing into them changes nothing else."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
