"""A model's operations in order, and which tensor went from where to where: from `torch.export`, or from one run.

Only what it takes to say whose output a tensor is: kinds of operations by their torch names, shapes, and which layer
of the model an operation belongs to. Nothing is rewritten.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from planish.quant.calls import moved_to
from planish.quant.conv import is_conv
from planish.quant.sites import is_linear
from planish.quant.stream import call_arguments, tensors_in

Shape = tuple[int, ...]
_NAMES = {
    "_to_copy": "to", "split_with_sizes": "split", "tensor_split": "split", "view": "reshape",
    "_unsafe_view": "reshape", "flatten": "reshape", "unflatten": "reshape", "concat": "cat", "concatenate": "cat",
    "native_dropout": "dropout", "__mul__": "mul", "__rmul__": "mul", "__getitem__": "getitem",
    "__matmul__": "matmul", "select": "getitem",
}  # fmt: skip


@dataclass
class Op:
    """One operation.

    Attributes:
        kind: Its name in torch, without what tells variants apart.
        given: The operations that made its tensors, by index; -1 for what came from outside.
        given_shapes: Shapes of these tensors.
        shapes: Shapes of its results.
        layer: The dense layer or convolution that it is the product of; None for any other operation.
        readers: The operations that read a result, by index.
    """

    kind: str
    given: tuple[int, ...]
    given_shapes: tuple[Shape, ...]
    shapes: tuple[Shape, ...]
    layer: str | None = None
    readers: list[int] = field(default_factory=list)


def name_of(function: str) -> str:
    """Return what an operation is called here.

    Example:
        >>> name_of("aten::split_with_sizes"), name_of("silu_"), name_of("chunk")
        ('split', 'silu', 'chunk')
    """
    plain = function.rpartition("::")[2]
    plain = plain if plain.startswith("__") else plain.rstrip("_")
    return _NAMES.get(plain, plain)


def exported(model: nn.Module, batch: Any) -> list[Op]:  # noqa: ANN401
    """Return the operations of a model as `torch.export` sees them, on no data at all.

    Args:
        model: In evaluation mode.
        batch: One call's arguments, as `quantize` takes them.

    Raises:
        Exception: Whatever torch.export raises where it cannot follow a model.
    """
    args, kwargs = call_arguments(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, args, kwargs, strict=False)
    layers, index, ops = _layers(model), dict[Any, int](), list[Op]()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        kind = name_of(schema.name if schema is not None else getattr(node.target, "__name__", str(node.target)))
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor | tuple | list)]
        ordered = [n for n in _in_order((node.args, node.kwargs)) if n in sources]  # a node read twice counts twice
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0] if stack else ""
        op = Op(
            kind, tuple(index.get(n, -1) for n in ordered), tuple(_shapes(n.meta["val"])[0] for n in ordered),
            _shapes(node.meta.get("val")), path if path in layers and kind in _PRODUCTS else None,
        )  # fmt: skip
        index[node] = len(ops)
        ops.append(op)
    return _read(ops)


def ran(model: nn.Module, batch: Any) -> list[Op]:  # noqa: ANN401
    """Return the operations of a model as one run meets them: those of the path that the data take.

    Args:
        model: In evaluation mode.
        batch: One call's arguments, as `quantize` takes them.
    """
    args, kwargs = call_arguments(model, batch)
    recorder = _Recorder(model)
    with torch.no_grad(), recorder.watching(), recorder:
        model(*args, **kwargs)
    return _read(recorder.ops)


_PRODUCTS = ("linear", "conv2d", "addmm", "convolution")


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if is_linear(m) or is_conv(m)}


def _read(ops: list[Op]) -> list[Op]:
    for number, op in enumerate(ops):
        for source in op.given:
            if source >= 0:
                ops[source].readers.append(number)
    return ops


def _in_order(value: Any) -> Iterator[Any]:  # noqa: ANN401
    if isinstance(value, torch.fx.Node):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _in_order(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _in_order(part)


def _shapes(value: Any) -> tuple[Shape, ...]:  # noqa: ANN401
    found = tuple(tuple(int(n) if isinstance(n, int) else -1 for n in t.shape) for t in tensors_in(value))
    return found or ((),)


class _Recorder(TorchFunctionMode):
    """Writes down every operation while it is on; results are kept alive so that no two share an identity."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.made: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.inside: list[str] = []
        self.modules = _layers(model)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which layer runs."""
        handles = []
        for name, module in self.modules.items():
            handles += [
                module.register_forward_pre_hook(lambda _m, _a, n=name: self.inside.append(n)),
                module.register_forward_hook(lambda _m, _a, _o: self.inside.pop() and None),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        """Run an operation and write it down."""
        given = list(tensors_in((tuple(args), dict(kwargs or {}))))
        result = func(*args, **(kwargs or {}))
        made = list(tensors_in(result))
        if not given or not made or getattr(func, "__name__", "") == "__get__":
            return result
        kind = name_of(getattr(func, "__name__", ""))
        layer = self.inside[-1] if self.inside and kind in _PRODUCTS else None
        self.ops.append(
            Op(kind, tuple(self.made.get(id(t), -1) for t in given), tuple(tuple(t.shape) for t in given),
               tuple(tuple(t.shape) for t in made), layer)
        )  # fmt: skip
        self.alive += made
        self.made.update((id(t), len(self.ops) - 1) for t in made)
        return result


def follow(model: nn.Module, batch: Any) -> tuple[list[Op], str, str]:  # noqa: ANN401
    """Return a model's operations, how they were found ("export", "run" or "nothing"), and what stood in the way.

    The model is put into evaluation mode meanwhile. Parameters on the meta device are followed there.
    """
    parameters = list(model.parameters())
    on_meta = any(p.device.type == "meta" for p in parameters)
    device = torch.device("meta") if on_meta else parameters[0].device if parameters else torch.device("cpu")
    batch = moved_to(batch, device)
    modes = {name: m.training for name, m in model.named_modules()}
    model.eval()
    try:
        try:
            return exported(model, batch), "export", ""
        except Exception as error:
            why = _first_line(error)
        try:
            return ran(model, batch), "run", why
        except Exception as error:
            return [], "nothing", f"{why}; {_first_line(error)}"
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
