"""m-NGP in miniature: no bound of gradients is needed, nothing is paid for that, and attacks stay below the claim."""

import math

import numpy as np
import pytest
import torch

from planish.optim import audit_epsilon, calibrate_noise

EPSILON, DELTA, STEPS, RUNS = 4.0, 1e-5, 4, 1000


def attacked(noise_multiplier, seed, canary, absent):
    """Return how far a 1-D parameter went along a canary, over runs of the real optimizer.

    `canary` and `absent` are the canary's gradients in runs with and without it; other samples do nothing.
    """
    pytest.importorskip("opacus")
    from planish.optim import MNGPOptimizer

    generator = torch.Generator().manual_seed(seed)
    scores = []
    for gradient in (canary, absent):
        ends = torch.zeros(RUNS)
        for run in range(RUNS):
            w = torch.nn.Parameter(torch.zeros(1))
            optimizer = MNGPOptimizer(
                torch.optim.SGD([w], 1.0),
                noise_multiplier=noise_multiplier,
                expected_batch_size=2,
                generator=generator,
            )
            for _ in range(STEPS):
                w.grad_sample = torch.tensor([[gradient], [0.0]])
                w.summed_grad = None
                optimizer.step()
            ends[run] = -w.detach()[0]
        scores.append(ends)
    return scores


@pytest.fixture(scope="module")
def added():
    return attacked(calibrate_noise(EPSILON, DELTA, STEPS), 0, 1e3, 0.0)


@pytest.mark.claim("m_ngp", "epsilon that a membership attack proves (95 %) of 4 claimed, one sample more")
def test_an_attack_stays_below_the_claim(added, record_claim):
    record_claim(audit_epsilon(*added, DELTA), EPSILON, at_least=False)


@pytest.mark.claim("m_ngp", "share of the claimed epsilon that the attack proves, one sample more: little is wasted")
def test_the_attack_comes_close(added, record_claim):
    record_claim(audit_epsilon(*added, DELTA) / EPSILON, 0.6)


@pytest.mark.claim("m_ngp", "epsilon that a membership attack proves (95 %) of 4 claimed, one sample replaced")
def test_replaced(record_claim):
    z = calibrate_noise(EPSILON, DELTA, STEPS, adjacency="replace")
    bound = audit_epsilon(*attacked(z, 1, 1e3, -1e3), DELTA)
    assert bound > 0.5 * EPSILON
    record_claim(bound, EPSILON, at_least=False)


@pytest.mark.claim("m_ngp", "epsilon proved of 4 claimed where the noise was divided by the batch of 2: caught")
def test_too_little_noise_is_caught(record_claim):
    record_claim(audit_epsilon(*attacked(calibrate_noise(EPSILON, DELTA, STEPS) / 2, 2, 1e3, 0.0), DELTA), EPSILON)


@pytest.mark.claim(
    "m_ngp", "less noise than the closed form sqrt(2 T log(1/delta)) / eps, T = 50, eps = 1, delta = 1e-5"
)
def test_exact_noise_is_less(record_claim):
    closed = math.sqrt(2 * 50 * math.log(1e5))
    record_claim(100 * (1 - calibrate_noise(1.0, 1e-5, 50) / closed), 20, "%")


@pytest.fixture(scope="module")
def heavy():
    """Return mean accuracies over eight seeds, epsilon 0.1, one sample replaced, rows with heavy tails."""
    pytest.importorskip("sklearn")
    from planish.optim import MNGPClassifier

    random = np.random.default_rng(0)
    X = random.normal(size=(9000, 8)) * np.exp(0.5 * random.normal(size=(9000, 1)))
    y = X @ random.normal(size=8) + random.logistic(size=9000) > 0
    X, Z, y, t = X[:5000], X[5000:], y[:5000], y[5000:]
    G = float(np.sqrt((X**2).sum(1) + 1).max())  # a bound of all gradients, which the data had to be asked for
    subjects = {"plain": {"normalizer": "clip", "threshold": G}, "max1": {}, "clip": {"normalizer": "clip"}}

    def score(settings, rate):
        models = (
            MNGPClassifier(0.1, 1e-5, n_steps=20, learning_rate=rate, adjacency="replace", random_state=s, **settings)
            for s in range(8)
        )
        return 100 * float(np.mean([model.fit(X, y).score(Z, t) for model in models]))

    return {
        name: max(score(settings, rate) for rate in (0.03, 0.1, 0.3, 1.0, 3.0)) for name, settings in subjects.items()
    }


@pytest.mark.claim("m_ngp", "accuracy above plain gradient perturbation, epsilon 0.1, 8 seeds, both tuned")
def test_better_than_plain_perturbation(heavy, record_claim):
    record_claim(heavy["max1"] - heavy["plain"], 0.8, "points")


@pytest.mark.claim("m_ngp", "accuracy above clipping at 1: the same mechanism")
def test_the_same_as_clipping_at_one(heavy, record_claim):
    assert heavy["max1"] == heavy["clip"]
    record_claim(abs(heavy["max1"] - heavy["clip"]), 0.0, "points", at_least=False)


@pytest.mark.claim("m_ngp", "excess risk of ridge logistic regression on four times the samples; theory at most 1/4")
def test_excess_risk_falls_with_the_samples(record_claim):
    pytest.importorskip("sklearn")
    from planish.optim import MNGPClassifier

    random = np.random.default_rng(0)
    ridge, d = 0.05, 8
    truth = 2 * random.normal(size=d)

    def draw(n):
        X = random.normal(size=(n, d)) / math.sqrt(d)  # gradients seldom longer than 1
        return X, X @ truth + random.logistic(size=n) > 0

    X, y = draw(40_000)  # stands for the population

    def risk(w):
        return float(np.logaddexp(0, np.where(y, -1, 1) * (X @ w)).mean() + ridge / 2 * w @ w)

    best = np.zeros(d)
    for _ in range(200):
        best = best - 2.0 * (X.T @ (0.5 * (1 + np.tanh(X @ best / 2)) - y) / len(X) + ridge * best)
    excess = {}
    for n in (1000, 4000):
        risks = []
        for seed in range(16):
            model = MNGPClassifier(
                0.5, 1e-5, n_steps=25, learning_rate=2.0, l2=ridge, fit_intercept=False, random_state=seed
            )
            risks.append(risk(model.fit(*draw(n)).coef_[0]) - risk(best))
        excess[n] = float(np.mean(risks))
    assert min(excess.values()) > 0
    record_claim(excess[4000] / excess[1000], 0.35, "times", at_least=False)
