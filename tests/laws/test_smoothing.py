"""Exact smoothers against the joint law; particle smoothers against exact ones; what holds for every cloud's size."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from planish.statespace import (
    FiniteHMM,
    LinearGaussian,
    Paris,
    StochasticVolatility,
    estimate_score,
    ffbs,
    forward_backward,
    kalman,
    paris,
    parisian_gibbs,
    particle_filter,
    simulate,
)
from planish.statespace.backward import Backward
from planish.statespace.particles import Cloud

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_walk(n=51):
    """An autoregression, 51 observations of it, and its exact smoother."""
    random = np.random.default_rng(0)
    x = [random.normal() * 0.6 / math.sqrt(1 - 0.97**2)]
    for _ in range(n - 1):
        x.append(0.97 * x[-1] + 0.6 * random.normal())
    y = torch.tensor(np.array(x) + random.normal(size=n))[:, None]
    model = LinearGaussian(0.97, 0.36).double()
    return model, y, kalman(model, y)


def products(t, before, x):
    return torch.zeros_like(x[..., 0]) if before is None else (before * x)[..., 0]


def product_mean(exact):
    return (exact.mean[:-1, 0] * exact.mean[1:, 0] + exact.lag_cov[:, 0, 0]).sum().detach()


def chain():
    steps = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=F64)
    start, means = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    return FiniteHMM(start, steps, means, torch.tensor([0.5, 1.0, 0.8], dtype=F64))


SEEN = torch.tensor([[0.3], [-1.2], [math.nan], [1.9], [0.4], [-0.5]], dtype=F64)


def switches(t, before, x):
    here = (x[..., 0] == 2).double()
    return here if before is None else here + 2 * (before != x)[..., 0]


def switch_mean(exact):
    moved = exact.pairs.sum() - exact.pairs.diagonal(dim1=-2, dim2=-1).sum()
    return (exact.marginals[:, 2].sum() + 2 * moved).detach()


def is_centred(values, truth, slack=0.0):
    """Whether the mean of independent values is the truth, within 4 standard errors."""
    return abs(float(values.mean() - truth)) < 4 * float(values.std() / len(values) ** 0.5) + slack


def test_kalman_is_the_joint_gaussian():
    A = torch.tensor([[0.8, 0.3], [-0.2, 0.5]], dtype=F64)
    B = torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=F64)
    Q, R = torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=F64), torch.tensor([[0.4, -0.1], [-0.1, 0.9]], dtype=F64)
    model = LinearGaussian(A, Q, B, R, initial_mean=torch.tensor([1.0, -1.0]))
    y = simulate(model, 5, 2, generator=seeded())[1]
    y[0, 2] = math.nan
    found = kalman(model, y)
    P = model.initial_cov
    torch.testing.assert_close(A @ P @ A.mT + Q, P)
    lower = torch.linalg.matrix_power
    covs = [[None] * 5 for _ in range(5)]
    marginal = P
    for i in range(5):
        for j in range(i, 5):
            covs[i][j] = marginal @ lower(A, j - i).mT
            covs[j][i] = covs[i][j].mT
        marginal = A @ marginal @ A.mT + Q
    joint = torch.cat([torch.cat(row, 1) for row in covs])
    mean = torch.cat([lower(A, i) @ model.initial_mean for i in range(5)])
    for s, rows in ((0, [0, 1, 3, 4]), (1, range(5))):
        H = torch.cat([torch.kron(torch.eye(5, dtype=F64)[i : i + 1], B) for i in rows])
        seen = torch.cat([y[s, i] for i in rows])
        S = H @ joint @ H.mT + torch.kron(torch.eye(len(rows), dtype=F64), R)
        gain = joint @ H.mT @ torch.linalg.inv(S)
        after = joint - gain @ H @ joint
        torch.testing.assert_close(found.mean[s].flatten(), mean + gain @ (seen - H @ mean))
        for i in range(5):
            torch.testing.assert_close(found.cov[s, i], after[2 * i : 2 * i + 2, 2 * i : 2 * i + 2])
        for i in range(4):
            torch.testing.assert_close(found.lag_cov[s, i], after[2 * i : 2 * i + 2, 2 * i + 2 : 2 * i + 4])
        torch.testing.assert_close(found.loglik[s], MultivariateNormal(H @ mean, S).log_prob(seen))
    paths = kalman(model, y[0]).sample(20_000, generator=seeded())
    assert ((paths.mean(0) - found.mean[0]).abs() < 4.5 * (found.cov[0].diagonal(dim1=-2, dim2=-1) / 2e4).sqrt()).all()
    lag = (paths[:, 1:, 0] * paths[:, :-1, 1]).mean(0) - paths[:, 1:, 0].mean(0) * paths[:, :-1, 1].mean(0)
    torch.testing.assert_close(lag, found.lag_cov[0, :, 1, 0].detach(), atol=0.02, rtol=0)


def all_paths(model):
    """Every path of the finite chain, and its probability together with what was seen."""
    x = torch.tensor(list(itertools.product(range(3), repeat=6)))[..., None]
    log_p = model.initial().log_prob(x[:, 0])
    for t in range(6):
        if t:
            log_p = log_p + model.transition(t, x[:, t - 1]).log_prob(x[:, t])
        if t != 2:
            log_p = log_p + model.observation(t, x[:, t]).log_prob(SEEN[t])
    return x, log_p.exp().detach()


def test_forward_backward_is_enumeration():
    model, found = chain(), forward_backward(chain(), SEEN)
    x, p = all_paths(model)
    states = (x == torch.arange(3)).double()
    law = p / p.sum()
    torch.testing.assert_close(found.loglik, p.sum().log())
    torch.testing.assert_close(found.marginals, torch.einsum("p,ptk->tk", law, states))
    torch.testing.assert_close(found.pairs, torch.einsum("p,ptk,ptl->tkl", law, states[:, :-1], states[:, 1:]))


@pytest.mark.parametrize("n", [2, 5])
def test_a_sweep_from_the_smoothing_law_is_unbiased_for_every_cloud(n):
    model, y, exact = slow_walk()
    truth = product_mean(exact)
    assert float(truth) == pytest.approx(112.704, abs=1e-3)
    chains = 3000
    start = exact.sample(chains, generator=seeded(n))
    found = parisian_gibbs(
        model, y, n, 1, 0, additive=products, n_chains=chains, path=start, generator=seeded(10 + n)
    )  # fmt: skip
    assert is_centred(found.per_sweep[0], truth)
    # the new path has the smoothing law: means, and covariances of neighbours
    z = (found.path.mean(0) - exact.mean) / (exact.cov[..., 0] / chains).sqrt()
    assert z.abs().max() < 4.5
    assert is_centred((found.path[:, 1:, 0] * found.path[:, :-1, 0]).sum(1), truth)
    assert 0 < float(found.renewal[0]) < float(found.renewal[-1]) <= 1


@pytest.mark.parametrize("kind", ["hybrid", "exact", "rejection", "mcmc"])
def test_sweeps_of_a_finite_chain_are_unbiased_however_indices_are_drawn(kind):
    model = chain()
    truth = switch_mean(forward_backward(model, SEEN))
    x, p = all_paths(model)
    start = x[p.multinomial(1500, replacement=True, generator=seeded())]
    found = parisian_gibbs(
        model, SEEN, 3, 1, 0, additive=switches, n_chains=1500, path=start, backward=kind, generator=seeded(2)
    )  # fmt: skip
    assert is_centred(found.per_sweep[0], truth)
    after = torch.stack([switches(t, found.path[:, t - 1] if t else None, found.path[:, t]) for t in range(6)]).sum(0)
    assert is_centred(after, truth)


class Guided(LinearGaussian):
    """Proposes from the exact law of X_t given both neighbours in time, or where y is missing from something wide."""

    def proposal(self, t, x, y):
        mean = torch.zeros_like(y) if x is None else 0.97 * x
        var = 0.36 / (1 - 0.97**2) if x is None else 0.36
        gain = var / (var + 1)
        centre = torch.where(y.isnan(), mean, mean + gain * (y - mean))
        return Independent(Normal(centre, 1.3 * math.sqrt(gain)), 1)


def test_guided_clouds_are_unbiased_too_and_lose_less():
    _, y, _ = slow_walk(20)
    y[7] = math.nan
    plain, guided = LinearGaussian(0.97, 0.36).double(), Guided(0.97, 0.36).double()
    exact = kalman(plain, y)
    start = exact.sample(2000, generator=seeded())
    found = parisian_gibbs(guided, y, 4, 1, 0, additive=products, n_chains=2000, path=start, generator=seeded(1))
    assert is_centred(found.per_sweep[0], product_mean(exact))
    runs = y.expand(500, 20, 1)
    logs = [particle_filter(m, runs, 50, generator=seeded(2)).loglik - exact.loglik.detach() for m in (plain, guided)]
    assert all(is_centred(log.exp(), 1.0) for log in logs)
    assert logs[1].std() < logs[0].std()


@pytest.mark.parametrize("resampling", ["multinomial", "stratified", "systematic"])
def test_the_likelihood_is_unbiased(resampling):
    _, y, _ = slow_walk(10)
    model = LinearGaussian(0.97, 0.36).double()
    log = particle_filter(model, y.expand(2000, 10, 1), 20, resampling=resampling, generator=seeded()).loglik
    assert is_centred((log - kalman(model, y).loglik.detach()).exp(), 1.0)


@pytest.mark.parametrize("smooth", [paris, ffbs])
def test_one_pass_tends_to_the_truth(smooth):
    model = chain()
    truth = switch_mean(forward_backward(model, SEEN))
    errors = [
        smooth(model, SEEN.expand(300, 6, 1), n, additive=switches, generator=seeded()).mean - truth for n in (10, 90)
    ]
    assert is_centred(errors[1], 0.0, slack=0.05)
    assert 2.2 < float(errors[0].square().mean().sqrt() / errors[1].square().mean().sqrt()) < 4.2  # sqrt(9) = 3


def test_the_ways_to_draw_backward_have_one_law():
    model, copies, random = LinearGaussian(0.9, 0.5).double(), 4000, seeded()
    x, log_w = torch.randn(5, 1, dtype=F64, generator=random), torch.randn(5, dtype=F64, generator=random)
    target = torch.tensor([[0.7]], dtype=F64)
    before = Cloud(3, x.expand(copies, 5, 1), log_w.expand(copies, 5), torch.zeros(copies), None, False)
    after = Cloud(4, target.expand(copies, 5, 1), log_w.expand(copies, 5), torch.zeros(copies),
                  torch.zeros(copies, 5, dtype=torch.long), False)  # fmt: skip
    chances = (log_w + model.transition(4, x).log_prob(target)).softmax(0).detach()
    wanted = torch.zeros(copies, 5, 3, dtype=torch.bool)
    wanted[:, 2, :2] = True
    for how in (Backward("exact"), Backward("rejection"), Backward("hybrid"), Backward("hybrid", 1),
                Backward("mcmc", mcmc_steps=40)):  # fmt: skip
        indices = torch.full((copies, 5, 3), -7)
        with torch.no_grad():
            evaluated = how.draw("test", model, before, after, wanted, indices, random)
        assert (indices[~wanted] == -7).all()
        counts = indices[wanted].bincount(minlength=5)
        chi2 = ((counts - 2 * copies * chances) ** 2 / (2 * copies * chances)).sum()
        assert float(chi2) < 18.5, how  # 1 in 1000 of four degrees of freedom
        pairs = (indices[:, 2, 0] == indices[:, 2, 1]).double()
        assert is_centred(pairs, chances.square().sum()), how  # the draws of one particle are independent
        if how.kind == "hybrid":
            assert evaluated <= 2 * copies * ((how.max_trials or 5) + 5)


def test_the_ancestor_is_a_draw_from_the_backward_kernel():
    model, y, _ = slow_walk(30)
    runs = y.expand(1500, 30, 1)
    a, b = (
        paris(model, runs, 15, additive=products, reuse_ancestors=reuse, generator=seeded(int(reuse))).mean
        for reuse in (True, False)
    )
    grid = torch.linspace(40, 160, 200, dtype=F64)
    apart = ((a[:, None] < grid).double().mean(0) - (b[:, None] < grid).double().mean(0)).abs().max()
    assert float(apart) < 1.95 * math.sqrt(2 / 1500)  # Kolmogorov and Smirnov, 1 in 1000
    assert a.std() / b.std() == pytest.approx(1, abs=0.12)


def test_one_backward_draw_degenerates_and_two_do_not():
    model = LinearGaussian(0.7, 0.5, initial_cov=1.0).double()
    y = simulate(model, 100, generator=seeded(3))[1]

    def total(t, before, x):
        return x[..., 0]

    excess = []
    for n in (5, 100):
        spread = [
            paris(model, y[:n].expand(400, n, 1), 20, m, additive=total, generator=seeded(m)).mean.var() for m in (1, 2)
        ]
        excess.append(float(spread[0] / spread[1]))
    assert excess[0] < 1.4 and excess[1] > 1.8, excess


def test_shares_give_the_estimate_again():
    from planish.statespace.ppg import sweep

    model, y, _ = slow_walk(12)
    smoother = Paris(model, 10, additive=lambda t, before, x: (t + 1) * x[..., 0] ** 2, generator=seeded())
    done = sweep(smoother, y.expand(3, 12, 1), None)
    shares = done.shares()
    assert all(torch.allclose(c.sum(1), torch.ones(3, dtype=F64)) for c in shares)
    again = sum((t + 1) * (c * x[..., 0] ** 2).sum(1) for t, (c, x) in enumerate(zip(shares, done.states, strict=True)))
    torch.testing.assert_close(again, done.mean[:, 0])


def test_the_score_is_the_gradient_of_the_exact_likelihood():
    model, y, exact = slow_walk(25)
    y[4] = math.nan
    exact = kalman(model, y)
    names = [name for name, _ in model.named_parameters()]
    wanted = torch.autograd.grad(exact.loglik, list(model.parameters()))
    batches = []
    for seed in range(12):
        start = exact.sample(100, generator=seeded(seed))
        score = estimate_score(model, y, 4, 1, 0, n_chains=100, path=start, generator=seeded(100 + seed))
        batches.append(torch.stack([score.gradients[name].flatten()[0] for name in names]))
    assert all(p.grad is None for p in model.parameters())
    found = torch.stack(batches)
    z = (found.mean(0) - torch.stack([g.flatten()[0] for g in wanted])) / (found.std(0) / 12**0.5)
    assert z.abs().max() < 4.5, dict(zip(names, z.tolist(), strict=True))


def test_what_does_not_matter():
    """A constant factor of the observations' density, the seed of others, the precision."""
    model, y, exact = slow_walk(20)

    class Scaled(LinearGaussian):
        def observation(self, t, x):
            law = super().observation(t, x)
            plain = law.log_prob
            law.log_prob = lambda value: plain(value) - 700.0  # its exponential is 0
            return law

    scaled = Scaled(0.97, 0.36).double()
    first = paris(model, y, 40, additive=products, generator=seeded())
    torch.manual_seed(99)
    again = paris(model, y, 40, additive=products, generator=seeded())
    other = paris(scaled, y, 40, additive=products, generator=seeded())
    assert torch.equal(first.mean, again.mean) and torch.equal(first.ess, again.ess)
    torch.testing.assert_close(other.mean, first.mean)
    torch.testing.assert_close(other.loglik, first.loglik - 20 * 700)
    single = LinearGaussian(0.97, 0.36)
    rough = paris(single, y.float().expand(200, 20, 1), 100, additive=products, generator=seeded()).mean
    assert rough.dtype == torch.float32
    assert is_centred(rough, float(product_mean(exact)), slack=0.5)


def test_series_in_a_batch_do_not_know_of_each_other():
    model = StochasticVolatility().double()
    y = simulate(model, 15, 3, generator=seeded())[1]
    y[1, 4:7] = math.nan
    together = paris(model, y.repeat(150, 1, 1), 60, additive=products, generator=seeded()).mean.reshape(150, 3)
    for s in range(3):
        alone = paris(model, y[s].expand(150, 15, 1), 60, additive=products, generator=seeded(s)).mean
        error = ((together[:, s].var() + alone.var()) / 150).sqrt()
        assert abs(float(together[:, s].mean() - alone.mean())) < 4 * float(error)
