"""Particle filters: clouds of weighted states, carried through time, any number of them at once."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from planish._support import bad
from planish.statespace.draws import Ladder, draw, uniform
from planish.statespace.models import StateSpaceModel

Resampling = Literal["multinomial", "stratified", "systematic"]


def check_series(where: str, y: Tensor) -> tuple[Tensor, bool]:
    """Return observations as (series, n_steps, dy), and whether there was one series without that axis."""
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim not in (1, 2, 3) or y.numel() == 0:
        got = tuple(y.shape) if isinstance(y, Tensor) else y
        raise bad(where, "y", "a float tensor (n_steps, dy) or (series, n_steps, dy), not empty", got)
    if y.isinf().any():
        raise bad(where, "y", "finite, or NaN where missing", "inf")
    gaps = y.reshape(*y.shape, 1) if y.ndim == 1 else y
    missing = gaps.isnan()
    if (missing.any(-1) & ~missing.all(-1)).any():
        raise bad(where, "y", "missing in whole rows", "a row with both numbers and NaN")
    return (gaps, False) if gaps.ndim == 3 else (gaps[None], True)


def log_observation(model: StateSpaceModel, t: int, x: Tensor, y: Tensor) -> Tensor:
    """Return log g_t(x) of y with an axis for particles, 0 for those series whose row is missing."""
    seen = ~y.isnan().any(-1)
    whole = bool(seen.all())
    if not whole and not seen.any():
        return y.new_zeros(torch.broadcast_shapes(x.shape[:-1], y.shape[:-1]))
    if not whole:  # in place of what is missing, something inside the law's support
        y = torch.where(seen[..., None], y, y[seen][0])
    log_g = model.observation(t, x).log_prob(y)
    return log_g if whole else torch.where(seen, log_g, 0)


@dataclass(frozen=True)
class Cloud:
    """Weighted particles at one time, one cloud a row.

    Attributes:
        t: The time.
        x: States, (clouds, particles, d).
        log_weights: (clouds, particles), not normalised.
        log_sums: Logarithm of the mean weight, (clouds,): how likely y_t was.
        ancestors: Where each particle came from, (clouds, particles); None at t = 0.
        exact: Whether ancestors are draws from the backward kernel: states were proposed by the transition itself.
    """

    t: int
    x: Tensor
    log_weights: Tensor
    log_sums: Tensor
    ancestors: Tensor | None
    exact: bool

    @property
    def weights(self) -> Tensor:
        """Normalised weights."""
        return self.log_weights.softmax(-1)

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each cloud."""
        return 1 / self.weights.square().sum(-1)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Return values[b, index[b, ...]]: rows of each cloud by their number in it."""
    rows = torch.arange(len(values), device=values.device).reshape([-1] + [1] * (index.ndim - 1))
    return values[rows, index]


def _weighted(
    where: str, model: StateSpaceModel, t: int, x: Tensor, y: Tensor, own: Distribution, guide: Distribution | None,
    ancestors: Tensor | None,
) -> Cloud:  # fmt: skip
    log_weights = log_observation(model, t, x, y)
    if guide is not None:
        log_weights = log_weights + own.log_prob(x) - guide.log_prob(x)
    log_sums = log_weights.logsumexp(-1) - math.log(x.shape[1])
    if not log_sums.isfinite().all():
        what = "all 0" if (log_sums == -math.inf).any() else "not finite"
        raise ValueError(
            f"{where}: the weights of a cloud are {what} at t = {t}; take more particles, a `proposal`, "
            "or look for an observation that the model excludes."
        )
    exact = guide is None and ancestors is not None
    return Cloud(t, x, log_weights.expand(x.shape[:2]), log_sums, ancestors, exact)


def _freeze(x: Tensor, frozen: Tensor | None) -> Tensor:
    return x if frozen is None else torch.cat([x[:, :-1], frozen[:, None].to(x.dtype)], 1)


def begin(
    where: str, model: StateSpaceModel, y: Float[Tensor, "clouds dy"], n: int, frozen: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Cloud:  # fmt: skip
    """Draw and weight the first clouds, one for each row of y; the last particle of each is `frozen`, if given."""
    own = model.initial()
    guide = model.proposal(0, None, y[:, None])
    law = own if guide is None else guide
    x = _freeze(draw(law.expand((len(y), n)), (), generator), frozen)
    return _weighted(where, model, 0, x, y[:, None], own, guide, None)


def advance(
    where: str, model: StateSpaceModel, cloud: Cloud, y: Float[Tensor, "clouds dy"], frozen: Tensor | None = None,
    generator: torch.Generator | None = None, resampling: Resampling = "multinomial",
) -> Cloud:  # fmt: skip
    """Resample, move, and weight by the next observation; the last particle of each cloud is `frozen`, if given."""
    t, (batch, n) = cloud.t + 1, cloud.log_weights.shape
    u = None
    if resampling != "multinomial":
        jitter = uniform((batch, n if resampling == "stratified" else 1), y, generator)
        u = (torch.arange(n, device=y.device) + jitter) / n
    ladder = Ladder(cloud.weights)
    ancestors = ladder.draw_each(n, generator, u)
    if frozen is not None:
        ancestors[:, -1] = ladder.offset[:, 0] * n + n - 1  # a frozen path descends from itself
    before = cloud.x.flatten(0, 1)[ancestors]
    own = model.transition(t, before)
    guide = model.proposal(t, before, y[:, None])
    x = _freeze(draw(own if guide is None else guide, (), generator), frozen)
    return _weighted(where, model, t, x, y[:, None], own, guide, ancestors - ladder.offset * n)


@dataclass(frozen=True)
class FilterResult:
    """What a particle filter says; a leading axis for several series.

    Attributes:
        loglik: Estimate of log p(y); its exponential is unbiased.
        mean: Estimates of E[X_t | y_{0:t}], (n_steps, d).
        ess: Effective sample size at each time, (n_steps,).

    Example:
        >>> from planish.statespace import LinearGaussian
        >>> seen: FilterResult = particle_filter(LinearGaussian(0.5, 1.0), torch.zeros(3, 1), 50)
        >>> seen.mean.shape, bool((seen.ess > 1).all())
        (torch.Size([3, 1]), True)
    """

    loglik: Tensor
    mean: Tensor
    ess: Tensor


@torch.no_grad()
def particle_filter(
    model: StateSpaceModel,
    y: Float[Tensor, "..."],
    n_particles: int = 100,
    *,
    resampling: Resampling = "multinomial",
    generator: torch.Generator | None = None,
) -> FilterResult:
    """Filter by particles: bootstrap, or guided where the model has a `proposal`; resampled at every step.

    Args:
        model: The model.
        y: Observations (n_steps, dy), or several series in front; rows of NaN where missing.
        n_particles: N, >= 2. Default 100.
        resampling: "multinomial", "stratified" or "systematic". Default "multinomial".
        generator: Source of randomness; None for torch's own.

    Raises:
        ValueError: An argument is out of range, or all weights vanish.

    Example:
        >>> from planish.statespace import LinearGaussian, kalman
        >>> model, y = LinearGaussian(0.9, 0.25), torch.ones(20, 1)
        >>> seen = particle_filter(model, y, 2000, generator=torch.Generator().manual_seed(0))
        >>> bool((seen.loglik - kalman(model, y).loglik).abs() < 0.2)
        True
    """
    check_count("particle_filter", "n_particles", n_particles, 2)
    if resampling not in get_args(Resampling):
        raise bad("particle_filter", "resampling", f"one of {', '.join(get_args(Resampling))}", resampling)
    series, single = check_series("particle_filter", y)
    cloud = begin("particle_filter", model, series[:, 0], n_particles, None, generator)
    means, sizes, loglik = [], [], cloud.log_sums
    for t in range(series.shape[1]):
        if t:
            cloud = advance("particle_filter", model, cloud, series[:, t], None, generator, resampling)
            loglik = loglik + cloud.log_sums
        means.append((cloud.weights[..., None] * cloud.x).sum(1))
        sizes.append(cloud.ess)
    parts = (loglik, torch.stack(means, 1), torch.stack(sizes, 1))
    return FilterResult(*(part[0] for part in parts) if single else parts)


def check_count(where: str, name: str, value: object, least: int) -> None:
    """Refuse what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise bad(where, name, f"an int >= {least}", value)
