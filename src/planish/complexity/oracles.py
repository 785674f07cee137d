r"""Oracles that count: what a method may ask of a function, and how often it has asked.

A stochastic oracle withholds the one entry of the gradient that would open the next door, except with probability q:

    g_i(x, z) = d_i F(x) (1 + 1[i > prog_{1/4}(x)] (z / q - 1)),   z ~ Bernoulli(q)

so that T doors need about T / q queries. With `smooth` the indicator is replaced by a smooth function of x, and the
oracle is smooth in mean square: E|g(x) - g(y)|^2 <= (328^2 / q) |x - y|^2 for the unscaled chain.

Reference:
    Arjevani et al., Lower Bounds for Non-Convex Stochastic Optimization, 2019. https://arxiv.org/abs/1912.02365
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.complexity.instances import ZeroChain, chain_grad

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


class CountingOracle:
    """Answer queries for a function's value and derivatives, and count them: a batch of n points is n queries.

    Args:
        f: The function; a `ZeroChain` also has its progress recorded, query by query.
        order: Highest derivative in an answer, 0 to 2; default 1.

    Raises:
        ValueError: `order` is out of range.

    Attributes:
        queries: Points asked for so far.
        calls: Calls so far.
        progress: For a `ZeroChain`, the number of open doors at each query.

    Example:
        >>> oracle = CountingOracle(ZeroChain(3))
        >>> value, grad = oracle(torch.zeros(2, 3, dtype=torch.float64))
        >>> oracle.queries, oracle.calls, oracle.progress
        (2, 1, [0, 0])
    """

    def __init__(self, f: ZeroChain | Callable[[Tensor], Tensor], order: int = 1) -> None:
        if order not in {0, 1, 2}:
            raise bad("CountingOracle", "order", "0, 1 or 2", order)
        self.f, self.order = f, order
        self.queries = self.calls = 0
        self.progress: list[int] = []

    def __call__(self, x: Float[Tensor, "*b dim"]) -> tuple[Tensor, ...]:
        """Return (value, gradient, Hessian) as far as `order` goes."""
        self.calls += 1
        points = x.detach().reshape(-1, x.shape[-1])
        self.queries += len(points)
        if isinstance(self.f, ZeroChain):
            self.progress += self.f.progress(points).tolist()
            answers = [self.f.value(points), self.f.grad(points)][: self.order + 1]
            if self.order == 2:
                answers.append(torch.stack([self.f.hessian(point) for point in points]))
        else:
            answers = [torch.stack([self.f(point) for point in points])]
            if self.order >= 1:
                answers.append(torch.stack([torch.func.grad(self.f)(point) for point in points]))
            if self.order == 2:
                answers.append(torch.stack([torch.autograd.functional.hessian(self.f, point) for point in points]))
        return tuple(a.reshape((*x.shape[:-1], *a.shape[1:])) for a in answers)


class StochasticOracle:
    """Answer queries with an unbiased gradient that shows the next door with probability q only.

    Args:
        chain: A plain (not rotated) chain.
        success: q, the probability that a query shows the next door, in (0, 1].
        smooth: Whether the answer changes smoothly with x; default False.
        generator: Draws the coins.

    Raises:
        ValueError: The chain is rotated, or `success` is out of range.

    Attributes:
        queries: Points asked for so far.

    Example:
        >>> oracle = StochasticOracle(ZeroChain(3), 0.5, generator=torch.Generator().manual_seed(0))
        >>> oracle(torch.zeros(4, 3, dtype=torch.float64))[:, 0].count_nonzero().item() < 4, oracle.queries
        (True, 4)
    """

    def __init__(
        self, chain: ZeroChain, success: int | float, *, smooth: bool = False, generator: torch.Generator | None = None
    ) -> None:
        if chain.basis is not None:
            raise bad("StochasticOracle", "chain", "plain, not rotated", chain.rotation)
        if not 0 < success <= 1:
            raise bad("StochasticOracle", "success", "in (0, 1]", success)
        self.chain, self.success, self.smooth, self.generator = chain, success, smooth, generator
        self.queries = 0

    @property
    def variance(self) -> float:
        """Bound on E|g - grad f|^2: one entry of the gradient, at most 23 (scaled), is kept back."""
        slope = self.chain.height / self.chain.width
        return float((23 * slope) ** 2 * (1 - self.success) / self.success)

    def hidden(self, x: Float[Tensor, "*b dim"]) -> Float[Tensor, "*b dim"]:
        """Return by how much each entry depends on the coin, 0 to 1."""
        y = self.chain.coordinates(x)
        if not self.smooth:
            index = torch.arange(1, y.shape[-1] + 1)
            last = ((y.abs() > 0.25) * index).amax(-1, keepdim=True)
            return (index > last).to(y.dtype)
        tail = step(y.abs()).square().flip(-1).cumsum(-1).flip(-1)
        return step(1 - tail.sqrt())

    def __call__(self, x: Float[Tensor, "*b dim"], coin: Tensor | None = None) -> Float[Tensor, "*b dim"]:
        """Return one stochastic gradient a point, each with a coin of its own unless coins (0 or 1) are given."""
        y = self.chain.coordinates(x)
        self.queries += y[..., 0].numel()
        if coin is None:
            drawn = torch.rand(y.shape[:-1], generator=self.generator, dtype=torch.float64)
            coin = (drawn < self.success).to(torch.float64)
        slope = self.chain.height / self.chain.width
        return slope * (chain_grad(y) * (1 + self.hidden(x) * (coin[..., None] / self.success - 1)))


def step(t: Tensor) -> Tensor:
    """Rise from 0 at 1/4 to 1 at 1/2, infinitely smooth: the integral of exp(-1 / (100 (t - 1/4) (1/2 - t)))."""
    nodes, weights = torch.tensor(_NODES), torch.tensor(_WEIGHTS)

    def integral(end: Tensor) -> Tensor:
        half = (end - 0.25) / 2
        at = 0.25 + half[..., None] * (nodes + 1)
        room = (at - 0.25) * (0.5 - at)
        inside = room > 0
        density = torch.where(inside, torch.exp(-1 / (100 * torch.where(inside, room, torch.ones_like(room)))), 0.0)
        return half * (density * weights).sum(-1)

    whole = integral(torch.tensor(0.5, dtype=torch.float64))
    return (integral(t.clamp(0.25, 0.5)) / whole).clamp(0.0, 1.0)


def geometric_queries(length: int, success: int | float) -> tuple[float, float]:
    """Return mean and standard deviation of the queries that T doors need, each opened with probability q.

    Args:
        length: T, >= 1.
        success: q in (0, 1].

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> geometric_queries(10, 0.5)
        (20.0, 4.47213595499958)
    """
    if length < 1:
        raise bad("geometric_queries", "length", "at least 1", length)
    if not 0 < success <= 1:
        raise bad("geometric_queries", "success", "in (0, 1]", success)
    return length / success, math.sqrt(length * (1 - success)) / success
