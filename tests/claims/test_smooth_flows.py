"""On a torus, smooth flows have better forces than splines of their size and conserve energy, at equal likelihood."""

import functools

import pytest
import torch

from benchmarks import flows_cases
from planish.flows import SmoothFlow, force_matching_loss


@functools.cache
def score(name, force_weight=0.0):
    model = flows_cases.MODELS[name](0)
    flows_cases.train(model, flows_cases.draw(20_000, 0), force_weight=force_weight, steps=500, seed=0, batch=128)
    return flows_cases.judge(model, n_test=2000, md_steps=600)


@pytest.mark.slow
@pytest.mark.claim("smooth_flows", "torus, trained on likelihood: force RMSE over that of circular RQ splines")
def test_forces(record_claim):
    record_claim(score("smooth").force_rmse / score("RQ spline").force_rmse, 0.75, at_least=False)


@pytest.mark.slow
@pytest.mark.claim("smooth_flows", "torus: change of energy in dynamics on the learned density, over that on splines")
def test_energy_is_conserved(record_claim):
    record_claim(score("smooth").drift / score("RQ spline").drift, 0.1, at_least=False)


@pytest.mark.slow
@pytest.mark.claim("smooth_flows", "torus: divergence from the truth, less that of splines")
def test_likelihood_is_no_worse(record_claim):
    record_claim(score("smooth").kl - score("RQ spline").kl, 0.02, "nats", at_least=False)


@pytest.mark.slow
@pytest.mark.claim("smooth_flows", "torus: force RMSE of training on forces too (weight 0.002), over likelihood alone")
def test_training_on_forces(record_claim):
    record_claim(score("smooth", 0.002).force_rmse / score("smooth").force_rmse, 0.9, at_least=False)


@pytest.mark.claim(
    "smooth_flows", "reverse KL through the numerical inverse: nats to a density seen only by its energy"
)
def test_training_by_energy_alone(record_claim):
    target = lambda x: -2 * (2 * torch.pi * x).cos().sum(-1)  # noqa: E731
    g = torch.Generator().manual_seed(0)
    flow = SmoothFlow(2, periodic=True, components=4, transforms=2, hidden_features=(16,), generator=g)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    x = torch.zeros(1, 2)
    for _ in range(120):
        kind = {"nll_weight": 0, "force_weight": 0, "kl_weight": 1, "energy": target, "generator": g}
        loss = force_matching_loss(flow(), x, x, **kind)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
    log_volume = 2 * torch.log(torch.special.i0(torch.tensor(2.0)))  # of exp(2 cos) on both circles
    with torch.no_grad():
        drawn, log_q = flow().rsample_and_log_prob((4000,), g)
        record_claim(float((target(drawn) + log_q).mean() + log_volume), 0.02, "nats", at_least=False)
