"""Volatility that nobody sees: smooth it from returns, learn its parameters, and say how sure that is."""

import torch

from planish.statespace import StochasticVolatility, fit_mle, parisian_gibbs, simulate

generator = torch.Generator().manual_seed(0)
truth = StochasticVolatility(mu=-1.0, rho=0.9, sigma=0.5).double()
x, y = simulate(truth, 80, generator=generator)  # y are returns; x, the log-volatility, is hidden
y[40:50] = float("nan")  # two weeks without data


def total(t: int, before: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x[..., 0]


def report(name: str, model: StochasticVolatility) -> None:
    result = parisian_gibbs(model, y, 50, 8, additive=total, n_chains=8, generator=generator)
    error = (result.state_mean - x).square().mean().sqrt()
    print(f"by {name}: sum {result.mean:.1f} +- {result.stderr:.1f}, states off by {error:.2f}")
    result.plot().savefig("sweeps.svg")


report("the model that made the data", truth)
model = StochasticVolatility(mu=0.5, rho=0.5, sigma=1.0).double()
report("a wrong one", model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
fit_mle(model, y, optimizer=optimizer, n_steps=25, n_particles=40, sweeps_per_step=1, burn_in=0, generator=generator)
rho, sigma = model.atanh_rho.tanh().item(), model.log_sigma.exp().item()
print(f"learned: mu {model.mu.item():.2f}, rho {rho:.2f}, sigma {sigma:.2f}")
report("the learned one", model)
print("picture: sweeps.svg")
