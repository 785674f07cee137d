"""Ground states: descent on the Nehari set, with a certificate of what was found."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import NotConverged, bad
from planish.pde.choquard import ChoquardProblem


@runtime_checkable
class Functional(Protocol):
    """An energy whose rays have one highest point each; `integral` weights its grid.

    Example:
        >>> flat: Functional = ChoquardProblem(lambda x: torch.ones_like(x[..., 0]), half_width=10, n=101)
        >>> v = torch.ones(101, dtype=torch.float64)
        >>> bool(flat.energy(flat.ray(v) * v) > flat.energy(0.9 * flat.ray(v) * v))
        True
    """

    def energy(self, v: Tensor) -> Tensor:
        """Return I(v)."""

    def gradient(self, v: Tensor) -> Tensor:
        """Return I'(v), as a function on the grid."""

    def integral(self, v: Tensor) -> Tensor:
        """Return the integral of a function."""

    def ray(self, v: Tensor) -> float:
        """Return t > 0 at which I(t v) is greatest."""

    def residual(self, v: Tensor) -> float:
        """Return the size of I'(v) relative to the nonlinear term's."""


@dataclass(frozen=True)
class GroundState:
    """A solution and its certificate.

    Attributes:
        u: Values on the problem's grid.
        energy: I(u).
        residual: |I'(u)| over the norm of the nonlinear term.
        nehari: Relative defect of <I'(u), u> = 0.
        pohozaev: Relative defect of Pohozaev's identity, an independent check; None unless Z is constant.
        edge: Largest value at the box's edge over the largest inside.
        growth: Share of the exponential growth that can be controlled, admissible below 1; None for powers. See
            `ChoquardProblem.exponential_growth`.
        peak: Highest point in the original variable x, between grid points by parabolas; (dim,).
        barycentre: Mean of x under u^p; (dim,).
        n_iter: Steps of the descent.

    Example:
        >>> flat = ChoquardProblem(lambda x: torch.ones_like(x[..., 0]), half_width=10, n=101)
        >>> state: GroundState = solve_ground_state(flat)
        >>> abs(state.nehari) < 1e-10, round(abs(state.peak[0]), 3)
        (True, 0.0)
    """

    u: Tensor
    energy: float
    residual: float
    nehari: float
    pohozaev: float | None
    edge: float
    growth: float | None
    peak: tuple[float, ...]
    barycentre: tuple[float, ...]
    n_iter: int


def minimize_on_nehari(
    functional: Functional,
    v0: Float[Tensor, "*grid"],
    *,
    tol: int | float = 1e-6,
    max_iter: int = 500,
    progress: Callable[[int, float], None] | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Minimize J(v) = max_t I(t v) by L-BFGS and return the minimizer on the Nehari set with the steps taken.

    Args:
        functional: The energy.
        v0: Where to start, positive somewhere.
        tol: Stop at this residual, > 0; default 1e-6.
        max_iter: Steps at most, >= 1; default 500.
        progress: Called with (steps, residual).
        preconditioner: A symmetric positive map; v = preconditioner(y) is minimized over y.

    Raises:
        ValueError: An argument is out of range.
        NotConverged: The residual is still above `tol`; `best` is (minimizer, steps).

    Example:
        >>> flat = ChoquardProblem(lambda x: torch.ones_like(x[..., 0]), half_width=10, n=101)
        >>> u, steps = minimize_on_nehari(flat, torch.exp(-flat.points[..., 0] ** 2))
        >>> flat.residual(u) < 1e-6
        True
    """
    if not 0 < tol < 1:
        raise bad("minimize_on_nehari", "tol", "in (0, 1)", tol)
    if max_iter < 1:
        raise bad("minimize_on_nehari", "max_iter", "at least 1", max_iter)
    change = preconditioner or (lambda y: y)
    y = v0.detach().clone()
    history: list[tuple[Tensor, Tensor, float]] = []

    def look(y: Tensor) -> tuple[float, Tensor, Tensor]:
        v = change(y)
        t = functional.ray(v)
        w = t * v
        return float(functional.energy(w)), change(t * functional.gradient(w)), w

    value, slope, w = look(y)
    steps = 0
    residual = functional.residual(w)
    while residual > tol and steps < max_iter:
        direction = _two_loops(slope, history)
        descent = float((direction * slope).sum())
        if descent >= 0:
            history.clear()
            direction, descent = -slope, -float(slope.square().sum())
        size = 1.0 if history else min(1.0, float(0.3 * y.norm() / slope.norm()))
        for _ in range(40):
            found, after, w_new = look(y + size * direction)
            if found <= value + 1e-4 * size * descent + 1e-15 * abs(value):
                break
            size *= 0.5
        else:
            if not history:
                break
            history.clear()
            continue
        moved, turned = size * direction, after - slope
        curvature = float((moved * turned).sum())
        if curvature > 1e-12 * float(moved.norm() * turned.norm()):
            history = [*history[-29:], (moved, turned, 1 / curvature)]
        y, value, slope, w = y + moved, found, after, w_new
        steps += 1
        residual = functional.residual(w)
        if progress is not None:
            progress(steps, residual)
    if residual > tol:
        raise NotConverged(
            f"minimize_on_nehari: the residual is {residual:.2e} after {steps} steps, above {tol:g}.", (w, steps)
        )
    return w, steps


def _two_loops(slope: Tensor, history: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Return minus the quasi-Newton step of the gradient (L-BFGS)."""
    q, shares = slope.clone(), []
    for moved, turned, inverse in reversed(history):
        share = inverse * float((moved * q).sum())
        q = q - share * turned
        shares.append(share)
    if history:
        moved, turned, inverse = history[-1]
        q = q / (inverse * float(turned.square().sum()))
    for (moved, turned, inverse), share in zip(history, reversed(shares), strict=True):
        q = q + (share - inverse * float((turned * q).sum())) * moved
    return -q


def solve_ground_state(
    problem: ChoquardProblem,
    start: Float[Tensor, "*grid"] | Sequence[float] | None = None,
    *,
    tol: int | float = 1e-6,
    max_iter: int = 500,
    preconditioned: bool = True,
    progress: Callable[[int, float], None] | None = None,
) -> GroundState:
    """Find a positive solution of least energy near a starting point.

    Args:
        problem: The problem.
        start: A function on the grid, or a point in x around which to put a Gaussian; default the origin.
        tol: Residual to reach; default 1e-6.
        max_iter: Steps at most; default 500.
        preconditioned: Descend in the norm of (1 - Delta)^s instead of the grid's; default True.
        progress: Called with (steps, residual).

    Raises:
        ValueError: An argument is out of range.
        NotConverged: The tolerance was not reached; `best` is the GroundState so far.

    Example:
        >>> flat = ChoquardProblem(lambda x: torch.ones_like(x[..., 0]), q=4, half_width=20, n=201)
        >>> state = solve_ground_state(flat)
        >>> round(state.energy, 2), state.residual < 1e-6
        (0.67, True)
    """
    if isinstance(start, Tensor):
        v0 = start
    else:
        centre = torch.tensor([0.0] * problem.dim if start is None else list(start), dtype=torch.float64)
        if centre.shape != (problem.dim,):
            raise bad("solve_ground_state", "start", f"a function or a point of {problem.dim} coordinates", start)
        v0 = torch.exp(-(problem.points - centre / problem.eps).square().sum(-1) / 2)
    smooth = sobolev_preconditioner(problem) if preconditioned else None
    if smooth is not None:
        v0 = smooth(v0, inverse=True)
    try:
        w, steps = minimize_on_nehari(problem, v0, tol=tol, max_iter=max_iter, preconditioner=smooth, progress=progress)
    except NotConverged as error:
        w, steps = error.best  # type: ignore[misc]
        raise NotConverged(
            str(error).replace("minimize_on_nehari", "solve_ground_state"), certify(problem, w, steps)
        ) from None
    return certify(problem, w, steps)


def sobolev_preconditioner(problem: ChoquardProblem) -> Callable[..., Tensor]:
    """Return v -> (|k|^(2 s) + 1)^(-1/2) v in Fourier space: rough directions become as cheap as smooth ones."""
    n, dims = problem.n, tuple(range(-problem.dim, 0))
    k = 2 * math.pi * torch.fft.fftfreq(n, problem.step, dtype=torch.float64)
    square = sum(k.reshape([-1 if i == d else 1 for i in range(problem.dim)]) ** 2 for d in range(problem.dim))
    symbol = (torch.as_tensor(square) ** problem.s + 1) ** -0.5

    def smooth(v: Tensor, *, inverse: bool = False) -> Tensor:
        factor = 1 / symbol if inverse else symbol
        made: Tensor = torch.fft.ifftn(torch.fft.fftn(v, dim=dims) * factor, dim=dims).real
        return made

    return smooth


def certify(problem: ChoquardProblem, u: Float[Tensor, "*grid"], n_iter: int = 0) -> GroundState:
    """Measure what a function satisfies.

    Args:
        problem: The problem.
        u: The function, positive somewhere.
        n_iter: Steps that led to it.

    Example:
        >>> flat = ChoquardProblem(lambda x: torch.ones_like(x[..., 0]), half_width=10, n=101)
        >>> guess = certify(flat, torch.exp(-flat.points[..., 0] ** 2))
        >>> guess.residual > 0.1, abs(guess.barycentre[0]) < 1e-12
        (True, True)
    """
    constant = bool((problem.z == problem.z.flatten()[0]).all())
    weight = u.abs() ** problem.p
    mean = (problem.points * weight[..., None]).flatten(0, -2).sum(0) / weight.sum()
    return GroundState(
        u=u,
        energy=float(problem.energy(u)),
        residual=problem.residual(u),
        nehari=float(problem.nehari(u)),
        pohozaev=problem.pohozaev(u) if constant else None,
        edge=problem.edge_mass(u),
        growth=problem.exponential_growth(u),
        peak=_peak(problem, u),
        barycentre=tuple((problem.eps * mean).tolist()),
        n_iter=n_iter,
    )


def _peak(problem: ChoquardProblem, u: Tensor) -> tuple[float, ...]:
    """Return the highest point, each coordinate by the parabola through three grid values."""
    index = [int(i) for i in torch.unravel_index(u.argmax(), u.shape)]
    found = []
    for axis in range(problem.dim):
        i, line, at = index[axis], u, problem.points[..., axis]
        for other in reversed([d for d in range(problem.dim) if d != axis]):
            line, at = line.select(other, index[other]), at.select(other, index[other])
        here = float(at[i])
        if 0 < i < problem.n - 1:
            left, top, right = line[i - 1 : i + 2].tolist()
            bend = left - 2 * top + right
            here += 0.5 * problem.step * (left - right) / bend if bend < 0 else 0.0
        found.append(problem.eps * here)
    return tuple(found)
