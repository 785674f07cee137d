"""A convolution with smoothing and a branch is the `QLinear` over its patches; a pixel is a token."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish._support import CheckpointError
from planish.quant import QConv, QLinear, load, quantize, rtn, save, svdquant
from planish.quant.act_formats import Dual, Static
from planish.quant.conv import column_scale, patches, rounded_image
from planish.quant.formats import FP4, Affine
from planish.quant.journal import Journal
from planish.quant.low_rank import LowRank, moments
from planish.quant.places import Places, joined
from planish.quant.schemes import describe, empty_layer
from planish.quant.sites import Site, weight_of
from planish.quant.stream import Block
from planish.quant.transforms import Scale

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": (2, 0), "dilation": (1, 2)},
    {"groups": 4, "padding": 1, "bias": False},
    {"groups": 8, "padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": (1, 2)},
]
GRID = Affine(4, None, scale_dtype="float64")
PIXEL = Affine(4, 4, symmetric=True, scale_dtype="float64")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv_of(options, kernel=(3, 2), inputs=8, outputs=24):
    torch.manual_seed(1)
    return nn.Conv2d(inputs, outputs, kernel, **options).double()


def parts_of(conv, rank=3):
    columns = weight_of(conv).shape[1]
    low = noise(rank, columns, seed=3), noise(conv.out_channels, rank, seed=4)
    return 0.5 + noise(conv.in_channels, seed=2).abs(), low


def by_rows(conv, rows, weight):
    """The plain way: every patch of every group of channels times the rows of its group."""
    taken = rows.unflatten(0, (-1, conv.groups))
    return torch.einsum("pgc,goc->pgo", taken, weight.unflatten(0, (conv.groups, -1))).flatten(1)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("act", [None, PIXEL, Affine(4, None, scale_dtype="float64")], ids=repr)
def test_it_is_the_linear_layer_over_patches(options, act):
    conv, x = conv_of(options), noise(2, 8, 9, 7, seed=5)
    scale, low = parts_of(conv)
    weight = GRID.encode(weight_of(conv) * column_scale(conv, scale))
    q = QConv(QLinear.of(weight, conv.bias, transform=Scale(scale), act=act, low_rank=low), conv)
    seen = Places.of(conv, x).scaled(scale)
    rounded = seen.rows() if act is None else seen.rounded(act).rows()
    flat = by_rows(conv, rounded, weight.decode()) + by_rows(conv, seen.rows(), low[1] @ low[0])
    flat = flat if conv.bias is None else flat + conv.bias
    y = q(x)
    torch.testing.assert_close(y.permute(0, 2, 3, 1).flatten(0, 2), flat, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(q(x[0]), y[0], rtol=1e-12, atol=1e-12)
    if act is None:
        torch.testing.assert_close(q.dequantize(torch.float64)(x), y, rtol=1e-10, atol=1e-10)
    if conv.groups == 1 and act is None:  # the QLinear itself, on what is unfolded; its kernel computes in float32
        columns = column_scale(conv, scale)[0]
        linear = QLinear.of(weight, conv.bias, transform=Scale(columns), low_rank=low)
        torch.testing.assert_close(linear(patches(conv, x)), flat, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_smoothing_changes_nothing(options):
    conv, x = conv_of(options), noise(2, 8, 9, 7, seed=5)
    scale, _ = parts_of(conv)
    moved = copy.deepcopy(conv)
    moved.weight = nn.Parameter((weight_of(conv) * column_scale(conv, scale)).view_as(conv.weight))
    torch.testing.assert_close(moved(x / scale[:, None, None]), conv(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    "act", [PIXEL, Affine(8, None), Dual(8), Static(Dual(4), -1.0, 2.0), Affine(4, 3, ragged=True), FP4(4)], ids=repr
)
def test_a_sample_of_places_sees_what_the_whole_image_does(options, act):
    conv, x = conv_of(options), noise(2, 8, 9, 7, seed=5)
    whole = patches(conv, rounded_image(act, x))
    every = Places.of(conv, x)
    assert torch.equal(every.rows(), patches(conv, x))
    torch.testing.assert_close(every.rounded(act).rows(), whole, rtol=1e-12, atol=1e-12)
    some = Places.of(conv, x, 5, torch.Generator().manual_seed(0))
    assert len(some) == 5 and some.rows().shape == (5 * conv.groups, weight_of(conv).shape[1])
    found = {tuple(row.tolist()) for row in every.rounded(act).rows()}
    assert all(tuple(row.tolist()) in found for row in some.rounded(act).rows())
    assert len(joined([some, every])) == 5 + len(every)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("act", [Affine(4, 8, symmetric=True), Affine(8, 16), FP4()], ids=repr)
def test_of_one_pixel_it_is_the_linear_layer_bit_for_bit(stride, act):
    conv = conv_of({"stride": stride}, 1, 16).float()
    scale, low = (p if isinstance(p, torch.Tensor) else [t.float() for t in p] for p in parts_of(conv))
    weight = Affine(4, 8).encode(weight_of(conv))
    linear = QLinear.of(weight, conv.bias.detach(), transform=Scale(scale.float()), act=act, low_rank=tuple(low))
    x = noise(2, 16, 5, 6, seed=7).float()
    flat = linear(x[..., ::stride, ::stride].movedim(1, -1))
    assert torch.equal(QConv(linear, conv)(x), flat.movedim(-1, 1))


@pytest.mark.parametrize("options", [{"padding": 1}, {"groups": 2, "stride": 2}, {"groups": 8}], ids=str)
def test_a_branch_of_full_rank_is_the_convolution(options):
    conv, x = conv_of(options, inputs=8, outputs=16), noise(2, 8, 6, 6, seed=5)
    columns = weight_of(conv).shape[1]
    rank = min(columns, 16)
    up, down = (weight_of(conv), torch.eye(columns).double()) if rank == columns else (
        torch.eye(16).double(), weight_of(conv)
    )  # fmt: skip
    nothing = GRID.encode(torch.zeros(16, columns, dtype=torch.float64))
    q = QConv(QLinear.of(nothing, conv.bias, act=PIXEL, low_rank=(down, up)), conv)
    torch.testing.assert_close(q(x), conv(x), rtol=1e-12, atol=1e-12)
    model = nn.Sequential(conv)
    method = svdquant(group_size=None, rank=rank, smooth=None, unsigned=False, dtype="float32", iterations=2,
                      convolutions=True)  # fmt: skip
    wanted = conv(x)
    quantize(model, [x], method)
    assert (model(x) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("act", [PIXEL, Affine(4, None, scale_dtype="float64")], ids=repr)
def test_moments_are_those_of_patches_of_the_rounded_image(act):
    conv, x = conv_of({"padding": 1}), noise(3, 8, 6, 6, seed=5)
    block = Block("", nn.Sequential(conv), [x], [{}], [None], "input")
    site = Site("0", {"0": conv}, {}, None, None, None, block)
    gram, cross, around = moments(site, act)
    rows = patches(conv, x)
    d = patches(conv, rounded_image(act, x)) - rows
    for found, wanted in ((gram, rows.T @ rows), (cross, rows.T @ d), (around, d.T @ d)):
        torch.testing.assert_close(found, wanted / len(rows), rtol=1e-9, atol=1e-9)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=4), nn.SiLU(), nn.Conv2d(16, 32, 1),
    ).eval()  # fmt: skip


def images(n=6, seed=0):
    return 4 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def small(convolutions=True, **options):
    return svdquant(group_size=16, ragged=True, rank=4, grid=3, iterations=3, convolutions=convolutions, **options)


@pytest.mark.parametrize("how", [True, "image"])
def test_svdquant_serves_convolutions_and_loses_less(how):
    wanted, errors = net()(images(4, 1)), []
    for rank in (0, 4):
        model = net()
        method = small(how)
        step = replace(method.round, rank=rank)
        own = replace(method.convolutions, round=step) if how == "image" else how
        report = quantize(model, [images()], replace(method, round=step, convolutions=own))
        assert [n for n, m in model.named_modules() if isinstance(m, QConv)] == ["0", "2", "4"]
        assert (model[0].down is not None) == (rank > 0) and report.blocks[0].folded
        errors.append((model(images(4, 1)) - wanted).square().mean().item())
    assert errors[1] < 0.5 * errors[0]
    assert [m.act.symmetric for m in (model[0], model[2], model[4])] == [True, False, False]  # SiLU before the last two


def test_it_comes_back_from_a_checkpoint_and_a_journal(tmp_path):
    model = net()
    method = small(dtype="float32")
    quantize(model, [images()], method, journal=Journal(tmp_path / "journal"))
    assert isinstance(model[2].transform, Scale) and model[2].transform.scale.shape == (16,)
    assert save(model, tmp_path / "small") == "planish"
    again, resumed = load(tmp_path / "small", into=net()), net()
    quantize(resumed, [images()], method, journal=Journal(tmp_path / "journal"))
    for twin in (again, resumed):
        assert torch.equal(twin(images()), model(images()))
    other = net()
    other[2] = nn.Linear(36, 16)  # as many inputs as the convolution has columns
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="`2`: the checkpoint has a convolution there"):
        load(tmp_path / "small", into=other)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_adapters_are_those_of_the_float_convolution():
    conv, x = conv_of({"padding": 1}), noise(2, 8, 6, 6, seed=5)
    scale, low = parts_of(conv)
    q = QConv(QLinear.of(GRID.encode(weight_of(conv)), conv.bias, transform=Scale(scale), low_rank=low), conv)
    before, down, up = q(x), noise(2, 8, 3, 2, seed=8), noise(24, 2, 1, 1, seed=9)
    q.add_lora("style", down, up, 0.5)
    added = nn.functional.conv2d(nn.functional.conv2d(x, down, padding=1), up)
    torch.testing.assert_close(q(x) - before, 0.5 * added, rtol=1e-9, atol=1e-9)
    q.remove_lora("style")
    assert torch.equal(q(x), before)
    grouped = conv_of({"groups": 4})
    with pytest.raises(
        ValueError, match=r"add_lora: `layer` must be a convolution whose channels are one group; got 4"
    ):
        QConv(QLinear.of(GRID.encode(weight_of(grouped))), grouped).add_lora("style", down, up)


def test_ranks_under_a_budget_reach_convolutions():
    for how in (True, "image"):
        model = net()
        method = svdquant(group_size=16, ragged=True, grid=1, iterations=2, convolutions=how, budget=1500)
        report = quantize(model, [images()], method)
        branches = [m for m in model if isinstance(m, QConv) and m.down is not None]
        spent = sum(t.nbytes for m in branches for t in (m.down, m.up))
        assert branches and spent <= 1500 and report.method


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"svdquant: `convolutions` must be a bool, 'pixel' or 'image'; got 'row'\."):
        svdquant(convolutions="row")
    with pytest.raises(ValueError, match=r"`convolutions` must be 'pixel' with four-bit floats"):
        svdquant(convolutions="image", precision="fp4")
    with pytest.raises(ValueError, match=r"LowRank: `rank` must be at most 16 at `0` \(see `ranks`\); got 20\."):
        quantize(net(), [images()], replace(small(), round=LowRank(20)))
    with pytest.raises(ValueError, match=r"`0`: `act` must be a grid whose groups divide 3 channels, or a ragged one"):
        own = replace(rtn(bits=4, group_size=None), act=Affine(4, 2))
        quantize(net(), [images()], replace(rtn(bits=4, group_size=16, ragged=True), convolutions=own))


@pytest.mark.parametrize("change", [{"channels": 0}, {"channels": "16"}, {"channels": 9}, {"transform": None}], ids=str)
def test_damaged_channels_are_refused(change):
    conv = conv_of({"padding": 1}).float()
    q = QConv(QLinear.of(Affine(4, None).encode(weight_of(conv)), transform=Scale(torch.ones(8))), conv)
    entry = describe("conv", q)
    assert entry["channels"] == 8 and "channels" not in describe("conv", QConv(QLinear.of(q.weight), conv))
    with pytest.raises(CheckpointError, match="`conv`"):
        empty_layer("conv", entry | change)
