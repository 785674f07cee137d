r"""The chain: a smooth nonconvex function whose stationary points lie behind T doors that open one after another.

    F_T(x) = sum_{i=1..T} h(x_{i-1}, x_i),   h(a, b) = Psi(-a) Phi(-b) - Psi(a) Phi(b),   x_0 = 1
    Psi(a) = exp(1 - 1 / (2a - 1)^2) for a > 1/2, else 0;   Phi(b) = sqrt(e) int_{-inf}^b exp(-t^2 / 2) dt

Coordinate i has a gradient only once coordinate i - 1 has passed 1/2, and as long as one coordinate lies within (-1, 1)
the gradient is longer than 1. Derivatives of any order have the same property, so no local information helps to skip a
door. Hidden behind a random rotation, the doors cannot be guessed either.

Reference:
    Carmon, Duchi, Hinder, Sidford, Lower Bounds for Finding Stationary Points I, 2017. https://arxiv.org/abs/1710.11606
    Zhang, Li, Quantum Lower Bounds for Finding Stationary Points of Nonconvex Functions, 2022.
    https://arxiv.org/abs/2212.03906
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from planish._support import bad

SMOOTHNESS = {1: 152.0, 2: 3781.0, 3: 8.58e4, 4: 3.77e6}
"""Lipschitz constants of the chain's derivatives by their order: 152 proved, the others found on a fine grid."""

GAP = 12.0  # F_T(0) - inf F_T is at most this many times T
_ROTATED = 1.02  # what the soft projection and the quadratic add to the constants above, at most
_RADIUS = 230.0  # of the soft projection, in sqrt(T)
_LEAST = 1 / 28  # of 2a - 1: below, exp(-1 / u^2) is 0 in float64


@lru_cache
def _polynomial(order: int) -> tuple[float, ...]:
    """Return P with Psi^(n)(a) = Psi(a) P(1 / (2a - 1)), lowest power first: P_{n+1} = 4 w^3 P_n - 2 w^2 P_n'."""
    if order == 0:
        return (1.0,)
    before = _polynomial(order - 1)
    after = [0.0] * (len(before) + 3)
    for power, c in enumerate(before):
        after[power + 3] += 4 * c
        after[power + 1] -= 2 * power * c
    return tuple(after)


def psi(a: Tensor, order: int = 0) -> Tensor:
    """Return the derivative of Psi of a given order; autograd may go on from there."""
    u = 2 * a - 1
    opens = u > _LEAST
    w = 1 / torch.where(opens, u, torch.ones_like(u))  # masked before it is inverted, else autograd meets NaN
    total = torch.zeros_like(w)
    for c in reversed(_polynomial(order)):
        total = total * w + c
    return torch.where(opens, torch.exp(1 - w.square()) * total, torch.zeros_like(total))


def phi(b: Tensor, order: int = 0) -> Tensor:
    """Return the derivative of Phi of a given order: from the first on, Hermite polynomials times a Gaussian."""
    if order == 0:
        return torch.mul(torch.special.ndtr(b), math.sqrt(2 * math.pi * math.e))
    hermite, before = torch.ones_like(b), torch.zeros_like(b)
    for n in range(order - 1):
        hermite, before = b * hermite - n * before, hermite
    sign = -1.0 if order % 2 == 0 else 1.0
    return sign * math.exp(0.5) * hermite * torch.exp(-b.square() / 2)


def link(a: Tensor, b: Tensor, m: int = 0, n: int = 0) -> Tensor:
    """Return d^m/da^m d^n/db^n h(a, b)."""
    sign = -1.0 if (m + n) % 2 else 1.0
    return sign * psi(-a, m) * phi(-b, n) - psi(a, m) * phi(b, n)


class ZeroChain:
    """A hard function for finding stationary points, scaled to given constants, plain or hidden by a rotation.

    The plain chain is hard for methods that start at 0 and stay in the span of what they have been told; the rotated
    one for every method, also randomised, if `dim` is large enough. Tensors are float64; points have shape (..., dim).

    Args:
        length: Number of doors T, >= 1.
        order: Which derivative's Lipschitz constant `lipschitz` is, 1 to 4; default 1, the gradient.
        lipschitz: That constant; default that of the unscaled chain (152 for order 1, 2 % more if rotated).
        eps: Gradients are longer than this until the last door is open, > 0; default 1 (1/2 if rotated).
        rotation: "none" (default) or "haar".
        dim: Number of variables, >= T; default T, or 40 T if rotated.
        generator: Draws the rotation; required with "haar".

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> f = ZeroChain(5)
        >>> x = torch.zeros(5, dtype=torch.float64)
        >>> f.grad(x).nonzero().flatten().tolist(), f.progress(x).item()  # only the first door can be seen
        ([0], 0)
    """

    def __init__(
        self,
        length: int,
        *,
        order: int = 1,
        lipschitz: int | float | None = None,
        eps: int | float | None = None,
        rotation: Literal["none", "haar"] = "none",
        dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if length < 1:
            raise bad("ZeroChain", "length", "at least 1", length)
        if order not in SMOOTHNESS:
            raise bad("ZeroChain", "order", "1, 2, 3 or 4", order)
        if rotation not in {"none", "haar"}:
            raise bad("ZeroChain", "rotation", "'none' or 'haar'", rotation)
        hidden = rotation == "haar"
        if hidden and generator is None:
            raise bad("ZeroChain", "generator", "a torch.Generator where the rotation is drawn", generator)
        dim = dim if dim is not None else (40 * length if hidden else length)
        if dim < length or (not hidden and dim != length):
            raise bad("ZeroChain", "dim", f"{length}" if not hidden else f"at least {length}", dim)
        base = SMOOTHNESS[order] * (_ROTATED if hidden else 1)
        self.length, self.dim, self.order, self.rotation = length, dim, order, rotation
        self.lipschitz = base if lipschitz is None else float(lipschitz)
        self.eps = (0.5 if hidden else 1.0) if eps is None else float(eps)
        for name in ("lipschitz", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise bad("ZeroChain", name, "above 0", getattr(self, name))
        # f(x) = height F(x / width): D^(p+1) scales by height / width^(p+1), the gradient by height / width.
        slope = self.eps * (2 if hidden else 1)
        self.width: float = (base * slope / self.lipschitz) ** (1 / order)
        self.height: float = slope * self.width
        self.basis: Tensor | None = None
        if hidden:
            made = torch.randn(dim, length, dtype=torch.float64, generator=generator)
            q, r = torch.linalg.qr(made)
            self.basis = q * r.diagonal().sign()  # without the signs the law would not be Haar's

    @classmethod
    def for_target(
        cls,
        eps: int | float,
        *,
        order: int = 1,
        delta: int | float = 1.0,
        lipschitz: int | float = 1.0,
        rotation: Literal["none", "haar"] = "none",
        generator: torch.Generator | None = None,
    ) -> "ZeroChain":
        """Build the longest chain with f(0) - inf f <= delta whose gradients exceed `eps` until its end.

        Args:
            eps: Wanted gradient norm, > 0.
            order: As in `ZeroChain`.
            delta: Bound on the gap, > 0; default 1.
            lipschitz: Constant of the derivative of that order, > 0; default 1.
            rotation: As in `ZeroChain`.
            generator: As in `ZeroChain`.

        Raises:
            ValueError: An argument is out of range, or the constants leave no room for a single door.

        Example:
            >>> ZeroChain.for_target(1e-3).length
            548
        """
        length = chain_length(eps, order=order, delta=delta, lipschitz=lipschitz, hidden=rotation == "haar")
        if length < 1:
            raise bad("ZeroChain.for_target", "eps", "small enough for one door with this gap and smoothness", eps)
        return cls(length, order=order, lipschitz=lipschitz, eps=eps, rotation=rotation, generator=generator)

    def coordinates(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b length"]:
        """Return the chain's own coordinates of points: what its doors see."""
        if x.shape[-1:] != (self.dim,) or x.dtype is not torch.float64:
            raise bad("ZeroChain", "x", f"float64 with last axis {self.dim}", f"{x.dtype} {tuple(x.shape)}")
        x = x / self.width
        return x if self.basis is None else (x / self._stretch(x)) @ self.basis

    def _stretch(self, x: Tensor) -> Tensor:
        return (1 + x.square().sum(-1, keepdim=True) / (_RADIUS**2 * self.length)).sqrt()

    def value(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b"]:
        """Return f(x); autograd may differentiate it any number of times."""
        y = self.coordinates(x)
        a = torch.cat([torch.ones_like(y[..., :1]), y[..., :-1]], -1)
        total = link(a, y).sum(-1)
        if self.basis is not None:
            total = total + (x / self.width).square().sum(-1) / 10
        return self.height * total

    def grad(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b dim"]:
        """Return the gradient in closed form; what is zero is exactly zero."""
        y = self.coordinates(x)
        return self.height / self.width * self._lifted(x / self.width, chain_grad(y))

    def _lifted(self, x: Tensor, inner: Tensor) -> Tensor:
        """Carry a gradient in the chain's coordinates to the (unscaled) variables, and add the quadratic's."""
        if self.basis is None:
            return inner
        stretch = self._stretch(x)
        g = inner @ self.basis.mT
        along = (x * g).sum(-1, keepdim=True) / (_RADIUS**2 * self.length * stretch**3)
        return g / stretch - x * along + x / 5

    def hessian(self, x: Float[Tensor, " dim"]) -> Float[Tensor, "dim dim"]:
        """Return the Hessian at one point."""
        eye = torch.eye(self.dim, dtype=torch.float64)
        return self.derivative(x, [eye[:, None].expand(-1, self.dim, -1), eye[None].expand(self.dim, -1, -1)])

    def derivative(self, x: Float[Tensor, "*b dim"], directions: list[Tensor]) -> Tensor:
        """Return the derivative tensor of f at x, applied to directions: as many as its order, shapes (..., dim).

        Raises:
            ValueError: There is no direction.
        """
        if not directions:
            raise bad("ZeroChain.derivative", "directions", "at least one tensor", directions)
        if self.basis is not None:
            return _nested(self.value, x, directions)
        y, order = self.coordinates(x), len(directions)
        a = torch.cat([torch.ones_like(y[..., :1]), y[..., :-1]], -1)
        # The coefficient of z^m in prod_j (v_j[i-1] z + v_j[i]) sums over choices of m directions for h's first slot.
        sums: list[Tensor] = [torch.ones_like(y)]
        for v in [direction / self.width for direction in directions]:
            first = torch.cat([torch.zeros_like(v[..., :1]), v[..., :-1]], -1)
            longer = [s * v for s in sums] + [torch.zeros_like(v)]
            for m, s in enumerate(sums):
                longer[m + 1] = longer[m + 1] + s * first
            sums = longer
        parts = [link(a, y, m, order - m) * s for m, s in enumerate(sums)]
        return self.height * torch.stack(torch.broadcast_tensors(*parts)).sum(0).sum(-1)

    def progress(self, x: Float[Tensor, "*b dim"], threshold: int | float = 0.5) -> Int[Tensor, "*b"]:
        """Return the index of the last coordinate beyond a threshold in size, 0 if there is none."""
        return progress(self.coordinates(x), threshold)

    def is_stationary(self, x: Float[Tensor, "*b dim"]) -> Tensor:
        """Say whether the gradient's norm is at most `eps`."""
        return torch.le(torch.linalg.vector_norm(self.grad(x), dim=-1), self.eps)


def chain_grad(y: Tensor) -> Tensor:
    """Return the gradient of the plain unscaled chain."""
    a = torch.cat([torch.ones_like(y[..., :1]), y[..., :-1]], -1)
    own = link(a, y, 0, 1)
    after = link(y[..., :-1], y[..., 1:], 1, 0)
    return own + torch.cat([after, torch.zeros_like(y[..., :1])], -1)


def progress(y: Tensor, threshold: int | float) -> Tensor:
    """Return the index (from 1) of the last coordinate beyond a threshold, 0 for none."""
    index = torch.arange(1, y.shape[-1] + 1)
    return ((y.abs() > threshold) * index).amax(-1)


def chain_length(eps: int | float, *, order: int, delta: int | float, lipschitz: int | float, hidden: bool) -> int:
    """Return how many doors fit under a gap and a smoothness; the caller's arguments are checked here.

    Raises:
        ValueError: An argument is out of range.
    """
    where = "query_lower_bound"
    if order not in SMOOTHNESS:
        raise bad(where, "order", "1, 2, 3 or 4", order)
    for name, number in (("eps", eps), ("delta", delta), ("lipschitz", lipschitz)):
        if not 0 < number < math.inf:
            raise bad(where, name, "above 0", number)
    base = SMOOTHNESS[order] * (_ROTATED if hidden else 1)
    slope = eps * (2 if hidden else 1)
    room: float = delta / GAP * (lipschitz / base) ** (1 / order) * slope ** (-(1 + order) / order)
    return math.floor(room)


def _nested(f: Callable[[Tensor], Tensor], x: Tensor, directions: list[Tensor]) -> Tensor:
    """Differentiate along one direction after the other."""
    shape = torch.broadcast_shapes(x.shape, *(v.shape for v in directions))
    with torch.enable_grad():
        point = x.detach().expand(shape).clone().requires_grad_()
        total = f(point)
        for v in directions:
            (g,) = torch.autograd.grad(total.sum(), point, create_graph=True)
            total = (g * v).sum(-1)
    return total.detach()
