r"""Maximum likelihood by score ascent: the gradient of log p(y) is itself a smoothed additive functional.

Fisher's identity says  grad log p(y) = E[ sum_t grad log m(x_{t-1}, x_t) + grad log g(x_t) | y ].  Particles, weights
and backward draws of a sweep are held fixed, and the complete-data log-likelihood is summed over them with the share of
each in the estimate (`Sweep.shares`); autograd then gives the PPG estimate of the score. Only a few steps of the series
are ever in the graph. Paths are carried from one parameter to the next, so the burn-in is paid once.

Differs from the paper: any optimizer of torch may take the steps; the model may end with the mean of the last iterates.

Reference:
    Cardoso et al., State and parameter learning with PaRIS particle Gibbs, 2023. https://arxiv.org/abs/2301.00900
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from planish._support import bad
from planish.statespace.backward import Kind
from planish.statespace.models import StateSpaceModel
from planish.statespace.particles import check_count, log_observation, pick
from planish.statespace.ppg import ParisianGibbs, Sweep, check_rollout

Estimator = Literal["ppg", "paris", "path"]
_ELEMENTS = 2**20  # densities in the graph at once


def _nothing(t: int, before: Tensor | None, x: Tensor) -> Tensor:
    """Smooth nothing: the sweep is wanted for its particles."""
    return torch.zeros(x.shape[:-1], device=x.device)


def _parts(model: StateSpaceModel, series: Tensor, done: Sweep, path_only: bool) -> list[Callable[[], Tensor]]:
    """Return what adds up to the smoothed complete-data log-likelihood of all clouds, a function for each time."""
    if path_only:
        shares = [torch.ones_like(done.weights[:, :1])] * series.shape[1]
        states = [done.path[:, t, None] for t in range(series.shape[1])]
        indices = [torch.zeros(len(series), 1, 1, dtype=torch.long, device=series.device)] * (series.shape[1] - 1)
    else:
        shares, states, indices = done.shares(), done.states, done.indices

    def at(t: int) -> Tensor:
        c, x = shares[t], states[t]
        log_g = log_observation(model, t, x, series[:, t, None])
        if t == 0:
            return (c * (model.initial().log_prob(x) + log_g)).sum()
        before = pick(states[t - 1], indices[t - 1].long())
        log_m = model.transition(t, before).log_prob(x[:, :, None])
        return (c * (log_m.mean(-1) + log_g)).sum()

    return [lambda t=t: at(t) for t in range(series.shape[1])]  # type: ignore[misc]


class _Ascent:
    """Sweeps, and the gradients that they give."""

    def __init__(self, gibbs: ParisianGibbs, model: StateSpaceModel, estimator: Estimator) -> None:
        self.gibbs, self.model, self.estimator = gibbs, model, estimator

    def add_gradient(self, n_sweeps: int, burn_in: int) -> float:
        """Add minus the score per series to the parameters' gradients; return the mean log-likelihood of sweeps."""
        loglik, kept = 0.0, n_sweeps - burn_in
        for k in range(n_sweeps):
            if self.estimator == "paris":
                self.gibbs.path = None
            done = self.gibbs.sweep()
            if k < burn_in:
                continue
            loglik += float(done.loglik.mean()) / kept
            series, path_only = self.gibbs.series, self.estimator == "path"
            parts = _parts(self.model, series, done, path_only)
            size = max(1, _ELEMENTS // (done.indices[0].numel() if done.indices else 1))
            with torch.enable_grad():
                for start in range(0, len(parts), size):
                    total = torch.stack([part() for part in parts[start : start + size]]).sum()
                    (-total / (kept * len(series))).backward()
        return loglik


def _gibbs(
    where: str, model: StateSpaceModel, y: Tensor, n_particles: int, estimator: Estimator, n_chains: int,
    n_backward: int, path: Tensor | None, backward: Kind, generator: torch.Generator | None,
) -> ParisianGibbs:  # fmt: skip
    if estimator not in get_args(Estimator):
        raise bad(where, "estimator", f"one of {', '.join(get_args(Estimator))}", estimator)
    if not any(p.requires_grad for p in model.parameters()):
        raise bad(where, "model", "one with parameters that want gradients", "none")
    return ParisianGibbs(
        model, y, n_particles, n_backward, additive=_nothing, n_chains=n_chains, path=path, backward=backward,
        generator=generator,
    )  # fmt: skip


@dataclass(frozen=True)
class Score:
    """An estimate of the gradient of log p(y).

    Attributes:
        gradients: By name of the parameter; the mean over several series.
        path: The last paths, to go on from.

    Example:
        >>> from planish.statespace import LinearGaussian
        >>> found: Score = estimate_score(LinearGaussian(0.5, 1.0), torch.ones(5, 1), 50, 4)
        >>> sorted(found.gradients)[-1], found.path.shape
        ('transition_matrix', torch.Size([1, 5, 1]))
    """

    gradients: dict[str, Tensor]
    path: Tensor


def estimate_score(
    model: StateSpaceModel,
    y: Float[Tensor, "..."],
    n_particles: int,
    n_sweeps: int,
    burn_in: int | None = None,
    *,
    estimator: Estimator = "ppg",
    n_chains: int = 1,
    n_backward: int = 2,
    path: Num[Tensor, "..."] | None = None,
    backward: Kind = "hybrid",
    generator: torch.Generator | None = None,
) -> Score:
    """Estimate the gradient of log p(y) in the model's parameters; their `grad` stays as it was.

    Args:
        model: The model.
        y: Observations (n_steps, dy), or several series in front; rows of NaN where missing.
        n_particles: N, >= 2.
        n_sweeps: k, >= 1.
        burn_in: k0 < k; default half of k.
        estimator: "ppg"; "paris", by unconditional passes; or "path", by the path alone (Markovian score climbing).
        n_chains: Chains for each series, >= 1. Default 1.
        n_backward: M, >= 1. Default 2.
        path: Where to start; None to draw by a first pass.
        backward: See `Paris`. Default "hybrid".
        generator: Source of randomness.

    Raises:
        ValueError: An argument is out of range, or the model has nothing to learn.

    Example:
        >>> from planish.statespace import StochasticVolatility
        >>> found = estimate_score(StochasticVolatility(mu=3.0), 0.1 * torch.ones(30, 1), 50, 4)
        >>> bool(found.gradients["mu"] < 0)
        True
    """
    left_out = check_rollout("estimate_score", n_sweeps, burn_in)
    gibbs = _gibbs(
        "estimate_score", model, y, n_particles, estimator, n_chains, n_backward, path, backward, generator
    )  # fmt: skip
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: p.grad for name, p in wanted.items()}
    try:
        for p in wanted.values():
            p.grad = None
        if path is None and estimator != "paris":
            gibbs.sweep()
        _Ascent(gibbs, model, estimator).add_gradient(n_sweeps, left_out)
        found = {name: torch.zeros_like(p) if p.grad is None else -p.grad for name, p in wanted.items()}
    finally:
        for name, p in wanted.items():
            p.grad = kept[name]
    assert gibbs.path is not None  # a sweep was run  # noqa: S101
    return Score(found, gibbs.split(gibbs.path))


@dataclass(frozen=True)
class FitResult:
    """How learning went.

    Attributes:
        parameters: All parameters as one vector after each step, (n_steps + 1, size); the start first.
        names: What the entries of the vector are: a name for each, numbered where a parameter has several.
        loglik: Mean log-likelihood of each step's sweeps, (n_steps,): noisy, and biased where sweeps are conditional.
        path: The last paths, to go on from.

    Example:
        >>> from planish.statespace import StochasticVolatility
        >>> found: FitResult = fit_mle(StochasticVolatility(), torch.ones(10, 1), n_particles=20, n_steps=3)
        >>> found.names, found.parameters.shape
        (('mu', 'atanh_rho', 'log_sigma'), torch.Size([4, 3]))
    """

    parameters: Tensor
    names: tuple[str, ...]
    loglik: Tensor
    path: Tensor


def fit_mle(
    model: StateSpaceModel,
    y: Float[Tensor, "..."],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    n_steps: int = 200,
    n_particles: int = 100,
    sweeps_per_step: int = 2,
    burn_in: int = 1,
    decay: int | float = 0.5,
    average: int | float = 0.25,
    estimator: Estimator = "ppg",
    n_chains: int = 1,
    n_backward: int = 2,
    path: Num[Tensor, "..."] | None = None,
    backward: Kind = "hybrid",
    progress: Callable[[int, float], None] | None = None,
    generator: torch.Generator | None = None,
) -> FitResult:
    """Fit a model in place by stochastic ascent of log p(y), a mean over series and observations.

    Args:
        model: The model; its parameters with `requires_grad` are learned.
        y: Observations (n_steps, dy), or several series in front; rows of NaN where missing.
        optimizer: Over the model's parameters; None for Adam with a rate of 0.1.
        n_steps: Steps of the optimizer, >= 1. Default 200.
        n_particles: N, >= 2. Default 100.
        sweeps_per_step: k, >= 1. Default 2.
        burn_in: k0 < k; small, because paths are carried on. Default 1.
        decay: The rate falls like step^-decay, in [0, 1]. Default 0.5, the paper's.
        average: Share of the last iterates whose mean the model ends with, in [0, 1]; 0 for the last one. Default 0.25.
        estimator: See `estimate_score`. Default "ppg".
        n_chains: Chains for each series, >= 1. Default 1.
        n_backward: M, >= 1. Default 2.
        path: Where to start, as `path` of a result.
        backward: See `Paris`. Default "hybrid".
        progress: Called with (steps done, mean log-likelihood of the step's sweeps).
        generator: Source of randomness.

    Raises:
        ValueError: An argument is out of range, the model has nothing to learn, or its weights vanish on the way.

    Example:
        >>> from planish.statespace import StochasticVolatility, simulate
        >>> g = torch.Generator().manual_seed(0)
        >>> _, y = simulate(StochasticVolatility(mu=1.0), 100, generator=g)
        >>> model = StochasticVolatility(mu=-1.0)
        >>> found = fit_mle(model, y, n_steps=20, n_particles=30, generator=g)
        >>> bool(model.mu > -0.5)
        True
    """
    check_count("fit_mle", "n_steps", n_steps, 1)
    check_rollout("fit_mle", sweeps_per_step, burn_in)
    for name, value in (("decay", decay), ("average", average)):
        if not 0 <= value <= 1:
            raise bad("fit_mle", name, "in [0, 1]", value)
    gibbs = _gibbs("fit_mle", model, y, n_particles, estimator, n_chains, n_backward, path, backward, generator)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(learned.values(), lr=0.1) if optimizer is None else optimizer
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + step) ** -decay)
    ascent = _Ascent(gibbs, model, estimator)
    history, values = [parameters_to_vector(learned.values()).detach().clone()], []
    if path is None and estimator != "paris":
        gibbs.sweep()
    for step in range(n_steps):
        optimizer.zero_grad()
        values.append(ascent.add_gradient(sweeps_per_step, burn_in))
        for p in learned.values():
            if p.grad is not None:
                p.grad /= gibbs.series.shape[1]
        optimizer.step()
        schedule.step()
        history.append(parameters_to_vector(learned.values()).detach().clone())
        if progress is not None:
            progress(step + 1, values[-1])
    parameters = torch.stack(history)
    if average:
        vector_to_parameters(parameters[-max(1, round(average * n_steps)) :].mean(0), learned.values())
    assert gibbs.path is not None  # a sweep was run  # noqa: S101
    names = tuple(f"{n}[{i}]" if p.numel() > 1 else n for n, p in learned.items() for i in range(p.numel()))
    return FitResult(parameters, names, torch.tensor(values), gibbs.split(gibbs.path))
