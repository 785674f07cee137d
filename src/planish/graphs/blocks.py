r"""Solve systems that are block tridiagonal in time, exactly: every quadratic recovery on a graph is one.

    diag(J) + G_0 (x) I + G_1 (x) D D'                                                                            (1)

with G_0 and G_1 functions of the graph's Laplacian couples each time with the one before and the one after it alone.
Block elimination takes M inverses of N x N matrices, however badly conditioned the system is where nobody looked.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_ROOM = 2**25  # numbers in each of the two stacks of blocks: 268 MB
_RIDGES = (1e-13, 1e-10, 1e-7)  # of the largest entry: what is free (a node never observed) is not moved


def affordable(n: int, m: int) -> bool:
    """Tell whether the blocks of N nodes and M times may be kept."""
    return n * n * m <= _ROOM


class TimeBlocks:
    """The factors of (1), in float64; a small ridge keeps it definite.

    Args:
        mask: J, (N, M).
        fixed: G_0, (N, N), symmetric and positive semidefinite.
        changes: G_1, likewise.

    Example:
        >>> blocks = TimeBlocks(torch.tensor([[True, False, True]]), torch.zeros(1, 1), torch.ones(1, 1))
        >>> blocks.solve(torch.tensor([[1.0, 0.0, 4.0]])).round(decimals=3)
        tensor([[1.7500, 2.5000, 3.2500]])
    """

    def __init__(self, mask: Bool[Tensor, "N M"], fixed: Float[Tensor, "N N"], changes: Float[Tensor, "N N"]) -> None:
        n, m = mask.shape
        self._changes = changes.double()
        top = 1 + float(fixed.diagonal().max()) + 2 * float(self._changes.diagonal().max())
        for ridge in _RIDGES:
            own = fixed.double() + ridge * top * torch.eye(n).to(self._changes)
            self._inverse, self._passed, whole = self._eliminate(mask, own, n, m)
            if whole:
                return
        raise ArithmeticError("a system that is positive semidefinite has no factors even with a ridge of 1e-7")

    def _eliminate(self, mask: Tensor, own: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, bool]:
        """Return S_t^-1 and G_1 S_t^-1 of each time, and whether each S_t was definite."""
        inverse = torch.empty(m, n, n).to(self._changes)
        passed = torch.empty_like(inverse)
        seen = mask.T.to(own)
        for t in range(m):
            block = own + self._changes * (1.0 if t in {0, m - 1} else 2.0)
            block.diagonal().add_(seen[t])
            if t:
                block -= passed[t - 1] @ self._changes
            lower, failed = torch.linalg.cholesky_ex(block)
            if int(failed):
                return inverse, passed, False
            torch.cholesky_inverse(lower, out=inverse[t])
            torch.mm(self._changes, inverse[t], out=passed[t])
        return inverse, passed, True

    def solve(self, right: Float[Tensor, "N M"]) -> Float[Tensor, "N M"]:
        """Return the solution for a right-hand side, in its kind of numbers."""
        rows = list(right.T.to(self._inverse).unbind(0))
        for t in range(1, len(rows)):
            rows[t] = torch.addmv(rows[t], self._passed[t - 1], rows[t - 1])
        out = torch.empty(len(rows), len(right)).to(self._inverse)
        torch.mv(self._inverse[-1], rows[-1], out=out[-1])
        for t in range(len(rows) - 2, -1, -1):
            torch.mv(self._inverse[t], torch.addmv(rows[t], self._changes, out[t + 1]), out=out[t])
        return out.T.to(right)
