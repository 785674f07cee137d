r"""Parisian particle Gibbs: PaRIS around a path that is drawn anew in every sweep, so that its bias dies geometrically.

A sweep runs *conditional* PaRIS: particle N of every cloud is set to the path zeta, all else is as in PaRIS. It
yields an estimate mu and a new path, traced back from a particle drawn by the last weights through J_1, the first
backward draw of each particle. The paths are a Markov chain that leaves the smoothing law as it is, for every N >= 2;
and if zeta has that law, the expectation of mu is exact. So what is wrong with sweep k is how far the chain still is
from its law, and that falls like a power of k:

    zeta[k+1], mu_k = sweep(zeta[k])                                                    (1)
    Pi_(k0, k) = 1 / (k - k0)  sum_{l = k0 + 1 .. k} mu_l                               (2)

==============  ======================  ============================================
paper           here                    range, default
==============  ======================  ============================================
N, M            ``n_particles``,        >= 2; N above the length of the series makes
                ``n_backward``          sweeps forget fast; M = 2
k, k0           ``n_sweeps``,           0 <= k0 < k; k0 = half of k
                ``burn_in``
zeta            ``path``                one unconditional pass draws the first
==============  ======================  ============================================

Differs from the paper: any number of chains run as one batch, and give a standard error; J_1 is the ancestor, see
`planish.statespace.online`. When to use: where a bias would add up - averages over many series, gradients, long chains.
At one small budget its mean squared error may be above that of PaRIS: less bias, more variance.

Reference:
    Cardoso et al., State and parameter learning with PaRIS particle Gibbs, 2023. https://arxiv.org/abs/2301.00900
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from planish._support import bad, require
from planish.statespace.backward import Kind
from planish.statespace.draws import Ladder
from planish.statespace.models import StateSpaceModel
from planish.statespace.online import Additive, Means, Paris, Terms
from planish.statespace.particles import check_count, check_series


@dataclass(frozen=True)
class Sweep:
    """One pass over the data and what a new path or a gradient needs of it; clouds in front.

    Attributes:
        mean: mu, (clouds, p).
        path: The new path, (clouds, n_steps, d).
        loglik: Estimates of log p(y), (clouds,); biased if the sweep was conditional.
        states: Particles at each time, (clouds, N, d) each.
        indices: Backward draws from t = 1 on, (clouds, N, M) each.
        weights: The last weights, (clouds, N).
    """

    mean: Tensor
    path: Tensor
    loglik: Tensor
    states: list[Tensor]
    indices: list[Tensor]
    weights: Tensor

    def shares(self) -> list[Tensor]:
        """Return how much each particle counts in the smoothed estimate, at each time: (clouds, N), sum 1."""
        found = [self.weights]
        for indices in reversed(self.indices):
            per_draw = (found[-1] / indices.shape[-1])[..., None].expand(indices.shape)
            spread = torch.zeros_like(found[-1]).scatter_add_(1, indices.flatten(1).long(), per_draw.flatten(1))
            found.append(spread)
        return found[::-1]


def sweep(smoother: Paris, series: Tensor, path: Tensor | None) -> Sweep:
    """Run a fresh smoother over the series, conditionally on a path if there is one, and draw the next path."""
    states, indices = [], []
    for t in range(series.shape[1]):
        smoother.update(series[:, t], frozen=None if path is None else path[:, t])
        states.append(smoother.cloud.x)
        if smoother.indices is not None:
            indices.append(smoother.indices.int())
    weights = smoother.cloud.weights
    rows = torch.arange(len(weights), device=weights.device)
    last = Ladder(weights).draw_each(1, smoother.generator)[:, 0] - rows * weights.shape[1]
    traced = [states[-1][rows, last]]
    for t in range(len(states) - 2, -1, -1):
        last = indices[t][rows, last, 0].long()
        traced.append(states[t][rows, last])
    mean = (weights[..., None] * smoother.beta).sum(1)
    return Sweep(mean, torch.stack(traced[::-1], 1), smoother.loglik, states, indices, weights)


@dataclass(frozen=True)
class GibbsResult:
    """What the sweeps say; `series` axes are there if the data had one.

    Attributes:
        mean: The roll-out estimate, over kept sweeps and chains; a dict if functionals came by name.
        stderr: Its standard error: between chains, or between blocks of sweeps if there is one chain.
        per_sweep: Estimates of every sweep, (n_sweeps, n_chains, *series, ...).
        path: The last paths, (n_chains, *series, n_steps, d): where to go on, and draws of the smoothing law.
        loglik: log p(y) by the unconditional first pass, (n_chains, *series); NaN if a path was given.
        renewal: How often a sweep changed the path, at each time, (n_steps,); below 1/2 take more particles.
        state_mean: Smoothed means of the states, (*series, n_steps, d).
        state_std: Smoothed standard deviations of the states, as `state_mean`.
        burn_in: Sweeps left out of `mean`.

    Example:
        >>> from planish.statespace import LinearGaussian
        >>> total = lambda t, before, x: x[..., 0]
        >>> y = torch.ones(10, 1)
        >>> result: GibbsResult = parisian_gibbs(LinearGaussian(0.9, 0.25), y, 20, 4, additive=total, n_chains=3)
        >>> result.per_sweep.shape, result.path.shape
        (torch.Size([4, 3]), torch.Size([3, 10, 1]))
    """

    mean: Means
    stderr: Means
    per_sweep: Means
    path: Tensor
    loglik: Tensor
    renewal: Tensor
    state_mean: Tensor
    state_std: Tensor
    burn_in: int

    def plot(self, name: str | None = None, truth: float | None = None) -> Any:  # noqa: ANN401  (a Figure)
        """Draw the estimates by sweep, and how often the path is renewed by time.

        Args:
            name: Which functional, if several came by name.
            truth: The right value, if it is known.

        Returns:
            A matplotlib Figure.

        Raises:
            ValueError: The functional has several components or belongs to several series.
            MissingExtra: matplotlib is not installed.
        """
        values = self.per_sweep[name] if isinstance(self.per_sweep, dict) and name else self.per_sweep
        if isinstance(values, dict) or values.ndim != 2:
            raise bad("GibbsResult.plot", "name", "that of one number for one series", name)
        plt: Any = require("matplotlib.pyplot", "plot", "GibbsResult.plot")
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        sweeps = range(1, len(values) + 1)
        middle, spread = values.mean(1), values.std(1) if values.shape[1] > 1 else torch.zeros(len(values))
        half = 2 * spread / values.shape[1] ** 0.5
        if self.burn_in:
            left.axvspan(0.5, self.burn_in + 0.5, color="#eeeeee", label="burn-in")
        left.errorbar(sweeps, middle, half, fmt="o", ms=3, color="#2a6f97", label="mean of chains, 2 s.e.")
        kept = float(values[self.burn_in :].mean())
        left.plot([self.burn_in + 0.5, len(values) + 0.5], [kept, kept], color="#2a6f97", lw=1, label="roll-out mean")
        if truth is not None:
            left.axhline(truth, color="#c1541f", ls="--", lw=1, label="exact")
        left.set(xlabel="sweep", ylabel="estimate", xlim=(0.5, len(values) + 0.5))
        left.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, columnspacing=1)
        right.plot(self.renewal.cpu(), color="#2a6f97")
        right.set(xlabel="time", ylabel="share of sweeps that renew the path", ylim=(0, 1.02))
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
        return figure


class ParisianGibbs:
    """Run sweeps of conditional PaRIS one by one, and carry the paths: for loops of your own.

    Args:
        model: The model; its parameters may change between sweeps.
        y: Observations (n_steps, dy), or several series in front; rows of NaN where missing.
        n_particles: N, >= 2.
        n_backward: M, >= 1. Default 2.
        additive: See `Paris`.
        n_chains: Independent chains for each series, >= 1, run as one batch. Default 1.
        path: Where to start, (n_chains, *series, n_steps, d), as `path` of a result; None to draw by a first pass.
        backward: See `Paris`.
        max_trials: See `Paris`.
        mcmc_steps: See `Paris`.
        reuse_ancestors: See `Paris`.
        generator: See `Paris`.

    Attributes:
        path: The paths now, (clouds, n_steps, d), chains before series; None before the first pass.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from planish.statespace import LinearGaussian
        >>> total = lambda t, before, x: x[..., 0]
        >>> gibbs = ParisianGibbs(LinearGaussian(0.9, 0.25), torch.ones(10, 1), 20, additive=total, n_chains=3)
        >>> first, second = gibbs.sweep(), gibbs.sweep()
        >>> second.mean.shape, gibbs.path.shape
        (torch.Size([3, 1]), torch.Size([3, 10, 1]))
    """

    def __init__(
        self,
        model: StateSpaceModel,
        y: Float[Tensor, "..."],
        n_particles: int,
        n_backward: int = 2,
        *,
        additive: Additive,
        n_chains: int = 1,
        path: Num[Tensor, "..."] | None = None,
        backward: Kind = "hybrid",
        max_trials: int | None = None,
        mcmc_steps: int = 2,
        reuse_ancestors: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        check_count("ParisianGibbs", "n_chains", n_chains, 1)
        series, self.single = check_series("ParisianGibbs", y)
        self.chains, self.batch = n_chains, len(series)
        self.series = series.repeat(n_chains, 1, 1)
        self.path = None if path is None else self._given(path)

        def fresh() -> Paris:
            return Paris(
                model, n_particles, n_backward, additive=additive, backward=backward, max_trials=max_trials,
                mcmc_steps=mcmc_steps, reuse_ancestors=reuse_ancestors, generator=generator,
            )  # fmt: skip

        self.fresh: Callable[[], Paris] = fresh
        self.terms: Terms = fresh().terms

    def _given(self, path: Tensor) -> Tensor:
        front = (self.chains,) if self.single else (self.chains, self.batch)
        if path.ndim != len(front) + 2 or path.shape[:-1] != (*front, self.series.shape[1]):
            allowed = f"of shape ({', '.join(map(str, front))}, {self.series.shape[1]}, d)"
            raise bad("ParisianGibbs", "path", allowed, tuple(path.shape))
        return path.reshape(-1, *path.shape[-2:])

    def sweep(self) -> Sweep:
        """Run one sweep, or the unconditional first pass if there is no path yet, and move the paths."""
        smoother = self.fresh()
        done = sweep(smoother, self.series, self.path)
        self.path, self.terms = done.path, smoother.terms
        return done

    def split(self, values: Tensor) -> Tensor:
        """Give (clouds, ...) back as (n_chains, *series, ...)."""
        front = (self.chains,) if self.single else (self.chains, self.batch)
        return values.reshape(*front, *values.shape[1:])


def check_rollout(where: str, n_sweeps: int, burn_in: int | None) -> int:
    """Return the sweeps to leave out, half of all by default."""
    check_count(where, "n_sweeps", n_sweeps, 1)
    if burn_in is None:
        return n_sweeps // 2
    check_count(where, "burn_in", burn_in, 0)
    if burn_in >= n_sweeps:
        raise bad(where, "burn_in", f"below n_sweeps = {n_sweeps}", burn_in)
    return burn_in


@torch.no_grad()
def parisian_gibbs(
    model: StateSpaceModel,
    y: Float[Tensor, "..."],
    n_particles: int,
    n_sweeps: int,
    burn_in: int | None = None,
    *,
    additive: Additive,
    n_chains: int = 1,
    n_backward: int = 2,
    path: Num[Tensor, "..."] | None = None,
    backward: Kind = "hybrid",
    max_trials: int | None = None,
    mcmc_steps: int = 2,
    reuse_ancestors: bool = True,
    progress: Callable[[int], None] | None = None,
    generator: torch.Generator | None = None,
) -> GibbsResult:
    """Smooth an additive functional of whole series with a bias that shrinks geometrically in the sweeps.

    Args:
        model: The model.
        y: Observations (n_steps, dy), or several series in front; rows of NaN where missing.
        n_particles: N, >= 2; below the length of the series the paths forget slowly.
        n_sweeps: k, >= 1, after the unconditional first pass.
        burn_in: k0 < k, sweeps left out of the mean. Default half of k.
        additive: See `Paris`.
        n_chains: See `ParisianGibbs`. Default 1.
        n_backward: M, >= 1. Default 2.
        path: See `ParisianGibbs`.
        backward: See `Paris`.
        max_trials: See `Paris`.
        mcmc_steps: See `Paris`.
        reuse_ancestors: See `Paris`.
        progress: Called with the number of sweeps done.
        generator: See `Paris`.

    Raises:
        ValueError: An argument is out of range, all weights vanish, or the transition has no density.
        NotConverged: Plain rejection finds nothing.

    Example:
        >>> from planish.statespace import LinearGaussian, kalman
        >>> model, y = LinearGaussian(0.9, 0.25), torch.ones(20, 1)
        >>> total = lambda t, before, x: x[..., 0]
        >>> g = torch.Generator().manual_seed(0)
        >>> found = parisian_gibbs(model, y, 30, 10, additive=total, n_chains=20, generator=g)
        >>> bool((found.mean - kalman(model, y).mean.sum()).abs() < 4 * found.stderr)
        True
    """
    left_out = check_rollout("parisian_gibbs", n_sweeps, burn_in)
    gibbs = ParisianGibbs(
        model, y, n_particles, n_backward, additive=additive, n_chains=n_chains, path=path, backward=backward,
        max_trials=max_trials, mcmc_steps=mcmc_steps, reuse_ancestors=reuse_ancestors, generator=generator,
    )  # fmt: skip
    loglik = gibbs.sweep().loglik if path is None else gibbs.series.new_full((len(gibbs.series),), float("nan"))
    estimates, changed = [], gibbs.series.new_zeros(gibbs.series.shape[1])
    sums: list[Tensor] = []
    for k in range(n_sweeps):
        old = gibbs.path
        done = gibbs.sweep()
        assert old is not None  # a first pass was run, or a path given  # noqa: S101
        estimates.append(done.mean)
        changed += (done.path != old).any(-1).to(changed).mean(0)
        if k >= left_out:
            moments = _moments(done)
            sums = [a + b for a, b in zip(sums, moments, strict=True)] if sums else moments
        if progress is not None:
            progress(k + 1)
    per_sweep = torch.stack([gibbs.split(mean) for mean in estimates])
    kept = per_sweep[left_out:]
    first, second = (gibbs.split(part).mean(0) / len(kept) for part in sums)
    unpack = gibbs.terms.unpack
    return GibbsResult(
        mean=unpack(kept.mean((0, 1))), stderr=unpack(_stderr(kept)), per_sweep=unpack(per_sweep),
        path=gibbs.split(done.path), loglik=gibbs.split(loglik), renewal=changed / n_sweeps, state_mean=first,
        state_std=(second - first.square()).clamp_min(0).sqrt(), burn_in=left_out,
    )  # fmt: skip


def _moments(done: Sweep) -> list[Tensor]:
    """Return smoothed first and second moments of the states, (clouds, n_steps, d) each."""
    pairs = list(zip(done.shares(), done.states, strict=True))
    return [torch.stack([(c[..., None] * x**power).sum(1) for c, x in pairs], 1) for power in (1, 2)]


def _stderr(kept: Tensor) -> Tensor:
    """Return the standard error of the mean over sweeps and chains, the first two axes."""
    sweeps, chains = kept.shape[:2]
    if chains > 1:
        between: Tensor = kept.mean(0).std(0) / chains**0.5
        return between
    blocks = int(sweeps**0.5)
    if blocks < 2:
        return torch.full_like(kept[0, 0], float("nan"))
    size = sweeps // blocks
    means = kept[:, 0][-blocks * size :].reshape(blocks, size, *kept.shape[2:]).mean(1)
    between_blocks: Tensor = means.std(0) / blocks**0.5
    return between_blocks
