"""Functions with a structure from which a good Hessian approximation can be read."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.optim.regularized import LowRank

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Composite:
    """A function f(x) = mean of outer(inner(x)), of which `minimize_gns` takes Gauss-Newton and Fisher matrices.

    Args:
        outer: Gives one loss a row of what `inner` gives, or one number; convex, if Gauss-Newton's matrix is to be
            >= 0.
        inner: The model: gives a tensor for a vector x.

    Example:
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> logistic = Composite(lambda z: torch.nn.functional.softplus(-z), lambda x: a @ x)
        >>> float(logistic(torch.zeros(2)).mul(1000).round())  # log 2
        693.0
    """

    outer: Function
    inner: Function

    def __call__(self, x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return f(x)."""
        return self.losses(x).mean()

    def losses(self, x: Float[Tensor, " n"]) -> Tensor:
        """Return the losses whose mean f(x) is.

        Args:
            x: The point.

        Returns:
            What `outer` gives.
        """
        return self.outer(self.inner(x))

    def gauss_newton(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return J' H_outer J as a matrix.

        Args:
            x: The point.

        Returns:
            The generalized Gauss-Newton matrix; the Hessian where `inner` is linear.
        """
        z = self.inner(x)
        bend = self._bend(z)
        columns = torch.func.jacrev(self.inner)(x).reshape(z.numel(), -1).T  # a column of J is a row here
        bent = torch.func.vmap(lambda v: bend(v.reshape(z.shape)))(columns)
        matrix: Tensor = bent.reshape(len(columns), -1) @ columns.T
        return (matrix + matrix.T) / 2

    def gauss_newton_product(self, x: Float[Tensor, " n"]) -> Function:
        """Return the function that multiplies by the Gauss-Newton matrix, for where it is too large to be kept.

        Args:
            x: The point.

        Returns:
            v -> J' H_outer J v.
        """
        found: tuple[Any, ...] = torch.func.vjp(self.inner, x)
        z, back = found

        def transposed(u: Tensor) -> Tensor:
            out: Tensor = back(u)[0]
            return out

        ahead = torch.func.vjp(transposed, torch.zeros_like(z))[1]  # J'u is linear in u: its derivative is J
        bend = self._bend(z)
        return lambda v: transposed(bend(ahead(v)[0]))

    def _bend(self, z: Tensor) -> Function:
        """Return the product with the Hessian of the mean of `outer` at z, which is symmetric: H'v is H v."""

        def mean(z: Tensor) -> Tensor:
            return self.outer(z).mean()

        back = torch.func.vjp(torch.func.grad(mean), z)[1]

        def product(v: Tensor) -> Tensor:
            out: Tensor = back(v)[0]
            return out

        return product

    def fisher(self, x: Float[Tensor, " n"]) -> LowRank:
        """Return the empirical Fisher matrix: the mean of g g' over the losses' gradients g.

        Args:
            x: The point.

        Returns:
            A matrix of rank at most the number of losses.
        """
        rows = torch.func.jacrev(self.losses)(x).reshape(-1, len(x))
        return LowRank(rows / math.sqrt(len(rows)))


class LogSumExp:
    """The soft maximum f(x) = mu log sum exp((a_i'x - b_i) / mu), with its weighted Gauss-Newton matrix and its metric.

    Args:
        a: Rows a_i.
        b: Offsets.
        mu: Width of the smoothing, > 0; f exceeds max(a_i'x - b_i) by at most mu log m. Default 1.

    Raises:
        ValueError: `mu` or a shape is wrong.

    Example:
        >>> f = LogSumExp(torch.tensor([[1.0], [-1.0]]), torch.zeros(2), mu=0.01)
        >>> round(float(f(torch.tensor([3.0]))), 4)  # |3|
        3.0
    """

    def __init__(self, a: Float[Tensor, "m n"], b: Float[Tensor, " m"], mu: float = 1.0) -> None:
        if not 0 < mu < math.inf:
            raise bad("LogSumExp", "mu", "a finite float > 0", mu)
        if a.ndim != 2 or b.shape != a.shape[:1]:
            raise bad("LogSumExp", "b", "one number a row of the matrix `a`", (tuple(a.shape), tuple(b.shape)))
        self.a, self.b, self.mu = a, b, mu

    def __call__(self, x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return f(x)."""
        return self.mu * torch.logsumexp((self.a @ x - self.b) / self.mu, 0)

    def gradient(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the gradient in closed form.

        Args:
            x: The point.

        Returns:
            The mean of the a_i, weighted by their softmax.
        """
        return self.a.T @ self._weights(x)

    def hessian(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return the Hessian in closed form.

        Args:
            x: The point.

        Returns:
            The covariance of the a_i over mu.
        """
        g = self.gradient(x)
        return self.weighted(x) - torch.outer(g, g) / self.mu

    def weighted(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return the weighted Gauss-Newton matrix, the Hessian less its negative part.

        Args:
            x: The point.

        Returns:
            A' diag(softmax) A / mu, which exceeds the Hessian by g g' / mu.
        """
        return self.a.T @ (self._weights(x)[:, None] * self.a) / self.mu

    @property
    def metric(self) -> Float[Tensor, "n n"]:
        """A'A, made positive definite; see `gram`."""
        return gram(self.a)

    def _weights(self, x: Tensor) -> Tensor:
        return torch.softmax((self.a @ x - self.b) / self.mu, 0)


class PowerNorm:
    """The power of a norm f(x) = ||u(x)||^p / p, with its Gauss-Newton matrix and that one's rank-one part.

    Args:
        u: Residuals: gives a vector for a vector, differentiably.
        p: Power, >= 2; 2 is least squares.

    Raises:
        ValueError: `p` is below 2.

    Example:
        >>> f = PowerNorm(lambda x: 2 * x, p=4)
        >>> float(f(torch.tensor([1.0, 0.0])))
        4.0
    """

    def __init__(self, u: Function, p: float) -> None:
        if not 2 <= p < math.inf:
            raise bad("PowerNorm", "p", "a finite float >= 2", p)
        self.u, self.p = u, p

    def __call__(self, x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return f(x)."""
        return self.u(x).square().sum() ** (self.p / 2) / self.p

    def gauss_newton(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return J' H_outer J: the Hessian where u is linear.

        Args:
            x: The point.

        Returns:
            ||u||^(p-2) J'J + (p-2) ||u||^(p-4) (J'u)(J'u)'.
        """
        size, jacobian, along = self._parts(x)
        # the direction is normalized first: ||u||^(p-4) would be infinite at u = 0 for p < 4
        return size ** (self.p - 2) * (jacobian.T @ jacobian + (self.p - 2) * torch.outer(along, along))

    def fisher(self, x: Float[Tensor, " n"]) -> LowRank:
        """Return the rank-one part of the Gauss-Newton matrix; the rest is the metric's, where u is linear.

        Args:
            x: The point.

        Returns:
            (p-2) ||u||^(-p) g g' with the gradient g, as its row.
        """
        size, _, along = self._parts(x)
        return LowRank(math.sqrt(self.p - 2) * size ** ((self.p - 2) / 2) * along[None])

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = self.u(x)
        jacobian = torch.func.jacrev(self.u)(x)
        size = value.norm()
        along = jacobian.T @ (value / size) if bool(size > 0) else torch.zeros_like(x)
        return size, jacobian, along


def gram(a: Float[Tensor, "m n"]) -> Float[Tensor, "n n"]:
    """Return A'A plus 1e-8 of its mean diagonal: the natural metric of a function of A x, never singular.

    Args:
        a: The matrix A, not 0.

    Returns:
        A positive definite matrix.

    Example:
        >>> gram(torch.tensor([[2.0]], dtype=torch.float64))
        tensor([[4.0000]], dtype=torch.float64)
    """
    matrix = a.T @ a
    matrix.diagonal().add_(1e-8 * matrix.diagonal().mean())
    return matrix
