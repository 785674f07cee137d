"""The steps of the pass one by one: moments, rounding, folding, walking over blocks, and the report."""

import copy
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish.quant import QLinear, quantize, rtn
from planish.quant.act_formats import Dual
from planish.quant.engine import Method, Walk, process
from planish.quant.formats import Affine
from planish.quant.local import SiteError
from planish.quant.moments import Moments, gram, measure
from planish.quant.report import BlockReport, Report, model_bytes
from planish.quant.rounding import Clip, ClipOutput, Nearest, best_limits, uncorrelated
from planish.quant.sites import find_sites, rebind, weight_of
from planish.quant.stacks import find_blocks
from planish.quant.stream import Stream, first_tensor
from planish.quant.transforms import Scale, Shift

nets = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "plain_nets.py")))
C, Attention, Net, ids, lines, mlp, noise = nets.C, nets.Attention, nets.Net, nets.ids, nets.lines, nets.mlp, nets.noise


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


def test_moving_the_ends_by_themselves_only_helps_and_does_where_a_group_is_lopsided():
    weight, importance = noise(12, 64), noise(64, seed=1).exp()
    weight[:, ::7] = weight[:, ::7].abs() * 5
    x = noise(300, 64, seed=2) + noise(300, 1, seed=3)  # correlated channels
    for grid in (Affine(3, 16), Affine(4, 64), Affine(4, 24, ragged=True), Affine(4, 16, symmetric=True)):
        blocks = (torch.arange(64)[:, None] // grid.group_size) == (torch.arange(64) // grid.group_size)
        for judge in (importance, x.T @ x / 300):
            square = torch.diag(judge) if judge.ndim == 1 else judge * blocks

            def loss(grid=grid, judge=judge, square=square, **how):
                gap = grid.fake(weight, limits=best_limits(weight, grid, judge, **how)) - weight
                return ((gap @ square) * gap).sum()

            common, either = loss(), loss(ends=True)
            assert either <= common * (1 + 1e-5)
            assert grid.symmetric or either < 0.98 * common


def test_correlations_are_believed_as_far_as_told():
    x = noise(50, 6)
    square = x.T @ x
    assert torch.equal(uncorrelated(square, 0.0), square)
    assert torch.equal(uncorrelated(square, 1.0), torch.diag(square.diagonal()))
    half = uncorrelated(square, 0.5)
    assert torch.equal(half.diagonal(), square.diagonal()) and torch.allclose(half[0, 1:], square[0, 1:] / 2)


def test_clipping_by_outputs_loses_less_of_the_output_than_clipping_by_weights():
    x = noise(400, C) + 2 * noise(400, 1, seed=5)
    errors = {}
    for step in (Nearest(), Clip(), ClipOutput()):
        model = mlp()
        errors[type(step)] = quantize(model, [x], replace(rtn(bits=3, group_size=16), round=step)).blocks[0].error
    assert errors[ClipOutput] < errors[Clip] < errors[Nearest]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": 1}, "ClipOutput: `steps` must be at least 2; got 1."),
        ({"least": 1.0}, "ClipOutput: `least` must be a float in (0, 1); got 1.0."),
        ({"independence": 1.5}, "ClipOutput: `independence` must be a float in [0, 1]; got 1.5."),
    ],
)
def test_clipping_by_outputs_refuses_what_makes_no_sense(arguments, sentence):
    with pytest.raises(ValueError) as error:
        ClipOutput(**arguments)
    assert str(error.value) == sentence


def test_clip_as_a_step():
    plain, clipped = mlp(), mlp()
    x = noise(200, C)
    a = quantize(plain, [x], rtn(bits=3, group_size=16))
    b = quantize(clipped, [x], replace(rtn(bits=3, group_size=16), round=Clip()))
    assert b.blocks[0].error < a.blocks[0].error


@pytest.mark.parametrize("step", [Clip(), ClipOutput()])
def test_clip_refuses_a_site_whose_transform_is_online(step):
    model, x = mlp(nn.GELU), noise(9, C)
    method = replace(
        rtn(group_size=16),
        transform=lambda s, m: Scale(torch.full((next(iter(s.weights.values())).shape[1],), 2.0)),
        round=step,
        online=True,
    )
    with pytest.raises(ValueError, match=f"{type(step).__name__}: `site` must be one whose transform was folded"):
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


def test_process_takes_a_verdict_at_its_word():
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
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    assert process(block, sites, fine) == {"0": False, "2": True, "4": True}
    assert [s.verdict for s in sites] == [None, 0, 0] and len(runs) == 4  # before and after, for each of two folds
    again = [rebind(site, block) for site in sites]
    assert process(block, again, fine) == {"0": False, "2": True, "4": True} and len(runs) == 4
    again[1].verdict = -1
    assert process(block, again, fine) == {"0": False, "2": False, "4": True} and len(runs) == 4
    handle.remove()
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
