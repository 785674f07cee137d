r"""PaRIS: smoothed expectations of additive functionals while the data come in, with memory that does not grow.

Wanted is E[h_n | y_{0:n}] for h_n = h_0(x_0) + sum_t h_t(x_{t-1}, x_t). A filter alone forgets: tracing paths back
through its ancestors soon leaves one path. So each particle i carries its own estimate of the past, renewed by M draws
J from the *backward kernel* instead of by its one ancestor:

    beta_t^i = (1/M) sum_j [ beta_{t-1}^{J_j} + h_t(xi_{t-1}^{J_j}, xi_t^i) ]           (1)
    estimate = sum_i w_t^i beta_t^i / sum_i w_t^i                                       (2)

==============  ============================  ================================
paper           here                          range, default
==============  ============================  ================================
N               ``n_particles``               >= 2; 100
M               ``n_backward``                >= 2 keeps it stable; 2
h_t             ``additive(t, before, x)``    ``before`` is None at t = 0
xi, w, beta     ``Paris.cloud``, ``.beta``    (clouds, N, ...)
==============  ============================  ================================

Differs from the paper: where states are proposed by the transition itself, the ancestor of a particle *is* one draw
from the backward kernel, independent given all particles; it serves as J_1, so M = 2 costs one draw and not two.
The law of the estimate is the same; `reuse_ancestors=False` draws all M.

When to use: long or endless series, one pass. Its bias is O(1/N); `parisian_gibbs` makes it shrink geometrically.

Reference:
    Olsson and Westerborn, Efficient particle-based online smoothing in general hidden Markov models: the PaRIS
    algorithm, 2017. https://arxiv.org/abs/1412.7550
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.statespace.backward import Backward, Kind
from planish.statespace.models import StateSpaceModel
from planish.statespace.particles import Cloud, advance, begin, check_count, check_series, pick

Functional = Callable[[int, Tensor | None, Tensor], Tensor]
"""h_t(t, x_{t-1}, x_t): states with coordinates last to numbers, without that axis, or to vectors in its place."""
Additive = Functional | Mapping[str, Functional]
Means = Tensor | dict[str, Tensor]


class Terms:
    """One functional or several by name, put side by side."""

    def __init__(self, where: str, additive: Additive) -> None:
        self.where, self.named = where, isinstance(additive, Mapping)
        self.parts = dict(additive) if isinstance(additive, Mapping) else {"additive": additive}
        if not self.parts or not all(callable(part) for part in self.parts.values()):
            raise bad(where, "additive", "a function of (t, before, x), or a mapping of names to such", additive)
        self.scalar: list[bool] = []
        self.sizes: list[int] = []

    def __call__(self, t: int, before: Tensor | None, x: Tensor) -> Tensor:
        """Return the terms at time t, (..., p)."""
        shape = torch.broadcast_shapes(x.shape[:-1], x.shape[:-1] if before is None else before.shape[:-1])
        made = []
        first = not self.sizes
        for name, part in self.parts.items():
            value = part(t, before, x)
            if value.ndim not in (x.ndim - 1, x.ndim):
                allowed = f"a function that gives {tuple(shape)}, or one axis more, at t = {t}"
                raise bad(self.where, name, allowed, tuple(value.shape))
            scalar = value.ndim == x.ndim - 1
            value = value[..., None] if scalar else value
            value = value if value.is_floating_point() else value.double()
            made.append(value.expand(*shape, value.shape[-1]))
            if first:
                self.scalar.append(scalar)
        if first:
            self.sizes = [part.shape[-1] for part in made]
        elif [part.shape[-1] for part in made] != self.sizes:
            raise bad(self.where, "additive", f"of the same size at all times, {self.sizes}", f"another at t = {t}")
        return torch.cat(made, -1) if len(made) > 1 else made[0]

    def unpack(self, values: Tensor) -> Means:
        """Give the numbers (..., p) back under their names and in their shapes."""
        parts = [
            part[..., 0] if scalar else part
            for part, scalar in zip(values.split(self.sizes, -1), self.scalar, strict=True)
        ]
        return dict(zip(self.parts, parts, strict=True)) if self.named else parts[0]


@dataclass(frozen=True)
class SmoothingResult:
    """What one pass says; a leading axis for several series.

    Attributes:
        mean: Estimate of the functional's smoothed expectation; a dict if functionals came by name.
        loglik: Estimate of log p(y).
        ess: Effective sample size at each time, (n_steps,).
        trials: Transition densities evaluated for a backward draw, on average.

    Example:
        >>> from planish.statespace import LinearGaussian
        >>> total = lambda t, before, x: x[..., 0]
        >>> result: SmoothingResult = paris(LinearGaussian(0.5, 1.0), torch.ones(5, 1), additive=total)
        >>> result.mean.shape, result.ess.shape
        (torch.Size([]), torch.Size([5]))
    """

    mean: Means
    loglik: Tensor
    ess: Tensor
    trials: float


class Paris:
    """Smooth additive functionals while observations come in: `update` takes the next one.

    Memory does not grow with time. Several series at once are so many clouds.

    Args:
        model: The model.
        n_particles: N, >= 2. Default 100.
        n_backward: M, >= 1; 2 or more keep the error stable in time. Default 2.
        additive: h_t(t, before, x) with `before` None at t = 0: states (..., d) to (...) or (..., p); or several such
            by name.
        backward: How backward indices are drawn: "hybrid", "exact", "rejection" or "mcmc". Default "hybrid".
        max_trials: Of hybrid rejection, >= 1; None for N. Default None.
        mcmc_steps: Metropolis steps of a draw by "mcmc", >= 1. Default 2.
        reuse_ancestors: Take the ancestor as first backward draw where it is one. Default True.
        generator: Source of randomness; None for torch's own.

    Attributes:
        cloud: Particles and weights now.
        beta: What each particle estimates, (clouds, N, p).
        indices: Backward draws of the last step, (clouds, N, M); None at t = 0.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from planish.statespace import LinearGaussian
        >>> smoother = Paris(LinearGaussian(0.9, 0.25), additive=lambda t, before, x: x[..., 0])
        >>> for value in (1.0, 0.5, float("nan"), 2.0):
        ...     smoother.update(torch.tensor([value]))
        >>> smoother.mean.shape, smoother.cloud.t
        (torch.Size([]), 3)
    """

    def __init__(
        self,
        model: StateSpaceModel,
        n_particles: int = 100,
        n_backward: int = 2,
        *,
        additive: Additive,
        backward: Kind = "hybrid",
        max_trials: int | None = None,
        mcmc_steps: int = 2,
        reuse_ancestors: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        check_count("Paris", "n_particles", n_particles, 2)
        check_count("Paris", "n_backward", n_backward, 1)
        self.backward = Backward(backward, max_trials, mcmc_steps)
        self.backward.check("Paris")
        self.model, self.n, self.m, self.generator = model, n_particles, n_backward, generator
        self.terms, self.reuse = Terms("Paris", additive), reuse_ancestors
        self._cloud: Cloud | None = None
        self.indices: Tensor | None = None
        self.beta = self._loglik = torch.empty(0)
        self._single, self._draws, self._evaluated = False, 0, 0

    @property
    def cloud(self) -> Cloud:
        """Particles and weights now."""
        if self._cloud is None:
            raise ValueError("Paris: nothing has been observed yet; call `update` first.")
        return self._cloud

    @torch.no_grad()
    def update(self, y_t: Float[Tensor, "..."], *, frozen: Tensor | None = None) -> None:
        """Take the next observation.

        Args:
            y_t: (dy,), or (series, dy) each time; NaN where missing.
            frozen: State (series, d) that the last particle of each cloud is set to: conditional PaRIS. Give a state
                of the path at every step, or at none.

        Raises:
            ValueError: Shapes changed, all weights vanish, or the transition has no density.
        """
        if y_t.ndim not in (1, 2):
            raise bad("Paris.update", "y_t", "of shape (dy,) or (series, dy)", tuple(y_t.shape))
        single = y_t.ndim == 1
        y, _ = check_series("Paris.update", y_t[None, None] if single else y_t[:, None])
        y = y[:, 0]
        if self._cloud is None:
            self._single = single
            self._cloud = begin("Paris", self.model, y, self.n, frozen, self.generator)
            self.beta = self.terms(0, None, self._cloud.x)
            self._loglik = self._cloud.log_sums
            return
        before = self._cloud
        if single != self._single or len(y) != len(before.x):
            raise bad("Paris.update", "y_t", f"of {len(before.x)} series as before", tuple(y_t.shape))
        after = advance("Paris", self.model, before, y, frozen, self.generator)
        indices = self._backward(before, after, frozen is not None)
        terms = self.terms(after.t, pick(before.x, indices), after.x[:, :, None])
        self.beta = (pick(self.beta, indices) + terms).mean(2)  # eq. (1)
        self._cloud, self.indices, self._loglik = after, indices, self._loglik + after.log_sums

    def _backward(self, before: Cloud, after: Cloud, conditional: bool) -> Tensor:
        indices = torch.empty(*after.log_weights.shape, self.m, dtype=torch.long, device=after.x.device)
        wanted = torch.ones_like(indices, dtype=torch.bool)
        if self.reuse and after.exact:
            assert after.ancestors is not None  # a cloud that has moved  # noqa: S101
            indices[..., 0] = after.ancestors
            wanted[..., 0] = False
        if conditional:  # the frozen particle was put there: it has no ancestor to start from or to reuse
            wanted[:, -1] = False
        made = self.backward.draw("Paris", self.model, before, after, wanted, indices, self.generator)
        self._draws += int(wanted.sum())
        self._evaluated += made
        if conditional:
            alone = torch.zeros_like(wanted)
            alone[:, -1] = True
            Backward("exact").draw("Paris", self.model, before, after, alone, indices, self.generator)
        return indices

    @property
    def mean(self) -> Means:
        """Estimate of the functional's expectation given all observations so far."""
        values = (self.cloud.weights[..., None] * self.beta).sum(1)  # eq. (2)
        return self.terms.unpack(values[0] if self._single else values)

    @property
    def loglik(self) -> Tensor:
        """Estimate of the log-likelihood of all observations so far."""
        return self._loglik[0] if self._single else self._loglik

    @property
    def trials(self) -> float:
        """Transition densities evaluated for a backward draw so far, on average; 0 if there was none."""
        return self._evaluated / max(1, self._draws)


def paris(
    model: StateSpaceModel,
    y: Float[Tensor, "..."],
    n_particles: int = 100,
    n_backward: int = 2,
    *,
    additive: Additive,
    backward: Kind = "hybrid",
    max_trials: int | None = None,
    mcmc_steps: int = 2,
    reuse_ancestors: bool = True,
    generator: torch.Generator | None = None,
) -> SmoothingResult:
    """Smooth an additive functional of a whole series in one pass; linear in particles and in time.

    Args:
        model: The model.
        y: Observations (n_steps, dy), or several series in front; rows of NaN where missing.
        n_particles: See `Paris`.
        n_backward: See `Paris`.
        additive: See `Paris`.
        backward: See `Paris`.
        max_trials: See `Paris`.
        mcmc_steps: See `Paris`.
        reuse_ancestors: See `Paris`.
        generator: See `Paris`.

    Raises:
        ValueError: An argument is out of range, all weights vanish, or the transition has no density.
        NotConverged: Plain rejection finds nothing.

    Example:
        >>> from planish.statespace import LinearGaussian, kalman
        >>> model, y = LinearGaussian(0.9, 0.25), torch.ones(20, 1)
        >>> total = lambda t, before, x: x[..., 0]
        >>> found = paris(model, y, 1000, additive=total, generator=torch.Generator().manual_seed(0))
        >>> bool((found.mean - kalman(model, y).mean.sum()).abs() < 0.5)
        True
    """
    series, single = check_series("paris", y)
    smoother = Paris(
        model, n_particles, n_backward, additive=additive, backward=backward, max_trials=max_trials,
        mcmc_steps=mcmc_steps, reuse_ancestors=reuse_ancestors, generator=generator,
    )  # fmt: skip
    sizes = []
    for t in range(series.shape[1]):
        smoother.update(series[0, t] if single else series[:, t])
        sizes.append(smoother.cloud.ess)
    ess = torch.stack(sizes, 1)
    return SmoothingResult(smoother.mean, smoother.loglik, ess[0] if single else ess, smoother.trials)


@torch.no_grad()
def ffbs(
    model: StateSpaceModel,
    y: Float[Tensor, "..."],
    n_particles: int = 100,
    *,
    additive: Additive,
    generator: torch.Generator | None = None,
) -> SmoothingResult:
    """Smooth with the whole backward kernel instead of draws from it (FFBSm, forward only): quadratic in particles.

    It is what PaRIS tends to as M grows; for small clouds, and to compare with.

    Args:
        model: The model.
        y: Observations (n_steps, dy), or several series in front; rows of NaN where missing.
        n_particles: N, >= 2. Default 100.
        additive: See `Paris`.
        generator: Source of randomness; None for torch's own.

    Raises:
        ValueError: An argument is out of range, or all weights vanish.

    Example:
        >>> from planish.statespace import LinearGaussian, kalman
        >>> model, y = LinearGaussian(0.9, 0.25), torch.ones(20, 1)
        >>> total = lambda t, before, x: x[..., 0]
        >>> found = ffbs(model, y, 300, additive=total, generator=torch.Generator().manual_seed(0))
        >>> bool((found.mean - kalman(model, y).mean.sum()).abs() < 0.5)
        True
    """
    check_count("ffbs", "n_particles", n_particles, 2)
    series, single = check_series("ffbs", y)
    terms = Terms("ffbs", additive)
    cloud = begin("ffbs", model, series[:, 0], n_particles, None, generator)
    beta, loglik, sizes = terms(0, None, cloud.x), cloud.log_sums, [cloud.ess]
    for t in range(1, series.shape[1]):
        before, cloud = cloud, advance("ffbs", model, cloud, series[:, t], None, generator)
        rows = []
        for part in cloud.x.split(max(1, 2**22 // (len(series) * n_particles)), 1):
            log_m = model.transition(t, before.x[:, None]).log_prob(part[:, :, None])
            kernel = (before.log_weights[:, None] + log_m).softmax(-1)[..., None]
            rows.append((kernel * (beta[:, None] + terms(t, before.x[:, None], part[:, :, None]))).sum(2))
        beta, loglik = torch.cat(rows, 1), loglik + cloud.log_sums
        sizes.append(cloud.ess)
    mean, ess = (cloud.weights[..., None] * beta).sum(1), torch.stack(sizes, 1)
    if single:
        return SmoothingResult(terms.unpack(mean[0]), loglik[0], ess[0], float(n_particles))
    return SmoothingResult(terms.unpack(mean), loglik, ess, float(n_particles))
