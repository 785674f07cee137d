"""The law of the run-time layer: it computes what its plain `nn.Linear` computes."""

import copy

import pytest
import torch
from torch import nn

from planish.quant.act_formats import Dual
from planish.quant.formats import FP4, Affine
from planish.quant.layers import QLinear
from planish.quant.transforms import Chain, Permute, Rotate, Scale, Shift

O, I = 7, 48  # noqa: E741


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TRANSFORMS = {
    "none": lambda: None,
    "scale": lambda: Scale(noise(I, seed=1).exp().float()),
    "shift": lambda: Shift(noise(I, seed=2).float()),
    "permute": lambda: Permute(torch.randperm(I, generator=torch.Generator().manual_seed(3))),
    "rotate": lambda: Rotate(torch.linalg.qr(noise(3, 16, 16, seed=4)).Q),
    "chain": lambda: Chain(
        Scale(noise(I, seed=1).exp().float()), Shift(noise(I, seed=2)), Rotate(torch.linalg.qr(noise(1, 12, 12)).Q)
    ),
}
GRIDS = [
    *(Affine(b, 16, s) for b in range(1, 9) for s in (True, False)),
    Affine(4, None),
    Affine(4, 20, ragged=True),
    Affine(3, 32, symmetric=True, ragged=True),
    Affine(4, 16, scale_dtype="float64"),
    Affine(4, 16, scale_dtype="bfloat16"),
]


def make(grid=Affine(4, 16), transform=None, rank=0, bias=True, act=None):  # noqa: B008
    branch = (noise(rank, I, seed=7).float(), noise(O, rank, seed=8).float()) if rank else None
    return QLinear.of(
        grid.encode(noise(O, I, seed=5)), noise(O, seed=6).float() if bias else None,
        transform=transform, act=act, low_rank=branch,
    )  # fmt: skip


def oracle(layer: QLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition, written out in float64."""
    t = x if layer.transform is None else layer.transform(x)
    y = t @ layer.weight.decode().double().T
    if layer.down is not None:
        y = y + t @ layer.down.double().T @ layer.up.double().T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_its_dense_twin_for_every_grid(grid, bias):
    layer, x = make(grid, bias=bias), noise(2, 3, I, seed=9)
    dense = layer.dequantize().double()
    assert (dense.bias is not None) == bias
    assert torch.allclose(layer(x), dense(x), rtol=1e-5, atol=1e-5)
    assert torch.allclose(layer(x), oracle(layer, x), rtol=1e-5, atol=1e-5)
    error = (layer(x.float()) - dense(x)).abs()
    half_step = x.abs().amax() / 32639 / 2  # of a 16-bit activation
    assert (error <= half_step * dense.weight.abs().sum(1) + 1e-4).all()
    layer.activation_bits = None
    assert torch.allclose(layer(x.float()), dense(x).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_its_dense_twin_with_every_part(transform, rank, bias):
    layer, x = make(transform=transform(), rank=rank, bias=bias), noise(2, 3, I, seed=9)
    assert torch.allclose(layer(x), oracle(layer, x), rtol=1e-6, atol=1e-5)
    assert torch.allclose(layer(x), layer.dequantize().double()(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act", [Affine(8, None, scale_dtype="float64"), Affine(4, 16), Dual(8), FP4(16)], ids=repr)
@pytest.mark.parametrize("rank", [0, 3])
def test_activations_are_rounded_after_the_transform_and_not_for_the_branch(act, rank):
    t = TRANSFORMS["scale"]()
    layer, x = make(transform=t, rank=rank, act=act), noise(5, I, seed=9)
    expected = act.fake(t(x)) @ layer.weight.decode().double().T + layer.bias.double()
    if rank:
        expected = expected + t(x) @ layer.down.double().T @ layer.up.double().T
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_the_weight_comes_back_as_it_was_put_in(grid):
    q = grid.encode(noise(O, I, seed=5))
    back = QLinear.of(q).weight
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scale, q.scale) and back.format == grid
    assert (back.zero is None) == (q.zero is None) == grid.symmetric
    if q.zero is not None:
        assert torch.equal(back.zero, q.zero)
    assert torch.equal(back.decode(), grid.decode(q))


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("rank", [0, 2])
def test_state_fits_an_empty_layer(grid, rank):
    layer, x = make(grid, rank=rank, transform=TRANSFORMS["scale"]()), noise(4, I)
    empty = QLinear(I, O, grid, rank=rank, transform=Scale(torch.ones(I)))
    empty(x)  # what it caches must not outlive the loading
    missing = empty.load_state_dict(layer.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(empty(x), layer(x))
    assert layer.weight_shape.tolist() == [O, I]


def test_the_names_and_shapes_are_those_of_compressed_tensors():
    state = make(Affine(4, 16)).state_dict()
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == {
        "weight_packed": ((O, 6), torch.int32),
        "weight_scale": ((O, 3), torch.float16),
        "weight_zero_point": ((1, 3), torch.int32),
        "weight_shape": ((2,), torch.int64),
        "bias": ((O,), torch.float32),
    }
    assert "weight_zero_point" not in make(Affine(4, 16, symmetric=True)).state_dict()


@pytest.mark.parametrize("grid", [Affine(4, 16, scale_dtype=d) for d in ("float16", "float32", "float64")], ids=repr)
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
def test_casting_the_model_keeps_the_scales(grid, cast):
    layer = make(grid)
    scale, weight = layer.weight_scale.clone(), layer.weight.decode()
    cast(layer)
    assert layer.weight_scale.dtype == scale.dtype and torch.equal(layer.weight_scale, scale)
    assert torch.equal(layer.weight.decode(), weight)
    assert layer.weight_packed.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_input_s_dtype(dtype):
    layer, x = make(transform=TRANSFORMS["scale"](), rank=2), noise(3, I).to(dtype)
    assert layer(x).dtype == dtype
    # in float32 the kernel rounds the activation to 16 bits
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float32: 5e-3}.get(dtype, 1e-4)
    assert torch.allclose(layer(x).double(), oracle(layer, x.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_copy_is_whole_and_apart(transform):
    layer, x = make(transform=transform(), rank=2), noise(3, I)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    twin.weight_scale.mul_(2)
    twin.weight_zero_point.zero_()
    assert torch.equal(layer(x), before)
    assert not torch.equal(twin(x), before)


def test_zero_points_changed_after_the_first_call_are_seen():
    layer, x = make(), noise(3, I)
    before = layer(x)
    layer.weight_zero_point.zero_()
    changed = layer(x)
    assert not torch.equal(changed, before)
    assert torch.allclose(changed, layer.dequantize().double()(x), rtol=1e-5, atol=1e-5)
    layer.weight_zero_point = make().weight_zero_point
    assert torch.equal(layer(x), before)


def test_meta_layers_hold_no_memory_and_have_the_same_shapes():
    layer = QLinear(I, O, Affine(4, 16), rank=2, device="meta")
    real = make(rank=2)
    floats = {n: tuple(b.shape) for n, b in real.state_dict().items()}
    assert {n: tuple(b.shape) for n, b in layer.state_dict().items()} == floats
    assert layer.weight_packed.is_meta and layer.weight_scale.is_meta


@pytest.mark.refuses
@pytest.mark.parametrize(
    "q", [FP4(16).encode(noise(2, O, I)), Dual().encode(noise(O, I)), Affine(4, 16).encode(noise(2, O, I))]
)
def test_only_a_matrix_of_integers_or_small_floats_makes_a_layer(q):
    with pytest.raises(ValueError, match=r"QLinear.of: `weight` must be a matrix in an Affine or FP4 format"):
        QLinear.of(q)


def test_its_repr_names_its_parts():
    text = repr(make(rank=2, act=Dual(8), transform=TRANSFORMS["scale"]()))
    assert "48 -> 7" in text and "Affine(bits=4" in text and "rank=2" in text and "act=Dual(bits=8)" in text
