"""Solve (H + lambda B) h = g for every lambda that a search asks for, with H a matrix, low-rank, diagonal or a product.

H is prepared once an iterate. "eigh" and "cg" then answer every further lambda without touching H again: the first
keeps the eigenvalues of B^-1 H, the second a Krylov basis, on which all shifts of H act alike. A system that is not
positive definite has no answer (None), and the search takes a larger lambda.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad

Solver = Literal["auto", "cholesky", "eigh", "cg", "low_rank"]
Solve = Callable[[float, float], Tensor | None]
"""(lambda, relative tolerance) -> h; the tolerance matters to "cg" alone."""
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LowRank:
    """A Hessian approximation U'U, kept as U.

    Args:
        rows: U, one row a rank; for a Fisher matrix the gradients of examples over the root of their number.

    Raises:
        ValueError: `rows` is no matrix.

    Example:
        >>> LowRank(torch.tensor([[1.0, 2.0]])).product(torch.tensor([1.0, 1.0]))
        tensor([3., 6.])
    """

    rows: Float[Tensor, "rank n"]

    def __post_init__(self) -> None:
        if self.rows.ndim != 2:
            raise bad("LowRank", "rows", "a matrix (rank, n)", tuple(self.rows.shape))

    def product(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Multiply by U'U.

        Args:
            v: A vector.

        Returns:
            U'(U v).
        """
        return self.rows.T @ (self.rows @ v)


Curvature = Tensor | LowRank | Product
"""H: a matrix, a vector (its diagonal), rows of a low-rank one, or a function that multiplies by it."""


class Metric:
    """The B that measures steps and, inverted, gradients: the identity, a diagonal, or a matrix."""

    def __init__(self, where: str, metric: Tensor | None, like: Tensor) -> None:
        n = len(like)
        self.size, self.like = n, like
        self.matrix: Tensor | None = None
        self.factor: Tensor | None = None
        self.diagonal: Tensor | None = None
        if metric is None:
            return
        metric = torch.as_tensor(metric).to(like)
        if metric.shape == (n,):
            if not bool(((metric > 0) & torch.isfinite(metric)).all()):
                raise bad(where, "metric", "positive everywhere", f"a diagonal with {float(metric.min()):.4g}")
            self.diagonal = metric
            return
        if metric.shape != (n, n):
            raise bad(where, "metric", f"None, a vector ({n},) or a matrix ({n}, {n})", tuple(metric.shape))
        check_symmetric(where, "metric", metric)
        factor, info = torch.linalg.cholesky_ex(metric)
        if int(info):
            raise bad(where, "metric", "positive definite", "an indefinite matrix")
        self.matrix, self.factor = metric, factor

    def product(self, v: Tensor) -> Tensor:
        """Return B v."""
        if self.matrix is not None:
            return self.matrix @ v
        return v if self.diagonal is None else self.diagonal * v

    def solve(self, v: Tensor) -> Tensor:
        """Return B^-1 v, for a vector or for columns."""
        if self.factor is not None:
            columns = v if v.ndim == 2 else v[:, None]
            return torch.cholesky_solve(columns, self.factor).reshape(v.shape)
        if self.diagonal is None:
            return v
        return v / (self.diagonal if v.ndim == 1 else self.diagonal[:, None])

    def dual_norm(self, g: Tensor) -> float:
        """Return <g, B^-1 g>^(1/2), the norm of a gradient."""
        if self.factor is not None:
            return float(torch.linalg.solve_triangular(self.factor, g[:, None], upper=False).norm())
        return float((g if self.diagonal is None else g / self.diagonal.sqrt()).norm())

    def norm(self, h: Tensor) -> float:
        """Return <B h, h>^(1/2), the norm of a step."""
        return math.sqrt(max(float(self.product(h) @ h), 0.0))

    def dense(self) -> Tensor:
        """Return B as a matrix."""
        if self.matrix is not None:
            return self.matrix
        ones = torch.ones_like(self.like) if self.diagonal is None else self.diagonal
        return torch.diag(ones)


def check_symmetric(where: str, name: str, matrix: Tensor) -> None:
    """Refuse a matrix that is not symmetric, beyond the rounding of computing it, or not finite.

    Raises:
        ValueError: It is not.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise bad(where, name, "finite", "a matrix with NaN or Inf")
    skew = float((matrix - matrix.T).abs().max())
    if skew > 1e4 * torch.finfo(matrix.dtype).eps * float(matrix.abs().max()):
        raise bad(where, name, "symmetric", f"a matrix that differs from its transpose by {skew:.4g}")


def check_solver(where: str, solver: str) -> None:
    """Refuse an unknown solver.

    Raises:
        ValueError: It is one.
    """
    if solver not in get_args(Solver):
        raise bad(where, "solver", f"one of {', '.join(get_args(Solver))}", solver)


def prepare(
    where: str, curvature: Curvature, metric: Metric, gradient: Tensor, solver: Solver, limit: int | None = None
) -> Solve:
    """Make the function that solves (H + lambda B) h = gradient.

    Raises:
        ValueError: H has the wrong shape, is not symmetric or not finite, or the solver cannot take it.
    """
    n = len(gradient)
    if isinstance(curvature, Tensor):
        if curvature.shape not in ((n, n), (n,)):
            raise bad(where, "hess", f"of shape ({n}, {n}) or ({n},)", tuple(curvature.shape))
        if curvature.ndim == 2:
            check_symmetric(where, "hess", curvature)
        elif not bool(torch.isfinite(curvature).all()):
            raise bad(where, "hess", "finite", "a diagonal with NaN or Inf")
    elif isinstance(curvature, LowRank) and curvature.rows.shape[1] != n:
        raise bad(where, "hess", f"rows of {n} numbers", tuple(curvature.rows.shape))
    diagonal = isinstance(curvature, Tensor) and curvature.ndim == 1
    if solver == "auto":
        if isinstance(curvature, LowRank):
            solver = "low_rank"
        elif isinstance(curvature, Tensor):
            solver = "cholesky"
        else:
            solver = "cg"
    if solver == "low_rank":
        if not isinstance(curvature, LowRank):
            raise bad(where, "solver", "'low_rank' only where the Hessian is a LowRank", solver)
        return _woodbury(curvature.rows, metric, gradient)
    if solver == "cg":
        return Krylov(_product(curvature), metric, gradient, limit)
    if diagonal and metric.matrix is None and isinstance(curvature, Tensor):
        return _elementwise(curvature, metric, gradient)
    matrix = _dense(curvature, n, gradient)
    return (_eigh if solver == "eigh" else _cholesky)(matrix, metric, gradient)


def _product(curvature: Curvature) -> Product:
    if isinstance(curvature, LowRank):
        return curvature.product
    if not isinstance(curvature, Tensor):
        return curvature
    return curvature.mul if curvature.ndim == 1 else curvature.matmul


def _dense(curvature: Curvature, n: int, like: Tensor) -> Tensor:
    if isinstance(curvature, LowRank):
        return curvature.rows.T @ curvature.rows
    if isinstance(curvature, Tensor):
        return torch.diag(curvature) if curvature.ndim == 1 else curvature
    columns = [curvature(e) for e in torch.eye(n, dtype=like.dtype, device=like.device)]
    matrix = torch.stack(columns)
    return (matrix + matrix.T) / 2


def _cholesky(matrix: Tensor, metric: Metric, g: Tensor) -> Solve:
    B = metric.dense()

    def solve(lam: float, _: float) -> Tensor | None:
        factor, info = torch.linalg.cholesky_ex(matrix + lam * B)
        return None if int(info) else torch.cholesky_solve(g[:, None], factor)[:, 0]

    return solve


def _eigh(matrix: Tensor, metric: Metric, g: Tensor) -> Solve:
    factor = metric.factor
    if factor is None:
        root = torch.ones_like(g) if metric.diagonal is None else metric.diagonal.sqrt()
        factor = torch.diag(root)
    half = torch.linalg.solve_triangular(factor, matrix, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    seen = vectors.T @ torch.linalg.solve_triangular(factor, g[:, None], upper=False)[:, 0]

    def solve(lam: float, _: float) -> Tensor | None:
        shifted = values + lam
        if not bool((shifted > 0).all()):
            return None
        white = vectors @ (seen / shifted)
        out: Tensor = torch.linalg.solve_triangular(factor.T, white[:, None], upper=True)[:, 0]
        return out

    return solve


def _elementwise(diagonal: Tensor, metric: Metric, g: Tensor) -> Solve:
    B = torch.ones_like(g) if metric.diagonal is None else metric.diagonal

    def solve(lam: float, _: float) -> Tensor | None:
        shifted = diagonal + lam * B
        return g / shifted if bool((shifted > 0).all()) else None

    return solve


def _woodbury(rows: Tensor, metric: Metric, g: Tensor) -> Solve:
    """One factorization of B, and one of the size of the rank for each lambda; of rank one it is Sherman-Morrison's."""
    inner = metric.solve(rows.T)  # B^-1 U'
    small, plain = rows @ inner, metric.solve(g)
    seen, one = rows @ plain, torch.eye(len(rows), dtype=g.dtype, device=g.device)

    def solve(lam: float, _: float) -> Tensor | None:
        factor, info = torch.linalg.cholesky_ex(small + lam * one)
        if int(info):  # lambda is lost in the rounding of U B^-1 U'
            return None
        return (plain - inner @ torch.cholesky_solve(seen[:, None], factor)[:, 0]) / lam

    return solve


@dataclass
class Krylov:
    """Conjugate gradients for all lambda at once: Lanczos' basis of B^-1 H, extended when a lambda needs more.

    Larger lambda need no more of it than smaller ones, so a search that only raises lambda after it moved its
    parameters multiplies by H only before. Products are counted in `products`.
    """

    product: Product
    metric: Metric
    gradient: Tensor
    limit: int | None = None
    products: int = 0
    basis: list[Tensor] = field(default_factory=list)
    diagonal: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = self.metric.dual_norm(self.gradient)
        self.following: Tensor | None = self.metric.solve(self.gradient) / self.size

    def _extend(self) -> None:
        v = self.following
        if v is None:
            raise RuntimeError("Krylov: the space is exhausted")  # the callers look first
        self.basis.append(v)
        w = self.product(v)
        self.products += 1
        self.diagonal.append(float(v @ w))
        w = self.metric.solve(w)
        known = torch.stack(self.basis)
        for _ in range(2):  # once leaves a rounding error that brings found directions back
            w = w - known.T @ (known @ self.metric.product(w))
        beta = self.metric.norm(w)
        self.beside.append(beta)
        scale = max(map(abs, (*self.diagonal, *self.beside[:-1])), default=0.0)
        exhausted = beta <= 100 * torch.finfo(w.dtype).eps * scale or len(self.basis) == len(w)
        self.following = None if exhausted else w / beta

    def __call__(self, lam: float, tolerance: float) -> Tensor | None:
        """Return h with a residual of at most tolerance |g|, or None where the shifted H is not positive definite.

        After `limit` directions the residual is what it is; the step's own test decides.
        """
        pivots: list[float] = []
        ends: list[float] = []
        while True:
            j = len(pivots)
            if j == len(self.basis):
                if self.following is None:
                    break
                self._extend()
            pivot = self.diagonal[j] + lam - (self.beside[j - 1] ** 2 / pivots[-1] if j else 0.0)
            if not pivot > 0:
                return None
            ends.append(-self.beside[j - 1] * ends[-1] / pivot if j else self.size / pivot)
            pivots.append(pivot)
            if abs(ends[-1]) * self.beside[j] <= tolerance * self.size or len(pivots) == self.limit:
                break
        y = ends[-1:]
        for j in range(len(pivots) - 2, -1, -1):
            y.append(ends[j] - self.beside[j] / pivots[j] * y[-1])
        weights = torch.tensor(y[::-1], dtype=self.gradient.dtype, device=self.gradient.device)
        return torch.stack(self.basis[: len(y)]).T @ weights
