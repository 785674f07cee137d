"""SAU's claims in miniature: derivatives are learnt where the width is real; at the paper's width it is PReLU."""

import statistics

import pytest
import torch
from torch import nn

from benchmarks.activations import UNITS, curve_errors
from planish.nn import SAU, WidthSchedule, to_leaky_relu

SEEDS = range(2)


def derivative_error(name: str) -> float:
    return statistics.fmean(curve_errors(UNITS[name], seed, steps=1000)[1] for seed in SEEDS)


@pytest.fixture(scope="module")
def errors():
    names = ("ReLU", "PReLU(0.15)", "SAU, the paper's width", "SAU, width trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: derivative_error(name) for name in names}
    torch.set_num_threads(threads)


@pytest.mark.claim("sau", "error of a learnt derivative: ReLU's, over that of SAU with a trained width")
def test_derivatives_against_relu(errors, record_claim):
    record_claim(errors["ReLU"] / errors["SAU, width trained"], 2.2, "times")


@pytest.mark.claim("sau", "error of a learnt derivative: PReLU's, over that of SAU with a trained width")
def test_derivatives_against_prelu(errors, record_claim):
    record_claim(errors["PReLU(0.15)"] / errors["SAU, width trained"], 1.8, "times")


@pytest.mark.claim("sau", "at the paper's width it is PReLU: how far apart their errors of derivatives are")
def test_the_papers_width_is_prelu(errors, record_claim):
    apart = abs(errors["SAU, the paper's width"] / errors["PReLU(0.15)"] - 1)
    record_claim(apart, 0.3, "of PReLU's", at_least=False)


@pytest.mark.claim("sau", "trained smooth, narrowed, made exact: the network's change, over the largest it could be")
def test_graduated_smoothing_ends_exact(record_claim):
    net = nn.Sequential(nn.Linear(1, 32), SAU(sigma=1.0), nn.Linear(32, 1))
    schedule = WidthSchedule(net, 1.0, 1e-3, 200)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x = torch.linspace(-2, 2, 64)[:, None]
    for _ in range(200):
        optimizer.zero_grad()
        (net(x) - x.abs()).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        smooth = net(x)
        (bound,) = to_leaky_relu(net).values()
        largest = bound * float(net[2].weight.abs().sum())
        change = float((net(x) - smooth).abs().max())
    assert 0 < largest < 0.01
    record_claim(change / largest, 1.0, at_least=False)
