"""Laws of the compiled ops of integer activations: equal to the definitions, on every instruction set."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish import kernels
from planish.kernels import cpu, integer, ops
from planish.quant.formats import Affine

pytestmark = pytest.mark.skipif(bool(cpu.absence), reason="the compiled module is absent")
RUNNABLE = cpu._native.runnable() if cpu._native is not None else []
UNIT = torch.finfo(torch.float32).eps / 2
HALVES = (torch.float16, torch.bfloat16, torch.float32)


def test_the_portable_kernels_and_the_best_ones_are_among_those_tested():
    assert {"portable", cpu._native.best_isa()} <= set(RUNNABLE)


def placed(t: torch.Tensor, offset: int, strided: bool) -> torch.Tensor:
    """The same values at any alignment, and contiguous or not."""
    room = torch.zeros(t.numel() * 2 + offset, dtype=t.dtype)
    step = 2 if strided else 1
    view = room[offset : offset + t.numel() * step].view(*t.shape[:-1], t.shape[-1] * step)[..., ::step]
    return view.copy_(t)


special = st.sampled_from([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -3e-39, 65504.0, 3e38])
rows = st.integers(1, 40).flatmap(
    lambda n: st.lists(
        st.lists(st.one_of(st.floats(width=32), st.floats(-8, 8, width=32), special), min_size=n, max_size=n),
        min_size=1,
        max_size=4,
    )
)


@given(
    values=rows,
    bits=st.integers(2, 8),
    group_size=st.one_of(st.none(), st.integers(1, 45)),
    symmetric=st.booleans(),
    dtype=st.sampled_from([*HALVES, torch.float64]),
    scale_dtype=st.sampled_from(HALVES),
    clip=st.sampled_from([1.0, 0.9, 0.3]),
    offset=st.integers(0, 3),
    strided=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
def test_quantize_rows_is_its_definition_bit_for_bit(
    values, bits, group_size, symmetric, dtype, scale_dtype, clip, offset, strided, threads
):
    x = placed(torch.tensor(values, dtype=torch.float64).to(dtype), offset, strided)
    kwargs = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype, "clip": clip}
    expected = ops.quantize_rows_reference(x, **kwargs)
    for instructions in RUNNABLE:
        found = integer.run_quantize_rows(x, **kwargs, instructions=instructions, threads=threads)
        for part, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(part, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_long_rows_are_encoded_bit_for_bit(bits, symmetric):
    g = torch.Generator().manual_seed(bits)
    x = torch.randn(70, 1031, generator=g) * torch.logspace(-30, 30, 70)[:, None]
    kwargs = {"bits": bits, "group_size": 128, "symmetric": symmetric, "scale_dtype": torch.float32}
    expected = ops.quantize_rows_reference(x, **kwargs)
    for instructions in RUNNABLE:
        for threads in (1, 2):
            found = integer.run_quantize_rows(x, **kwargs, instructions=instructions, threads=threads)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@given(
    seed=st.integers(0, 2**20),
    bits=st.integers(2, 8),
    group_size=st.one_of(st.none(), st.integers(1, 70)),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
@settings(max_examples=60, deadline=None)
def test_codes_are_those_of_the_format(seed, bits, group_size, symmetric, scale_dtype):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 65, generator=g) * torch.tensor([[1e-6], [1.0], [1e3]])
    x[2, :20] = 0
    form = Affine(bits, group_size, symmetric, ragged=True, scale_dtype=scale_dtype)
    wanted = form.encode(x)
    codes, scale, zero = kernels.quantize_rows(
        x, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=wanted.scale.dtype
    )
    assert torch.equal(codes.int() + form.middle, wanted.codes.int())
    assert torch.equal(scale, wanted.scale.float())
    assert torch.equal(zero.int() + form.middle, wanted.zero.int()) if not symmetric else not zero.any()


def operands(seed, m, out, channels, bits, group_size, x_group_size, scale_dtype, asymmetric, rank, biased):
    g = torch.Generator().manual_seed(seed)
    count, x_count = -(-channels // min(group_size, channels)), -(-channels // min(x_group_size or channels, channels))

    def ints(low, high, *shape, dtype):
        return torch.randint(low, high, shape, generator=g).to(dtype)

    args = {
        "xq": ints(-128, 128, m, channels, dtype=torch.int8),
        "x_scale": torch.rand(m, x_count, generator=g) + 0.01,
        "packed": ints(-(2**31), 2**31, out, -(-channels * bits // 32), dtype=torch.int32),
        "scale": (torch.rand(out, count, generator=g) + 0.01).to(scale_dtype),
        "zero": ints(0, 256, out, count, dtype=torch.uint8),
        "bias": torch.randn(out, generator=g) if biased else None,
    }
    kwargs = {
        "bits": bits,
        "group_size": group_size,
        "x_group_size": x_group_size,
        "x_zero": ints(-128, 128, m, x_count, dtype=torch.int8) if asymmetric else None,
        "down": torch.randn(rank, channels, generator=g) if rank else None,
        "up": torch.randn(out, rank, generator=g) if rank else None,
        "x": torch.randn(m, channels, generator=g) if rank else None,
    }
    return args, kwargs


def bound(args, kwargs):
    """The bound that qgemm.h states, from exact integers; with the branch's first product as float32 BLAS bounds it."""
    codes = args["xq"].double()
    channels, out = codes.shape[1], args["packed"].shape[0]
    size, x_size = min(kwargs["group_size"], channels), min(kwargs["x_group_size"] or channels, channels)
    weight = ops.unpack(args["packed"], kwargs["bits"], channels).double()
    weight = weight - args["zero"].double().repeat_interleave(size, -1)[:, :channels]
    if kwargs["x_zero"] is not None:
        codes = codes - kwargs["x_zero"].double().repeat_interleave(x_size, -1)[:, :channels]
    edges = sorted({*range(0, channels, 512), *range(0, channels, size), *range(0, channels, x_size), channels})
    total = torch.zeros(codes.shape[0], out, dtype=torch.float64)
    for begin, end in itertools.pairwise(edges):  # at least as many runs as the kernel has
        exact = codes[:, begin:end] @ weight[:, begin:end].mT
        step = args["x_scale"].double()[:, begin // x_size, None] * args["scale"].double()[None, :, begin // size]
        total += (exact * step).abs()
    if args["bias"] is not None:
        total += args["bias"].double().abs()
    rank = 0
    if kwargs["down"] is not None:
        rank = kwargs["down"].shape[0] + channels
        total += kwargs["x"].double().abs() @ kwargs["down"].double().abs().mT @ kwargs["up"].double().abs().mT
    return (len(edges) + rank + 4) * UNIT * total + 1e-30


def check(args, kwargs, threads=(1,)):
    expected = ops.qgemm_reference(**args, **kwargs, dtype=torch.float64)
    first = None
    for instructions in RUNNABLE:
        for count in threads:
            y = integer.run_qgemm(**args, **kwargs, instructions=instructions, threads=count)
            first = y if first is None else first
            assert torch.equal(y, first), f"{instructions} on {count} threads gives other bits than {RUNNABLE[0]}"
    assert ((first.double() - expected).abs() <= bound(args, kwargs)).all()
    return first


@given(
    seed=st.integers(0, 2**20),
    m=st.integers(0, 11),
    out=st.one_of(st.integers(1, 20), st.sampled_from([48, 70])),
    channels=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 136, 515, 1030])),
    bits=st.sampled_from([1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8]),
    group_size=st.one_of(st.integers(1, 80), st.sampled_from([128, 600, 2**62])),
    x_group_size=st.one_of(st.none(), st.integers(1, 80), st.just(128)),
    scale_dtype=st.sampled_from(HALVES),
    asymmetric=st.booleans(),
    rank=st.sampled_from([0, 0, 1, 5]),
    biased=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(max_examples=120, deadline=None)
def test_qgemm_keeps_its_bound_and_its_bits(
    seed, m, out, channels, bits, group_size, x_group_size, scale_dtype, asymmetric, rank, biased, threads
):
    args, kwargs = operands(
        seed, m, out, channels, bits, group_size, x_group_size, scale_dtype, asymmetric, rank, biased
    )
    check(args, kwargs, threads=(threads,))


@pytest.mark.parametrize(
    ("m", "out", "channels", "bits", "group_size", "x_group_size"),
    [
        (1, 200, 4200, 4, 128, None),
        (300, 100, 700, 4, 64, 64),
        (9, 97, 2100, 8, 2**40, None),
        (65, 50, 640, 4, 32, None),
    ],
)
def test_qgemm_crosses_blocks_panels_and_threads(m, out, channels, bits, group_size, x_group_size):
    args, kwargs = operands(1, m, out, channels, bits, group_size, x_group_size, torch.float16, True, 3, True)
    whole = check(args, kwargs, threads=(1, 2, 4))
    one = m // 2
    for name in ("xq", "x_scale"):
        args[name] = args[name][one : one + 1]
    for name in ("x_zero", "x"):
        kwargs[name] = kwargs[name][one : one + 1]
    alone = integer.run_qgemm(**args, **kwargs)
    assert (alone - whole[one]).abs().max() <= bound(args, kwargs).max()  # the branch's BLAS may sum in another order
    kwargs |= {"down": None, "up": None, "x": None}
    assert torch.equal(integer.run_qgemm(**args, **kwargs), integer.run_qgemm(**args, **kwargs, threads=3))


@given(
    seed=st.integers(0, 2**20),
    out=st.sampled_from([1, 7, 16, 50]),
    channels=st.one_of(st.integers(1, 300), st.sampled_from([512, 2048, 2049, 4360, 17000])),
    group_size=st.sampled_from([16, 32, 64, 128, 192, 256, 512]),
    x_group_size=st.sampled_from([None, 1, 2, 3]),
    scale_dtype=st.sampled_from(HALVES),
    rank=st.sampled_from([0, 2]),
    biased=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_one_row_takes_a_way_of_its_own_and_gives_the_same_bits(
    seed, out, channels, group_size, x_group_size, scale_dtype, rank, biased, threads
):
    x_group_size = None if x_group_size is None else x_group_size * group_size
    args, kwargs = operands(seed, 1, out, channels, 4, group_size, x_group_size, scale_dtype, False, rank, biased)
    check(args, kwargs, threads=(threads,))
    kwargs |= {"down": None, "up": None, "x": None}  # the branch's BLAS may sum two rows in another order
    alone = integer.run_qgemm(**args, **kwargs)
    twice = {name: args[name].expand(2, -1) if name in ("xq", "x_scale") else args[name] for name in args}
    assert torch.equal(integer.run_qgemm(**twice, **kwargs), alone.expand(2, -1))


def test_a_row_of_qgemm_does_not_depend_on_the_others():
    args, kwargs = operands(2, 37, 60, 520, 4, 128, None, torch.float16, True, 0, True)
    whole = integer.run_qgemm(**args, **kwargs)
    for n in (0, 17, 36):
        part = {name: args[name][n : n + 1] if name in ("xq", "x_scale") else args[name] for name in args}
        assert torch.equal(
            integer.run_qgemm(**part, **kwargs | {"x_zero": kwargs["x_zero"][n : n + 1]}), whole[n : n + 1]
        )


@given(offset=st.integers(0, 5), strided=st.booleans(), dtype=st.sampled_from([*HALVES, torch.float64]))
@settings(max_examples=20, deadline=None)
def test_qgemm_takes_any_alignment_stride_and_dtype(offset, strided, dtype):
    args, kwargs = operands(3, 5, 12, 70, 4, 16, 10, torch.float32, True, 2, True)
    whole = kernels.qgemm(**args, **kwargs, dtype=torch.float32)
    moved = {n: t if t is None else placed(t, offset, strided) for n, t in args.items()}
    more = {n: placed(t, offset, strided) if isinstance(t, torch.Tensor) else t for n, t in kwargs.items()}
    y = kernels.qgemm(**moved, **more, dtype=dtype)
    assert y.dtype == dtype
    if dtype is torch.float64:
        torch.testing.assert_close(y, whole.double(), rtol=1e-5, atol=1e-3)
    else:
        assert torch.equal(y, whole.to(dtype))


def test_operands_may_share_their_memory():
    codes = torch.randint(-128, 128, (16, 16), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed, zero, one = codes[:, :8].view(torch.int32), codes[:, :1].view(torch.uint8), torch.ones(1, 1).expand(16, 1)
    kwargs = {"bits": 4, "group_size": 16}
    y = kernels.qgemm(codes, one, packed, one, zero, **kwargs)
    apart = kernels.qgemm(codes.clone(), one.clone(), packed.clone(), one.clone(), zero.clone(), **kwargs)
    assert torch.equal(y, apart)


def test_poisoned_rows_stay_visible_to_the_end():
    x = torch.ones(4, 40)
    x[0, 3], x[1, 3], x[2, 39] = float("nan"), float("inf"), -float("inf")
    args, kwargs = operands(4, 4, 20, 40, 4, 8, None, torch.float32, False, 0, True)
    for symmetric in (True, False):
        codes, scale, zero = kernels.quantize_rows(x, symmetric=symmetric)
        kwargs["x_zero"] = None if symmetric else zero
        for instructions in RUNNABLE:
            y = integer.run_qgemm(**args | {"xq": codes, "x_scale": scale}, **kwargs, instructions=instructions)
            assert not y[:3].isfinite().any()
            assert y[3].isfinite().all()


@given(
    seed=st.integers(0, 2**20),
    m=st.integers(0, 14),
    count=st.integers(1, 4),
    size=st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 128])),
    dtype=st.sampled_from([*HALVES, torch.float64]),
    index=st.sampled_from([None, torch.int32, torch.int64]),
    shared=st.booleans(),
    strided=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(max_examples=80, deadline=None)
def test_rotate_differs_from_its_definition_by_rounding_alone(
    seed, m, count, size, dtype, index, shared, strided, threads
):
    g = torch.Generator().manual_seed(seed)
    x = placed(torch.randn(m, count * size, generator=g, dtype=torch.float64).to(dtype), seed % 4, strided)
    wide = torch.promote_types(dtype, torch.float32)
    blocks = torch.randn(1 if shared else count, size, size, generator=g, dtype=torch.float64).to(wide)
    blocks = blocks.expand(count, size, size)
    order = None if index is None else torch.randperm(count * size, generator=g).to(index)
    exact = ops.rotate_reference(x.double(), blocks.double(), order)
    scale = ops.rotate_reference(x.double().abs(), blocks.double().abs(), order)
    for instructions in RUNNABLE:
        y = integer.run_rotate(x, blocks, order, instructions=instructions, threads=threads)
        assert y.dtype == dtype
        error = (y.double() - exact).abs()
        assert (error <= (size + 2) * torch.finfo(wide).eps * scale + torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("size", [16, 128, 512, 1024])
def test_rotate_crosses_strips_and_threads(size):
    g = torch.Generator().manual_seed(size)
    x, order = torch.randn(101, 2048, generator=g), torch.randperm(2048, generator=g)
    blocks = torch.linalg.qr(torch.randn(2048 // size, size, size, generator=g))[0]
    exact = ops.rotate_reference(x.double(), blocks.double(), order)
    for instructions in RUNNABLE:
        y = [integer.run_rotate(x, blocks, order, instructions=instructions, threads=n) for n in (1, 3)]
        assert torch.equal(*y), "the result depends on the number of threads"
        assert (y[0] - exact).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_and_narrowed_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one = torch.ones(1, 1, 1).expand(2**16, 1, 1)
    for instructions in RUNNABLE:
        back = integer.run_rotate(every, one, None, instructions=instructions)
        torch.testing.assert_close(back, every, rtol=0, atol=0, equal_nan=True)
        factor = torch.full((1, 1, 1), 1 + 2.0**-12).expand(2**16, 1, 1)  # products that have to be rounded
        rounded = integer.run_rotate(every, factor, None, instructions=instructions)
        wanted = (every.float() * factor[0, 0, 0]).to(dtype)
        torch.testing.assert_close(rounded, wanted, rtol=0, atol=0, equal_nan=True)
