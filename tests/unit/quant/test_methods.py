"""The presets: callable without arguments, named by a text that makes them again, and better than plain rounding."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish import quant
from planish.quant import METHODS, quantize
from planish.quant.engine import Method, no_plan, no_refine, no_transform
from planish.quant.formats import Affine
from planish.quant.low_rank import LowRank
from planish.quant.methods.awq import LocalScale
from planish.quant.methods.duquant import DuRotate
from planish.quant.methods.evol_q import ClipWeight, Evolve
from planish.quant.methods.gptq import Compensate
from planish.quant.methods.segquant import FindCuts, SmoothAlpha
from planish.quant.methods.smoothquant_plus import Smooth
from planish.quant.methods.svdquant import SearchSmooth
from planish.quant.mixed import SearchBits
from planish.quant.plans import SearchAlpha
from planish.quant.rounding import Clip, ClipOutput, Nearest
from planish.quant.segmenting import Segmented

C = 64
GRIDS = {
    "svdquant": Affine(4, 64, symmetric=True),
    "duquant": Affine(4, None, clip=0.8),
    "evol-q": Affine(4, None),
    "segquant": Affine(8, None, symmetric=True, scale_dtype="float32", per_tensor=True),
}  # as published, where it is not the house's


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(3)
    model = Net().eval().requires_grad_(False)
    for block in model.blocks:
        block.norm.weight.copy_(torch.rand(C) * 2 + 0.1)
        block.norm.weight[::16] *= 12  # channels that stand out
        block.up.weight[:, ::16] /= 6
    mix = torch.randn(C, C) / C**0.5
    data = [torch.randn(16, 24, C) @ mix for _ in range(4)]
    return model, data[:3], data[3]


def error(net, method):
    model, batches, held = net
    twin = copy.deepcopy(model)
    report = quantize(twin, batches, method)
    return ((twin(held) - model(held)).square().mean() / model(held).square().mean()).item(), report


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_runs_without_arguments_and_says_what_it_is(name):
    method = METHODS[name]()
    assert method.name == name and method.weight == GRIDS.get(name, Affine(4, 128))
    assert repr(method) == repr(METHODS[name]()) and "0x" not in repr(method)
    names = {
        "Affine": Affine, "Smooth": Smooth, "SearchAlpha": SearchAlpha, "Nearest": Nearest, "Clip": Clip,
        "LowRank": LowRank, "SearchSmooth": SearchSmooth,
        "Segmented": Segmented, "SmoothAlpha": SmoothAlpha, "FindCuts": FindCuts,
        "DuRotate": DuRotate, "Evolve": Evolve, "ClipWeight": ClipWeight,
        "Compensate": Compensate, "LocalScale": LocalScale, "ClipOutput": ClipOutput, "SearchBits": SearchBits,
    }  # fmt: skip
    text = repr(method).removeprefix(name)
    steps = {"plan": no_plan, "transform": no_transform, "refine": no_refine}
    made = eval(f"dict{text}", {**names, **{s.__name__: s for s in steps.values()}})
    assert Method(name, **made) == method


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("arguments", [{"bits": 9}, {"group_size": 0}, {"scale_dtype": "int8"}])
def test_every_preset_refuses_what_its_grid_refuses(name, arguments):
    with pytest.raises(ValueError, match=f"Affine: `{next(iter(arguments))}` must be"):
        METHODS[name](**arguments)


@pytest.mark.parametrize("group", [32, None])
def test_they_lose_less_than_plain_rounding_on_data_not_seen(net, group):
    found = {name: error(net, METHODS[name](bits=3, group_size=group))[0] for name in METHODS}
    for name in METHODS:  # trials at random gain least
        assert name == "rtn" or found[name] < (0.95 if name == "evol-q" else 0.9) * found["rtn"]
    assert found["best"] < 0.8 * found["gptq"]
    both = error(net, quant.best(bits=3, group_size=group, alpha=0.5))[0]
    found.pop("svdquant")  # its branch is as wide as half of these layers
    assert both == min(*found.values(), both)  # channels were planted that only smoothing evens out


def test_undoing_the_incoming_error_brings_the_output_closer(net):
    plain = quant.best(bits=3, group_size=32, correct=0.0)
    half = quant.best(bits=3, group_size=32)
    assert error(net, half)[1].blocks[-1].error < error(net, plain)[1].blocks[-1].error


def test_best_takes_another_way_where_activations_are_rounded_hard(net):
    eight, four = quant.best(group_size=32, act_bits=8), quant.best(group_size=32, act_bits=4)
    assert (eight.act.bits, eight.online, eight.transform, eight.round.correct) == (8, False, no_transform, 0.5)
    assert isinstance(four.transform, DuRotate) and four.online and four.act.clip < 1
    lost, _ = error(net, four)
    plain = replace(quant.rtn(group_size=32), act=replace(four.act, clip=1.0), online=True)
    assert lost < 0.7 * error(net, plain)[0]
    assert lost < error(net, quant.duquant(group_size=32))[0]
    with pytest.raises(ValueError, match=r"best: `act_bits` must be None or an integer from 2 to 8; got 1."):
        quant.best(act_bits=1)


def test_local_scales_beat_no_scales_and_fold(net):
    awq = quant.awq(bits=3, group_size=32, clip=False)
    scaled, report = error(net, awq)
    assert all(all(b.folded.values()) and b.folded for b in report.blocks)
    assert scaled < error(net, replace(awq, transform=no_transform))[0]


def test_bad_arguments_of_steps():
    for make, sentence in (
        (lambda: Compensate(damping=0), "Compensate: `damping` must be above 0; got 0."),
        (lambda: Compensate(correct=1.5), "Compensate: `correct` must be a float in [0, 1]; got 1.5."),
        (
            lambda: Compensate(rounds=-1),
            "Compensate: `rounds` must be at least 0, with at least one sweep; got (-1, 2).",
        ),
        (lambda: LocalScale(steps=0), "LocalScale: `steps` must be at least 1, with at least 1 token; got (0, 4096)."),
        (lambda: SearchAlpha(tokens=0), "SearchAlpha: `tokens` must be at least 1; got 0."),
        (lambda: SearchAlpha(drop=0.5), "SearchAlpha: `drop` must be above 1 or None; got 0.5."),
    ):
        with pytest.raises(ValueError) as failure:
            make()
        assert str(failure.value) == sentence
