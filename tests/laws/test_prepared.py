"""Laws of the repacked weight: its product is that of rounded activations, whatever the shape, threads or processor."""

import copy
import gc
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from planish import kernels
from planish.kernels import cpu, ops
from planish.quant.formats import Affine
from planish.quant.layers import QLinear

pytestmark = pytest.mark.skipif(bool(cpu.absence), reason="the compiled module is absent")
_SETS = [] if cpu._native is None else cpu._native.runnable()
_STEPS = {16: 32639, 8: 127}


@pytest.fixture(autouse=True)
def _keep_the_instruction_set():
    yield
    cpu._native.use(cpu.isa)


def problem(seed, rows, out, channels, group_size, dtype=torch.float32, symmetric=False):
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (out, -(-channels // 8)), generator=g).to(torch.int32)
    groups = -(-channels // group_size)
    scale = (torch.rand(out, groups, generator=g) + 0.01).to(dtype)
    zero = torch.randint(0, 16, (out, groups), generator=g).to(torch.uint8)
    x = torch.randn(rows, channels, generator=g) * torch.rand(channels, generator=g).exp()
    return x, packed, scale, torch.full_like(zero, 8) if symmetric else zero, torch.randn(out, generator=g)


def dense(packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, channels: int) -> Tensor:
    weight = ops.dequantize(packed, scale.float(), zero, bits=4, group_size=group_size, channels=channels)
    return weight.double()


def allowed(x: Tensor, weight: Tensor, bias: Tensor, group_size: int, bits: int) -> Tensor:
    """Half a step of each group's largest entry at every weight, and float32 sums of the groups."""
    size = min(group_size, x.shape[1])
    groups = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % size)).unflatten(1, (-1, size)).amax(2)
    half_step = groups.repeat_interleave(size, 1)[:, : x.shape[1]] / _STEPS[bits] * (0.5 + 1e-3)
    total = x.double().abs() @ (weight.abs() + 15 * weight.abs().amax()).T + bias.double().abs()
    return half_step @ weight.abs().T + (groups.shape[1] + 8) * torch.finfo(torch.float32).eps * total + 1e-28


@pytest.mark.parametrize("instructions", _SETS)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(0, 13),
    out=st.integers(1, 70),
    channels=st.one_of(st.integers(1, 80), st.sampled_from([127, 128, 136, 1030])),
    group_size=st.one_of(st.integers(1, 140), st.just(2**40)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    bits=st.sampled_from([16, 8]),
    symmetric=st.booleans(),
    threads=st.integers(1, 3),
    offset=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_only_the_activation_is_rounded(
    instructions, seed, rows, out, channels, group_size, dtype, bits, symmetric, threads, offset
):
    x, packed, scale, zero, bias = problem(seed, rows, out, channels, group_size, dtype, symmetric)
    x = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(rows, channels)  # any alignment
    weight = cpu._shelf.make(packed, scale, zero, channels, group_size)
    if weight.data is None:
        assert -(-min(group_size, channels) // 8) * 8 > 1.2 * min(group_size, channels), "a common group is left out"
        return
    cpu._native.use(instructions)
    y = cpu.run_prepared(x, weight, bias, activation_bits=bits, threads=threads)
    exact = dense(packed, scale, zero, group_size, channels)
    error = (y.double() - torch.nn.functional.linear(x.double(), exact, bias.double())).abs()
    assert (error <= allowed(x, exact, bias, group_size, bits)).all()


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("rows", "out", "channels", "group_size"), [(70, 999, 2056, 128), (3, 40, 5000, 2500)])
def test_results_depend_on_nothing_but_the_row_and_the_weight(rows, out, channels, group_size, bits):
    x, packed, scale, zero, bias = problem(1, rows, out, channels, group_size, torch.float16)
    weight = cpu._shelf.make(packed, scale, zero, channels, group_size)
    results = {}
    for name in _SETS:
        cpu._native.use(name)
        whole = cpu.run_prepared(x, weight, bias, activation_bits=bits, threads=1)
        assert torch.equal(whole, cpu.run_prepared(x, weight, bias, activation_bits=bits, threads=4))
        for m in (0, rows // 2, rows - 1):
            alone = cpu.run_prepared(x[m : m + 1], weight, bias, activation_bits=bits, threads=2)
            assert torch.equal(whole[m : m + 1], alone), f"{name}: row {m} depends on its neighbours"
        results[name] = whole
    exact = dense(packed, scale, zero, group_size, channels)
    total = x.double().abs() @ (exact.abs() + 15 * exact.abs().amax()).T
    for name, y in results.items():  # the same integers: only the float sums of the groups differ, by fused products
        gap = (y.double() - results["portable"].double()).abs()
        assert (gap <= 60 * torch.finfo(torch.float32).eps * total).all(), name


@pytest.mark.parametrize("instructions", _SETS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_row_stays_visible_and_alone(instructions, poison):
    x, packed, scale, zero, bias = problem(2, 7, 33, 100, 32)
    weight = cpu._shelf.make(packed, scale, zero, 100, 32)
    cpu._native.use(instructions)
    clean = cpu.run_prepared(x, weight, bias, activation_bits=16)
    x[3, 99] = poison
    y = cpu.run_prepared(x, weight, bias, activation_bits=16)
    assert y[3].isnan().all()
    others = [m for m in range(7) if m != 3]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("instructions", _SETS)
def test_tiny_and_huge_activations(instructions):
    _, packed, scale, zero, _ = problem(3, 1, 5, 64, 32)
    weight = cpu._shelf.make(packed, scale, zero, 64, 32)
    cpu._native.use(instructions)
    for value in (0.0, 1e-45, 1e-31, 1e-29, 1e30):
        x = torch.full((1, 64), value)
        y = cpu.run_prepared(x, weight, None, activation_bits=16)
        exact = x.double() @ dense(packed, scale, zero, 32, 64).T
        assert ((y - exact).abs() <= 1e-4 * value * 64 + 1e-27).all(), value


def test_a_weight_that_is_written_to_is_prepared_anew():
    x, packed, scale, zero, _ = problem(4, 2, 40, 64, 32)
    options = {"bits": 4, "group_size": 32, "activation_bits": 16}
    for change in (lambda: packed.add_(1), lambda: scale.mul_(3), lambda: zero.fill_(2), lambda: None):
        change()
        y = kernels.w4a16(x, packed, scale, zero, **options)
        assert torch.equal(y, kernels.w4a16(x, packed.clone(), scale.clone(), zero.clone(), **options))
    packed.data = packed.data + 5  # no version is counted here: the address tells
    assert torch.equal(
        kernels.w4a16(x, packed, scale, zero, **options), kernels.w4a16(x, packed.clone(), scale, zero, **options)
    )


def test_the_shelf_keeps_one_copy_and_only_while_the_weight_lives():
    _, packed, scale, zero, _ = problem(5, 1, 40, 64, 32)
    gc.collect()
    before = len(cpu._shelf._kept)
    weight = cpu._shelf.find(packed, scale, zero, 64, 32)
    assert cpu._shelf.find(packed, scale, zero, 64, 32) is weight
    assert len(cpu._shelf._kept) == before + 1
    del packed
    gc.collect()
    assert len(cpu._shelf._kept) == before


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prepared_weight_is_multiplied_without_the_dispatcher_and_alike(dtype):
    x, packed, scale, zero, bias = problem(11, 3, 40, 64, 32)
    x, bias, options = x.to(dtype), bias.to(dtype), {"bits": 4, "group_size": 32, "activation_bits": 16}
    assert cpu.run_kept(x, packed, scale, zero, bias, **options) is None, "nobody has prepared it yet"
    for added in (None, bias):
        for rows in (x, x[0], x[:0], x.view(1, 3, 64), torch.stack([x, x], -1)[..., 0]):
            y = torch.ops.planish.w4a16(rows, packed, scale, zero, added, **options)
            kept = cpu.run_kept(rows, packed, scale, zero, added, **options)
            assert kept.dtype is dtype and torch.equal(kept, y)
            assert torch.equal(kernels.w4a16(rows, packed, scale, zero, added, **options), y)


def test_whatever_does_not_fit_or_is_watched_takes_the_way_of_the_dispatcher():
    x, packed, scale, zero, bias = problem(12, 3, 40, 64, 32)
    options = {"bits": 4, "group_size": 32, "activation_bits": 16}
    y = kernels.w4a16(x, packed, scale, zero, bias, **options)
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg() and torch.equal(kernels.w4a16(negative, packed, scale, zero, bias, **options), y)
    batched = torch.vmap(lambda row: kernels.w4a16(row, packed, scale, zero, bias, **options))
    with warnings.catch_warnings(action="ignore"):  # torch takes the rows one by one, and says so
        assert torch.equal(batched(x), y)
    watch = _Watch()
    with watch:
        assert torch.equal(kernels.w4a16(x, packed, scale, zero, bias, **options), y)
    assert "planish.w4a16.default" in watch.seen


@pytest.mark.refuses
def test_what_does_not_fit_is_refused_on_the_short_way_too():
    x, packed, scale, zero, bias = problem(12, 3, 40, 64, 32)
    options = {"bits": 4, "group_size": 32, "activation_bits": 16}
    for wrong in (
        {"x": torch.zeros(3, 50)}, {"bias": torch.zeros(39)}, {"bits": 8}, {"group_size": 0}, {"activation_bits": 12},
        {"x": torch.zeros(())}, {"scale": scale[:-1]}, {"zero": zero.int()},
    ):  # fmt: skip
        arguments = {"x": x, "packed": packed, "scale": scale, "zero": zero, "bias": bias, **options, **wrong}
        with pytest.raises(ValueError, match="w4a16"):
            kernels.w4a16(**arguments)


def test_a_zero_point_beyond_four_bits_is_left_to_the_float_kernel():
    x, packed, scale, zero, bias = problem(6, 2, 8, 64, 32)
    zero[3, 1] = 200
    y = kernels.w4a16(x, packed, scale, zero, bias, bits=4, group_size=32, activation_bits=16)
    assert torch.equal(y, kernels.w4a16(x, packed, scale, zero, bias, bits=4, group_size=32))


def test_a_layer_follows_casts_copies_and_its_own_setting():
    g = torch.Generator().manual_seed(7)
    linear = torch.nn.Linear(96, 40)
    layer = QLinear.of(Affine(4, group_size=32).encode(linear.weight.detach()), linear.bias)
    x = torch.randn(3, 96, generator=g)
    y = layer(x)
    exact = layer.dequantize()(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert (y - exact).abs().max() < 1e-3
    layer.activation_bits = None
    plain = layer(x)
    assert not torch.equal(plain, y), "16-bit rounding changed nothing at all: was it done?"
    layer.activation_bits = 8
    assert (plain - exact).abs().max() < (y - exact).abs().max() < (layer(x) - exact).abs().max() < 0.1
    layer.activation_bits = 16
    assert set(layer.state_dict()) == set(copy.deepcopy(layer).double().state_dict())
    assert torch.allclose(layer.double()(x.double()).float(), exact, atol=1e-5)
    assert torch.allclose(layer.bfloat16()(x.bfloat16()).float(), exact, atol=0.05)
    with torch.inference_mode():
        assert torch.equal(layer.float()(x), layer(x))


def test_threads_that_call_at_once_each_get_their_own_result():
    x, packed, scale, zero, bias = problem(8, 8, 600, 1024, 128)
    weight = cpu._shelf.make(packed, scale, zero, 1024, 128)
    expected = cpu.run_prepared(x, weight, bias, activation_bits=16, threads=1)
    wrong: list[int] = []

    def work() -> None:
        for n in range(50):
            if not torch.equal(cpu.run_prepared(x, weight, bias, activation_bits=16, threads=3), expected):
                wrong.append(n)

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_temporary_scales_and_zero_points_are_told_apart_by_what_they_hold():
    x, packed, scale, zero, _ = problem(9, 2, 40, 64, 32)
    options = {"bits": 4, "group_size": 32, "activation_bits": 16}
    first = cpu._shelf.find(packed, scale.clone(), zero.clone(), 64, 32)
    assert cpu._shelf.find(packed, scale.clone(), zero.clone(), 64, 32) is first, "equal values were prepared again"
    for step in range(1, 6):  # the allocator hands out the same address again and again
        y = kernels.w4a16(x, packed, scale * step, (zero + step) % 16, **options)
        fresh = kernels.w4a16(x, packed.clone(), scale * step, (zero + step) % 16, **options)
        assert torch.equal(y, fresh), step


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_layer_follows_its_weight_and_prepares_it_once():
    linear = torch.nn.Linear(96, 40)
    layer = QLinear.of(Affine(4, group_size=32, symmetric=False).encode(linear.weight.detach()), linear.bias)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(10))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        kept = cpu._shelf._kept[id(layer.weight_packed)].weight
        compiled(x)
        assert cpu._shelf._kept[id(layer.weight_packed)].weight is kept
        layer.weight_zero_point.add_(1)
        assert torch.equal(compiled(x), copy.deepcopy(layer)(x))
