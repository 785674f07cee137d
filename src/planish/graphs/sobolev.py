"""Sobolev smoothness of how a signal on a graph changes: tr[(X D)' (L + epsilon I)^beta (X D)].

Differences between times are asked to be smooth over the graph. epsilon > 0 makes the matrix definite, so that also
what all nodes do together costs something; beta says how much more rough differences cost than smooth ones.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.graphs.time import temporal_difference

_EIGH = 1500  # nodes up to which a fractional power takes all eigenvectors


class LaplacianPower(nn.Module):
    """Apply (L + epsilon I)^beta to signals on a graph.

    Whole powers are repeated products. Others take the eigenvectors of L up to 1,500 nodes, and a Chebyshev polynomial
    above, which needs products with L only.

    Args:
        laplacian: L, (N, N), symmetric and positive semidefinite, dense or sparse: see `laplacian`.
        epsilon: >= 0; default 0.05. 0 is the smoothness of Qiu et al. (2017).
        beta: Exponent, > 0; default 1.
        method: "auto" (default), "eigh" or "chebyshev".
        degree: Of the Chebyshev polynomial, >= 1; default 64.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from planish.graphs import laplacian
        >>> power = LaplacianPower(laplacian([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.0, beta=2.0)
        >>> power(torch.tensor([[1.0], [0.0]])).T
        tensor([[ 2., -2.]])
    """

    def __init__(
        self,
        laplacian: Float[Tensor, "N N"],
        epsilon: int | float = 0.05,
        beta: int | float = 1.0,
        *,
        method: Literal["auto", "eigh", "chebyshev"] = "auto",
        degree: int = 64,
    ) -> None:
        super().__init__()
        if laplacian.ndim != 2 or laplacian.shape[0] != laplacian.shape[1]:
            raise bad("LaplacianPower", "laplacian", "a square matrix", tuple(laplacian.shape))
        if not 0 <= epsilon < math.inf:
            raise bad("LaplacianPower", "epsilon", "a float >= 0", epsilon)
        if not 0 < beta < math.inf:
            raise bad("LaplacianPower", "beta", "a float above 0", beta)
        if method not in {"auto", "eigh", "chebyshev"}:
            raise bad("LaplacianPower", "method", "'auto', 'eigh' or 'chebyshev'", method)
        if degree < 1:
            raise bad("LaplacianPower", "degree", "an int >= 1", degree)
        self.epsilon, self.beta, self.method, self.degree = float(epsilon), float(beta), method, degree
        self.register_buffer("laplacian", laplacian)
        self.laplacian: Tensor
        self._basis: tuple[Tensor, Tensor] | None = None
        self._coefficients: list[float] | None = None

    @property
    def n_nodes(self) -> int:
        """Return N."""
        return len(self.laplacian)

    def sharing(self, epsilon: int | float, beta: int | float = 1.0) -> "LaplacianPower":
        """Return the same of another epsilon and beta, with the eigenvectors that are already known."""
        other = LaplacianPower(self.laplacian, epsilon, beta, method=self.method, degree=self.degree)
        other._basis = self._basis
        return other

    def basis(self) -> tuple[Float[Tensor, "N"], Float[Tensor, "N N"]]:
        """Return the eigenvalues of L, none below 0, and its eigenvectors as columns; computed once."""
        if self._basis is None or self._basis[0].device != self.laplacian.device:
            dense = self.laplacian.to_dense() if self.laplacian.is_sparse else self.laplacian
            values, vectors = torch.linalg.eigh(dense.double())
            self._basis = values.clamp_min(0).to(dense), vectors.to(dense)
        return self._basis

    @property
    def has_basis(self) -> bool:
        """Tell whether eigenvectors are affordable or known."""
        return self._basis is not None or self.method == "eigh" or (self.method == "auto" and self.n_nodes <= _EIGH)

    def forward(self, x: Float[Tensor, "N *M"]) -> Float[Tensor, "N *M"]:
        """Return (L + epsilon I)^beta x."""
        if x.shape[0] != self.n_nodes:
            raise bad("LaplacianPower", "x", f"of {self.n_nodes} rows, one a node", tuple(x.shape))
        flat = x.reshape(len(x), -1)
        if self.method == "auto" and self.beta == int(self.beta) and self.beta <= 4:
            for _ in range(int(self.beta)):
                flat = self.laplacian @ flat + self.epsilon * flat
        elif self.has_basis and self.method != "chebyshev":
            values, vectors = self.basis()
            flat = vectors @ ((values + self.epsilon)[:, None] ** self.beta * (vectors.T @ flat))
        else:
            flat = self._chebyshev(flat)
        return flat.reshape(x.shape)

    def _chebyshev(self, x: Tensor) -> Tensor:
        """Return sum_k c_k T_k(2 L / top - I) x, top being twice the largest degree: no eigenvalue is above it."""
        diagonal = self.diagonal()
        top = max(2 * float(diagonal.max()), 1e-30)
        if self._coefficients is None:
            n = self.degree + 1
            angle = math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n
            values = ((torch.cos(angle) + 1) * top / 2 + self.epsilon) ** self.beta
            table = torch.cos(torch.arange(n, dtype=torch.float64)[:, None] * angle)
            c = 2 / n * (table @ values)
            self._coefficients = [float(c[0]) / 2, *c[1:].tolist()]
        c0, c1, *rest = self._coefficients
        last, now = x, (2 / top) * (self.laplacian @ x) - x
        total: Tensor = c0 * last + c1 * now
        for ck in rest:
            last, now = now, (4 / top) * (self.laplacian @ now) - 2 * now - last
            total = total + ck * now
        return total

    def diagonal(self) -> Float[Tensor, "N"]:
        """Return the diagonal of L: the degrees, for a combinatorial one."""
        if not self.laplacian.is_sparse:
            return self.laplacian.diagonal()
        source, target = self.laplacian.coalesce().indices()
        on = source == target
        values = self.laplacian.coalesce().values()
        return torch.zeros(self.n_nodes).to(values).scatter(0, source[on], values[on])


def sobolev_loss(
    x: Float[Tensor, "N M"],
    laplacian: Float[Tensor, "N N"],
    *,
    epsilon: int | float = 0.05,
    beta: int | float = 1.0,
) -> Float[Tensor, ""]:
    """Return tr[(x D)' (L + epsilon I)^beta (x D)]: a sum over nodes and times, not a mean.

    Args:
        x: Signals, one row a node, M >= 2 times.
        laplacian: L, (N, N).
        epsilon: >= 0; default 0.05.
        beta: > 0; default 1.

    Raises:
        ValueError: An argument is out of range, or shapes do not fit.

    Example:
        >>> from planish.graphs import laplacian
        >>> L = laplacian([[0.0, 1.0], [1.0, 0.0]])
        >>> sobolev_loss(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), L, epsilon=0.5)
        tensor(1.5000)
    """
    return SobolevLoss(laplacian, epsilon=epsilon, beta=beta).forward(x)


class SobolevLoss(nn.Module):
    """Charge a signal lam tr[(X D)' (L + epsilon I)^beta (X D)].

    Args:
        laplacian: L, (N, N).
        epsilon: >= 0; default 0.05.
        beta: > 0; default 1.
        lam: lambda, >= 0; default 1. The trace is a sum, so beside a mean over samples lambda shrinks with their
            number.
        method: How to take the power: see `LaplacianPower`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from planish.graphs import laplacian
        >>> loss = SobolevLoss(laplacian([[0.0, 1.0], [1.0, 0.0]]), lam=0.1)
        >>> float(loss(torch.ones(2, 5)))  # what does not change costs nothing
        0.0
    """

    def __init__(
        self,
        laplacian: Float[Tensor, "N N"],
        *,
        epsilon: int | float = 0.05,
        beta: int | float = 1.0,
        lam: int | float = 1.0,
        method: Literal["auto", "eigh", "chebyshev"] = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= lam < math.inf:
            raise bad("SobolevLoss", "lam", "a float >= 0", lam)
        self.lam = float(lam)
        self.power = LaplacianPower(laplacian, epsilon, beta, method=method)

    def forward(self, x: Float[Tensor, "N M"]) -> Float[Tensor, ""]:
        """Return the charge of signals."""
        steps = temporal_difference(x)
        charge: Tensor = self.lam * (steps * self.power(steps)).sum()
        return charge
