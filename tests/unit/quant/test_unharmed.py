"""An exception in the middle leaves the user's model as it was: classes, dtypes, values, hooks."""

import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish.quant import Journal, files, quantize, rtn, search
from planish.quant.disk import SafetensorsWeights
from planish.quant.methods.smoothquant_plus import smoothquant_plus
from planish.quant.plans import SearchAlpha
from planish.quant.rounding import Nearest
from planish.quant.transforms import Scale

nets = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "plain_nets.py")))


class WeariedError(Exception):
    """What the steps below raise."""


@dataclass(frozen=True)
class Tires:
    """Round to nearest, up to one site."""

    at: str = "blocks.1.o"

    def __call__(self, site, method):
        if site.name == self.at:
            raise WeariedError
        return Nearest()(site, method)


def refuses(block, method):
    """Refine nothing: the block is rounded already when this raises."""
    raise WeariedError


def online(site, method):
    """Scale everything; what nothing absorbs is applied by hooks."""
    return Scale(torch.rand(next(iter(site.weights.values())).shape[1]) + 0.5)


def facts(model):
    return {
        "classes": {n: type(m) for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()},
        "forwards": {n for n, m in model.named_modules() if "forward" in vars(m)},
        "where": {n: (id(t), t.data_ptr(), t.dtype, t.requires_grad) for n, t in model.named_parameters()},
        "values": {n: t.detach().clone() for n, t in model.state_dict().items()},
    }


def unharmed(model, before):
    after = facts(model)
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    assert all(torch.equal(values[n], t) for n, t in old.items())


STEPS = {
    "rounding": replace(rtn(group_size=16), round=Tires()),
    "first": replace(rtn(group_size=16), round=Tires("blocks.0.q+k+v")),
    "refining": replace(rtn(group_size=16), refine=refuses),
    "online": replace(rtn(group_size=16), transform=online, online=True, round=Tires()),
    "folded": replace(smoothquant_plus(0.5, group_size=16), round=Tires()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_quantize(step, dtype):
    model = nets.Net(tied=True).to(dtype).eval()
    before = facts(model)
    with pytest.raises(WeariedError):
        quantize(model, [nets.ids()], STEPS[step])
    unharmed(model, before)
    twin = nets.Net(tied=True).to(dtype).eval()  # and it can be quantized afterwards, as if nothing had been
    for each in (model, twin):
        quantize(each, [nets.ids()], rtn(group_size=16))
    assert torch.equal(model(nets.ids())["logits"], twin(nets.ids())["logits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_search(dtype):
    model = nets.Net().to(dtype).eval()
    before = facts(model)
    with pytest.raises(WeariedError):
        search(model, [nets.ids()], [STEPS["folded"]])
    where = before.pop("where")
    after = facts(model)
    assert {n: (i, d, g) for n, (i, _, d, g) in after.pop("where").items()} == {
        n: (i, d, g) for n, (i, _, d, g) in where.items()
    }  # half precision came back from float32 to other memory
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    assert all(torch.equal(values[n], t) for n, t in old.items())


def test_a_plan_that_raises(monkeypatch):
    model = nets.Net().half().eval()
    classes = facts(model)["classes"]
    method = smoothquant_plus(group_size=16, granularity="layer")
    assert isinstance(method.plan, SearchAlpha)

    def tire(*_):
        raise WeariedError

    monkeypatch.setattr("planish.quant.plans.SiteError", tire)
    with pytest.raises(WeariedError):
        quantize(model, [nets.ids()], method)
    assert facts(model)["classes"] == classes
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_a_model_whose_blocks_raise(monkeypatch):
    """While recording, before any block is processed."""
    model = nets.Net().half().eval()
    before = facts(model)

    def tire(*_, **__):
        raise WeariedError

    monkeypatch.setattr(nets.Attention, "forward", tire)
    with pytest.raises((WeariedError, ValueError)):
        quantize(model, [nets.ids()], rtn(group_size=16))
    assert facts(model)["classes"] == before["classes"]
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_weights_from_disk_go_back_to_it(tmp_path):
    stored = nets.Net().eval()
    files.write_shard(tmp_path / "model.safetensors", stored.state_dict())
    model = nets.Net().to("meta").eval()
    weights = SafetensorsWeights(tmp_path, model)
    classes = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(WeariedError):
        quantize(model, [nets.ids()], STEPS["folded"], weights=weights)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {p.device.type for p in model.blocks.parameters()} == {"meta"}
    report = quantize(model, [nets.ids()], rtn(group_size=16), weights=weights)
    assert [b.name for b in report.blocks] == ["blocks.0", "blocks.1"]
    quantize(stored, [nets.ids()], rtn(group_size=16))
    with torch.no_grad():  # where a gradient is asked for the exact path runs, and only one of the two asks
        assert torch.equal(model(nets.ids())["logits"], stored(nets.ids())["logits"])


def test_a_run_goes_on_after_an_exception(tmp_path):
    """The journal keeps the finished block, the model is float again: the same call ends with the same bits."""
    model, twin = nets.Net().eval(), nets.Net().eval()
    method = rtn(group_size=16)
    seen = []

    def tire(stage, done, total):
        seen.append(done)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, [nets.ids()], method, journal=Journal(tmp_path), progress=tire)
    assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith((".q", ".o")))
    quantize(model, [nets.ids()], method, journal=Journal(tmp_path), progress=tire)
    quantize(twin, [nets.ids()], method)
    assert seen == [1, 1, 2]
    assert torch.equal(model(nets.ids())["logits"], twin(nets.ids())["logits"])
