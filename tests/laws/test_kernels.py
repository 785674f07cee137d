"""Laws of the four ops: what the definitions mean, and that every faster kernel agrees with them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planish import kernels
from planish.kernels import cpu, ops

_INSTRUCTION_SETS = ["portable", "avx2", "avx512"]
_RUNNABLE = _INSTRUCTION_SETS[: _INSTRUCTION_SETS.index(cpu.isa) + 1] if cpu.isa in _INSTRUCTION_SETS else []


def pack(codes: list[list[int]], bits: int) -> Tensor:
    """Write the stream by way of one big integer a row: slow, and unlike the code under test."""
    rows = []
    for row in codes:
        stream = sum(code << (bits * k) for k, code in enumerate(row))
        size = -(-len(row) * bits // 32)
        words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(size)]
        rows.append([w - (1 << 32) if w >> 31 else w for w in words])
    return torch.tensor(rows, dtype=torch.int32).reshape(len(codes), -1)


def layer(seed: int, out: int, channels: int, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw codes, and the packed weight, scales and zero points that go with them."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out, channels), generator=g)
    count = -(-channels // group_size)
    scale = torch.rand(out, count, generator=g) + 0.01
    zero = torch.randint(0, 1 << bits, (out, count), generator=g).to(torch.uint8)
    return codes, pack(codes.tolist(), bits), scale, zero


def dense(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """The weight, entry by entry, in float64."""
    weight = torch.empty(codes.shape, dtype=torch.float64)
    for o in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            group = k // group_size
            weight[o, k] = (codes[o, k].item() - zero[o, group].item()) * scale[o, group].double().item()
    return weight


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "rows": st.integers(0, 5),
        "out": st.integers(1, 9),
        "channels": st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 136])),
        "group_size": st.integers(1, 80),
    }
)


@given(shape=shapes, bits=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_unpacking_undoes_packing_at_every_width(shape, bits):
    codes, packed, _, _ = layer(shape["seed"], shape["out"], shape["channels"], bits, shape["group_size"])
    assert torch.equal(ops.unpack(packed, bits, shape["channels"]).long(), codes)


@given(shape=shapes, bits=st.integers(1, 8), biased=st.booleans())
@settings(max_examples=40, deadline=None)
def test_w4a16_is_the_dense_product_in_float64(shape, bits, biased):
    codes, packed, scale, zero = layer(shape["seed"], shape["out"], shape["channels"], bits, shape["group_size"])
    g = torch.Generator().manual_seed(shape["seed"])
    x = torch.randn(shape["rows"], shape["channels"], generator=g, dtype=torch.float64)
    bias = torch.randn(shape["out"], generator=g, dtype=torch.float64) if biased else None
    y = kernels.w4a16(x, packed, scale, zero, bias, bits=bits, group_size=shape["group_size"])
    # the definition rounds the weight to float32 once, so the oracle does too
    weight = dense(codes, scale, zero, shape["group_size"]).float().double()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=1e-10, atol=1e-10)


def _assert_rounding_only(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    size = x.double().abs() @ weight.abs().mT + (0 if bias is None else bias.double().abs())
    # sums in any order stay within (terms + 2) roundings of the sum of magnitudes
    bound = (x.shape[-1] + 2) * torch.finfo(torch.float32).eps / 2 * size + 1e-30
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.skipif(not _RUNNABLE, reason="the compiled module is absent")
@pytest.mark.parametrize("instructions", _RUNNABLE)
@given(shape=shapes, biased=st.booleans(), threads=st.integers(1, 3), offset=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_compiled_w4a16_differs_from_the_definition_by_rounding_alone(instructions, shape, biased, threads, offset):
    codes, packed, scale, zero = layer(shape["seed"], shape["out"], shape["channels"], 4, shape["group_size"])
    g = torch.Generator().manual_seed(shape["seed"])
    rows, channels = shape["rows"], shape["channels"]
    x = torch.randn(rows * channels + offset, generator=g)[offset:].view(rows, channels)  # any alignment
    bias = torch.randn(shape["out"], generator=g) if biased else None
    y = cpu.run_w4a16(
        x, packed, scale, zero, bias, group_size=shape["group_size"], instructions=instructions, threads=threads
    )
    _assert_rounding_only(y, x, dense(codes, scale, zero, shape["group_size"]).float().double(), bias)


@pytest.mark.skipif(not _RUNNABLE, reason="the compiled module is absent")
@pytest.mark.parametrize("instructions", _RUNNABLE)
@pytest.mark.parametrize(
    ("rows", "out", "channels", "group_size"), [(1, 7, 1023, 128), (3, 1030, 2056, 100), (17, 5, 4100, 2**40)]
)
def test_the_compiled_w4a16_crosses_panels_and_threads(instructions, rows, out, channels, group_size):
    g = torch.Generator().manual_seed(0)
    packed = torch.randint(-(2**31), 2**31, (out, -(-channels // 8)), generator=g).to(torch.int32)
    count = -(-channels // group_size)
    scale = torch.rand(out, count, generator=g).bfloat16()
    zero = torch.randint(0, 16, (out, count), generator=g).to(torch.uint8)
    x = torch.randn(channels, rows, generator=g).mT  # not contiguous
    y = [
        cpu.run_w4a16(x, packed, scale, zero, None, group_size=group_size, instructions=instructions, threads=n)
        for n in (1, 4)
    ]
    assert torch.equal(*y), "the result depends on the number of threads"
    weight = ops.dequantize(packed, scale, zero, bits=4, group_size=group_size, channels=channels)
    _assert_rounding_only(y[0], x, weight.double(), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_give_half_precision_results(dtype):
    codes, packed, scale, zero = layer(3, 6, 40, 4, 16)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = kernels.w4a16(x, packed, scale, zero, bits=4, group_size=16)
    assert y.dtype == dtype
    exact = x.double() @ dense(codes, scale, zero, 16).mT
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps * exact.abs().max().item())


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    bits=st.integers(2, 8),
    group_size=st.one_of(st.none(), st.integers(1, 50)),
    symmetric=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_encoded_rows_are_within_half_a_step(values, bits, group_size, symmetric):
    x = torch.tensor([values])
    codes, scale, zero = kernels.quantize_rows(x, bits=bits, group_size=group_size, symmetric=symmetric)
    size = min(group_size or len(values), len(values))
    step = scale.double().repeat_interleave(size, -1)[:, : len(values)]
    origin = zero.double().repeat_interleave(size, -1)[:, : len(values)]
    error = ((codes.double() - origin) * step - x.double()).abs()
    assert (error <= step * (0.5 + 1e-5)).all()
    assert (codes >= -(1 << (bits - 1))).all()
    assert (codes <= (1 << (bits - 1)) - 1).all()
    assert (codes[x == 0].double() == origin[x == 0]).all(), "0 must be exact"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_row_stays_visible(poison, symmetric):
    x = torch.ones(3, 8)
    x[1, 5] = poison
    codes, scale, zero = kernels.quantize_rows(x, bits=8, symmetric=symmetric)
    value = (codes.float() - zero) * scale
    assert torch.isfinite(value[[0, 2]]).all()
    assert not torch.isfinite(value[1]).any()


@given(shape=shapes, bits=st.integers(1, 8), branch=st.booleans(), x_group_size=st.sampled_from([None, 1, 7, 32]))
@settings(max_examples=40, deadline=None)
def test_qgemm_is_the_product_of_what_the_codes_stand_for(shape, bits, branch, x_group_size):
    codes, packed, scale, zero = layer(shape["seed"], shape["out"], shape["channels"], bits, shape["group_size"])
    g = torch.Generator().manual_seed(shape["seed"])
    rows, channels, out = shape["rows"] + 1, shape["channels"], shape["out"]
    x = torch.randn(rows, channels, generator=g)
    xq, x_scale, x_zero = kernels.quantize_rows(x, bits=8, group_size=x_group_size, symmetric=False)
    down = torch.randn(2, channels, generator=g) if branch else None
    up = torch.randn(out, 2, generator=g) if branch else None
    bias = torch.randn(out, generator=g)
    y = kernels.qgemm(
        xq,
        x_scale,
        packed,
        scale,
        zero,
        bias,
        bits=bits,
        group_size=shape["group_size"],
        x_zero=x_zero,
        x_group_size=x_group_size,
        down=down,
        up=up,
        x=x if branch else None,
        dtype=torch.float64,
    )
    size = x_group_size or channels
    decoded = torch.empty(rows, channels, dtype=torch.float64)
    for n in range(rows):
        for k in range(channels):
            decoded[n, k] = (xq[n, k].item() - x_zero[n, k // size].item()) * x_scale[n, k // size].double().item()
    expected = decoded @ dense(codes, scale, zero, shape["group_size"]).mT + bias.double()
    if down is not None and up is not None:
        expected = expected + x.double() @ (up.double() @ down.double()).mT
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_rotate_is_a_permutation_then_a_block_diagonal_product():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 12, generator=g, dtype=torch.float64)
    blocks = torch.linalg.qr(torch.randn(3, 4, 4, generator=g, dtype=torch.float64))[0]
    index = torch.randperm(12, generator=g)
    y = kernels.rotate(x, blocks, index)
    torch.testing.assert_close(y, x[..., index] @ torch.block_diag(*blocks), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(kernels.rotate(y, blocks.mT.contiguous()), x[..., index], rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    _, packed, scale, zero = layer(5, 4, 10, 4, 4)
    x = torch.randn(2, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: kernels.w4a16(x, packed, scale, zero, b, bits=4, group_size=4), (x, bias)
    )
    blocks = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: kernels.rotate(x, b, torch.arange(9, -1, -1)), (x, blocks))
