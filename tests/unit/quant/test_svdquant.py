"""Low-rank branches from the outside: bad input, other methods around them, checkpoints, adapters."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish._support import CheckpointError
from planish.quant import (
    FP4,
    Affine,
    Journal,
    LowRank,
    QLinear,
    best,
    gptq,
    inspect,
    load,
    quantize,
    rtn,
    save,
    svdquant,
)
from planish.quant.methods.gptq import Compensate
from planish.quant.methods.svdquant import SearchSmooth
from planish.quant.schemes import empty_layer
from planish.quant.spread import SpreadRanks

C = 32


def net(act=nn.GELU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, 64), act(), nn.Linear(64, C), act(), nn.Linear(C, 24)).eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [noise(64, C, seed=s) for s in (1, 2)]
QUICK = {"group_size": 16, "rank": 2, "grid": 2, "iterations": 2}


def lost(method, model=None):
    model = model or net()
    wanted, twin = model(BATCHES[0]), copy.deepcopy(model)
    quantize(twin, BATCHES, method)
    return (twin(BATCHES[0]) - wanted).square().mean().item(), twin


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LowRank(-1), "LowRank: `rank` must be an int >= 0; got -1."),
        (lambda: LowRank(True), "LowRank: `rank` must be an int >= 0; got True."),
        (lambda: LowRank(ranks=(("a", 1.5),)), "LowRank: `rank` must be an int >= 0; got 1.5."),
        (lambda: LowRank(weigh="both"), "LowRank: `weigh` must be one of output, weight; got 'both'."),
        (lambda: LowRank(iterations=0), "LowRank: `iterations` must be at least 1; got 0."),
        (lambda: LowRank(dtype="int8"), "LowRank: `dtype` must be auto, float16, bfloat16 or float32; got 'int8'."),
        (lambda: LowRank(correct=2), r"LowRank: `correct` must be a float in \[0, 1\]; got 2."),
        (lambda: LowRank(inner=Compensate(correct=0.5), correct=0.5), "LowRank: `inner` must be a step without"),
        (lambda: SearchSmooth(grid=0), "SearchSmooth: `grid` must be at least 1; got 0."),
        (lambda: SearchSmooth(alpha=2), r"SearchSmooth: `alpha` must be None or a float in \[0, 1\]; got 2."),
        (lambda: SearchSmooth(tokens=0), "SearchSmooth: `tokens` must be at least 1; got 0."),
        (lambda: SearchSmooth(judge="me"), "SearchSmooth: `judge` must be 'module' or 'layer'; got 'me'."),
        (lambda: SpreadRanks(-1), "SpreadRanks: `budget` must be an int >= 0, in bytes; got -1."),
        (lambda: SpreadRanks(1, step=0), "SpreadRanks: `step` must be at least 1"),
        (lambda: svdquant(precision="nf4"), "svdquant: `precision` must be 'int' or 'fp4'; got 'nf4'."),
        (lambda: svdquant(smooth="much"), "svdquant: `smooth` must be 'search', a float in"),
        (lambda: quantize(nn.Linear(40, 64), [noise(4, 40)], svdquant(precision="fp4")), "40 channels cannot be"),
        (lambda: lost(svdquant(rank=33, group_size=16)), r"LowRank: `rank` must be at most 32 at `0` \(see `ranks`\)"),
        (lambda: lost(svdquant(group_size=24)), "quantize, block model, `0`: 32 channels cannot be split"),
        (lambda: lost(replace(rtn(group_size=16), plan=SpreadRanks(1))), "SpreadRanks: `method` must be one that"),
        (lambda: lost(replace(gptq(), weight=FP4())), "Compensate: `weight` must be a grid of integers"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def adapted():
    return QLinear.of(Affine(4, 16).encode(noise(8, C)))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda q: q.add_lora("", noise(2, C), noise(8, 2)), "add_lora: `name` must be a name that is not taken"),
        (lambda q: q.add_lora("a", noise(2, C), noise(8, 2)), "add_lora: `name` must be a name that is not taken"),
        (lambda q: q.add_lora("b", noise(2, C), noise(8, 3)), r"add_lora: `down, up` must be of shape \(r, 32\)"),
        (lambda q: q.add_lora("b", noise(2, 31), noise(8, 2)), r"add_lora: `down, up` must be of shape \(r, 32\)"),
        (lambda q: q.add_lora("b", noise(0, C), noise(8, 0)), r"add_lora: `down, up` must be of shape \(r, 32\)"),
        (lambda q: q.add_lora("b", noise(2, C) / 0, noise(8, 2)), "add_lora: `down, up` must be finite"),
        (lambda q: q.add_lora("b", noise(2, C), noise(8, 2), scale=float("nan")), "`scale` must be a finite number"),
        (lambda q: q.set_lora_scale("b", 1.0), "set_lora_scale: `name` must be one of a; got 'b'."),
        (lambda q: q.set_lora_scale("a", float("inf")), "set_lora_scale: `scale` must be a finite number; got inf."),
        (lambda q: q.remove_lora("b"), "remove_lora: `name` must be one of a; got 'b'."),
    ],
)  # fmt: skip
def test_bad_adapters_are_refused_and_leave_the_layer_alone(call, sentence):
    layer = adapted()
    layer.add_lora("a", noise(1, C), noise(8, 1))
    before = layer(BATCHES[0])
    with pytest.raises(ValueError, match=sentence):
        call(layer)
    assert torch.equal(layer(BATCHES[0]), before) and list(layer.loras) == ["a"]
    layer.remove_lora("a")
    with pytest.raises(ValueError, match="remove_lora: `name` must be one of none: there is no adapter; got 'a'."):
        layer.remove_lora("a")


def test_an_adapter_meets_the_float_models_input():
    """Trained on the float model, put on the quantized one: smoothing, shift and rounding are around it, not in it."""
    model = net()
    down, up = noise(2, 64, seed=5) / 8, noise(C, 2, seed=6) / 2
    merged = copy.deepcopy(model)
    merged[2].weight.data += 0.5 * up @ down
    wanted = merged[2](merged[1](merged[0](BATCHES[0]))) - model[2](model[1](model[0](BATCHES[0])))
    quantize(model, BATCHES, svdquant(bits=8, act_bits=8, **QUICK))
    assert model[2].transform is not None
    before = model[:3](BATCHES[0])
    model[2].add_lora("style", down, up, 0.5)
    moved = model[:3](BATCHES[0]) - before
    assert (moved - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("method", [rtn(group_size=16), gptq(group_size=16), best(group_size=16)], ids=lambda m: m.name)
@pytest.mark.parametrize("act", [None, Affine(4, 16, True)], ids=["A16", "A4"])
def test_any_method_can_have_a_branch(method, act):
    method = replace(method, act=act)
    with_branch = replace(method, round=LowRank(4, inner=method.round, iterations=2))
    error, model = lost(with_branch)
    assert error < lost(method)[0]
    assert all(m.down.shape[0] == 4 for m in model.modules() if isinstance(m, QLinear))
    none = lost(replace(with_branch, round=LowRank(0, inner=method.round)))[1]
    plain = lost(method)[1]
    assert torch.equal(none(BATCHES[0]), plain(BATCHES[0]))


def test_another_step_can_round_the_last_residual():
    """The published order: the branch first, beside plain rounding; then compensated rounding of what is left."""
    plain, then = svdquant(**QUICK | {"smooth": None}), svdquant(**QUICK | {"smooth": None, "last": Compensate()})
    one, two = lost(plain)[1], lost(then)[1]
    assert torch.equal(one[0].down, two[0].down) and not torch.equal(one[0].weight_packed, two[0].weight_packed)
    rank_0 = lost(replace(then, round=replace(then.round, rank=0)))[1]
    same = lost(replace(then, round=Compensate()))[1]
    assert torch.equal(rank_0(BATCHES[0]), same(BATCHES[0]))


def test_a_branch_can_undo_what_comes_in():
    """Aiming at the float model's output, not at the layer's own, helps where earlier layers have lost much."""
    step = LowRank(8, inner=Compensate(clip=True), iterations=2)
    coarse = replace(rtn(bits=2, group_size=16), round=step)
    assert lost(replace(coarse, round=replace(step, correct=1.0)))[0] < lost(coarse)[0]


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "fp4"}, {"bits": 3, "act_bits": None}, {"budget": 3000}, {"fold": True}], ids=str
)
def test_a_checkpoint_holds_all_of_it(tmp_path, settings):
    model, twin = net(), net()
    report = quantize(model, BATCHES, svdquant(**QUICK | settings))
    model[0].add_lora("a", noise(2, C).half(), noise(64, 2).half(), 0.25)
    model[0].add_lora("b", noise(1, C), noise(64, 1))
    assert save(model, tmp_path / "q", report=report) == "planish"
    again = load(tmp_path / "q", into=twin)
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[k].float(), right[k].float()) for k in left)
    assert torch.equal(again(BATCHES[0]), model(BATCHES[0]))
    assert again[0].loras == {"a": (2, 0.25), "b": (1, 1.0)}
    again[0].remove_lora("a")
    assert inspect(tmp_path / "q")["low_rank"] > 0
    if "budget" in settings:
        spent = sum(t.nbytes for k, t in left.items() if k.endswith((".down", ".up")))
        assert 0 < spent == report.search["branch bytes"] <= 3000


def test_a_damaged_adapter_in_a_file_is_refused():
    entry = {"in": C, "out": 8, "weight": Affine(4, 16).to_dict()}
    sound = {"dtype": "float16", "parts": [{"name": "a", "rank": 2, "scale": 0.5}]}
    assert empty_layer("q", entry | {"loras": sound}).lora_down.shape == (2, C)
    part = sound["parts"][0]
    for wrong in (
        {"dtype": "int8", "parts": [part]}, {"dtype": "float16", "parts": []},
        {"dtype": "float16", "parts": [part, part]},
        {"dtype": "float16", "parts": [part | {"rank": 0}]}, {"dtype": "float16", "parts": [part | {"scale": None}]},
        {"dtype": "float16", "parts": [part | {"scale": float("inf")}]}, {"dtype": "float16", "parts": {}}, [], "x",
        {"dtype": "float16", "parts": [{"name": "a"}]}, {"dtype": "float16", "parts": [part | {"rank": True}]},
    ):  # fmt: skip
        with pytest.raises(CheckpointError):
            empty_layer("q", entry | {"loras": wrong})


def test_an_interrupted_run_spends_the_same_bytes(tmp_path):
    """What the plan found is in the journal: the second run asks nothing again and ends with the same model."""
    method = svdquant(**QUICK | {"budget": 2000})
    runs = []
    for _ in range(2):
        model, stages = net(), []
        quantize(model, BATCHES, method, journal=Journal(tmp_path / "j"), progress=lambda s, d, t: stages.append(s))  # noqa: B023
        runs.append((model, stages))
    assert "ranks" in runs[0][1] and "ranks" not in runs[1][1]
    assert torch.equal(runs[0][0](BATCHES[0]), runs[1][0](BATCHES[0]))


def test_skipped_layers_stay_as_they_are():
    model = net()
    before = model[2].weight.clone()
    quantize(model, BATCHES, svdquant(**QUICK), skip=("2",))
    assert torch.equal(model[2].weight, before) and isinstance(model[4], QLinear)


def test_dead_channels_and_extreme_factors_stay_within_16_bits():
    model = net(nn.ReLU)
    with torch.no_grad():
        model[0].weight[:, 3] *= 1e-7
        model[0].weight[:, 5] = 0.0
    batches = [b * torch.where(torch.arange(C) == 7, 1e6, 1.0) * (torch.arange(C) != 9) for b in BATCHES]
    for alpha in (0.5, 1.0):
        made = copy.deepcopy(model)
        quantize(made, batches, svdquant(**QUICK | {"smooth": alpha}))
        scale = made[0].transform.scale
        assert scale[9] == 1 and scale[5] == 1
        assert torch.isfinite(made(batches[0])).all() and 1e-4 <= scale.min() and scale.max() <= 1e4


def test_a_seed_is_nowhere():
    one, two = lost(svdquant(**QUICK))[1], lost(svdquant(**QUICK))[1]
    assert torch.equal(one(BATCHES[0]), two(BATCHES[0]))
