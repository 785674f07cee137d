"""The pass on plain modules, in every precision, and what it refuses."""

import copy
import json
import logging
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from planish.quant import QLinear, fold, quantize, rtn
from planish.quant.engine import Method, Walk, process
from planish.quant.formats import Affine, Dual
from planish.quant.local import SiteError
from planish.quant.moments import Moments, gram, measure
from planish.quant.report import BlockReport, Report, model_bytes
from planish.quant.rounding import Clip, Nearest, best_limits
from planish.quant.sites import find_sites, weight_of
from planish.quant.stream import Stream, call_model, find_blocks, first_tensor
from planish.quant.transforms import Scale, Shift

C = 32


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mlp(act=nn.ReLU, depth=3, width=48, bias=True):
    torch.manual_seed(0)
    layers = []
    for i in range(depth):
        layers += [nn.Linear(C if i == 0 else width, width if i < depth - 1 else C, bias=bias), act()]
    return nn.Sequential(*layers[:-1]).eval()


class Attention(nn.Module):
    """A block of plain linears with a mask, a context by name, and a tuple as its answer."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = nn.LayerNorm(C), *(nn.Linear(C, C) for _ in range(4))
        with torch.no_grad():
            self.norm.weight.copy_(1 + 0.3 * noise(C, seed=1))
            self.norm.bias.copy_(noise(C, seed=2))

    def forward(self, hidden, attention_mask=None, bias=0.0):
        x = self.norm(hidden)
        score = self.q(x) @ self.k(x).mT / C**0.5 + bias
        if attention_mask is not None:
            score = score.masked_fill(~attention_mask[:, None].bool(), -1e9)
        return hidden + self.o(score.softmax(-1) @ self.v(x)), score


class Net(nn.Module):
    """Token ids, embedding, blocks in a list, head: with no library at all."""

    def __init__(self, tied=False, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, C)
        self.blocks = nn.ModuleList([Attention() for _ in range(depth)])
        self.lm_head = nn.Linear(C, 40, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        bias = torch.ones(1, dtype=x.dtype) * 0.1
        for block in self.blocks:
            x, _ = block(x, attention_mask, bias=bias)
        return {"loss": None, "logits": self.lm_head(x)}


def ids(rows=2, length=7, seed=3):
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def lines(model, batches):
    stream = Stream(model, batches)
    block = stream.block(0, stream.start())
    sites = find_sites(block, lambda name: False)
    return block, sites, [(s.kind, s.producer_name) for s in sites]


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


# ---- moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_moments_are_those_of_all_rows(dtype):
    parts = [noise(n, 6, seed=n, dtype=dtype) * n for n in (1, 4, 0, 9)]
    moments = Moments.empty(parts[0])
    for part in parts:
        moments.add(part)
    rows = torch.cat(parts)
    assert moments.rows == 14
    assert torch.equal(moments.amax, rows.abs().amax(0))
    assert torch.allclose(moments.mean_abs, rows.abs().mean(0))
    assert torch.allclose(moments.second_moment, rows.square().mean(0))


def test_moments_are_not_there_before_they_are_measured():
    _, sites, _ = lines(mlp(), [noise(4, C)])
    with pytest.raises(RuntimeError, match="site 0: statistics are read before they were collected"):
        sites[0].moments  # noqa: B018


def test_the_gram_matrix_is_that_of_the_tokens():
    x = [noise(5, C), noise(7, C, seed=1)]
    block, sites, _ = lines(mlp(), x)
    rows = torch.cat(x)
    assert torch.allclose(gram(block, sites[0]), rows.T @ rows / 12, rtol=1e-5, atol=1e-6)
    block, sites, _ = lines(mlp(nn.GELU), x)
    measure(block, sites)
    assert torch.allclose(gram(block, sites[2]).diagonal(), sites[2].moments.second_moment, rtol=1e-5)


# ---- rounding, folding, walking


def test_clipping_never_costs_weighted_error():
    weight, importance = noise(12, 64), noise(64, seed=1).exp()
    weight[:, 5] *= 12
    for grid in (Affine(3, 16), Affine(4, 64, symmetric=True), Affine(4, 24, ragged=True)):
        limits = best_limits(weight, grid, importance)

        def loss(fake):
            return ((fake - weight).square() * importance).sum()

        assert loss(grid.fake(weight, limits=limits)) <= loss(grid.fake(weight)) * (1 + 1e-6)
    assert loss(Affine(3, 16).fake(weight, limits=best_limits(weight, Affine(3, 16), importance))) < 0.95 * loss(
        Affine(3, 16).fake(weight)
    )


def test_clip_as_a_step():
    plain, clipped = mlp(), mlp()
    x = noise(200, C)
    a = quantize(plain, [x], rtn(bits=3, group_size=16))
    b = quantize(clipped, [x], replace(rtn(bits=3, group_size=16), round=Clip()))
    assert b.blocks[0].error < a.blocks[0].error


def test_clip_refuses_a_site_whose_transform_is_online():
    model, x = mlp(nn.GELU), noise(9, C)
    method = replace(
        rtn(group_size=16),
        transform=lambda s, m: Scale(torch.full((next(iter(s.weights.values())).shape[1],), 2.0)),
        round=Clip(),
        online=True,
    )
    with pytest.raises(ValueError, match="Clip: `site` must be one whose transform was folded"):
        quantize(model, [x], method)


@pytest.mark.parametrize("bias", [True, False])
def test_a_transform_that_finds_no_layer_runs_online(bias):
    model, x = mlp(nn.GELU, bias=bias).double(), noise(9, C, dtype=torch.float64)
    before = model(x)
    fine = Affine(8, 1, scale_dtype="float64")

    def shift(site, method):
        return Shift(noise(next(iter(site.weights.values())).shape[1], seed=2, dtype=torch.float64))

    report = quantize(model, [x], Method("shifted", weight=fine, transform=shift, online=True))
    assert report.blocks[0].folded == {"0": False, "2": False, "4": False}
    assert all(isinstance(m.transform, Shift) for m in model.modules() if isinstance(m, QLinear))
    assert torch.allclose(model(x), before, rtol=1e-6, atol=1e-6)
    assert "folded 0 of 3, 3 online" in str(report)


def test_rounded_activations_are_seen_by_the_blocks_that_follow():
    model, x = Net().eval(), ids(4, 9)
    twin = copy.deepcopy(model)
    report = quantize(model, [x], replace(rtn(bits=8, group_size=16), act=Dual(4)))
    errors = []
    kept = {}
    for name, net in (("ours", model), ("theirs", twin)):
        handles = [
            block.register_forward_hook(lambda m, a, out, n=name, i=i: kept.__setitem__((n, i), out[0]))
            for i, block in enumerate(net.blocks)
        ]
        net(x)
        for handle in handles:
            handle.remove()
    for i in range(2):
        gap = kept["ours", i] - kept["theirs", i]
        errors.append((gap.square().sum() / kept["theirs", i].square().sum()).item())
    assert [b.error for b in report.blocks] == pytest.approx(errors, rel=1e-3)
    plain = quantize(twin, [x], rtn(bits=8, group_size=16))
    assert report.blocks[-1].error > 3 * plain.blocks[-1].error


@pytest.mark.parametrize("feed", ["quantized", "float"])
def test_the_rounding_step_sees_what_feed_says(feed):
    seen = []

    def look(site, method):
        seen.append(site.block.inputs[0].clone())
        return Nearest()(site, method)

    model = Net().eval()
    twin = copy.deepcopy(model)
    quantize(model, [ids()], replace(rtn(bits=2, group_size=16), round=look, feed=feed))
    source = model if feed == "quantized" else twin
    entering = []
    handle = source.blocks[1].register_forward_pre_hook(lambda m, a, k: entering.append(a[0]), with_kwargs=True)
    source(ids())
    handle.remove()
    assert torch.allclose(seen[-1], entering[0], rtol=1e-4, atol=1e-5)
    other = twin if feed == "quantized" else model
    handle = other.blocks[1].register_forward_pre_hook(lambda m, a, k: entering.append(a[0]), with_kwargs=True)
    other(ids())
    handle.remove()
    assert not torch.allclose(seen[-1], entering[1], rtol=1e-2, atol=1e-2)


def test_progress_is_told_after_every_block():
    told = []
    quantize(Net().eval(), [ids()], rtn(group_size=16), progress=lambda *a: told.append(a))
    assert told == [("quantize", 1, 2), ("quantize", 2, 2)]


class Pair(nn.Module):
    """Two layers that read one input, as keys and values do."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        y = self.norm(x)
        return self.a(y) * self.b(y)


def test_site_error_of_one_layer_is_its_output_error_and_of_several_that_of_their_module():
    model, x = nn.Sequential(Pair(), nn.Linear(C, C)), noise(9, C)
    block, sites, _ = lines(model, [x])
    measure(block, sites)
    grid = Affine(3, 16)
    assert [list(s.consumers) for s in sites] == [["0.a", "0.b"], ["1"]]
    for site, module in zip(sites, (model[0], model[1]), strict=True):
        judge = SiteError(site, tokens=9)
        given = x if module is model[0] else model[0](x)
        target, before = module(given), copy.deepcopy(model.state_dict())
        found = judge.of(rtn(bits=3, group_size=16), None)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())  # the weights are put back
        twin = copy.deepcopy(module)
        for part in twin.modules():
            if isinstance(part, nn.Linear):
                part.weight.data = grid.fake(part.weight.data)
        gap = (twin(given) - target).square()
        assert found == pytest.approx(gap.mean().item() if module is model[0] else gap.sum(-1).mean().item(), rel=1e-4)


def test_process_can_be_told_to_trust_folds():
    model = mlp().double()
    x = noise(9, C, dtype=torch.float64)
    block, sites, _ = lines(model, [x])
    measure(block, sites)
    fine = Method(
        "x",
        weight=Affine(8, 1, scale_dtype="float64"),
        transform=lambda s, m: Scale(torch.full((next(iter(s.weights.values())).shape[1],), 3.0).double()),
    )
    before = model(x)
    assert process(block, sites, fine, check=False) == {"0": False, "2": True, "4": True}
    assert torch.allclose(first_tensor(block.call(x, {})), before, rtol=1e-6, atol=1e-6)


def test_conv1d_weights_are_read_the_other_way_round():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(48, C)
    assert weight_of(layer).shape == (48, C)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(48, C))
    x, w = noise(5, C), layer.weight.detach().T.clone()
    quantize(model, [x], rtn(group_size=16))
    assert torch.equal(model[0].weight.decode(), Affine(4, 16).fake(w))


def test_find_blocks_takes_the_heaviest_list_of_equal_modules():
    model = Net()
    assert find_blocks(model)[0] == ["blocks.0", "blocks.1"]
    model.more = nn.ModuleList([nn.Sequential(nn.Linear(C, 400)) for _ in range(3)])
    assert find_blocks(model)[0][0] == "more.0"
    model.mixed = nn.ModuleList([nn.Linear(C, 4000), nn.ReLU()])
    model.heads = nn.ModuleList([nn.Linear(C, 4000), nn.Linear(C, 4000)])  # leaves are no blocks
    assert find_blocks(model)[0][0] == "more.0"
    assert find_blocks(mlp())[0] == [""]


# ---- report


def test_the_report_is_json_and_fits_a_terminal():
    report = quantize(Net().eval(), [ids()], rtn(group_size=16))
    text = json.dumps(report.to_json())
    data = json.loads(text)
    assert [b["name"] for b in data["blocks"]] == ["blocks.0", "blocks.1"]
    assert "clean" not in data["blocks"][0]
    assert data["blocks"][0]["sqnr_db"] == pytest.approx(-10 * math.log10(data["blocks"][0]["error"]))
    assert data["left_in_float"] == ["lm_head"] and data["bytes_after"] < data["bytes_before"]
    assert all(len(line) < 100 for line in str(report).splitlines())
    assert "left in float: lm_head" in str(report) and "2 blocks" in str(report)


def test_worst_blocks_are_those_that_add_most():
    report = Report("x", blocks=[BlockReport(str(i), error=e) for i, e in enumerate((0.1, 0.15, 0.5, 0.52))])
    assert [b.name for b in report.worst(2)] == ["2", "0"]
    assert BlockReport("x", error=0.0).sqnr == math.inf and BlockReport("x", error=0.0).to_json()["sqnr_db"] is None


def test_bytes_are_counted_once():
    assert model_bytes(Net(tied=True)) == model_bytes(Net()) - 40 * C * 4
    layer = QLinear.of(Affine(4, 16).encode(noise(32, C)))
    assert model_bytes(layer) == 32 * C // 2 + 32 * 2 * 2 + 32 * 2 // 2 + 2 * 8


def test_the_method_s_text_is_its_provenance():
    text = repr(replace(rtn(bits=3), act=Dual(8), round=Clip(steps=4)))
    assert text == (
        "rtn(weight=Affine(bits=3, group_size=128, symmetric=False, ragged=False, scale_dtype='float16'), "
        "act=Dual(bits=8), round=Clip(steps=4, least=0.5))"
    )
    assert " at 0x" not in repr(Method(transform=lambda s, m: None))


# ---- planted outliers


@pytest.mark.parametrize("factor", [10.0, 50.0])
def test_planted_outliers_change_no_function_and_hurt_round_to_nearest(factor):
    plant = runpy.run_path(str(Path(__file__).parents[2] / "planted.py"))["plant_outliers"]
    model = Net().eval()
    planted = copy.deepcopy(model).double()
    x = [ids(4, 12)]
    before = model.double()(x[0])["logits"]
    assert plant(planted, x, factor=factor, share=0.05) == 8  # two sites of two channels in each of two blocks
    assert torch.allclose(planted(x[0])["logits"], before, rtol=1e-9, atol=1e-9)
    stream = Stream(planted, x)
    block = stream.block(0, stream.start())
    sites = find_sites(block, lambda name: False)
    measure(block, sites)
    assert sites[0].moments.amax.max() > factor / 4 * sites[0].moments.amax.median()
    plain, hard = (quantize(m.float(), x, rtn(bits=4, group_size=None)) for m in (model, planted))
    assert hard.blocks[-1].error > 1.5 * plain.blocks[-1].error


def test_a_walk_keeps_what_it_knows_of_equal_blocks():
    walk = Walk(Net().eval(), [ids()])
    hidden = walk.stream.start()
    first = walk.sites(walk.stream.block(0, hidden))
    assert len(walk.known) == 1
    second = walk.sites(walk.stream.block(1, hidden))
    assert len(walk.known) == 1
    assert [s.kind for s in first] == [s.kind for s in second]
    assert second[0].consumers["q"] is walk.model.blocks[1].q and second[0].producer is walk.model.blocks[1].norm
