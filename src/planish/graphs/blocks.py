r"""Solve systems that are block tridiagonal in time, exactly: every quadratic recovery on a graph is one.

    diag(J) + V diag(f) V' (x) I + V diag(c) V' (x) D D'                                                          (1)

with V the eigenvectors of the graph couples each time with the one before and the one after it alone. Elimination in
V's coordinates, where the coupling is diagonal, takes one inverse of an N x N matrix at each time, however badly
conditioned the system is where nobody looked.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROOM = 2**25  # numbers in the stack of blocks: 268 MB
_RIDGES = (1e-13, 1e-10, 1e-7)  # of the largest entry: what is free (a node never observed) is not moved


def affordable(n: int, m: int) -> bool:
    """Tell whether the blocks of N nodes and M times may be kept."""
    return n * n * m <= _ROOM


class TimeBlocks:
    """The factors of (1), in float64; a small ridge keeps it definite.

    Args:
        mask: J, (N, M).
        vectors: V, (N, N), orthogonal.
        fixed: f, (N,), >= 0.
        changes: c, (N,), >= 0.

    Example:
        >>> blocks = TimeBlocks(torch.tensor([[True, False, True]]), torch.eye(1), torch.zeros(1), torch.ones(1))
        >>> blocks.solve(torch.tensor([[1.0, 0.0, 4.0]])).round(decimals=3)
        tensor([[1.7500, 2.5000, 3.2500]])
    """

    def __init__(
        self,
        mask: Bool[Tensor, "N M"],
        vectors: Float[Tensor, "N N"],
        fixed: Float[Tensor, "N"],
        changes: Float[Tensor, "N"],
    ) -> None:
        self._vectors, self._changes = vectors.double(), changes.double()
        top = 1 + float(fixed.max()) + 2 * float(changes.max())
        for ridge in _RIDGES:
            self._inverse, whole = self._eliminate(mask.T, fixed.double() + ridge * top)
            if whole:
                return
        raise ArithmeticError("a system that is positive semidefinite has no factors even with a ridge of 1e-7")

    def _eliminate(self, seen: Bool[Tensor, "M N"], own: Float[Tensor, "N"]) -> tuple[Tensor, bool]:
        """Return the inverse of each time's block once the times before it are gone, and whether all were definite."""
        m, c = len(seen), self._changes
        inverse = torch.empty(m, len(c), len(c)).to(c)
        for t in range(m):
            rows = self._vectors[seen[t]]
            block = rows.T @ rows
            block.diagonal().add_(own + c * (1.0 if t in {0, m - 1} else 2.0))
            if t:
                block -= c[:, None] * inverse[t - 1] * c
            lower, failed = torch.linalg.cholesky_ex(block)
            if int(failed):
                return inverse, False
            torch.cholesky_inverse(lower, out=inverse[t])
        return inverse, True

    def solve(self, right: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
        """Return the solution for a right-hand side, in its kind of numbers."""
        rows = right.T.to(self._inverse) @ self._vectors
        for t in range(1, len(rows)):
            rows[t] += self._changes * (self._inverse[t - 1] @ rows[t - 1])
        rows[-1] = self._inverse[-1] @ rows[-1]
        for t in range(len(rows) - 2, -1, -1):
            rows[t] = self._inverse[t] @ (rows[t] + self._changes * rows[t + 1])
        return (rows @ self._vectors.T).T.to(right)
