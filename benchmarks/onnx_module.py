"""A graph of ONNX as a plain module of torch: convolutions and dense layers under their own names, the rest as told.

Enough of the format and of its operators for one U-Net, read without the onnx package: a file is nested records of
numbered fields. What is not known is refused by name.

Legend of the fields that are read: model 7 graph; graph 1 node, 5 initializer; node 1 input, 2 output, 4 operator, 5
attribute; attribute 1 name, 2 float, 3 int, 4 string, 8 ints; tensor 1 dims, 2 type, 8 name, 9 raw bytes.
"""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 11: torch.float64}
_GROUPS = 1 << 63


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return (value - (1 << 64) if value >= _GROUPS else value), at


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a record: an int, or bytes not yet looked into."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field {number} has kind {kind}")
        yield number, data[at : at + size]
        at += size


def _record(data: memoryview) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        found.setdefault(number, []).append(value)
    return found


def _text(data: memoryview) -> str:
    return bytes(data).decode()


def _ints(values: list[Any]) -> list[int]:
    """Return numbers, whether they came one by one or packed together."""
    made: list[int] = []
    for value in values:
        if isinstance(value, int):
            made.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            made.append(number)
    return made


def _tensor(record: dict[int, list[Any]]) -> Tensor:
    dims = _ints(record.get(1, []))
    return torch.frombuffer(bytearray(record[9][0]), dtype=_DTYPES[record[2][0]]).view(dims)


def _attribute(record: dict[int, list[Any]]) -> Any:  # noqa: ANN401
    if 2 in record:
        return struct.unpack("<f", record[2][0])[0]
    if 3 in record:
        return record[3][0]
    return _text(record[4][0]) if 4 in record else _ints(record.get(8, []))


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    wanted = [x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(shape.tolist())]
    return x.reshape(wanted)


def _resize(x: Tensor, _region: None, factors: Tensor, **_: object) -> Tensor:
    return nn.functional.interpolate(x, scale_factor=factors.tolist()[2:], mode="nearest")


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end])


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axes.flatten().tolist()):
        x = x.unsqueeze(axis)
    return x


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow, "Sqrt": torch.sqrt,
    "Log": torch.log, "Cos": torch.cos, "Sin": torch.sin, "Sigmoid": torch.sigmoid, "Reciprocal": torch.reciprocal,
    "Clip": lambda x, low, high: x.clamp(low, high), "Shape": _shape, "Unsqueeze": _unsqueeze, "Resize": _resize,
    "Squeeze": lambda x: x.squeeze(), "Reshape": _reshape,
    "Concat": lambda *parts, axis: torch.cat(parts, axis), "Softmax": lambda x, axis: x.softmax(axis),
    "Split": lambda x, axis, num_outputs: x.chunk(num_outputs, axis),
    "Einsum": lambda *parts, equation: torch.einsum(equation, *parts),
    "AveragePool": lambda x, kernel_shape, **_: nn.functional.avg_pool2d(x, kernel_shape),
    "InstanceNormalization": lambda x, w, b, epsilon: nn.functional.instance_norm(x, weight=w, bias=b, eps=epsilon),
}  # fmt: skip


class GraphModule(nn.Module):
    """A graph whose convolutions and dense layers are torch's own, found under the names of their weights.

    Args:
        path: The file.
        output: Name of the value that is returned.
    """

    def __init__(self, path: Path, output: str) -> None:
        super().__init__()
        graph = _record(_record(memoryview(path.read_bytes()))[7][0])
        constants = {}
        for data in graph[5]:
            record = _record(data)
            constants[_text(record[8][0])] = _tensor(record)
        self.output, self.steps = output, [self._step(_record(data), constants) for data in graph[1]]
        last = {name: i for i, (_, names, _, _) in enumerate(self.steps) for name in names if name != output}
        self.done = [[name for name, at in last.items() if at == i] for i in range(len(self.steps))]
        used = {name for _, names, _, _ in self.steps for name in names}
        self.names = [name for name in constants if name in used]
        for i, name in enumerate(self.names):
            self.register_buffer(f"constant_{i}", constants[name])

    def _step(
        self, record: dict[int, list[Any]], constants: dict[str, Tensor]
    ) -> tuple[str, list[str], list[str], dict[str, Any]]:  # fmt: skip
        operator, inputs = _text(record[4][0]), [_text(name) for name in record.get(1, [])]
        attributes = {_text(a[1][0]): _attribute(a) for a in map(_record, record.get(5, []))}
        outputs = [_text(name) for name in record[2]]
        if operator in ("Conv", "Gemm"):
            weight = constants[inputs[1]]
            name = inputs[1].removesuffix(".weight")
            layer: nn.Module
            if operator == "Conv":
                layer = nn.Conv2d(
                    weight.shape[1] * attributes["group"], weight.shape[0], tuple(weight.shape[2:]),
                    tuple(attributes["strides"]), tuple(attributes["pads"][:2]), tuple(attributes["dilations"]),
                    attributes["group"], bias=len(inputs) > 2,
                )  # fmt: skip
            else:
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=len(inputs) > 2)
            state = {"weight": weight} | ({"bias": constants[inputs[2]]} if len(inputs) > 2 else {})
            layer.load_state_dict(state)
            self._place(name, layer)
            return f"layer {name}", inputs[:1], outputs, {}
        if operator not in _OPERATORS:
            raise ValueError(f"operator {operator} is not known here")
        dropped = () if operator in ("AveragePool", "Resize") else ("nearest_mode",)
        return operator, inputs, outputs, {k: v for k, v in attributes.items() if k not in dropped}

    def _place(self, name: str, layer: nn.Module) -> None:
        parent: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the output of the graph."""
        known: dict[str, Any] = {**inputs, "": None}
        known |= {name: getattr(self, f"constant_{i}") for i, name in enumerate(self.names)}
        for (operator, names, outputs, attributes), done in zip(self.steps, self.done, strict=True):
            given = [known[name] for name in names]
            if operator.startswith("layer "):
                made: Any = self.get_submodule(operator.removeprefix("layer "))(*given)
            else:
                made = _OPERATORS[operator](*given, **attributes)
            known |= dict(zip(outputs, made, strict=True)) if len(outputs) > 1 else {outputs[0]: made}
            for name in done:
                del known[name]
        result: Tensor = known[self.output]
        return result
