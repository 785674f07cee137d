"""The worst function: queries grow with the doors, as 1/eps to the stated power, and superposition does not help."""

import math

import pytest
import torch

from planish.complexity import ChainGame, StochasticOracle, ZeroChain, bench, query_lower_bound
from planish.complexity.circuits import grover_circuit, random_circuit, sequential_circuit
from planish.optim import GradNormNewton, NormalizedGD, Spider

F64 = torch.float64
OPTIMIZERS = {
    "GD": lambda p: torch.optim.SGD(p, lr=1 / 20),
    "momentum": lambda p: torch.optim.SGD(p, lr=1 / 50, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=1 / 50, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "L-BFGS": lambda p: torch.optim.LBFGS(p, lr=1.0, line_search_fn="strong_wolfe"),
    "NormalizedGD": lambda p: NormalizedGD(p, lr=1.0),
    "Spider": lambda p: Spider(p, lr=1.0, q=5),
    "GradNormNewton": GradNormNewton,
}


@pytest.mark.claim("quantum_lower_bounds", "no method needs fewer queries than the chain has doors, ours and torch's")
def test_nobody_beats_the_bound(record_claim):
    scores = bench(OPTIMIZERS, (5, 10, 20))
    assert [r.queries for r in scores.rows if r.optimizer == "GD"] == [52, 85, 147]
    record_claim(min(row.per_door for row in scores.rows), 1, "queries a door")


@pytest.mark.claim("quantum_lower_bounds", "queries of gradient descent against 1/eps: slope 2")
def test_slope_of_gradient_descent(record_claim):
    counts = []
    for eps in (2e-3, 1e-3):  # 100 and 400 doors
        f = ZeroChain.for_target(eps, delta=0.731)
        step = 152 / 20 / f.lipschitz
        (row,) = bench(
            {"GD": lambda p, step=step: torch.optim.SGD(p, lr=step)}, (f.length,), chain=lambda _, f=f: f
        ).rows
        counts.append(row.queries)
    record_claim(abs(math.log(counts[-1] / counts[0]) / math.log(2) - 2), 0.1, "from 2", at_least=False)


@pytest.mark.claim("quantum_lower_bounds", "a stochastic oracle costs T / q queries (relative error of the mean)")
def test_stochastic_queries(record_claim):
    f, q, n_runs = ZeroChain(10), 0.2, 600
    oracle = StochasticOracle(f, q, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(n_runs, 10, dtype=F64)
    queries = 0
    while (active := (f.progress(x, 1.0) < 10)).any():
        queries += int(active.sum())
        g = oracle(x)
        x = torch.where(active[:, None] & (g != 0), -2.0 * g.sign(), x)
    record_claim(abs(queries / n_runs / (10 / q) - 1), 0.05, at_least=False)


@pytest.mark.claim("quantum_lower_bounds", "K < T queries: largest |psi - phi| over its bound, 100 random circuits")
def test_hybrid_argument(record_claim):
    game, worst, hits, bounds = ChainGame(4, 2), 0.0, [], []
    chains = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    for seed in range(100):
        report = game.hybrid_report(random_circuit(game, 1, torch.Generator().manual_seed(seed)), chains)
        assert all(leak <= bound for leak, bound in zip(report.leaks, report.leak_bounds, strict=True))
        worst = max(worst, *(d / b for d, b in zip(report.distances, report.bounds, strict=True)))
        hits.append(report.hits)
        bounds.append(report.hit_bound)
    assert max(hits) <= min(bounds)
    record_claim(worst, 1, at_least=False)


def test_leak_halves_when_keys_double():
    leaks = {}
    for n_keys in (8, 16):
        game = ChainGame(n_keys, 2)
        g = torch.Generator().manual_seed(0)
        chains = (torch.randint(n_keys, (6, 2), generator=g) + 1).tolist()
        leaks[n_keys] = game.hybrid_report(random_circuit(game, 1, g), chains).leaks[0]
        assert leaks[n_keys] <= 2 / n_keys
    assert 0.35 < leaks[16] / leaks[8] < 0.7


@pytest.mark.parametrize("n_keys", [4, 9])
def test_grover_guesses_better_than_chance_and_asks_more_than_reading(n_keys):
    game = ChainGame(n_keys, 2)
    iterations = round(math.pi / 4 * math.sqrt(n_keys) - 0.5)
    circuit, chain = grover_circuit(game, iterations), (2, 3)
    found = game.success(game.run(circuit, chain), chain)
    assert found > 10 / n_keys**2 or found == pytest.approx(1)
    assert len(circuit) > len(sequential_circuit(game))


def test_rates_are_those_of_the_paper():
    assert [query_lower_bound(1e-3, order=p).exponent for p in (1, 2, 3)] == [2, 1.5, pytest.approx(4 / 3)]
    for setting, exponent in (("stochastic", 4.0), ("mean_squared_smooth", 3.0)):
        coarse, fine = (query_lower_bound(eps, setting, delta=1e4, sigma=1.0) for eps in (1e-3, 1e-4))
        assert math.log10(fine.queries / coarse.queries) == pytest.approx(exponent, abs=0.02)
        assert fine.asymptotic / coarse.asymptotic == pytest.approx(10**exponent)
    for model in ("classical", "quantum"):
        assert query_lower_bound(1e-4, model=model) == query_lower_bound(1e-4)
    assert query_lower_bound(1e-4).length == pytest.approx(13_706, rel=0.025)  # 2 % for the rotation's constants
    assert query_lower_bound(1e-3, model="zero_respecting").length == 548


def test_hidden_doors_are_not_found_by_guessing_in_many_dimensions():
    """Progress of Gaussian guesses at doors that are directions: none where dimensions are many."""
    g = torch.Generator().manual_seed(0)
    best = {}
    for dim in (6, 240):
        f = ZeroChain(6, rotation="haar", dim=dim, generator=g)
        guesses = torch.randn(4000, dim, dtype=F64, generator=g)
        guesses *= f.width * 1.5 / guesses.norm(dim=-1, keepdim=True)
        best[dim] = f.progress(guesses).max().item()
    assert best[240] == 0 < best[6]
