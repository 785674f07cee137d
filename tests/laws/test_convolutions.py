"""A quantized convolution is the convolution with its dequantized weight; patches make it a linear layer."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.quant import QConv, QLinear, gptq, load, quantize, rtn, save
from planish.quant.conv import patches
from planish.quant.formats import FP4, Affine
from planish.quant.journal import Journal
from planish.quant.rounding import Clip
from planish.quant.sites import set_weight, weight_of
from planish.quant.transforms import Scale, Shift

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": (2, 0), "dilation": (1, 2)},
    {"groups": 4, "padding": 1, "bias": False},
    {"groups": 8, "padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "replicate"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": (1, 2)},
]


def conv_of(options, kernel=(3, 2)):
    torch.manual_seed(1)
    return nn.Conv2d(8, 24, kernel, **options).double()


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16, bias=False), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16),
    ).eval()  # fmt: skip


def images(n=6, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_it_equals_the_convolution_of_its_dequantized_weight(options, batched):
    conv, x = conv_of(options), torch.randn(2, 8, 9, 7, dtype=torch.float64)
    x = x if batched else x[0]
    rounded = Affine(4, None, scale_dtype="float64").encode(weight_of(conv))
    q = QConv(QLinear.of(rounded, conv.bias), conv)
    weight = rounded.decode().view_as(conv.weight)
    twin = copy.deepcopy(conv)
    twin.weight = nn.Parameter(weight, requires_grad=False)
    torch.testing.assert_close(q(x), twin(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.dequantize(torch.float64)(x), twin(x), rtol=1e-12, atol=1e-12)
    assert q(x).shape == conv(x).shape
    assert (q(x) - conv(x)).abs().max() < 0.3 * conv(x).abs().max()


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_patches_times_rows_is_the_convolution(options):
    conv, x = conv_of(options), torch.randn(2, 8, 9, 7, dtype=torch.float64)
    groups, rows = conv.groups, weight_of(conv).unflatten(0, (conv.groups, -1))  # (groups, outputs, columns)
    taken = patches(conv, x).unflatten(0, (-1, groups))
    flat = torch.einsum("pgc,goc->pgo", taken, rows).flatten(1)
    y = conv(x) if conv.bias is None else conv(x) - conv.bias[:, None, None]
    torch.testing.assert_close(flat, y.permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-10, atol=1e-10)


def test_a_weight_comes_back_as_it_was_written():
    conv = conv_of({"groups": 4}).to(memory_format=torch.channels_last)
    wanted = torch.randn_like(weight_of(conv))
    set_weight(conv, wanted)
    assert torch.equal(weight_of(conv), wanted)


@pytest.mark.parametrize("method", [rtn(bits=3, group_size=None), gptq(bits=3, group_size=None),
                                    replace(rtn(bits=3, group_size=None), round=Clip())])  # fmt: skip
def test_convolutions_are_rounded_only_where_asked_for(method):
    plain = net()
    quantize(plain, [images()], method)
    assert not any(isinstance(m, QConv) for m in plain.modules())
    model = net()
    report = quantize(model, [images()], replace(method, convolutions=True))
    assert [n for n, m in model.named_modules() if isinstance(m, QConv)] == ["0", "3", "5"]
    assert isinstance(model[8], QLinear)
    assert report.bytes_after < report.bytes_before
    wanted = net()
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            wanted.set_submodule(name, module.dequantize())
    torch.testing.assert_close(model(images()), wanted(images()), rtol=1e-4, atol=1e-4)
    assert 0 < report.blocks[0].error < 1


def test_convolutions_may_have_a_method_of_their_own():
    own = replace(rtn(bits=8, group_size=None), act=Affine(8, None))
    model = net()
    quantize(model, [images()], replace(rtn(bits=4, group_size=16, ragged=True), convolutions=own))
    assert [(m.format.bits, m.format.group_size, m.act) for m in model.modules() if isinstance(m, QConv)] == (
        [(8, None, Affine(8, None))] * 3
    )
    assert (model[8].format.bits, model[8].format.group_size, model[8].act) == (4, 16, None)
    assert "convolutions=rtn(weight=" in repr(replace(rtn(), convolutions=own))
    with pytest.raises(ValueError, match=r"block model, `0`: 27 channels cannot be split in groups of 128"):
        quantize(net(), [images()], replace(rtn(bits=4, group_size=16, ragged=True), convolutions=rtn()))


def test_compensation_sees_patches():
    """What GPTQ gains on the output of a convolution, it gains by the correlations of patches."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.Identity())
    smooth = nn.functional.avg_pool2d(torch.randn(8, 4, 12, 12), 3, 1)  # neighbours alike
    errors = [quantize(copy.deepcopy(conv), [smooth], replace(m, convolutions=True)).blocks[0].error
              for m in (rtn(bits=3, group_size=None), gptq(bits=3, group_size=None))]  # fmt: skip
    assert errors[1] < 0.6 * errors[0]


def test_an_image_shares_one_scale_of_activations():
    conv, x = nn.Conv2d(4, 16, 3), torch.randn(3, 4, 6, 6)
    act = Affine(8, None)
    layer = QLinear.of(Affine(8, None).encode(weight_of(conv)), conv.bias, act=act)
    q = QConv(layer, conv)
    rounded = torch.stack([act.fake(image.flatten()).view_as(image) for image in x])
    torch.testing.assert_close(q(x), q.dequantize()(rounded))
    with pytest.raises(
        ValueError, match=r"QConv: `act` must be a grid whose groups divide 4 channels, or a ragged one"
    ):
        QConv(QLinear.of(Affine(8, None).encode(weight_of(conv)), act=Affine(8, 3)), conv)


def test_four_bit_floats_serve_too():
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(2, 16, 5, 5)
    q = QConv(QLinear.of(FP4().encode(weight_of(conv)), conv.bias), conv)
    torch.testing.assert_close(q.dequantize()(x), q(x))
    assert (q(x) - conv(x)).abs().max() < 0.3 * conv(x).abs().max()


def test_bad_layers_are_refused():
    conv, grid = nn.Conv2d(4, 16, 3), Affine(4, None)
    with pytest.raises(ValueError, match=r"QConv: `layer` must be 36 -> 16; got '35 -> 16'\."):
        QConv(QLinear.of(grid.encode(torch.randn(16, 35))), conv)
    for transform, sentence in (
        (Scale(torch.ones(36)), r"QConv: `layer` must be one whose transform scales 4 channels; got 36\."),
        (Shift(torch.ones(4)), r"QConv: `layer` must be one whose transform is a Scale of its channels; got 'Shift'\."),
    ):
        with pytest.raises(ValueError, match=sentence):
            QConv(QLinear.of(grid.encode(weight_of(conv)), transform=transform), conv)
    with pytest.raises(ValueError, match=r"block model, `0`: 27 channels cannot be split in groups of 128"):
        quantize(net(), [images()], replace(rtn(), convolutions=True))


def test_a_checkpoint_brings_convolutions_back(tmp_path):
    model = net()
    quantize(model, [images()], replace(rtn(bits=4, group_size=None), convolutions=True))
    assert save(model, tmp_path / "small") == "planish"
    again = load(tmp_path / "small", into=net())
    assert isinstance(again[3], QConv)
    assert torch.equal(again(images()), model(images()))


def test_a_journal_brings_convolutions_back(tmp_path):
    method = replace(rtn(bits=4, group_size=None), convolutions=True)
    models = []
    for _ in range(2):
        models.append(net())
        quantize(models[-1], [images()], method, journal=Journal(tmp_path / "journal"))
    assert isinstance(models[1][3], QConv)
    assert torch.equal(models[0](images()), models[1](images()))
