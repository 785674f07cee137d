"""From the parts of a model to the compiled decoder."""

from typing import cast

from torch import Tensor, nn

from planish.kernels import decoding, placing
from planish.quant.anatomy import Anatomy, Norm, UnfitError
from planish.quant.formats import FP4
from planish.quant.layers import QLinear


def as_float(tensor: Tensor | None) -> Tensor | None:
    """Return a float32 copy of a vector, or None."""
    return None if tensor is None else tensor.detach().float().contiguous()


def dense_rows(layer: nn.Module) -> Tensor:
    """Return a layer's rows, in their own dtype where the compiled side reads it."""
    weight = cast(Tensor, layer.dequantize().weight if isinstance(layer, QLinear) else layer.weight).detach()
    return (weight if weight.dtype in decoding.KINDS else weight.float()).contiguous()


def _matrix(layer: nn.Module) -> placing.Matrix:
    bias = as_float(cast(Tensor | None, layer.bias))
    if not isinstance(layer, QLinear):
        dense = dense_rows(layer)
        return placing.Matrix(len(dense), dense.shape[1], dense=dense, bias=bias)
    beside = layer.down is not None or layer.loras or isinstance(layer.format, FP4)
    if layer.format.bits != 4 or layer.transform is not None or layer.act is not None or beside:
        raise UnfitError("a layer is not plainly 4-bit: it has other bits, a transform, rounded inputs or a branch")
    group = min(layer.format.group_size or layer.in_features, layer.in_features)
    zero = None if layer.weight_zero_point is None else layer.zeros()
    return placing.Matrix(
        layer.out_features, layer.in_features, packed=layer.weight_packed, scale=layer.weight_scale, zero=zero,
        group_size=group, bias=bias,
    )  # fmt: skip


def _pair(norm: Norm | None) -> decoding.Norm:
    return None if norm is None else (norm.weight, norm.eps)


def assemble(
    parts: Anatomy, head: Tensor, bias: Tensor | None, *, rounded: bool, threads: int
) -> decoding.NativeDecoder:
    """Build the compiled decoder; `rounded`: read the head as int8 rows first."""
    blocks = [
        decoding.Block(
            norms=[
                _pair(n) for n in (b.before_attention, b.after_attention, b.before_mlp, b.after_mlp, b.q_norm, b.k_norm)
            ],
            matrices=[[_matrix(m) for m in group] for group in (b.qkv, b.out, b.gate_up, b.down)],
            window=b.window,
            rope=b.rope,
        )
        for b in parts.blocks
    ]
    embedding = parts.embedding if parts.embedding.dtype in decoding.KINDS else parts.embedding.float()
    codes, scale, lost = decoding.encode_rows(head) if rounded else (None, None, None)
    shape = decoding.Shape(
        parts.hidden, parts.heads, parts.kv_heads, parts.head_dim, parts.inner, parts.vocab,
        parts.scale, parts.softcap, parts.embed_scale, parts.gate,
    )  # fmt: skip
    return decoding.NativeDecoder(
        shape, blocks, parts.ropes, embedding.contiguous(), _pair(parts.last),
        decoding.Head(head, bias, codes, scale, lost, parts.head_softcap), threads,
    )  # fmt: skip
