"""A layer cut into segments: rows whose outputs are joined, or columns whose outputs are added.

The parts are quantized layers of their own, each with its scales, its rounding of inputs and its transform. The same
module holds float parts while a cut is being made.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.quant.conv import QConv, is_conv
from planish.quant.layers import QLinear
from planish.quant.sites import is_linear, weight_of

MODES = ("output", "input")


class Segments(nn.Module):
    """Layers that stand in the place of one: their outputs joined ("output") or, each on its channels, added ("input").

    Args:
        parts: The layers in order: all dense ones or all convolutions, quantized or not.
        mode: "output": parts read the same input and own rows of the weight. "input": parts own columns, and read the
            matching channels of the input.

    Raises:
        ValueError: There are no parts, `mode` is unknown, or sizes do not agree.

    Example:
        >>> whole = nn.Linear(6, 4)
        >>> cut = Segments.split(whole, "input", (2, 4))
        >>> x = torch.randn(3, 6)
        >>> bool(torch.allclose(cut(x), whole(x), atol=1e-6)), cut.sizes
        (True, (2, 4))
    """

    def __init__(self, parts: Sequence[nn.Module], mode: str) -> None:
        super().__init__()
        if mode not in MODES:
            raise bad("Segments", "mode", "'output' or 'input'", mode)
        if not parts:
            raise bad("Segments", "parts", "at least one layer", [])
        self.mode, self.parts = mode, nn.ModuleList(parts)
        self.spatial = is_conv(parts[0]) or isinstance(parts[0], QConv)
        kinds = {is_conv(part) or isinstance(part, QConv) for part in parts}
        other = {features(part)[0 if mode == "output" else 1] for part in parts}
        if len(kinds) > 1 or (len(other) > 1 and not (self.spatial and mode == "output")):
            same = "inputs" if mode == "output" else "outputs"
            raise bad("Segments", "parts", f"layers of one kind with as many {same}", [features(p) for p in parts])

    @classmethod
    def split(cls, layer: nn.Module, mode: str, sizes: Sequence[int]) -> "Segments":
        """Cut a float layer, which stays as it is; of columns the first part holds the bias.

        Args:
            layer: A dense layer, or a convolution without groups of channels.
            mode: See the class.
            sizes: Outputs, or input channels, of each part.

        Returns:
            What computes the same.

        Raises:
            ValueError: The sizes do not make up the layer, or a convolution has groups.
        """
        if mode not in MODES:
            raise bad("Segments", "mode", "'output' or 'input'", mode)
        spatial = is_conv(layer)
        if spatial and cast(nn.Conv2d, layer).groups != 1:
            raise bad("Segments", "layer", "a convolution whose channels are one group", cast(nn.Conv2d, layer).groups)
        weight = layer.get_parameter("weight") if spatial else weight_of(layer)
        total = weight.shape[0 if mode == "output" else 1]
        if not sizes or min(sizes) < 1 or sum(sizes) != total:
            raise bad("Segments", "sizes", f"numbers above 0 that sum to {total}", tuple(sizes))
        bias = cast(Tensor | None, getattr(layer, "bias", None))
        parts: list[nn.Module] = []
        for start, size in zip(starts(sizes), sizes, strict=True):
            rows = weight.detach().narrow(0 if mode == "output" else 1, start, size).clone()
            if mode == "output":
                own = None if bias is None else bias[start : start + size].detach().clone()
            else:
                own = None if bias is None or start else bias.detach().clone()
            parts.append(_like(layer, rows, own))
        return cls(parts, mode).train(layer.training)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Outputs, or input channels, of each part."""
        if self.mode == "output":
            return tuple(features(part)[1] for part in self.parts)
        return tuple(_channels(part) for part in self.parts)

    @property
    def in_features(self) -> int:
        """What enters the whole layer: channels, times the places of the kernel in a convolution."""
        each = [features(part)[0] for part in self.parts]
        return each[0] if self.mode == "output" else sum(each)

    @property
    def out_features(self) -> int:
        """Outputs of the whole layer."""
        each = [features(part)[1] for part in self.parts]
        return sum(each) if self.mode == "output" else each[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, in the dtype of `x`."""
        axis = -3 if self.spatial else -1
        if self.mode == "output":
            made = [part(x) for part in self.parts]
            return made[0] if len(made) == 1 else torch.cat(made, axis)
        if len(self.parts) == 1:
            return cast(Tensor, self.parts[0](x))
        wide = torch.promote_types(x.dtype, torch.float32)
        total: Tensor | None = None
        for part, piece in zip(self.parts, x.split(self.sizes, axis), strict=True):
            y = part(piece).to(wide)
            total = y if total is None else total + y
        return cast(Tensor, total).to(x.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the float layer that this one equals when no part rounds its inputs, in `dtype` at the least."""
        dense = [part.dequantize(dtype) if isinstance(part, QLinear) else part for part in self.parts]
        axis = 0 if self.mode == "output" else 1
        weights = [part.get_parameter("weight").detach() for part in dense]
        biases = [cast(Tensor | None, part.bias) for part in dense]
        bias = None
        if any(b is not None for b in biases):
            zeros = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
            bias = torch.cat(zeros) if axis == 0 else torch.stack(zeros).sum(0)
        return _like(dense[0], torch.cat(weights, axis), bias)

    def extra_repr(self) -> str:
        """Return the layer's facts for `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, {self.mode} in {self.sizes}"


def starts(sizes: Sequence[int]) -> list[int]:
    """Return where each part begins.

    Example:
        >>> starts((2, 3, 4))
        [0, 2, 5]
    """
    return [0, *accumulate(sizes)][:-1]


def features(module: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a layer, float or quantized; a convolution's inputs are its weight's columns."""
    if isinstance(module, QLinear | Segments):
        return module.in_features, module.out_features
    if is_conv(module) or is_linear(module):
        outputs, inputs = weight_of(module).shape
        return inputs, outputs
    raise bad("Segments", "parts", "dense layers or convolutions", type(module).__name__)


def _channels(module: nn.Module) -> int:
    return cast(int, module.in_channels) if is_conv(module) or isinstance(module, QConv) else features(module)[0]


def _like(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a float layer with another weight, and the geometry of a convolution."""
    made: nn.Module
    if is_conv(layer):
        conv = cast(nn.Conv2d, layer)
        made = nn.Conv2d(
            weight.shape[1], weight.shape[0], conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            bias=bias is not None, padding_mode=conv.padding_mode, device="meta",
        )  # fmt: skip
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


Quantized = QLinear | Segments
"""What stands in the place of a dense layer or a convolution."""


def quantized_layers(model: nn.Module) -> dict[str, QLinear | Segments]:
    """Return the quantized layers of a model by name; parts of a cut one are not layers of their own.

    Example:
        >>> quantized_layers(nn.Sequential(nn.Linear(2, 2)))
        {}
    """
    found: dict[str, QLinear | Segments] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, Segments) or (isinstance(module, QLinear) and not (inside and name.startswith(inside))):
            found[name] = module
            if isinstance(module, Segments):
                inside += (f"{name}." if name else "",)
    return found


def in_place_of(there: nn.Module, layer: QLinear | Segments) -> QLinear | Segments:
    """Return the layer as what it replaces needs it: `QConv` in place of a convolution, else as it is."""
    if not is_conv(there):
        return layer
    if isinstance(layer, QLinear):
        return layer if isinstance(layer, QConv) else QConv(layer, cast(nn.Conv2d, there))
    if layer.spatial:
        return layer
    columns = cast(nn.Conv2d, there).weight[0, 0].numel()
    sizes = layer.sizes if layer.mode == "output" else tuple(size // columns for size in layer.sizes)
    plain = Segments.split(there, layer.mode, sizes)
    made = [in_place_of(p, cast(QLinear, q)) for p, q in zip(plain.parts, layer.parts, strict=True)]
    return Segments(made, layer.mode).train(layer.training)
