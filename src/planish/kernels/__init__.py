"""Run it fast: the four operations behind every quantized layer.

w4a16          float activation x packed weight of 1 to 8 bits: weight-only methods
quantize_rows  encode activations as small integers, one scale a row or a group
qgemm          integer activation x packed weight, with an optional low-rank float branch
rotate         block-orthogonal change of basis, after an optional permutation

Each is a PyTorch operator (`torch.ops.planish.*`) with a reference that runs on any device, and faster versions where
there are some; `backends()` says what runs where, and why.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int8, Int32, UInt8
from torch import Tensor

from planish.kernels import cpu, integer, ops  # noqa: F401

__all__ = ["Backend", "backends", "qgemm", "quantize_rows", "rotate", "w4a16"]

_OPS = ("w4a16", "quantize_rows", "qgemm", "rotate")


@dataclass(frozen=True)
class Backend:
    """Say what runs one op on one kind of device.

    Args:
        op: Name of the op.
        device: Device type, or "any" for the reference.
        kernel: "reference", or "compiled" with the instruction set in use.
        when: The arguments it takes; the rest goes to the reference.
        why: Why there is nothing faster, empty if there is nothing to say.

    Example:
        >>> Backend("rotate", "any", "reference", "all").why
        ''
    """

    op: str
    device: str
    kernel: str
    when: str
    why: str = ""


def backends() -> tuple[Backend, ...]:
    """List what runs each op on this machine, and why.

    Returns:
        Rows in the order in which they are tried; those of a device come before that of "any".

    Example:
        >>> sorted({row.op for row in backends()})
        ['decoder', 'qgemm', 'quantize_rows', 'rotate', 'w4a16']
    """
    if cpu.absence:
        why = f"the compiled module is absent: {cpu.absence}"
        fast = [Backend(op, "cpu", "reference", "all", why) for op in _OPS]
    else:
        rounded = "bits=4, activation_bits=16 or 8, not float64, zero <= 15, padding groups to eights adds at most half"
        kernel = f"compiled ({cpu.isa})"
        fast = [
            Backend("w4a16", "cpu", f"{kernel}, repacked weight, integer activation", rounded),
            Backend("w4a16", "cpu", kernel, "bits=4, float32"),
            Backend("quantize_rows", "cpu", kernel, "all"),
            Backend("qgemm", "cpu", kernel, "all but dtype=float64"),
            Backend("rotate", "cpu", kernel, "all"),
        ]
    whole = Backend("decoder", "cpu", "absent", "none", f"the compiled module is absent: {cpu.absence}")
    if not cpu.absence:
        whole = Backend("decoder", "cpu", f"compiled ({cpu.isa})", "4-bit decoders of the Llama kind: quant.Decoder")
    plain = (Backend(op, "any", "reference", "all", "no faster version is written yet") for op in _OPS)
    return (*fast, whole, *plain)


def w4a16(
    x: Float[Tensor, "*rows channels"],
    packed: Int32[Tensor, "out words"],
    scale: Float[Tensor, "out groups"],
    zero: UInt8[Tensor, "out groups"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    bits: int,
    group_size: int,
    activation_bits: int | None = None,
) -> Float[Tensor, "*rows out"]:
    """Multiply a float activation by a packed integer weight: y = x @ ((codes - zero) * scale).T + bias.

    Differentiable in every float argument; gradients go through the reference.

    With `activation_bits` the activation may be rounded to integers of that width, a group at a time, so that products
    and sums are exact integers: a weight of 4 bits on a CPU is then repacked at its first use into the order in which
    memory streams best, and the repacked copy (as large as the weight) is kept for as long as `packed` lives and none
    of the weight's tensors is written to. `backends()` says where this is done; elsewhere nothing is rounded.

    Args:
        x: Activation, in float32, bfloat16, float16 or float64.
        packed: Unsigned codes, a little-endian stream of bits along the channels: ceil(channels * bits / 32) words.
        scale: Step of each group, any float dtype.
        zero: Code that stands for 0 in each group; 2^(bits-1) for a symmetric format.
        bias: Added to the result.
        bits: Width of a code, 1 to 8.
        group_size: Channels that share a scale, >= 1; the last group may be shorter.
        activation_bits: 16 (steps of 1/32639 of the group's largest entry), 8 (1/127), or None (default) for none.

    Returns:
        The product, in the dtype of `x`; the weight is computed in float32 and cast to it.

    Raises:
        ValueError: A shape, dtype, device or range does not fit.

    Example:
        >>> packed = torch.tensor([[0x21]], dtype=torch.int32)  # codes 1, 2
        >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8)
        >>> w4a16(torch.tensor([10.0, 100.0]), packed, one, zero, bits=4, group_size=2)
        tensor([210.])
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or scale.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return ops.w4a16_reference(
            x, packed, scale, zero, bias, bits=bits, group_size=group_size, activation_bits=activation_bits
        )
    if activation_bits is not None:
        kept = cpu.run_kept(
            x, packed, scale, zero, bias, bits=bits, group_size=group_size, activation_bits=activation_bits
        )
        if kept is not None:
            return kept
    y: Tensor = torch.ops.planish.w4a16(
        x, packed, scale, zero, bias, bits=bits, group_size=group_size, activation_bits=activation_bits
    )
    return y


def quantize_rows(
    x: Float[Tensor, "*rows channels"],
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    clip: float = 1.0,
) -> tuple[Int8[Tensor, "*rows channels"], Float[Tensor, "*rows groups"], Int8[Tensor, "*rows groups"]]:
    """Encode each row as signed integers: x is close to (codes - zero) * scale, and 0 is exact.

    The range is that of the data, or a share of it, computed in float32. A group that holds NaN or infinity, or whose
    scale does not fit its dtype, keeps a non-finite scale, so that whatever is computed from it is visibly not finite.
    Not differentiable: a backward pass warns.

    Args:
        x: Activation, in float32, bfloat16, float16 or float64.
        bits: Width of a code, 2 to 8; codes lie in [-2^(bits-1), 2^(bits-1) - 1].
        group_size: Channels that share a scale, >= 1; None for one scale a row.
        symmetric: Put zero at code 0, the extreme half a step beyond the last code; else the range is [min, max] of
            the group, widened to hold 0.
        scale_dtype: Dtype whose values scales take, before codes are chosen: float32, bfloat16 or float16.
        clip: Share of the range that the codes span, in (0, 1]; what lies beyond gets the last code.

    Returns:
        Codes, scales (float32, > 0) and the codes that stand for 0.

    Raises:
        ValueError: A dtype or range does not fit.

    Example:
        >>> codes, scale, zero = quantize_rows(torch.tensor([[-7.5, 0.0, 3.0]]), bits=4)
        >>> codes.tolist(), scale.tolist(), zero.tolist()
        ([[-8, 0, 3]], [[1.0]], [[0]])
    """
    codes, scale, zero = torch.ops.planish.quantize_rows(
        x, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype, clip=clip
    )
    return codes, scale, zero


def qgemm(
    xq: Int8[Tensor, "*rows channels"],
    x_scale: Float[Tensor, "*rows x_groups"],
    packed: Int32[Tensor, "out words"],
    scale: Float[Tensor, "out groups"],
    zero: UInt8[Tensor, "out groups"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    bits: int,
    group_size: int,
    x_zero: Int8[Tensor, "*rows x_groups"] | None = None,
    x_group_size: int | None = None,
    down: Float[Tensor, "rank channels"] | None = None,
    up: Float[Tensor, "out rank"] | None = None,
    x: Float[Tensor, "*rows channels"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*rows out"]:
    """Multiply an encoded activation by a packed weight, and add a low-rank float branch and the bias.

    y = ((xq - x_zero) * x_scale) @ ((codes - zero) * scale).T + x @ down.T @ up.T + bias. Products and sums of
    integers are exact everywhere; the reference adds what they are scaled to in float64 and rounds once, the compiled
    kernels add it in float32 (the bound is in csrc/qgemm.h), with the same bits for any instruction set and number of
    threads. Not differentiable: a backward pass warns.

    Args:
        xq: Signed codes of the activation, as `quantize_rows` makes them.
        x_scale: Step of each row, or of each group of a row.
        packed: Unsigned codes of the weight, as for `w4a16`.
        scale: Step of each group of the weight.
        zero: Code that stands for 0 in each group of the weight.
        bias: Added to the result.
        bits: Width of a weight's code, 1 to 8.
        group_size: Channels that share a scale of the weight, >= 1.
        x_zero: Codes that stand for 0 in the activation; None for 0.
        x_group_size: Channels that share a scale of the activation, >= 1; None for one scale a row.
        down: First factor of the low-rank branch; needs `up` and `x`.
        up: Second factor.
        x: The activation before it was encoded, which the branch reads.
        dtype: Dtype of the result.

    Returns:
        The product in `dtype`.

    Raises:
        ValueError: A shape, dtype, device or range does not fit, or only a part of the branch is given.

    Example:
        >>> codes, step, _ = quantize_rows(torch.tensor([[1.0, -2.0]]))
        >>> weight = torch.tensor([[0x21]], dtype=torch.int32)  # codes 1, 2
        >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8)
        >>> qgemm(codes, step, weight, one, zero, bits=4, group_size=2).round(decimals=1)
        tensor([[-3.]])
    """
    y: Tensor = torch.ops.planish.qgemm(
        xq,
        x_scale,
        packed,
        scale,
        zero,
        bias,
        bits=bits,
        group_size=group_size,
        x_zero=x_zero,
        x_group_size=x_group_size,
        down=down,
        up=up,
        x=x,
        dtype=dtype,
    )
    return y


def rotate(
    x: Float[Tensor, "*rows channels"],
    blocks: Float[Tensor, "count size size"],
    index: Int[Tensor, " channels"] | None = None,
) -> Float[Tensor, "*rows channels"]:
    """Multiply each block of channels by its own matrix, after reordering the channels.

    y[k size + j] = sum_i x[index[k size + i]] blocks[k, i, j]: the activation is a row, the matrix stands on its right.
    Differentiable in `x` and `blocks`; gradients go through the reference.

    Args:
        x: Activation of count * size channels.
        blocks: One matrix a block, orthogonal if the layer is to be left unchanged.
        index: Channel that each position takes, a permutation; None for the given order.

    Returns:
        The turned activation in the dtype of `x`, computed in float32 or better.

    Raises:
        ValueError: A shape, dtype or device does not fit.

    Example:
        >>> turn = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> rotate(torch.tensor([1.0, 2.0]), turn)
        tensor([2., 1.])
    """
    if torch.is_grad_enabled() and (x.requires_grad or blocks.requires_grad):
        return ops.rotate_reference(x, blocks, index)
    y: Tensor = torch.ops.planish.rotate(x, blocks, index)
    return y
