"""The pass on plain modules, in every precision, and what it refuses."""

import copy
import logging
import math
import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish.quant import QLinear, awq, best, fold, gptq, quantize, rtn
from planish.quant.engine import Method
from planish.quant.formats import Affine
from planish.quant.methods.smoothquant_plus import smoothquant_plus
from planish.quant.moments import measure
from planish.quant.rounding import Clip
from planish.quant.sites import find_sites
from planish.quant.stream import Stream, call_model, first_tensor
from planish.quant.transforms import Scale

nets = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "plain_nets.py")))
C, Attention, Net, ids, lines, mlp, noise = nets.C, nets.Attention, nets.Net, nets.ids, nets.lines, nets.mlp, nets.noise


# ---- plain modules


@pytest.mark.parametrize(
    ("act", "folds"), [(nn.ReLU, True), (nn.LeakyReLU, True), (nn.GELU, False), (nn.SiLU, False), (nn.Tanh, False)]
)
def test_an_mlp_folds_where_its_activation_lets_a_scale_through(act, folds):
    model, x = mlp(act).double(), noise(20, C, dtype=torch.float64)
    before = model(x)
    block, sites, found = lines(model, [x])
    assert found == [("0", None), ("2", "0" if folds else None), ("4", "2" if folds else None)]
    measure(block, sites)
    for i, site in enumerate(sites):
        scale = Scale(noise(next(iter(site.weights.values())).shape[1], seed=i, dtype=torch.float64).exp())
        assert fold.apply(block, scale, site) == (folds and i > 0)
    assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-10)


def test_activations_in_place_are_no_different():
    model, x = mlp(lambda: nn.ReLU(inplace=True)).double(), noise(20, C, dtype=torch.float64)
    before = model(x)
    block, sites, _ = lines(model, [x])
    measure(block, sites)
    assert sites[1].moments.amax.amin() >= 0  # what enters, not what the linear before made
    assert fold.apply(block, Scale(noise(48, dtype=torch.float64).exp()), sites[1])
    assert torch.allclose(model(x), before, rtol=1e-10, atol=1e-10)


def test_linears_in_a_row_fold_any_linear_transform():
    model, x = nn.Sequential(nn.Linear(C, 48), nn.Linear(48, C)).double(), noise(9, C, dtype=torch.float64)
    assert lines(model, [x])[2] == [("0", None), ("1", "0")]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "padded", "list"])
def test_batches_come_as_the_model_takes_them(form):
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    batch = {
        "tensor": ids(), "tuple": (ids(), mask), "list": [ids()], "dict": {"ids": ids()},
        "padded": {"ids": ids(), "attention_mask": mask},
    }[form]  # fmt: skip
    model = Net().eval()
    twin = copy.deepcopy(model)
    report = quantize(model, [batch, batch], rtn(group_size=16))
    assert [b.name for b in report.blocks] == ["blocks.0", "blocks.1"]
    assert report.left_in_float == ["lm_head"]
    ours, theirs = first_tensor(call_model(model, batch)), first_tensor(call_model(twin, batch))
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.3
    dense = [m.dequantize() if isinstance(m, QLinear) else m for m in model.modules()]
    assert sum(isinstance(m, nn.Linear) for m in dense) == 9
    for i in range(2):
        expected = rtn(group_size=16).weight.fake(twin.blocks[i].q.weight.detach())
        assert torch.equal(model.blocks[i].q.weight.decode(), expected)


def test_padded_tokens_count_in_no_statistic():
    mask = torch.ones(2, 7)
    mask[1, 3:] = 0
    one = {"ids": ids(), "attention_mask": mask}
    other = {"ids": torch.where(mask.bool(), ids(), (ids() + 7) % 40), "attention_mask": mask}
    moments = []
    for batch in (one, other):
        stream = Stream(Net().eval(), [batch])
        block = stream.block(0, stream.start())
        sites = find_sites(block, lambda name: False)
        measure(block, sites)
        moments.append(sites[0].moments)
    assert moments[0].rows == 10
    assert torch.equal(moments[0].amax, moments[1].amax)
    assert torch.allclose(moments[0].second_moment, moments[1].second_moment)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: (Net().eval(), ids()), lambda: (mlp(), noise(40, C))])
def test_half_precision_models_are_computed_in_float32_and_stay_half(dtype, make):
    model, x = make()
    model = model.to(dtype)
    x = x if x.dtype == torch.int64 else x.to(dtype)
    wide = copy.deepcopy(model).float()
    fine = x if x.dtype == torch.int64 else x.float()
    ours, theirs = (quantize(m, [b], rtn(group_size=16)) for m, b in ((model, x), (wide, fine)))
    assert ours.blocks[-1].error == pytest.approx(theirs.blocks[-1].error, rel=0.05)
    for (name, a), b in zip(model.named_modules(), wide.modules(), strict=True):
        if isinstance(a, QLinear):
            assert torch.equal(a.weight_packed, b.weight_packed), name
            assert a.bias is None or a.bias.dtype in (dtype, torch.float32)
    assert all(p.dtype == dtype for p in model.parameters())
    assert first_tensor(model(x)).dtype == dtype


@pytest.mark.parametrize("scale_dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("preset", [rtn, awq, gptq, best, partial(smoothquant_plus, alpha=0.5)])
def test_float64_models_may_have_scales_of_any_precision(preset, scale_dtype):
    model, wide = Net().eval(), Net().eval().double()
    method = preset(group_size=16, scale_dtype=scale_dtype)
    ours, theirs = (quantize(m, [ids()], method) for m in (wide, model))
    assert [b.error for b in ours.blocks] == pytest.approx([b.error for b in theirs.blocks], rel=0.1)
    output = first_tensor(wide(ids()))
    assert output.dtype == torch.float64
    twin = Net().eval().double()  # the layers compute as their dense twins do; kernels take scales in float32
    near = 1e-6 if scale_dtype == "float64" else 1e-12
    twin.load_state_dict({**wide.state_dict(), **dense_state(wide)}, strict=False)
    assert torch.allclose(first_tensor(twin(ids())), output, rtol=near, atol=near)


def dense_state(model):
    layers = {n: m.dequantize(torch.float64) for n, m in model.named_modules() if isinstance(m, QLinear)}
    return {f"{n}.{k}": v for n, dense in layers.items() for k, v in dense.state_dict().items()}


def test_tied_embeddings_stay_tied_and_untouched():
    model = Net(tied=True).eval()
    before = model.embed.weight.clone()
    report = quantize(model, [ids()], rtn(group_size=16))
    assert model.lm_head.weight is model.embed.weight and torch.equal(model.embed.weight, before)
    assert report.left_in_float == ["lm_head"]


def test_a_block_that_draws_at_random_folds_nothing():
    class Noisy(Attention):
        def forward(self, hidden, attention_mask=None, bias=0.0):
            hidden, score = super().forward(hidden, attention_mask, bias)
            return hidden + 0.01 * torch.randn_like(hidden), score

    model = Net().eval()
    model.blocks = nn.ModuleList([Noisy(), Noisy()])
    _, sites, found = lines(model, [ids()])
    assert [kind for kind, _ in found] == ["q+k+v", "o"]
    assert all(producer is None for _, producer in found)
    assert all(site.channels is None for site in sites)


@pytest.mark.parametrize("q", ["blocks.0.q", "q", "blocks.*.q", "*q"])
def test_layers_are_skipped_by_name_last_part_or_pattern(q):
    model = Net().eval()
    report = quantize(model, [ids()], rtn(group_size=16), skip=(q, "lm_head"))
    kept = ["blocks.0.q"] if q == "blocks.0.q" else ["blocks.0.q", "blocks.1.q"]
    assert report.left_in_float == [*kept, "lm_head"]


def test_a_skipped_layer_is_compensated_all_the_same():
    model = Net().eval().double()
    before = model(ids())["logits"]

    def smooth(site, method):
        channels = next(iter(site.weights.values())).shape[1]
        return Scale(noise(channels, seed=4, dtype=torch.float64).exp())

    lossless = replace(rtn(bits=8, group_size=1), transform=smooth, weight=Affine(8, 1, scale_dtype="float64"))
    report = quantize(model, [ids()], lossless, skip=("q", "lm_head"))
    assert report.blocks[0].folded == {"k+v": True, "o": True}
    assert torch.allclose(model(ids())["logits"], before, rtol=1e-6, atol=1e-6)


def test_small_linears_stay_float():
    model = nn.Sequential(nn.Linear(C, 16), nn.ReLU(), nn.Linear(16, 15))
    report = quantize(model, [noise(4, C)], rtn(group_size=16))
    assert report.left_in_float == ["2"] and report.blocks[0].sites == 1


def test_blocks_that_are_not_a_chain_are_taken_as_one(caplog):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.heads = nn.ModuleList([mlp(depth=2) for _ in range(3)])

        def forward(self, x):
            return sum(head(x * (i + 1)) for i, head in enumerate(self.heads))

    class Shared(Heads):
        def forward(self, x):
            for _ in range(2):
                for head in self.heads:
                    x = head(x)
            return x

    class Skips(Heads):
        def forward(self, x):
            return self.heads[1](self.heads[0](x))

    for make in (Heads, Shared, Skips):
        model, x = make().eval(), noise(12, C)
        before = model(x)
        with caplog.at_level(logging.WARNING, "planish"):
            report = quantize(model, [x], rtn(group_size=16))
        assert "processed as one block" in caplog.text
        caplog.clear()
        assert [b.name for b in report.blocks] == ["model"]
        error = (model(x) - before).square().sum() / before.square().sum()
        assert report.blocks[0].error == pytest.approx(error.item(), rel=1e-3)


# ---- a model without linears, and everything that is refused


def test_a_model_without_linears_is_left_as_it_is():
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(8)).eval()
    report = quantize(model, [noise(4, 8)], rtn())
    assert report.blocks[0].sites == 0 and report.blocks[0].error == 0 and report.blocks[0].sqnr == math.inf
    assert report.left_in_float == [] and report.bytes_after == report.bytes_before


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batches(batches):
    with pytest.raises(ValueError, match=r"quantize: `batches` must be at least one batch of what the model takes"):
        quantize(mlp(), batches, rtn(group_size=16))


@pytest.mark.parametrize("batches", [[torch.ones(0, C)], [{"ids": torch.ones(2, 0).long()}], [{}], [()]])
def test_batches_without_values(batches):
    with pytest.raises(ValueError, match=r"quantize: `batches` must be batches with at least one token"):
        quantize(mlp(), batches, rtn(group_size=16))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    model = Net().eval()
    with torch.no_grad():
        model.blocks[1].v.weight[3, 4] = value
    before = copy.deepcopy(model.blocks[1].state_dict())
    with pytest.raises(ValueError, match=r"quantize, block blocks.1, `v`: its weight holds NaN or Inf"):
        quantize(model, [ids()], rtn(group_size=16))
    assert before.keys() == model.blocks[1].state_dict().keys()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_activation_that_is_not_finite_is_named_with_its_batch(value):
    bad = noise(4, C)
    bad[2, 5] = value
    with pytest.raises(ValueError, match=r"quantize, block model, `0`: its input holds NaN or Inf in batch 1\."):
        quantize(mlp(), [noise(4, C), bad], rtn(group_size=16))


def test_a_model_is_quantized_once():
    model = mlp()
    quantize(model, [noise(4, C)], rtn(group_size=16))
    with pytest.raises(ValueError, match=r"`model` must be a float model; got 'one that holds QLinear layers already'"):
        quantize(model, [noise(4, C)], rtn(group_size=16))


def test_groups_that_do_not_divide_are_named_before_anything_is_touched():
    model = mlp(width=40)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"quantize, block model, `2`: 40 channels cannot be split in groups of 16"):
        quantize(model, [noise(4, C)], rtn(group_size=16))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert quantize(mlp(width=40), [noise(4, C)], rtn(group_size=16, ragged=True)).left_in_float == []


def test_what_a_model_returns_must_hold_a_tensor():
    class Mute(nn.Module):
        def forward(self, x):
            return "nothing"

    with pytest.raises(ValueError, match="one that returns a tensor, or a tuple or dict that holds one; got 'str'"):
        quantize(Mute(), [noise(2, C)], rtn())


def test_blocks_must_return_a_tensor_or_a_tuple():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(C, C)

        def forward(self, x):
            return {"state": self.linear(x)}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Odd(), Odd()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)["state"]
            return x

    with pytest.raises(ValueError, match="one whose blocks return a tensor or a tuple; got 'dict'"):
        quantize(Model(), [noise(2, C)], rtn(group_size=16))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Method(feed="both"), r"Method: `feed` must be 'quantized' or 'float'; got 'both'"),
        (lambda: Clip(steps=1), "Clip: `steps` must be at least 2; got 1"),
        (lambda: Clip(least=1.0), r"Clip: `least` must be a float in \(0, 1\); got 1.0"),
        (lambda: Clip(least=0), "Clip: `least`"),
    ],
)
def test_bad_arguments_of_steps(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
