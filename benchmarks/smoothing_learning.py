"""Learning by PPG with warm paths, by PaRIS, and by the path alone, at the same cost, on three models.

Every step takes one pass of 80 particles and one step of Adam. The distance is that of the parameters, as they are
kept (logarithms, artanh), to those that made the data; the exact maximum lies elsewhere, so it does not go to 0. Every
piece is kept in the cache.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row
from benchmarks.smoothing import Piece, kept
from planish.statespace import (
    ChaoticRNN,
    LinearGaussian,
    StateSpaceModel,
    StochasticVolatility,
    fit_mle,
    kalman,
    simulate,
)


def _learners() -> dict[str, tuple[StateSpaceModel, StateSpaceModel, Tensor]]:
    """Return the truth, the start, and the series, for each model."""
    random = torch.Generator().manual_seed(0)

    def line(a: float, q: float) -> LinearGaussian:
        model = LinearGaussian(a, q).double()
        model.observation_matrix.requires_grad_(False)
        return model

    truth, start = line(0.9, 0.3), line(0.5, 1.0)
    found: dict[str, tuple[StateSpaceModel, StateSpaceModel, Tensor]] = {}
    found["autoregression in noise"] = (truth, start, simulate(truth, 40, generator=random)[1])
    volatile, calm = StochasticVolatility(-1.0, 0.95, 0.3).double(), StochasticVolatility(0.0, 0.5, 0.6).double()
    found["stochastic volatility"] = (volatile, calm, simulate(volatile, 40, generator=random)[1])
    net = ChaoticRNN.random(5, noise=0.1, generator=random).double()
    other = ChaoticRNN.random(5, noise=0.3, generator=random).double()
    with torch.no_grad():
        other.weights.copy_(net.weights)
    for model in (net, other):
        model.weights.requires_grad_(False)  # what 40 steps tell of the connections is little: the noise is learned
    found["chaotic network, d = 5: its noise"] = (net, other, simulate(net, 40, generator=random)[1])
    return found


def _learn(name: str, estimator: str, steps: int, seed: int) -> Piece:
    truth, start, y = _learners()[name]
    optimizer = torch.optim.Adam([p for p in start.parameters() if p.requires_grad], lr=0.2)
    found = fit_mle(
        start, y, optimizer=optimizer, n_steps=steps, n_particles=80, sweeps_per_step=1, burn_in=0,
        estimator=estimator, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    goal = torch.cat([p.detach().flatten() for p in truth.parameters() if p.requires_grad])
    piece = {"distance": (found.parameters - goal).norm(dim=1).tolist()}
    if isinstance(start, LinearGaussian):
        piece["loglik"] = [float(kalman(start, y).loglik.detach())]
    return piece


def rows(quick: bool, *, fresh: bool = False, **_: object) -> Iterator[Row]:
    """Yield distances by step.

    Args:
        quick: Few steps.
        fresh: Compute again what the cache holds.
        **_: What other benchmarks are asked beside this.
    """
    steps = 4 if quick else 32
    marks = sorted({0, steps // 8, steps // 4, steps // 2, steps})
    for name in _learners():
        for estimator, said in (("ppg", "PPG, warm"), ("paris", "PaRIS"), ("path", "path only (score climbing)")):
            file = f"learn-{name.split()[0]}-{estimator}"
            piece = kept(file, lambda a=(name, estimator, steps, 0): _learn(*a), quick=quick, fresh=fresh)
            case = f"learning, {name}: distance of the iterates to what made the data"
            for mark in marks:
                yield Row(case, said, f"step {mark}", piece["distance"][mark], "")
            tail = piece["distance"][-max(1, steps // 4) :]
            yield Row(case, said, "mean of the last quarter", float(np.mean(tail)), "")
            if "loglik" in piece:
                yield Row(case, said, "log-likelihood at the end, exact", piece["loglik"][0], "nats")
