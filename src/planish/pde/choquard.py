r"""The fractional (p, q)-Choquard equation: positive solutions, and how they settle where the potential is least.

    eps^(ps) (-Delta)_p^s u + eps^(qs) (-Delta)_q^s u + Z(x) (|u|^(p-2) u + |u|^(q-2) u)
        = eps^(mu - N) [ |x|^(-mu) * F(u) ] f(u),      p = N / s < q

In the variable y = x / eps, v(y) = u(eps y), eps is left in the potential alone. The energy is

    I(v) = [v]_p^p / p + [v]_q^q / q + int Z(eps y) (|v|^p / p + |v|^q / q) - 1/2 int (|.|^(-mu) * F(v)) F(v)

Every v has one multiple t v at which I is greatest along its ray (the Nehari set); J(v) = I(t(v) v) does not change
when v is scaled, and its least value is the ground level.

=============  =====================  ====================================================
paper          here                   shape, range
=============  =====================  ====================================================
N, s, q, mu    ``dim`` and the same   N in {1, 2}, s in (0, 1), q > N / s, mu in (0, N)
Z              ``potential``          positive function of points (..., N)
epsilon        ``eps``                > 0
F, f           ``nonlinearity``       see `ExpNonlinearity`
=============  =====================  ====================================================

Differs from the paper: it proves that solutions exist and concentrate; here they are computed, on a box outside of
which they are set to 0. That box is the largest source of error: solutions decay like a power only.

Reference:
    Concentrating solutions of the fractional (p,q)-Choquard equation with exponential growth, 2025.
    https://arxiv.org/abs/2506.00412
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import PlanishWarning, bad
from planish.pde.nonlinearities import ExpNonlinearity, Nonlinearity
from planish.pde.operators import FractionalLaplacian1D, FractionalLaplacian2D
from planish.pde.riesz import RieszPotential


@dataclass(frozen=True)
class Norms:
    """Integrals that energy, Nehari and Pohozaev are made of.

    Example:
        >>> problem = ChoquardProblem(lambda x: torch.ones_like(x[..., 0]), half_width=10, n=101)
        >>> round(float(problem.norms(torch.exp(-problem.points[..., 0] ** 2)).mass_p), 4)
        1.2533
    """

    seminorm_p: Tensor
    seminorm_q: Tensor
    mass_p: Tensor
    mass_q: Tensor
    interaction: Tensor


class ChoquardProblem:
    """State a problem on a grid: energies, their gradient, and the identities that a solution must satisfy.

    Args:
        potential: Z: points (..., dim) in the original variable x -> values, positive.
        eps: Above 0; default 1.
        dim: N, 1 (default) or 2.
        s: Order, in (0, 1), with N / s >= 2; default 1/2.
        q: Second power, above p = N / s; default 4. In the plane p and q are even.
        mu: Power of the Riesz kernel, in (0, N); default 1/2.
        nonlinearity: Default `ExpNonlinearity` with the exponent p / (p - 1) and the fewest terms, 2 or more, that are
            admissible.
        half_width: Half the box's side, in y = x / eps; default 40.
        n: Grid points a side; default 801.
        lowest: inf Z where it is known, to check the box's edge against it; default the least value on the grid.

    Raises:
        ValueError: An argument is out of range, or the exponents admit no Nehari projection.

    Attributes:
        points: Grid points in y, (n, ..., dim).
        p: N / s.
        z: Z(eps y) at the grid points.

    Example:
        >>> problem = ChoquardProblem(lambda x: torch.ones_like(x[..., 0]), q=3, half_width=10, n=101)
        >>> v = torch.exp(-problem.points[..., 0] ** 2)
        >>> u = problem.project(v)
        >>> abs(float(problem.nehari(u))) < 1e-12
        True
    """

    def __init__(
        self,
        potential: Callable[[Tensor], Tensor],
        *,
        eps: int | float = 1.0,
        dim: int = 1,
        s: int | float = 0.5,
        q: int | float = 4.0,
        mu: int | float = 0.5,
        nonlinearity: Nonlinearity | None = None,
        half_width: int | float = 40.0,
        n: int = 801,
        lowest: int | float | None = None,
    ) -> None:
        where = "ChoquardProblem"
        if dim not in {1, 2}:
            raise bad(where, "dim", "1 or 2", dim)
        if not 0 < s < 1:
            raise bad(where, "s", "in (0, 1)", s)
        if dim / s < 2:
            raise bad(where, "s", f"at most {dim / 2}, so that p = {dim} / s is at least 2", s)
        if not dim / s < q < math.inf:
            raise bad(where, "q", f"above p = {dim / s:g}", q)
        if not 0 < mu < dim:
            raise bad(where, "mu", f"in (0, {dim})", mu)
        if not 0 < eps < math.inf:
            raise bad(where, "eps", "above 0", eps)
        if not 0 < half_width < math.inf:
            raise bad(where, "half_width", "above 0", half_width)
        self.dim, self.s, self.p, self.q, self.mu, self.eps = dim, s, dim / s, float(q), mu, eps
        least = self.p * (2 * dim - mu) / (2 * dim)  # below, the Hardy-Littlewood-Sobolev inequality bounds nothing
        if nonlinearity is None:
            exponent = self.p / (self.p - 1)
            terms = max(2, math.floor(self.q / 2 / exponent) + 1, math.ceil(least / exponent))
            nonlinearity = ExpNonlinearity(terms=terms, exponent=exponent)
        self.nonlinearity = nonlinearity
        if not self.nonlinearity.growth > self.q / 2:
            raise bad(where, "nonlinearity", f"one that starts with a power above q / 2 = {q / 2:g}", self.nonlinearity)
        if not self.nonlinearity.growth >= least:
            raise bad(where, "nonlinearity", f"one that starts with a power of {least:g} or more", self.nonlinearity)
        self.half_width, self.n = half_width, n
        # Line: the ends are grid points. Plane: cells fill the box.
        self.step = 2 * half_width / (n - 1 if dim == 1 else n)
        axis = torch.linspace(-half_width, half_width, n, dtype=torch.float64)
        axis = axis if dim == 1 else axis * (n - 1) / n
        self.points = torch.stack(torch.meshgrid(*[axis] * dim, indexing="ij"), -1)
        make = FractionalLaplacian1D if dim == 1 else FractionalLaplacian2D
        self.first, self.second = make(n, self.step, s=s, r=self.p), make(n, self.step, s=s, r=self.q)
        self.riesz = RieszPotential(n, self.step, mu, dim=dim)
        self.z = potential(eps * self.points).to(torch.float64)
        if self.z.shape != self.points.shape[:-1]:
            raise bad(where, "potential", f"a function that gives {tuple(self.points.shape[:-1])}", tuple(self.z.shape))
        if not torch.isfinite(self.z).all() or not (self.z > 0).all():
            raise bad(where, "potential", "positive and finite", float(self.z.min()))
        inside = float(self.z.min()) if lowest is None else lowest
        edge = float(self._edge(self.z).min())
        if (self.z != self.z.flatten()[0]).any() and not inside < edge:
            warnings.warn(
                f"{where}: the potential at the box's edge ({edge:.4g}) is no higher than its least value "
                f"({inside:.4g}), so solutions may leave the box; take a wider one.",
                PlanishWarning,
                stacklevel=2,
            )

    def _edge(self, v: Tensor) -> Tensor:
        if self.dim == 1:
            return v[[0, -1]]
        return torch.cat([v[0], v[-1], v[:, 0], v[:, -1]])

    def integral(self, v: Float[Tensor, "*grid"]) -> Tensor:
        """Return the integral over the box."""
        return self.step**self.dim * v.sum()

    def norms(self, v: Float[Tensor, "*grid"]) -> Norms:
        """Return the integrals of a function."""
        self._check(v)
        filled = self.nonlinearity.primitive(v)
        return Norms(
            self.first.energy(v),
            self.second.energy(v),
            self.integral(self.z * v.abs() ** self.p),
            self.integral(self.z * v.abs() ** self.q),
            self.integral(self.riesz(filled) * filled),
        )

    def _check(self, v: Tensor) -> None:
        if v.shape != self.z.shape or v.dtype is not torch.float64:
            raise bad("ChoquardProblem", "v", f"float64 of shape {tuple(self.z.shape)}", f"{v.dtype} {tuple(v.shape)}")

    def energy(self, v: Float[Tensor, "*grid"]) -> Tensor:
        """Return I(v)."""
        m = self.norms(v)
        return (m.seminorm_p + m.mass_p) / self.p + (m.seminorm_q + m.mass_q) / self.q - m.interaction / 2

    def gradient(self, v: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid"]:
        """Return I'(v), as a function: what must vanish for the equation to hold."""
        self._check(v)
        zero_order = self.z * (v.abs() ** (self.p - 1) + v.abs() ** (self.q - 1)) * v.sign()
        return self.first(v) + self.second(v) + zero_order - self._force(v)

    def _force(self, v: Tensor) -> Tensor:
        return self.riesz(self.nonlinearity.primitive(v)) * self.nonlinearity(v)

    def residual(self, v: Float[Tensor, "*grid"]) -> float:
        """Return |I'(v)| over the norm of its nonlinear term: 0 for a solution."""
        force = self._force(v).norm()
        return float(self.gradient(v).norm() / force) if force > 0 else math.inf

    def nehari(self, v: Float[Tensor, "*grid"]) -> Tensor:
        """Return <I'(v), v> over the norms' part: 0 on the Nehari set."""
        m = self.norms(v)
        a = m.seminorm_p + m.mass_p + m.seminorm_q + m.mass_q
        return 1 - self.integral(self._force(v) * v) / a

    def pohozaev(self, v: Float[Tensor, "*grid"]) -> float:
        """Return the relative defect of Pohozaev's identity, which no part of the method imposes; for a constant Z.

        Raises:
            ValueError: The potential is not constant.
        """
        if (self.z != self.z.flatten()[0]).any():
            raise bad("ChoquardProblem.pohozaev", "potential", "constant", "one that varies")
        m = self.norms(v)
        left = self.dim * (m.mass_p / self.p + m.mass_q / self.q) + (self.dim - self.s * self.q) * m.seminorm_q / self.q
        right = (2 * self.dim - self.mu) * m.interaction / 2
        return float((left - right) / right)

    def exponential_growth(self, v: Float[Tensor, "*grid"]) -> float | None:
        """Return how much of the growth that can be controlled v uses up: admissible below 1.

        That is beta 2N / (2N - mu) |v|^(p / (p - 1)) in the norm of W^(s, p), over `growth_bound(dim, s)`: below it,
        exp of the nonlinearity's inner power is integrable to what the Riesz potential needs.

        Returns:
            The share; None for a nonlinearity that grows like a power, which has no such limit.
        """
        if not isinstance(self.nonlinearity, ExpNonlinearity):
            return None
        self._check(v)
        norm = (self.first.energy(v) + self.integral(v.abs() ** self.p)) ** (1 / self.p)
        used = self.nonlinearity.beta * 2 * self.dim / (2 * self.dim - self.mu) * norm ** (self.p / (self.p - 1))
        return float(used) / growth_bound(self.dim, self.s)

    def ray(self, v: Float[Tensor, "*grid"]) -> float:
        """Return t > 0 with t v on the Nehari set: where I is greatest along the ray of v.

        Raises:
            ValueError: v is nowhere positive, or its nonlinear term overflows before the set is reached.
        """
        m = self.norms(v)
        a, b = float(m.seminorm_p + m.mass_p), float(m.seminorm_q + m.mass_q)

        def slope(log_t: float) -> float:
            t = math.exp(log_t)
            pull = float(self.integral(self._force(t * v) * v)) * t
            return math.log(pull / (a * t**self.p + b * t**self.q)) if pull > 0 else -math.inf

        if not (v > 0).any():
            raise bad("ChoquardProblem.project", "v", "positive somewhere", "a function that is nowhere positive")
        start = -math.log(float(v.max()))  # heights near 1
        low, high = start - 1.0, start + 1.0
        for _ in range(60):
            if slope(low) < 0:
                break
            low -= 1.0
        for _ in range(60):
            if slope(high) > 0:
                break
            high += 0.5
        else:
            raise bad(
                "ChoquardProblem.project", "v", "a function whose ray meets the Nehari set", "none below overflow"
            )
        return math.exp(root(slope, low, high))

    def project(self, v: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid"]:
        """Return the multiple of v on the Nehari set."""
        return self.ray(v) * v

    def edge_mass(self, v: Float[Tensor, "*grid"]) -> float:
        """Return the largest value at the box's edge over the largest inside: how much the box cuts off."""
        return float(self._edge(v).abs().max() / v.abs().max())


def growth_bound(dim: int, s: int | float) -> float:
    """Return the largest a for which exp(a |u|^(N / (N - s))) can be bounded over the unit ball of W^(s, N/s).

    An upper bound of the sharp constant, from functions that concentrate at a point.

    Args:
        dim: N, 1 or 2.
        s: Order, in (0, 1).

    Raises:
        ValueError: An argument is out of range.

    Source: Parini and Ruf, On the Moser-Trudinger inequality in fractional Sobolev-Slobodeckij spaces, 2019.

    Example:
        >>> abs(growth_bound(1, 0.5) - 2 * math.pi**2) < 1e-12
        True
    """
    if dim not in {1, 2}:
        raise bad("growth_bound", "dim", "1 or 2", dim)
    if not 0 < s < 1:
        raise bad("growth_bound", "s", "in (0, 1)", s)
    p = dim / s
    sphere = 2.0 if dim == 1 else 2 * math.pi
    # sum over k of (N + k - 1)! / (k! (N + 2 k)^p): Hurwitz' zeta function of the odd, or of all, integers
    power, start = (p, 0.5) if dim == 1 else (p - 1, 1.0)
    zeta = torch.special.zeta(torch.tensor(power, dtype=torch.float64), torch.tensor(start, dtype=torch.float64))
    total = 2.0**-p * float(zeta)
    return float(dim * (2 * sphere**2 * math.gamma(p + 1) / math.factorial(dim) * total) ** (s / (dim - s)))


def root(f: Callable[[float], float], low: int | float, high: int | float, *, tol: int | float = 1e-14) -> float:
    """Return the root of an increasing function between two points of opposite sign, by Chandrupatla's method."""
    a, b = float(high), float(low)
    fa, fb = f(a), f(b)
    if fa == 0 or fb == 0:
        return a if fa == 0 else b
    c, fc, t = a, fa, 0.5
    for _ in range(200):
        x = a + t * (b - a)
        fx = f(x)
        if (fx > 0) == (fa > 0):
            c, fc = a, fa
        else:
            c, b, fc, fb = b, a, fb, fa
        a, fa = x, fx
        best = a if abs(fa) < abs(fb) else b
        small = 2 * tol * max(1.0, abs(best))
        if fx == 0 or abs(b - a) <= small:
            return best
        t = 0.5
        if all(map(math.isfinite, (fa, fb, fc))) and len({fa, fb, fc}) == 3:
            xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
            if phi**2 < xi and (1 - phi) ** 2 < 1 - xi:
                t = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        low_t = small / abs(b - a) / 2
        t = min(max(t, low_t), 1 - low_t)
    return best
