r"""GraphTRSS and other quadratic recoveries: what a signal on a graph was where nobody looked.

    min_X  1/2 |J o (X - Y)|^2 + alpha/2 tr[(X D)' (L + epsilon I)^beta (X D)]
                               + spatial/2 tr(X' L X) + temporal/2 |X D|^2                                    (1)

is a linear system, block tridiagonal in time. Where its blocks fit into memory they are eliminated, and conjugate
gradients only polish; else the preconditioner replaces the mask J by its mean, which makes the system diagonal in the
eigenvectors of the graph and the cosines of time.

Where nothing ties a value (a node never observed may be moved as a whole for free) it stays where the iteration starts:
at linear interpolation in time, and for such a node at the mean of its neighbours.

Reference:
    Giraldo, Mahmood, Garcia-Garcia, Thanou and Bouwmans, Reconstruction of Time-varying Graph Signals via Sobolev
    Smoothness, IEEE Transactions on Signal and Information Processing over Networks, 2022.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from planish._support import NotConverged, bad
from planish.graphs.adjacency import as_adjacency
from planish.graphs.blocks import TimeBlocks, affordable
from planish.graphs.sobolev import LaplacianPower
from planish.graphs.time import cosines, frequencies, from_cosines, interpolate_time, second_difference

Linear = Callable[[Tensor], Tensor]
_FREE = 1e-9  # least charge in the solution by elimination, of the largest


def conjugate_gradients(
    apply: Linear,
    right: Tensor,
    start: Tensor,
    *,
    preconditioner: Linear,
    residual_goal: float,
    error_goal: float,
    max_iter: int,
    where: str,
    strict: bool = True,
) -> tuple[Tensor, int]:
    """Solve apply(x) = right for a symmetric positive semidefinite map; return x and the steps taken.

    Both norms must reach their goals: the residual's, and that of the preconditioned residual, which estimates the
    error. A small residual alone says little: smooth moves of values that nobody saw hardly change it.
    """
    x = start.clone()
    residual = right - apply(x)
    z = preconditioner(residual)
    direction, rho = z, (residual * z).sum()
    for step in range(max_iter + 1):
        if float(residual.norm()) <= residual_goal and float(z.norm()) <= error_goal:
            return x, step
        if step == max_iter:
            break
        image = apply(direction)
        size = rho / (direction * image).sum()
        x = x + size * direction
        residual = residual - size * image
        z = preconditioner(residual)
        rho, before = (residual * z).sum(), rho
        direction = z + (rho / before) * direction
    if not strict:
        return x, max_iter
    goals = f"{residual_goal:.3g} or the error above {error_goal:.3g}"
    raise NotConverged(f"{where}: the residual is above {goals} after {max_iter} steps.", x)


def neighbour_means(x: Tensor, known: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of known neighbours at each time, and where there is one."""
    weight = w @ known.to(x)
    total = w @ torch.where(known, x, 0.0)
    return total / torch.where(weight > 0, weight, 1.0), weight > 0


def first_guess(x: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    """Return linear interpolation in time; a node never observed has the mean of its neighbours, ring by ring."""
    guess = interpolate_time(x, mask)
    seen = mask.any(1, keepdim=True).expand_as(mask)
    while not bool(seen.all()):
        means, found = neighbour_means(guess, seen, w)
        found = found & ~seen
        if not bool(found.any()):
            break  # an island where nobody looked keeps the mean of all
        guess, seen = torch.where(found, means, guess), seen | found
    return guess


def graph_trss(
    x: Float[Tensor, "N M"],
    mask: Bool[Tensor, "N M"],
    smoothness: LaplacianPower,
    *,
    alpha: int | float = 1e-3,
    spatial: int | float = 0.0,
    temporal: int | float = 0.0,
    start: Float[Tensor, "N M"] | None = None,
    tol: int | float = 1e-8,
    max_iter: int = 5000,
) -> Float[Tensor, "N M"]:
    """Recover signals whose changes are smooth over a graph (GraphTRSS): the minimizer of (1).

    Args:
        x: Signals, one row a node; only entries of the mask are read.
        mask: Which entries are samples.
        smoothness: (L + epsilon I)^beta.
        alpha: Weight of smooth changes, >= 0; default 1e-3.
        spatial: Weight of smoothness over the graph at each time, >= 0; default 0.
        temporal: Weight of the plain square of changes, >= 0; default 0.
        start: Where to start; by default interpolation in time.
        tol: Residual and estimated error relative to the samples about their mean, in (0, 1); default 1e-8.
        max_iter: Steps at most; default 5000.

    Returns:
        The whole signals; samples are smoothed too.

    Raises:
        ValueError: An argument is out of range, or shapes do not fit.
        NotConverged: The tolerance was not reached; `best` is where it stopped.

    Example:
        >>> from planish.graphs import laplacian
        >>> L = laplacian([[0.0, 1.0], [1.0, 0.0]])
        >>> x = torch.tensor([[0.0, 1.0, 2.0], [5.0, 9.0, 7.0]])
        >>> mask = torch.tensor([[True, True, True], [True, False, True]])
        >>> graph_trss(x, mask, LaplacianPower(L), alpha=1e-4).round(decimals=2)[1]
        tensor([5., 6., 7.])
    """
    where = "graph_trss"
    check_signals(where, x, mask, smoothness.n_nodes, alpha=alpha, spatial=spatial, temporal=temporal)
    if not 0 < tol < 1:
        raise bad(where, "tol", "in (0, 1)", tol)
    if smoothness.has_basis and affordable(*x.shape):
        kind, x = x.dtype, x.double()
        apply, precondition = _by_blocks(mask, smoothness, float(alpha), float(spatial), float(temporal))
    else:
        kind = x.dtype
        apply, precondition = _by_frequencies(x, mask, smoothness, float(alpha), float(spatial), float(temporal))
    level = x[mask].mean()  # no term feels it; without it the tolerance is that of what varies
    y = torch.where(mask, x - level, 0.0)
    start = first_guess(y, mask, weights_of(smoothness.laplacian).to(x)) if start is None else start.to(x) - level
    size = float(y.norm())
    solved, _ = conjugate_gradients(
        apply, y, start, preconditioner=precondition, residual_goal=float(tol) * size,
        error_goal=float(tol) * size * math.sqrt(mask.numel() / int(mask.sum())), max_iter=max_iter, where=where,
    )  # fmt: skip
    return (level + solved).to(kind)


def _by_blocks(
    mask: Tensor, smoothness: LaplacianPower, alpha: float, spatial: float, temporal: float
) -> tuple[Linear, Linear]:
    """Return the system (1) in float64, and its solution by elimination in time.

    What is free is kept from rounding: the level of a node never seen is projected away, and a time never seen, if only
    differences between nodes are charged, has a charge in the solution that the system has not.
    """
    levels, vectors = (part.double() for part in smoothness.basis())
    charges = spatial * levels, alpha * (levels + smoothness.epsilon) ** smoothness.beta + temporal
    fixed, change = ((vectors * charge) @ vectors.T for charge in charges)
    blocks, seen = TimeBlocks(mask, vectors, *(c.maximum(_FREE * c.max()) for c in charges)), mask.to(levels)
    unseen = ~mask.any(1) if not spatial else torch.zeros(len(mask), dtype=torch.bool, device=mask.device)

    def level(v: Tensor) -> Tensor:
        return torch.where(unseen[:, None], v - v.mean(1, keepdim=True), v)

    return (
        lambda v: seen * v + fixed @ v + change @ second_difference(v),
        lambda r: level(blocks.solve(level(r))),
    )


def _by_frequencies(
    x: Tensor, mask: Tensor, smoothness: LaplacianPower, alpha: float, spatial: float, temporal: float
) -> tuple[Linear, Linear]:
    """Return the system (1), and its solution if each entry were seen as much as the mean of all."""
    seen = mask.to(x)

    def apply(v: Tensor) -> Tensor:
        out = seen * v
        if alpha:
            out = out + alpha * smoothness(second_difference(v))
        if spatial:
            out = out + spatial * (smoothness.laplacian @ v)
        return out + temporal * second_difference(v) if temporal else out

    levels, turn, back = _graph_basis(smoothness)
    k = frequencies(x.shape[1], x)
    power = (levels + smoothness.epsilon) ** smoothness.beta
    diagonal = mask.double().mean().to(x).clamp_min(1e-12) + alpha * power[:, None] * k
    diagonal = diagonal + spatial * levels[:, None] + temporal * k
    return apply, lambda r: back(from_cosines(cosines(turn(r)) / diagonal))


def tikhonov(
    x: Float[Tensor, "N M"],
    mask: Bool[Tensor, "N M"],
    smoothness: LaplacianPower,
    *,
    alpha: int | float = 1e-2,
    temporal: int | float = 0.0,
    tol: int | float = 1e-8,
    max_iter: int = 5000,
) -> Float[Tensor, "N M"]:
    """Recover signals that are smooth over a graph at each time, and if asked in time.

    Args:
        x: Signals, one row a node; only entries of the mask are read.
        mask: Which entries are samples.
        smoothness: Its Laplacian is used; epsilon and beta are not.
        alpha: Weight of smoothness over the graph, >= 0; default 0.01.
        temporal: Weight of the square of changes in time, >= 0; default 0.
        tol: Residual relative to the samples; default 1e-8.
        max_iter: Steps at most; default 5000.

    Raises:
        ValueError: An argument is out of range, or shapes do not fit.
        NotConverged: The tolerance was not reached.

    Example:
        >>> from planish.graphs import laplacian
        >>> L = laplacian([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> x = torch.tensor([[1.0, 1.0], [9.0, 9.0], [3.0, 5.0]])
        >>> mask = torch.tensor([[True, True], [False, False], [True, True]])
        >>> tikhonov(x, mask, LaplacianPower(L), alpha=1e-4).round(decimals=2)[1]
        tensor([2., 3.])
    """
    return graph_trss(x, mask, smoothness, alpha=0.0, spatial=alpha, temporal=temporal, tol=tol, max_iter=max_iter)


def interpolate_neighbours(x: Float[Tensor, "N M"], mask: Bool[Tensor, "N M"], graph: Any) -> Float[Tensor, "N M"]:  # noqa: ANN401
    """Fill each gap by the weighted mean of the neighbours that were observed at that time, else linearly in time.

    Args:
        x: Signals, one row a node; only entries of the mask are read.
        mask: Which entries are samples.
        graph: Adjacency, (N, N).

    Raises:
        ValueError: The graph is refused, or shapes do not fit.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 7.0]])
        >>> mask = torch.tensor([[True, True, True], [True, False, True]])
        >>> interpolate_neighbours(x, mask, [[0.0, 1.0], [1.0, 0.0]])[1]
        tensor([5., 2., 7.])
    """
    w = as_adjacency(graph, "interpolate_neighbours", dtype=x.dtype)
    check_signals("interpolate_neighbours", x, mask, len(w))
    means, found = neighbour_means(x, mask, w)
    return torch.where(mask, x, torch.where(found, means, first_guess(x, mask, w)))


def _graph_basis(smoothness: LaplacianPower) -> tuple[Tensor, Linear, Linear]:
    """Return eigenvalues of L with the way to its eigenvectors and back; the degrees, and no way, if that is dear."""
    if not smoothness.has_basis:
        return smoothness.diagonal(), lambda v: v, lambda v: v
    values, vectors = smoothness.basis()
    return values, lambda v: vectors.T @ v, lambda v: vectors @ v


def weights_of(laplacian: Tensor) -> Tensor:
    """Return the adjacency behind a Laplacian: what is off its diagonal, with the other sign."""
    if not laplacian.is_sparse:
        return (torch.diag(laplacian.diagonal()) - laplacian).clamp_min(0)
    laplacian = laplacian.coalesce()
    off = laplacian.indices()[0] != laplacian.indices()[1]
    at, values = laplacian.indices()[:, off], -laplacian.values()[off]
    return torch.sparse_coo_tensor(at, values, laplacian.shape, check_invariants=True).coalesce()


def check_signals(where: str, x: Tensor, mask: Tensor, n: int, **weights: float) -> None:
    """Refuse signals and masks that do not fit a graph of n nodes, and weights below 0."""
    if x.ndim != 2 or len(x) != n or not x.is_floating_point():
        raise bad(where, "x", f"floats, ({n} nodes, times)", f"{x.dtype} {tuple(x.shape)}")
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise bad(where, "mask", f"bools of shape {tuple(x.shape)}", f"{mask.dtype} {tuple(mask.shape)}")
    if not bool(mask.any()):
        raise bad(where, "mask", "True somewhere: without a sample nothing is known", "no sample")
    if not bool(torch.isfinite(x[mask]).all()):
        raise bad(where, "x", "finite where the mask is True", "NaN or infinity")
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise bad(where, name, "a float >= 0", value)
