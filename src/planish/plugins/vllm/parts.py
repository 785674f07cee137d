"""Quantized layers cut for tensor parallelism and put together as vLLM wants them; needs no vLLM.

vLLM merges the layers that read one activation (q, k, v; gate, up) and cuts every layer over its workers: outputs of
the merged ones, inputs of those that follow. Codes are cut as they are, nothing is rounded again.

Legend: O outputs, I inputs, r rank of a float branch.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.quant.formats import FP4, Affine, QTensor
from planish.quant.layers import QLinear
from planish.quant.parts import Quantized
from planish.quant.transforms import Chain, Permute, Rotate, Scale, Shift, Transform

Span = tuple[int, int]


def take_rows(layer: QLinear, spans: Sequence[Span]) -> QLinear:
    """Return the layer that computes only the outputs in `spans`, in their order.

    Args:
        layer: The whole layer.
        spans: Half-open ranges of outputs.

    Returns:
        A new layer; `layer` itself where the spans are all of it.

    Example:
        >>> layer = QLinear.of(Affine(4, 32).encode(torch.randn(8, 32)))
        >>> part, x = take_rows(layer, [(6, 8), (0, 1)]), torch.ones(1, 32)
        >>> torch.allclose(part(x), layer(x)[:, [6, 7, 0]], atol=1e-5)
        True
    """
    if list(spans) == [(0, layer.out_features)]:
        return layer
    whole = layer.weight
    pieces = [whole.rows(slice(*span)) for span in spans]
    bias = None if layer.bias is None else torch.cat([layer.bias[slice(*s)] for s in spans])
    branch = None
    if layer.down is not None and layer.up is not None:
        branch = layer.down, torch.cat([layer.up[slice(*s)] for s in spans])
    return QLinear.of(_stacked(pieces), bias, transform=layer.transform, act=layer.act, low_rank=branch)


def take_columns(name: str, layer: QLinear, start: int, stop: int) -> QLinear:
    """Return the layer that reads inputs `start` to `stop`: the parts' outputs add up to the whole layer's.

    Args:
        name: The layer's name, for the sentence of an error.
        layer: The whole layer, without a bias.
        start: First input, at the beginning of a group.
        stop: Past the last input, at the end of a group.

    Returns:
        A new layer; `layer` itself where that is all of it.

    Raises:
        ValueError: The cut goes through a group, or a transform or the rounding of inputs reaches across it.

    Example:
        >>> layer, x = QLinear.of(Affine(4, 32).encode(torch.randn(8, 64))), torch.randn(1, 64)
        >>> left, right = take_columns("o", layer, 0, 32), take_columns("o", layer, 32, 64)
        >>> torch.allclose(left(x[:, :32]) + right(x[:, 32:]), layer(x), atol=1e-5)
        True
    """
    if (start, stop) == (0, layer.in_features):
        return layer
    whole, size = layer.weight, layer.format.group_size
    scale, zero = whole.scale, whole.zero
    if size is not None:
        if start % size or (stop % size and stop != layer.in_features):
            raise ValueError(
                f"`{name}`: a worker's inputs {start} to {stop} do not end where groups of {size} do; "
                "use fewer workers (tensor_parallel_size) or smaller groups."
            )
        groups = slice(start // size, -(-stop // size))
        scale, zero = scale[:, groups], None if zero is None else zero[:, groups]
    act = layer.act
    if act is not None and not (isinstance(act, Affine) and act.group_size and _whole(act.group_size, start, stop)):
        raise _across(name, f"rounding of inputs to {act}", start, stop)
    moved = None if layer.transform is None else _cut(name, layer.transform, start, stop)
    branch = None
    if layer.down is not None and layer.up is not None:
        branch = layer.down[:, start:stop], layer.up
    weight = QTensor(whole.codes[:, start:stop].contiguous(), scale, zero, layer.format)
    return QLinear.of(weight, layer.bias, transform=moved, act=act, low_rank=branch)


def _whole(size: int, start: int, stop: int) -> bool:
    return start % size == 0 and stop % size == 0


def _across(name: str, what: str, start: int, stop: int) -> ValueError:
    return ValueError(
        f"`{name}`: its {what} reaches past the inputs {start} to {stop} of one worker; "
        "serve it with tensor_parallel_size=1."
    )


def _cut(name: str, transform: Transform, start: int, stop: int) -> Transform:
    if isinstance(transform, Chain):
        return Chain(*(_cut(name, part, start, stop) for part in transform.parts))  # type: ignore[arg-type]
    if isinstance(transform, Scale):
        return Scale(transform.scale[start:stop])
    if isinstance(transform, Shift):
        return Shift(transform.offset[start:stop])
    if isinstance(transform, Rotate) and _whole(size := transform.blocks.shape[-1], start, stop):
        blocks = transform.blocks
        return Rotate(blocks if len(blocks) == 1 else blocks[start // size : stop // size])
    if isinstance(transform, Permute):
        index = transform.index[start:stop]
        if bool(((index >= start) & (index < stop)).all()):
            return Permute(index - start)
    raise _across(name, type(transform).__name__, start, stop)


def same_transform(a: Transform | None, b: Transform | None) -> bool:
    """Say whether two transforms do the same.

    Example:
        >>> same_transform(Scale(torch.ones(2)), Scale(torch.ones(2))), same_transform(None, Scale(torch.ones(2)))
        (True, False)
    """
    if a is None or b is None:
        return a is b
    kinds = [[type(m) for m in t.modules()] for t in (a, b)]
    left, right = a.state_dict(), b.state_dict()
    return kinds[0] == kinds[1] and all(torch.equal(left[key], right[key]) for key in left)


def _stacked(pieces: Sequence[QTensor]) -> QTensor:
    zeros = [piece.zero for piece in pieces if piece.zero is not None]
    return QTensor(
        torch.cat([p.codes for p in pieces]), torch.cat([p.scale for p in pieces]),
        torch.cat(zeros) if zeros else None, pieces[0].format,
    )  # fmt: skip


def _branches(parts: Sequence[QLinear]) -> tuple[Tensor, Tensor] | None:
    """Return the branches of several layers as one: below each other, or in blocks beside each other."""
    found = [(p.down, p.up) for p in parts if p.down is not None and p.up is not None]
    if not found:
        return None
    if len(found) == len(parts) and all(torch.equal(found[0][0], down) for down, _ in found):
        return found[0][0], torch.cat([up for _, up in found])  # a site's one way down
    like = found[0][1]
    ups = [like.new_zeros(p.out_features, 0) if p.up is None else p.up for p in parts]
    return torch.cat([down for down, _ in found]), torch.block_diag(*ups)


class Beside(nn.Module):
    """Layers of one input whose outputs are joined; for those that differ too much to be one layer.

    Args:
        *parts: The layers.

    Example:
        >>> parts = [QLinear.of(Affine(bits, 32).encode(torch.randn(8, 32))) for bits in (4, 8)]
        >>> Beside(*parts)(torch.ones(1, 32)).shape
        torch.Size([1, 16])
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, joined."""
        return torch.cat([part(x) for part in self.parts], -1)


def join(parts: Sequence[QLinear]) -> QLinear | Beside:
    """Make one layer of several that read the same input.

    Args:
        parts: Layers without a bias, in the order of their outputs.

    Returns:
        One `QLinear` where format, transform and rounding of inputs are the same; else the layers beside each other.

    Raises:
        ValueError: There is no layer, or the layers read different numbers of inputs.

    Example:
        >>> parts = [QLinear.of(Affine(4, 32).encode(torch.randn(8, 32))) for _ in "qkv"]
        >>> join(parts).out_features
        24
    """
    if len({p.in_features for p in parts}) != 1:
        raise bad("join", "parts", "layers that read one input", [p.in_features for p in parts])
    first = parts[0]
    alike = all(
        p.format == first.format and p.act == first.act and same_transform(p.transform, first.transform) for p in parts
    )
    if len(parts) == 1:
        return first
    if not alike:
        return Beside(*parts)
    weight = _stacked([p.weight for p in parts])
    return QLinear.of(weight, transform=first.transform, act=first.act, low_rank=_branches(parts))


def check_servable(name: str, layer: Quantized) -> QLinear:
    """Return a layer, or refuse it: one whose answer to a request would depend on the others, one with adapters.

    Raises:
        ValueError: Inputs are rounded to FP4, whose scale is chosen for the whole tensor; there are adapters; or the
            layer is cut into segments.

    Example:
        >>> check_servable("q", QLinear.of(Affine(4, 32).encode(torch.randn(8, 32)), act=Affine(8, None))).out_features
        8
    """
    if not isinstance(layer, QLinear):
        raise ValueError(f"`{name}`: it is cut into segments, which the method planish does not serve.")
    if isinstance(layer.act, FP4):
        raise ValueError(
            f"`{name}`: inputs rounded to {layer.act} share a scale over all tokens of a batch, so that requests would "
            "change each other's answers; the method planish does not serve them."
        )
    if isinstance(layer.format, FP4):
        raise ValueError(f"`{name}`: weights of four-bit floats are not served; use integers.")
    if layer.loras:
        raise ValueError(f"`{name}`: it carries {', '.join(layer.loras)}; let vLLM apply adapters to a layer without.")
    return layer


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's output in the dtype of `x`; on a CPU computed in float32, which the compiled kernels take.

    Example:
        >>> layer = QLinear.of(Affine(4, 32).encode(torch.randn(8, 32)))
        >>> run(layer, torch.ones(1, 32, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        made: Tensor = layer(x.float())
        return made.to(x.dtype)
    made = layer(x)
    return made


def set_activation_bits(layer: nn.Module) -> None:
    """Let kernels round float activations as PLANISH_ACTIVATION_BITS says: 16 (where it is not set) or 8.

    Args:
        layer: A layer; all `QLinear` in it are set.

    Raises:
        ValueError: The variable holds something else.
    """
    value = os.environ.get("PLANISH_ACTIVATION_BITS", "16")
    if value not in ("8", "16"):
        raise bad("vLLM plug-in", "PLANISH_ACTIVATION_BITS", "8 or 16", value)
    for module in layer.modules():
        if isinstance(module, QLinear):
            module.activation_bits = int(value)
