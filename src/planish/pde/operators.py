r"""The fractional r-Laplacian on a line and in the plane, of functions that vanish outside a box.

    [u]_r^r         = int int |u(x) - u(y)|^r / |x - y|^(N + s r) dx dy
    (-Delta)_r^s u  = 2 PV int |u(x) - u(y)|^(r-2) (u(x) - u(y)) / |x - y|^(N + s r) dy  = (1 / r) d[u]_r^r / du

Both come from one discrete energy, so that the operator is its exact gradient. On a line, the increments' r-th powers
over |z|^r are smooth in z: they are interpolated linearly between grid distances and integrated exactly against the
remaining power of z (second order). In the plane the power is integrated over cells, with a gradient term in the cell
around zero. What lies outside the box enters by exact integrals.

For even r the powers of differences expand into convolutions: O(n log n) by fast Fourier transforms instead of O(n^2).

Normalization: Gagliardo's. The classical (-Delta)^s is `classical_constant(N, s) / 2` times the operator with r = 2.
"""

import itertools
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad

_SERIES = 100  # grid distances from which a second difference of powers is summed as a series


def classical_constant(dim: int, s: int | float) -> float:
    """Return c with (-Delta)^s u = c PV int (u(x) - u(y)) / |x - y|^(dim + 2 s) dy.

    Args:
        dim: N, >= 1.
        s: Order, in (0, 1).

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> round(classical_constant(1, 0.5) * math.pi, 12)
        1.0
    """
    if dim < 1:
        raise bad("classical_constant", "dim", "at least 1", dim)
    if not 0 < s < 1:
        raise bad("classical_constant", "s", "in (0, 1)", s)
    return float(4**s * math.gamma(dim / 2 + s) / (math.pi ** (dim / 2) * abs(math.gamma(-s))))


def hat_moments(n: int, step: int | float, power: int | float) -> Tensor:
    """Return the integrals of z^power against the hat functions around step, 2 step, ..., n step; power > -2."""
    k = torch.arange(0, n + 2, dtype=torch.float64)
    second = k ** (power + 2) / ((power + 1) * (power + 2))
    exact = second[2:] - 2 * second[1:-1] + second[:-2]
    k = k[1:-1]
    series = k**power * (
        1 + power * (power - 1) / (12 * k**2) + power * (power - 1) * (power - 2) * (power - 3) / (360 * k**4)
    )  # the difference loses k^2 of its digits
    return torch.where(k < _SERIES, exact, series) * float(step ** (power + 1))


def even_convolve(weights: Float[Tensor, " n"], u: Float[Tensor, "*b n"], *, centre: int | float = 0.0) -> Tensor:
    """Return sum_j w_|i-j| u_j, with w_0 = centre and w_k = weights[k - 1], by Fourier transforms."""
    n = u.shape[-1]
    kernel = u.new_zeros(2 * n)
    kernel[0] = centre
    kernel[1:n] = weights[: n - 1]
    kernel[n + 1 :] = weights[: n - 1].flip(0)
    spectrum = torch.fft.rfft(kernel)
    made: Tensor = torch.fft.irfft(torch.fft.rfft(u, 2 * n) * spectrum, 2 * n)[..., :n]
    return made


def signed_power(d: Tensor, power: int | float) -> Tensor:
    """Return |d|^power sign(d), with a derivative of 0 at 0 for powers above 1."""
    return d.abs() ** power * d.sign()


class _Seminorm:
    """What line and plane share: checks, the choice of the path, and the operator as the energy's gradient."""

    def __init__(self, where: str, s: int | float, r: int | float, step: int | float, n: int) -> None:
        if not 0 < s < 1:
            raise bad(where, "s", "in (0, 1)", s)
        if not r >= 2:
            raise bad(where, "r", "at least 2", r)
        if not 0 < step < math.inf:
            raise bad(where, "step", "above 0", step)
        if n < 3:
            raise bad(where, "n", "at least 3", n)
        self.where, self.s, self.r, self.step, self.n = where, s, r, step, n
        self.even = float(r) == 2 * round(r / 2) and r <= 6  # beyond, the expansion cancels

    def _check(self, u: Tensor, shape: tuple[int, ...]) -> None:
        if u.dtype is not torch.float64 or u.shape[-len(shape) :] != shape:
            raise bad(self.where, "u", f"float64 with last axes {shape}", f"{u.dtype} {tuple(u.shape)}")


class FractionalLaplacian1D(_Seminorm):
    """Evaluate [u]_r^r and (-Delta)_r^s u on a uniform grid of a line; differentiable, batched over leading axes.

    Args:
        n: Grid points, >= 3.
        step: Their distance h, > 0.
        s: Order, in (0, 1).
        r: Power, >= 2; even ones up to 6 run in O(n log n).
        dense: Sum over all pairs although r is even; default False.

    Raises:
        ValueError: An argument is out of range, or `u` does not fit the grid.

    Example:
        >>> x = torch.linspace(-40, 40, 1601, dtype=torch.float64)
        >>> seminorm = FractionalLaplacian1D(1601, 0.05, s=0.5, r=2)
        >>> round(float(seminorm.energy(1 / (1 + x**2))), 3), round(math.pi**2 / 2, 3)
        (4.935, 4.935)
    """

    def __init__(self, n: int, step: int | float, *, s: int | float, r: int | float = 2.0, dense: bool = False) -> None:
        super().__init__("FractionalLaplacian1D", s, r, step, n)
        power = r - 1 - s * r
        moments = hat_moments(n, step, power)
        moments[0] += step ** (power + 1) / ((power + 1) * (power + 2))  # the half hat of distance 0
        distance = step * torch.arange(1, n + 1, dtype=torch.float64)
        a, b = (n - 1) * step, n * step
        rising = b ** (power + 1) / (power + 1) - (b ** (power + 2) - a ** (power + 2)) / (
            step * (power + 1) * (power + 2)
        )
        moments[-1] = rising  # beyond, all is outside and integrated exactly
        self.weights = moments / distance**r
        behind = self.weights.flip(0).cumsum(0).flip(0)  # sum over distances >= k
        self.exterior = behind + behind.flip(0) + 2 * b ** (-s * r) / (s * r)
        self.fast = self.even and not dense

    def energy(self, u: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
        """Return [u]_r^r."""
        self._check(u, (self.n,))
        if self.fast:
            return torch.mul((self(u) * u).sum(-1), self.step)
        inside = self._pair_weights() * (u[..., :, None] - u[..., None, :]).abs() ** self.r
        return torch.mul(inside.sum((-2, -1)) + 2 * (self.exterior * u.abs() ** self.r).sum(-1), self.step)

    def __call__(self, u: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """Return (-Delta)_r^s u."""
        self._check(u, (self.n,))
        outside = self.exterior * signed_power(u, self.r - 1)
        if not self.fast:
            d = signed_power(u[..., :, None] - u[..., None, :], self.r - 1)
            return torch.mul((self._pair_weights() * d).sum(-1) + outside, 2)
        power, total = round(self.r) - 1, torch.zeros_like(u)
        for m in range(power + 1):
            coefficient = math.comb(power, m) * (-1.0) ** m
            total = total + coefficient * u ** (power - m) * even_convolve(self.weights, u**m)
        return torch.mul(total + outside, 2)

    def _pair_weights(self) -> Tensor:
        index = torch.arange(self.n)
        padded = torch.cat([self.weights.new_zeros(1), self.weights])
        return padded[(index[:, None] - index[None, :]).abs()]


class FractionalLaplacian2D(_Seminorm):
    """Evaluate [u]_r^r and (-Delta)_r^s u on a square grid of the plane; differentiable, batched over leading axes.

    Args:
        n: Grid points a side, >= 3; each stands for a cell of its own.
        step: Their distance h, > 0.
        s: Order, in (0, 1).
        r: Power: 2, 4 or 6.

    Raises:
        ValueError: An argument is out of range, or `u` does not fit the grid.

    Example:
        >>> seminorm = FractionalLaplacian2D(41, 0.3, s=0.5, r=4)
        >>> seminorm.energy(torch.zeros(41, 41, dtype=torch.float64)).item()
        0.0
    """

    def __init__(self, n: int, step: int | float, *, s: int | float, r: int | float = 2.0) -> None:
        super().__init__("FractionalLaplacian2D", s, r, step, n)
        if not self.even:
            raise bad(self.where, "r", "2, 4 or 6", r)
        power = r - 2 - s * r
        distance = _lattice(n, step)
        self.weights = torch.where(distance > 0, cell_integrals(n, step, power) / distance.clamp_min(step) ** r, 0.0)
        theta = 2 * math.pi * (torch.arange(720, dtype=torch.float64) + 0.5) / 720
        edge = step / 2 / torch.maximum(theta.cos().abs(), theta.sin().abs())
        shares = theta.cos().abs() ** r * edge ** (r - s * r) / (r - s * r)
        self.near = float(shares.mean() * 2 * math.pi)  # of the cell around zero, times |grad u|^r
        at = step * (torch.arange(n, dtype=torch.float64) + 0.5)
        side = n * step
        cos, sin = theta.cos(), theta.sin()
        across = torch.where(cos > 0, side - at[:, None], at[:, None]) / cos.abs()  # rays to the box's edges
        along = torch.where(sin > 0, side - at[:, None], at[:, None]) / sin.abs()
        reach = torch.minimum(across[:, None, :], along[None, :, :])
        self.exterior = (reach ** (-s * r)).mean(-1) * 2 * math.pi / (s * r)
        self._spectrum = torch.fft.rfft2(wrapped(self.weights))

    def energy(self, u: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b"]:
        """Return [u]_r^r."""
        self._check(u, (self.n, self.n))
        far = 2 * (self._pairs(u) * u).sum((-2, -1)) + 2 * (self.exterior * u**self.r).sum((-2, -1))
        return self.step**2 * (far + self.near * self._slopes(u).sum((-2, -1)))

    def __call__(self, u: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
        """Return (-Delta)_r^s u: the energy's gradient, by cell and over r."""
        self._check(u, (self.n, self.n))
        with torch.enable_grad():
            v = u if u.requires_grad else u.detach().requires_grad_()
            steep = self._slopes(v).sum()
            (near,) = torch.autograd.grad(steep, v, create_graph=u.requires_grad)
        return 2 * (self._pairs(u) + self.exterior * u ** (self.r - 1)) + self.near / self.r * near

    def _pairs(self, u: Tensor) -> Tensor:
        """Return sum_j w_(i-j) (u_i - u_j)^(r-1), expanded into convolutions."""
        power, total = round(self.r) - 1, torch.zeros_like(u)
        for m in range(power + 1):
            convolved = torch.fft.irfft2(torch.fft.rfft2(u**m, (2 * self.n,) * 2) * self._spectrum, (2 * self.n,) * 2)
            total = total + math.comb(power, m) * (-1.0) ** m * u ** (power - m) * convolved[..., : self.n, : self.n]
        return total

    def _slopes(self, u: Tensor) -> Tensor:
        """Return |grad u|^r at all cells and one beyond, averaged over the four one-sided differences."""
        v = torch.nn.functional.pad(u, (2, 2, 2, 2))
        c = v[..., 1:-1, 1:-1]
        back, front = (c - v[..., :-2, 1:-1]) / self.step, (v[..., 2:, 1:-1] - c) / self.step
        left, right = (c - v[..., 1:-1, :-2]) / self.step, (v[..., 1:-1, 2:] - c) / self.step
        half = self.r / 2
        pairs = itertools.product((back, front), (left, right))
        total: Tensor = torch.stack([(a**2 + b**2) ** half for a, b in pairs]).sum(0)
        return total / 4


def _lattice(n: int, step: int | float) -> Tensor:
    k = step * torch.arange(n, dtype=torch.float64)
    return torch.hypot(k[:, None], k[None, :])


def cell_integrals(n: int, step: int | float, power: int | float) -> Float[Tensor, "n n"]:
    """Return the integrals of |z|^power over the cells around (i, j) step, i, j >= 0; power > -2; polar around zero."""
    nodes, weights = (torch.tensor(a) * step / 2 for a in np.polynomial.legendre.leggauss(6))
    at = (step * torch.arange(n, dtype=torch.float64))[:, None] + nodes
    squares = at**2
    made = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):  # a row at a time: memory stays small
        powers = (squares[i][:, None, None] + squares[None]) ** (power / 2)
        made[i] = torch.einsum("ajb,a,b->j", powers, weights, weights)
    theta = 2 * math.pi * (torch.arange(720, dtype=torch.float64) + 0.5) / 720
    edge = step / 2 / torch.maximum(theta.cos().abs(), theta.sin().abs())
    made[0, 0] = (edge ** (power + 2)).mean() * 2 * math.pi / (power + 2)
    return made


def wrapped(weights: Float[Tensor, "n n"]) -> Float[Tensor, "m m"]:
    """Lay the even continuation of weights out for a circular convolution of twice the length."""
    n = weights.shape[0]
    index = torch.arange(2 * n)
    index = torch.where(index <= n, index, 2 * n - index)
    padded = torch.nn.functional.pad(weights, (0, 1, 0, 1))
    return padded[index][:, index]
