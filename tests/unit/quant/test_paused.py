"""Runs that wait at a layer: they tell what a run from the beginning tells, and are begun anew where they would not."""

import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.quant import Affine, duquant, engine, gptq, quantize, rtn, segquant, spread, svdquant
from planish.quant.paused import PausedRuns
from planish.quant.stream import Block


class Net(nn.Module):
    """A U-Net in small: a skip around a level, attention's three layers on one input, a gate."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up = nn.Conv2d(64, 32, 3, padding=1)
        self.last = nn.Linear(32, 16)

    def forward(self, x):
        high = nn.functional.silu(self.first(x))
        low = nn.functional.silu(self.down(high))
        t = low.flatten(2).mT
        mixed = nn.functional.scaled_dot_product_attention(self.q(t), self.k(t), self.v(t))
        low = low + self.out(mixed).mT.unflatten(2, low.shape[2:])
        wide = torch.cat([high, nn.functional.interpolate(low, scale_factor=2)], 1)
        return self.last(nn.functional.gelu(self.up(wide)).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def pictures():
    return [torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 4, 2)]


def block(module, inputs):
    return Block("", module, inputs, [{} for _ in inputs], [None for _ in inputs])


METHODS = {  # and how often the runs are begun: once for the transforms, once for rounding
    "svdquant": (lambda: svdquant(rank=4, convolutions=True, ragged=True), 2),
    "smoothed into the layer before": (lambda: svdquant(rank=4, convolutions=True, ragged=True, fold=True), 3),
    "by budget": (lambda: svdquant(budget=4096, ragged=True), 3),
    "duquant": (lambda: replace(duquant(), convolutions=False), 2),
    "gptq": (lambda: gptq(group_size=32), 1),
    "segquant": (lambda: segquant(convolutions=True), 2),
    "rtn": (lambda: rtn(group_size=32), 0),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_made_is_the_same(name, monkeypatch):
    """Bit for bit what runs from the beginning lead to."""
    make, expected = METHODS[name]
    begun = []
    kept = PausedRuns._begin
    monkeypatch.setattr(PausedRuns, "_begin", lambda runs: (begun.append(1), kept(runs))[1])
    ours, theirs = net(), net()
    quantize(ours, pictures(), make())
    assert len(begun) == expected
    for module in (engine, spread):
        monkeypatch.setattr(module, "pausing", lambda _block: nullcontext())
    quantize(theirs, pictures(), make())
    assert len(begun) == expected
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_every_layer_costs_one_run_together():
    model, calls = net(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    runs = PausedRuns(block(model, pictures()))
    for name in ("first", "down", "q", "out", "up", "last"):
        assert len(list(runs.entering(name))) == 3
    assert runs.starts == 1
    runs.close()
    assert len(calls) == 3


@pytest.mark.parametrize("change", ["behind", "replaced behind", "hook behind", "asked again", "here", "ahead"])
def test_old_news_is_not_told(change):
    model, inputs = net(), pictures()
    runs = PausedRuns(block(model, inputs))
    list(runs.entering("down"))
    list(runs.entering("up"))
    with torch.no_grad():
        if change == "behind":
            model.down.weight.mul_(2)
        elif change == "replaced behind":
            model.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        elif change == "hook behind":
            model.down.register_forward_pre_hook(lambda _m, args: (args[0] * 3,))
        elif change == "here":
            model.up.register_forward_pre_hook(lambda _m, args: (args[0] * 3,))
            model.up.weight.div_(3)
        elif change == "ahead":
            model.last.weight.mul_(2)
    wanted = {"asked again": "down", "here": "last", "ahead": "up"}.get(change, "up")
    told = list(runs.entering(wanted))
    assert runs.starts == (1 if change in ("here", "ahead") else 2)
    fresh = PausedRuns(block(model, inputs))
    assert all(torch.equal(a, b) for a, b in zip(told, fresh.entering(wanted), strict=True))
    runs.close()
    fresh.close()


def test_hooks_of_today_count_for_what_waits():
    model = net()
    runs = PausedRuns(block(model, pictures()))
    before = list(runs.entering("up"))
    model.up.register_forward_pre_hook(lambda _m, args: (args[0] * 3,))
    model.up.register_forward_pre_hook(lambda _m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    after = list(runs.entering("up"))
    assert runs.starts == 1
    assert all(torch.equal(a * 3 + 1, b) for a, b in zip(before, after, strict=True))
    runs.close()


def test_an_iteration_that_is_left_early_does_no_harm():
    model, inputs = net(), pictures()
    runs = PausedRuns(block(model, inputs))
    next(iter(runs.entering("down")))
    model.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
    told = [list(runs.entering(name)) for name in ("q", "up")]
    fresh = PausedRuns(block(model, inputs))
    for name, found in zip(("q", "up"), told, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, fresh.entering(name), strict=True))
    assert "forward" not in model.down.__dict__
    runs.close()
    fresh.close()


@pytest.mark.refuses
def test_what_the_model_raises_arrives():
    model = net()
    model.up.register_forward_pre_hook(lambda *_: 1 / 0)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        quantize(model, pictures(), svdquant(rank=4, convolutions=True, ragged=True))
    runs = PausedRuns(block(model, pictures()))
    list(runs.entering("q"))
    with pytest.raises(ZeroDivisionError):
        list(runs.entering("last"))
    runs.close()
    assert threading.active_count() == threads


def test_nothing_is_left_behind():
    threads, hooks = threading.active_count(), len(torch.nn.modules.module._global_forward_pre_hooks)
    model = net()
    quantize(model, pictures(), replace(rtn(group_size=32), act=Affine(8, None)))
    quantize(net(), pictures(), svdquant(rank=4, convolutions=True, ragged=True))
    assert threading.active_count() == threads
    assert len(torch.nn.modules.module._global_forward_pre_hooks) == hooks
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_layer_that_is_not_reached_is_told_of_for_nobody():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(x)) if len(x) > 1 else self.a(x)

    runs = PausedRuns(block(Some(), [torch.ones(1, 2), torch.ones(3, 2)]))
    assert [len(x) for x in runs.entering("b")] == [3]
    runs.close()
