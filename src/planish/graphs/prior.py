r"""A smoothness prior with eight numbers, learned on samples that are hidden on purpose.

GraphTRSS charges a change of graph frequency lambda and time frequency k = 2 - 2 cos(omega) with
alpha (lambda + epsilon) k. Here each node may have a mean and a season for (almost) free, and what is left is charged

    P(lambda, k) = alpha (lambda + epsilon)^beta ((1 - r)^2 + r k)^gamma,      r = exp(-d_0 - d_1 lambda)         (1)

the inverse spectrum of a process that forgets at a rate that depends on how rough it is over the graph. Means and
seasons are charged alpha c_0 lambda and alpha c_1 lambda: neighbours have similar ones. d = 0, gamma = beta = 1, c = 0
and no season is GraphTRSS, near which learning starts.

The eight numbers are those whose fill predicts hidden samples best. With A(theta) the matrix of the linear system, X
its solution without the hidden samples and A Z = H o (X - Y), the derivative of 1/2 |H o (X - Y)|^2 is
-<Z, dA/dtheta X>: two solutions of the system, whatever the number of parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from planish._support import bad
from planish.graphs.blocks import TimeBlocks, affordable
from planish.graphs.recovery import Linear, check_signals, conjugate_gradients, first_guess, weights_of
from planish.graphs.sobolev import LaplacianPower
from planish.graphs.time import cosines, frequencies, from_cosines

_NAMES = ("alpha", "epsilon", "beta", "gamma", "forget", "forget_rough", "mean", "season")
_REACH = (4.0, 4.0, 1.0, 1.0, 5.0, 5.0, 7.0, 7.0)  # how far learning may move each logarithm
_CHARGE = 0.02  # of the squared movement; ten times the logarithm of the error stands beside it
_PRECISION = 1e-3  # of the error on hidden samples, to which fills are solved while learning
_PEAK = 30.0  # a season stands out of the frequencies around it by this factor


@dataclass(frozen=True)
class SmoothnessPrior:
    """The numbers of (1), and the periods of the seasons; `fill` recovers signals with them.

    Attributes:
        alpha: Weight, > 0; large where samples are noisy.
        epsilon: What smooth changes cost beside rough ones, > 0.
        beta: Exponent over the graph, > 0.
        gamma: Exponent in time, > 0: 1 is a random walk, 2 its sum.
        forget: d_0, > 0, in 1 / time step.
        forget_rough: d_1, > 0.
        mean: c_0, > 0.
        season: c_1, > 0.
        periods: In time steps, each above 2; a season has these and half of these.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from planish.graphs import LaplacianPower, laplacian
        >>> power = LaplacianPower(laplacian([[0.0, 1.0], [1.0, 0.0]]))
        >>> x = torch.tensor([[0.0, 1.0, 2.0], [5.0, 9.0, 7.0]])
        >>> mask = torch.tensor([[True, True, True], [True, False, True]])
        >>> SmoothnessPrior(alpha=1e-4).fill(x, mask, power).round(decimals=1)[1]
        tensor([5., 6., 7.])
    """

    alpha: float = 1e-3
    epsilon: float = 0.05
    beta: float = 1.0
    gamma: float = 1.0
    forget: float = 0.01
    forget_rough: float = 0.01
    mean: float = 1e-4
    season: float = 1e-4
    periods: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in _NAMES:
            if not 0 < getattr(self, name) < math.inf:
                raise bad("SmoothnessPrior", name, "a float above 0", getattr(self, name))
        if not all(2 < period < math.inf for period in self.periods):
            raise bad("SmoothnessPrior", "periods", "above 2 time steps each", self.periods)

    def fill(
        self,
        x: Float[Tensor, "N M"],
        mask: Bool[Tensor, "N M"],
        smoothness: LaplacianPower,
        *,
        tol: int | float = 1e-8,
        max_iter: int = 5000,
    ) -> Float[Tensor, "N M"]:
        """Recover signals: the minimizer of 1/2 |J o (X - Y)|^2 + half the charges.

        Args:
            x: Signals, one row a node; only entries of the mask are read.
            mask: Which entries are samples.
            smoothness: Its eigenvectors are used; epsilon and beta are this prior's own.
            tol: Estimated error relative to the samples about their mean, in (0, 1); default 1e-8.
            max_iter: Steps at most; default 5000.

        Raises:
            ValueError: Shapes do not fit, or an argument is out of range.
            NotConverged: The tolerance was not reached.
        """
        check_signals("SmoothnessPrior.fill", x, mask, smoothness.n_nodes)
        system = _System(x, mask, smoothness, self.periods)
        within = float(tol) * system.scale
        return system.level + system.solve(self._theta(x), system.y, system.guess, within, max_iter, strict=True)

    def _theta(self, like: Tensor) -> Tensor:
        return torch.tensor([math.log(getattr(self, name)) for name in _NAMES]).to(like)


class _System:
    """The linear system of one set of samples, about their mean: what does not depend on the eight numbers."""

    def __init__(self, x: Tensor, mask: Tensor, smoothness: LaplacianPower, periods: Sequence[float]) -> None:
        self.levels, self.vectors = smoothness.basis()
        self.k = frequencies(x.shape[1], x)
        self.seen, self.density = mask.to(x), mask.double().mean().to(x)
        self.frame = seasonal_frame(x.shape[1], periods).to(x)
        self.level = x[mask].mean()
        self.y = torch.where(mask, x - self.level, 0.0)
        self.scale = float(self.y[mask].square().mean().sqrt())
        self.guess = first_guess(self.y, mask, weights_of(smoothness.laplacian))

    def charges(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each graph and time frequency is charged, and each column of the frame."""
        alpha, epsilon, beta, gamma, d0, d1, c0, c1 = theta.exp()
        levels = self.levels[:, None]
        r = torch.exp(-d0 - d1 * levels)
        p = alpha * (levels + epsilon) ** beta * ((1 - r) ** 2 + r * self.k) ** gamma  # eq. (1)
        return p, alpha * torch.cat([c0[None], c1.expand(self.frame.shape[1] - 1)]) * levels

    def spectra(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of signals: outside the frame by frequencies, and in the frame."""
        turned = self.vectors.T @ x
        inside = turned @ self.frame
        return cosines(turned - inside @ self.frame.T), inside

    def signals(self, spectrum: Tensor, inside: Tensor) -> Tensor:
        """Return the signals of coefficients: the transpose of `spectra`."""
        outside = from_cosines(spectrum)
        outside = outside - (outside @ self.frame) @ self.frame.T
        x: Tensor = self.vectors @ (outside + inside @ self.frame.T)
        return x

    def preconditioner(self, theta: Tensor) -> Linear:
        """Return nearly the inverse of the system: exact but for gamma, means and seasons if blocks fit, else rough."""
        p, c = self.charges(theta)
        if affordable(*self.y.shape):
            alpha, epsilon, beta, gamma, d0, d1 = theta.double().exp()[:6]
            levels = self.levels.double()
            r = torch.exp(-d0 - d1 * levels)
            # (1) with gamma = 1, but right at the frequency at which the samples begin to tell nothing
            between = 2 - 2 * math.cos(math.pi * float(self.density))
            charge = alpha * (levels + epsilon) ** beta * ((1 - r) ** 2 + r * between) ** (gamma - 1)
            return TimeBlocks(self.seen > 0, self.vectors, charge * (1 - r) ** 2, charge * r).solve

        def rough(v: Tensor) -> Tensor:
            s, f = self.spectra(v)
            return self.signals(s / (self.density + p), f / (self.density + c))

        return rough

    def solve(
        self,
        theta: Tensor,
        right: Tensor,
        start: Tensor,
        within: float,
        max_iter: int,
        *,
        precondition: Linear | None = None,
        strict: bool = False,
    ) -> Tensor:
        """Solve the system to a root mean square error; unless strict, what `max_iter` steps reach will do."""
        p, c = self.charges(theta)

        def apply(v: Tensor) -> Tensor:
            s, f = self.spectra(v)
            return self.seen * v + self.signals(p * s, c * f)

        goal = within * math.sqrt(right.numel())
        return conjugate_gradients(
            apply, right, start, preconditioner=self.preconditioner(theta) if precondition is None else precondition,
            residual_goal=goal, error_goal=goal, max_iter=max_iter, where="SmoothnessPrior.fill", strict=strict,
        )[0]  # fmt: skip


def seasonal_frame(m: int, periods: Sequence[float]) -> Float[Tensor, "M r"]:
    """Return orthonormal columns that span constants, and cosines and sines of each period and of half of it."""
    t = torch.arange(m, dtype=torch.float64)
    columns = [torch.ones_like(t)]
    for period in periods:
        for harmonic in (1, 2):
            if harmonic / period < 0.5:
                angle = 2 * math.pi * harmonic * t / period
                columns += [torch.cos(angle), torch.sin(angle)]
    frame: Tensor = torch.linalg.qr(torch.stack(columns, 1))[0]
    return frame


def find_period(x: Float[Tensor, "N M"]) -> float | None:
    """Return the period that stands out of complete signals, in time steps; None if none does.

    Four cycles must be there, and the period's power must be thirty times the median of the frequencies around it.

    Args:
        x: Signals, one row a node, without gaps.

    Example:
        >>> t = torch.arange(96.0)
        >>> noise = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
        >>> round(find_period(torch.sin(2 * torch.pi * t / 12) + 0.3 * noise), 1)
        12.0
        >>> find_period(noise.cumsum(1)) is None
        True
    """
    m = x.shape[1]
    t = torch.linspace(-1, 1, m).to(x)
    flat = x - x.mean(1, keepdim=True)
    flat = flat - (flat @ t)[:, None] / t.square().sum() * t
    flat = flat / flat.square().sum(1, keepdim=True).sqrt().clamp_min(1e-30)
    power = torch.fft.rfft(flat).abs().square().mean(0)
    best, at = 0.0, 0
    for j in range(4, len(power) - 1):
        around = torch.cat([power[max(1, j // 2) : max(1, j - 1)], power[j + 2 : 2 * j]])
        if len(around) >= 3 and power[j] > max(_PEAK * float(around.median()), best):
            best, at = float(power[j]), j
    if not at:
        return None
    fine = at + torch.linspace(-0.5, 0.5, 41).to(x)
    angle = -2 * math.pi / m * fine[:, None] * torch.arange(m).to(x)
    waves = torch.polar(torch.ones_like(angle), angle)
    return m / float(fine[(flat.to(waves.dtype) @ waves.T).abs().square().sum(0).argmax()])


def learn_prior(
    x: Float[Tensor, "N M"],
    mask: Bool[Tensor, "N M"],
    smoothness: LaplacianPower,
    *,
    hidden: Bool[Tensor, "N M"],
    start: SmoothnessPrior | None = None,
    max_iter: int = 12,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[SmoothnessPrior, Float[Tensor, "N M"]]:
    """Learn the eight numbers of a prior on hidden samples.

    Args:
        x: Signals, one row a node; only entries of the mask are read.
        mask: Which entries are samples.
        smoothness: Its eigenvectors are used.
        hidden: Which of the samples are hidden, some but not all.
        start: Where to start, and the periods; default `SmoothnessPrior()`.
        max_iter: Steps of L-BFGS, >= 1; default 12, each some solutions of the linear system.
        progress: Called with (evaluations, root mean square error on hidden samples).

    Returns:
        The prior, and the fill it gave without the hidden samples.

    Raises:
        ValueError: An argument is out of range, or shapes do not fit.

    Example:
        >>> from planish.graphs import LaplacianPower, laplacian, random_mask
        >>> power = LaplacianPower(laplacian(torch.ones(5, 5, dtype=torch.float64)))
        >>> draw = torch.Generator().manual_seed(0)
        >>> x = torch.randn(5, 60, generator=draw, dtype=torch.float64).cumsum(1)
        >>> mask = random_mask(torch.ones_like(x, dtype=torch.bool), 0.6, generator=draw)
        >>> hidden = mask & (torch.rand(x.shape, generator=draw) < 0.2)
        >>> prior, fill = learn_prior(x, mask, power, hidden=hidden)
        >>> prior.alpha > 0
        True
    """
    check_signals("learn_prior", x, mask, smoothness.n_nodes)
    inside = mask & ~hidden
    if not bool((hidden & mask).any()) or not bool(inside.any()):
        raise bad("learn_prior", "hidden", "some of the samples, not all", f"{int(hidden.sum())} of {int(mask.sum())}")
    if max_iter < 1:
        raise bad("learn_prior", "max_iter", "an int >= 1", max_iter)
    start = SmoothnessPrior() if start is None else start
    hidden = hidden & mask
    system = _System(x, inside, smoothness, start.periods)
    origin, reach = start._theta(x), torch.tensor(_REACH).to(x)
    moved = torch.zeros_like(origin).requires_grad_()
    fill, adjoint = system.guess, torch.zeros_like(x)
    error = float((fill + system.level - x)[hidden].square().mean().sqrt())
    best = (math.inf, origin, fill)
    calls = 0
    optimizer = torch.optim.LBFGS(
        [moved], max_iter=max_iter, max_eval=max_iter + max_iter // 2, line_search_fn="strong_wolfe",
        tolerance_grad=1e-2, tolerance_change=1e-3,
    )  # fmt: skip

    def look() -> Tensor:
        nonlocal fill, adjoint, best, calls, error
        with torch.enable_grad():
            theta = origin + reach * torch.tanh(moved / reach)
        now = theta.detach()
        near = system.preconditioner(now)
        fill = system.solve(now, system.y, fill, _PRECISION * error, 300, precondition=near)
        miss = torch.where(hidden, fill + system.level - x, 0.0)
        square = miss.square().sum()
        error = math.sqrt(max(float(square), 1e-30) / int(hidden.sum()))
        rough = float(near(miss).square().mean().sqrt())
        adjoint = system.solve(now, miss, adjoint, 10 * _PRECISION * rough, 300, precondition=near)
        if float(square) < best[0]:
            best = float(square), now, fill
        calls += 1
        if progress is not None:
            progress(calls, error)
        s, f = (a * b for a, b in zip(system.spectra(fill), system.spectra(adjoint), strict=True))
        with torch.enable_grad():
            p, c = system.charges(theta)
            charge = _CHARGE * moved.square().sum()
            slope = charge - 20 * ((p * s).sum() + (c * f).sum()) / square.clamp_min(1e-30)
            moved.grad = torch.autograd.grad(slope, moved)[0]
        return 10 * square.clamp_min(1e-30).log() + charge.detach()

    optimizer.step(torch.no_grad()(look))
    numbers = dict(zip(_NAMES, best[1].exp().tolist(), strict=True))
    return replace(start, **numbers), best[2] + system.level
