"""NIPQ in miniature: training under noise comes to rest where the straight-through estimator does not."""

import copy

import pytest
import torch
from torch import nn

from planish.quant import nipq, quantize, rtn, search
from planish.quant.engine import Walk
from planish.quant.methods.nipq import attach, cost, freeze, learned, param_groups, widths
from planish.quant.noise import draw, noised, rounded

TARGETS = (0.3, 0.45, 0.6)


def descend(target, *, noise, seed=0, steps=2000, lr=0.01):
    """Bring one weight to a target by gradients; codes are the whole numbers. Return where it was, and its codes."""
    generator = torch.Generator().manual_seed(seed)
    alpha, bits = torch.tensor(7.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    w, path = torch.zeros((), dtype=torch.float64, requires_grad=True), []
    for _ in range(steps):
        if noise:
            q = noised(w, alpha, bits, draw("uniform", w, alpha, bits, generator=generator))
        else:
            q = rounded(w, alpha, bits)
        (slope,) = torch.autograd.grad((q - target).square() / 2, w)
        with torch.no_grad():
            w -= lr * slope
        path.append(w.item())
    late = torch.tensor(path[-1000:])
    return late, late.round()


@pytest.mark.claim("nipq", "a weight between two codes: the straight-through estimator keeps jumping, noise does not")
@pytest.mark.parametrize("target", TARGETS)
def test_noise_rests_where_the_straight_through_estimator_oscillates(target, record_claim):
    jumping, codes = descend(target, noise=False)
    resting, settled = descend(target, noise=True)
    flips = int((codes.diff() != 0).sum())
    record_claim(flips, 300, "jumps of the code in 1,000 steps by the straight-through estimator")
    record_claim(int((settled.diff() != 0).sum()), flips / 10, "jumps under noise", at_least=False)
    assert abs(jumping.mean() - 0.5) < 0.02, "it stands at the threshold, wherever the best weight is"
    assert abs(resting.mean() - target) < 0.05
    assert settled[-1] == round(target)


class Uneven(nn.Module):
    """Blocks of which some matter far more for what comes out."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(6))
        self.gains = [3.0, 1.0, 0.3, 0.1, 0.3, 1.0]

    def forward(self, x):
        for gain, block in zip(self.gains, self.blocks, strict=True):
            x = x + gain * block(x)
        return x


def uneven():
    torch.manual_seed(1)
    return Uneven().eval(), [torch.randn(64, 32) for _ in range(4)]


@pytest.mark.claim("nipq", "widths by sensitivity lose less than one width of the same average (blocks planted uneven)")
@pytest.mark.parametrize("bits", [3, 4])
def test_allocation_by_cost_beats_one_width(bits, record_claim):
    model, data = uneven()
    method = nipq(bits=bits, group_size=None)
    planned = method.plan(Walk(model, data[:3]), method)
    plain = rtn(bits=bits, group_size=None)
    one = search(model, data[3:], [planned, method.__class__("one", method.weight, round=method.round), plain])
    assert planned.findings["average"] <= bits and planned.findings["average"] >= 0.97 * bits
    record_claim(one.losses[1] / one.losses[0], 2.2, "times less loss on data not seen")
    assert one.losses[0] < one.losses[2]


@pytest.mark.claim("nipq", "training under noise to 3 bits beats rounding the trained float network")
def test_training_under_noise_beats_rounding_afterwards(record_claim):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))
    x, fresh = torch.randn(1024, 16), torch.randn(1024, 16)
    with torch.no_grad():
        y, wanted = teacher(x), teacher(fresh)

    def gap(model):
        with torch.no_grad():
            return ((model.eval()(fresh) - wanted).square().mean() / wanted.square().mean()).item()

    afterwards, model = copy.deepcopy(teacher), copy.deepcopy(teacher)
    quantize(afterwards, [x], rtn(bits=3, group_size=None, symmetric=True))
    attach(model, x, bits=3.0, generator=generator)
    optimizer = torch.optim.Adam(param_groups(model, 3e-3))

    def train(steps):
        model.train()
        for step in range(steps):
            part = slice(step % 8 * 128, step % 8 * 128 + 128)
            loss = (model(x[part]) - y[part]).square().mean() / y.square().mean() + cost(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    train(240)
    live = widths(model)
    assert sum(model[int(n)].weight.numel() * w for n, (w, _) in live.items()) / 2048 == pytest.approx(3.0, rel=0.03)
    found = freeze(model)
    assert sum(model[int(n)].weight.numel() * w for n, w in found.items()) <= 3.0 * 2048
    train(80)
    judged = gap(model)
    quantize(model, [x], learned(model))
    assert gap(model) == pytest.approx(judged, rel=0.02)
    record_claim(gap(afterwards) / gap(model), 2.0, "times less error than rounding afterwards, at 3 bits")
