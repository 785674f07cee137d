r"""The best correction of given rank for the error of a layer's weights, as the layer's outputs see it.

A layer computes W x; after rounding it is off by E x. Among all corrections C of rank k, which leaves the least
E[|(E - C) x|^2] = tr((E - C) R (E - C)'), with R = E[x x']? With any S such that S S' = R this is the Frobenius norm
of E S - C S, so the answer is C = (E S)_k S^-1: truncate the singular values, then undo S. But truncation is a
projection, (E S)_k = U U' E S with U the first k left singular vectors of E S, and S cancels:

    C = U (U' E),   U = the first k eigenvectors of E R E'

No root of R is taken and nothing is inverted, so R may be singular: channels that never fire, fewer rows than channels.
`up` = U is orthonormal, which half precision holds well.

Differs from the paper: QERA takes R^1/2 and solves with it; the corrections are the same wherever that root has an
inverse. The tests keep the path over the root as the oracle.

Reference:
    Zhang et al., QERA: an Analytical Framework for Quantization Error Reconstruction, ICLR 2025.
    https://arxiv.org/abs/2410.06040
"""

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import NotConverged, bad

_DIRECT = 1024
"""Rows up to which E R E' is formed and decomposed whole; above, only a small subspace is."""
_DEPTH = 2  # powers of E R E' in one Krylov block
_SPARE = 8  # directions kept beyond the rank
_ROUNDS = 60
_SETTLED = 1e-4  # of the error that is left


def low_rank_correction(
    error: Float[Tensor, "*b out in"], second_moment: Float[Tensor, "*b in in"], rank: int
) -> tuple[Float[Tensor, "*b out rank"], Float[Tensor, "*b rank in"]]:
    """Find the correction of given rank that leaves the least error at a layer's outputs.

    Works in float64 inside; no gradient flows through. The same input gives the same bits.

    Args:
        error: E, the float weight minus the rounded one.
        second_moment: R = E[x x'], the mean of the outer products of the layer's inputs; positive semidefinite, may be
            singular. Any positive multiple gives the same correction.
        rank: Of the correction, from 1 to the smaller side of `error`.

    Returns:
        (up, down) in the dtype of `error`; `up @ down` is the correction, the columns of `up` are orthonormal and come
        in the order of what they take from the error, the largest first.

    Raises:
        ValueError: A shape does not fit, a value is not finite, `second_moment` is not symmetric (to 1e-4 of its
            largest entry) or has a negative diagonal, or `rank` is out of range.
        NotConverged: The subspace did not settle (large layers only); `best` is the (up, down) reached.

    Source: QERA (arXiv 2410.06040), theorem 1, without its root.

    Example:
        >>> error = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> second_moment = torch.tensor([[9.0, 0.0], [0.0, 1.0]])  # the first channel is three times as large
        >>> up, down = low_rank_correction(error, second_moment, rank=1)
        >>> (up @ down).tolist()  # 1 x 3 outweighs 2 x 1
        [[0.0, 0.0], [1.0, 0.0]]
    """
    _check(error, second_moment, rank)
    with torch.no_grad():
        e, r = error.double(), second_moment.double()
        r = (r + r.mT) / 2
        settled = True
        if e.shape[-2] <= max(_DIRECT, 2 * rank):
            up = _leading(e @ r @ e.mT, rank)
        else:
            flat = [_subspace(one, moment, rank) for one, moment in zip(_matrices(e), _matrices(r), strict=True)]
            settled = all(done for _, done in flat)
            up = torch.stack([found for found, _ in flat]).reshape(*e.shape[:-1], rank)
        found = up.to(error.dtype), (up.mT @ e).to(error.dtype)
    if not settled:
        raise NotConverged(f"low_rank_correction: the subspace of rank {rank} did not settle.", found)
    return found


def _check(error: Tensor, second_moment: Tensor, rank: int) -> None:
    where = "low_rank_correction"
    for name, value in (("error", error), ("second_moment", second_moment)):
        if not value.is_floating_point():
            raise bad(where, name, "a tensor of real floats", value.dtype)
        if not torch.isfinite(value).all():
            raise bad(where, name, "finite", "NaN or infinity")
    if error.ndim < 2 or 0 in error.shape:
        raise bad(where, "error", "of shape (*b, out, in), none of them 0", tuple(error.shape))
    fits = (*error.shape[:-2], error.shape[-1], error.shape[-1])
    if tuple(second_moment.shape) != fits:
        raise bad(where, "second_moment", f"of shape {fits}, as `error` has it", tuple(second_moment.shape))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(error.shape[-2:]):
        raise bad(where, "rank", f"an int from 1 to {min(error.shape[-2:])}", rank)
    largest = second_moment.abs().amax()
    apart = (second_moment - second_moment.mT).abs().amax()
    if apart > 1e-4 * largest:
        raise bad(where, "second_moment", "symmetric", f"entries that differ by {apart.item():.3g}")
    least = second_moment.diagonal(dim1=-2, dim2=-1).amin()
    if least < 0:
        raise bad(where, "second_moment", "positive semidefinite", f"{least.item():.3g} on its diagonal")


def _matrices(batch: Tensor) -> Tensor:
    return batch.reshape(-1, *batch.shape[-2:])


def _leading(m: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors of the largest eigenvalues, the largest first."""
    _, vectors = torch.linalg.eigh((m + m.mT) / 2)
    leading: Tensor = vectors[..., -rank:].flip(-1)
    return leading


def _subspace(e: Tensor, r: Tensor, rank: int) -> tuple[Tensor, bool]:
    """Return the leading eigenvectors of E R E' by restarted block Krylov iteration, and whether they settled.

    What is left of the error settles long before the single vectors do where eigenvalues lie close together: it is
    stationary there. So the iteration stops by what is left, which is also all that anyone asks of it.
    """
    columns = min(rank + _SPARE, e.shape[0])
    whole = ((e @ r) * e).sum()  # the trace: the error without a correction
    start = torch.Generator().manual_seed(0)
    q = torch.randn(e.shape[0], columns, generator=start, dtype=e.dtype).to(e.device)
    taken = torch.zeros_like(whole)
    for _ in range(_ROUNDS):
        blocks = [torch.linalg.qr(q).Q]
        for _ in range(_DEPTH if columns * (_DEPTH + 1) <= e.shape[0] else 1):
            blocks.append(torch.linalg.qr(e @ (r @ (e.mT @ blocks[-1]))).Q)
        basis = torch.linalg.qr(torch.cat(blocks, dim=-1)).Q
        seen = e.mT @ basis
        values, vectors = torch.linalg.eigh(seen.mT @ r @ seen)
        q = basis @ vectors[:, -columns:].flip(-1)
        before, taken = taken, values[-rank:].sum()
        if taken - before <= _SETTLED * (whole - taken).clamp(min=1e-12 * whole):
            return q[:, :rank], True
    return q[:, :rank], False
