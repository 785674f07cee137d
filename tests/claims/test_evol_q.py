"""Evol-Q's claim in miniature: at two bits, scales that evolve bring a network nearer to its float self."""

import copy
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.quant import Evolve, evol_q, evolve, quantize
from planish.quant.engine import no_refine
from planish.quant.fitness import kl
from planish.quant.methods.evol_q import published

CENTRES = 2.0 * torch.randn(32, 16, generator=torch.Generator().manual_seed(5))
BUDGET = 400


def points(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(32, (n,), generator=generator)
    return CENTRES[labels] + torch.randn(n, 16, generator=generator), labels


@pytest.fixture(scope="module")
def network():
    """A classifier of 32 kinds of points, trained."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(300):
        x, y = points(128, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def rounded(net, batches):
    """Return the network at two bits, each row in its best range, as the paper begins."""
    model = copy.deepcopy(net)
    quantize(model, batches, replace(evol_q(bits=2, scale_dtype="float32"), refine=no_refine))
    return model


def unseen(net, model):
    """Return divergence and agreement with the float network, on points that nothing was fitted to."""
    x, _ = points(2000, 10_000)
    ours, theirs = model(x), net(x)
    return kl(ours, theirs).item(), (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()


def changes(net, settings, seeds=3):
    """Return the divergence left, relative to the start's, and the points of agreement won, by seed."""
    ratios, won = [], []
    for seed in range(seeds):
        batches = [points(100, 1000 + 10 * seed + i)[0] for i in range(5)]
        start = rounded(net, batches)
        before = unseen(net, start)
        evolve(start, batches, net, replace(settings, seed=seed))
        after = unseen(net, start)
        ratios.append(after[0] / before[0])
        won.append(100 * (after[1] - before[1]))
    return ratios, won


@pytest.mark.claim("evol_q", "2 bits: evolution of scales lowers the divergence from the float network, unseen data")
def test_the_divergence_falls_on_unseen_data(network, record_claim):
    ratios, _ = changes(network, Evolve("kl", passes=4, cycles=100, budget=BUDGET))
    assert max(ratios) < 1
    record_claim(1 / statistics.mean(ratios), 2.0, "times less")


@pytest.mark.claim("evol_q", "2 bits: it also finds the float network's answer more often, unseen data")
def test_agreement_rises_on_unseen_data(network, record_claim):
    _, won = changes(network, Evolve("kl", passes=4, cycles=100, budget=BUDGET))
    record_claim(statistics.mean(won), 1.0, "points")


@pytest.mark.claim("evol_q", "stretching the grid under fixed codes beats rounding anew, equal evaluations")
def test_fixed_codes_beat_rounding_anew(network, record_claim):
    ours, _ = changes(network, Evolve("kl", passes=4, cycles=100, budget=BUDGET))
    anew, _ = changes(network, Evolve("kl", passes=4, cycles=100, budget=BUDGET, codes="nearest"))
    record_claim(statistics.mean(anew) / statistics.mean(ours), 1.3, "times less divergence")


@pytest.mark.claim("evol_q", "our settings beat the published ones, equal evaluations")
def test_our_settings_beat_the_published_ones(network, record_claim):
    ours, _ = changes(network, Evolve("kl", passes=4, cycles=100, budget=BUDGET))
    theirs, _ = changes(network, replace(published(), passes=100, budget=BUDGET, scope="all"))
    record_claim(statistics.mean(theirs) / statistics.mean(ours), 1.3, "times less divergence")
