"""Graphs as weights: checked adjacencies, Laplacians, nearest-neighbour graphs, edge lists.

Legend: N nodes, E edges, d coordinates. A graph is its symmetric adjacency W (N, N), dense or sparse, with W_ij >= 0
and no loops; or PyTorch Geometric's pair `edge_index` (2, E), `edge_weight` (E,).
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from planish._support import bad

_DENSE = 2000  # nodes up to which a k-NN graph is returned as a dense matrix by default


def as_adjacency(graph: Any, where: str = "as_adjacency", *, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ANN401
    """Return a checked adjacency as a dense tensor, or as a coalesced sparse COO tensor if a sparse one came.

    Args:
        graph: (N, N): a tensor (dense, COO or CSR), an array, or a SciPy sparse matrix; symmetric, >= 0. Loops are
            dropped: they are no part of a Laplacian.
        where: Whose argument it is, for the sentence of a refusal.
        dtype: Of the result; the input's floating kind by default, else float64.

    Raises:
        ValueError: It is not square, not finite, negative somewhere, or not symmetric.

    Example:
        >>> as_adjacency([[0, 2], [2, 0]])
        tensor([[0., 2.],
                [2., 0.]], dtype=torch.float64)
    """
    if hasattr(graph, "tocoo"):  # SciPy's
        coo = graph.tocoo()
        at = torch.stack([torch.as_tensor(coo.row).long(), torch.as_tensor(coo.col).long()])
        values = torch.as_tensor(coo.data)
        graph = torch.sparse_coo_tensor(at, values, tuple(int(n) for n in coo.shape), check_invariants=True)
    w = torch.as_tensor(graph)
    if w.ndim != 2 or w.shape[0] != w.shape[1]:
        raise bad(where, "graph", "a square matrix", tuple(w.shape))
    if dtype is None:
        dtype = w.dtype if w.is_floating_point() else torch.float64
    sparse = w.layout != torch.strided
    w = (w.to_sparse_coo().coalesce() if sparse else w).to(dtype)
    values = w.values() if sparse else w
    if not bool(torch.isfinite(values).all()):
        raise bad(where, "graph", "finite", "NaN or infinity")
    if bool((values < 0).any()):
        raise bad(where, "graph", "without negative weights", float(values.min()))
    gap = (w - w.T).coalesce().values() if sparse else w - w.T
    largest = float(values.max()) if values.numel() else 0.0
    if gap.numel() and float(gap.abs().max()) > 1e-6 * largest:
        raise bad(where, "graph", "symmetric: (W + W') / 2 makes it so", f"|W - W'| of {float(gap.abs().max()):.3g}")
    if sparse:
        kept = (w.indices()[0] != w.indices()[1]) & (values > 0)
        return torch.sparse_coo_tensor(w.indices()[:, kept], values[kept], w.shape, check_invariants=True).coalesce()
    return w - torch.diag(w.diagonal())


def degrees(w: Tensor) -> Tensor:
    """Return the sums of a dense or sparse adjacency's rows."""
    total: Tensor = torch.sparse.sum(w, 1).to_dense() if w.is_sparse else w.sum(1)
    return total


def laplacian(
    graph: Any,  # noqa: ANN401
    normalization: Literal["none", "symmetric"] = "none",
) -> Tensor:
    """Return L = D - W, or I - D^-1/2 W D^-1/2; sparse if the graph is.

    Args:
        graph: Adjacency W, (N, N): a tensor, an array, or a SciPy sparse matrix; symmetric and >= 0.
        normalization: "none" (default), the combinatorial Laplacian; or "symmetric". A node without neighbours has a
            row of zeros in the first and the identity's row in the second.

    Returns:
        L, (N, N).

    Raises:
        ValueError: The adjacency is refused, or the normalization is neither.

    Example:
        >>> laplacian([[0.0, 2.0], [2.0, 0.0]])
        tensor([[ 2., -2.],
                [-2.,  2.]])
    """
    w = as_adjacency(graph, "laplacian")
    if normalization not in {"none", "symmetric"}:
        raise bad("laplacian", "normalization", "'none' or 'symmetric'", normalization)
    degree = degrees(w)
    on_diagonal = degree if normalization == "none" else torch.ones_like(degree)
    if normalization == "symmetric":
        w = scaled_adjacency(w, degree)
    if not w.is_sparse:
        return torch.diag(on_diagonal) - w
    loops = torch.arange(len(degree)).expand(2, -1)
    at, values = torch.cat([w.indices(), loops], 1), torch.cat([-w.values(), on_diagonal])
    return torch.sparse_coo_tensor(at, values, w.shape, check_invariants=True).coalesce()


def scaled_adjacency(w: Tensor, degree: Tensor) -> Tensor:
    """Return D^-1/2 W D^-1/2, with 0 for 0/0."""
    root = torch.where(degree > 0, degree, 1.0).rsqrt() * (degree > 0)
    if not w.is_sparse:
        return root[:, None] * w * root
    source, target = w.indices()
    return torch.sparse_coo_tensor(
        w.indices(), root[source] * w.values() * root[target], w.shape, check_invariants=True
    ).coalesce()


def knn_graph(
    coordinates: Float[Tensor, "N d"],
    k: int = 10,
    *,
    weighting: Literal["gaussian", "inverse"] = "gaussian",
    sigma: int | float | None = None,
    sparse: bool | None = None,
) -> Float[Tensor, "N N"]:
    """Join each point to its nearest ones, and return the weights.

    Args:
        coordinates: Points, (N, d), N >= 2.
        k: Neighbours of each, in [1, N - 1]; default 10. A point may end with more: those that have chosen it.
        weighting: "gaussian" (default), exp(-distance^2 / sigma^2); or "inverse", 1 / distance^2 over its largest
            value.
        sigma: Width of the Gaussian, > 0; by default the mean of all distances between chosen neighbours, as in the
            paper's code with each point counted as a neighbour of itself.
        sparse: Layout of the result; by default sparse above 2,000 points.

    Returns:
        The adjacency, (N, N), symmetric.

    Raises:
        ValueError: An argument is out of range, or points coincide where weights are inverse.

    Example:
        >>> line = torch.tensor([[0.0], [1.0], [3.0]])
        >>> knn_graph(line, 1, weighting="inverse")
        tensor([[0.0000, 1.0000, 0.0000],
                [1.0000, 0.0000, 0.2500],
                [0.0000, 0.2500, 0.0000]])
    """
    points = torch.as_tensor(coordinates)
    points = points if points.is_floating_point() else points.double()
    if points.ndim != 2 or len(points) < 2 or not bool(torch.isfinite(points).all()):
        raise bad("knn_graph", "coordinates", "finite, (points >= 2, dimensions)", tuple(points.shape))
    n = len(points)
    if not isinstance(k, int) or not 1 <= k < n:
        raise bad("knn_graph", "k", f"an int in [1, {n - 1}]", k)
    if weighting not in {"gaussian", "inverse"}:
        raise bad("knn_graph", "weighting", "'gaussian' or 'inverse'", weighting)
    if sigma is not None and not sigma > 0:
        raise bad("knn_graph", "sigma", "above 0", sigma)
    near, who = [], []
    for start in range(0, n, 1024):  # a slab of all distances at a time
        slab = torch.cdist(points[start : start + 1024], points)
        rows = torch.arange(len(slab))
        slab[rows, start + rows] = torch.inf
        found = slab.topk(k, largest=False)
        near.append(found.values)
        who.append(found.indices)
    distance, index = torch.cat(near), torch.cat(who)
    if weighting == "gaussian":
        width = float(distance.sum() / (n * (k + 1))) if sigma is None else float(sigma)
        weight = torch.exp(-((distance / width) ** 2)) if width > 0 else torch.ones_like(distance)
    else:
        if not bool((distance > 0).all()):
            raise bad("knn_graph", "coordinates", "distinct points where weights are inverse distances", "equal points")
        weight = distance.min() ** 2 / distance**2
    source = torch.arange(n)[:, None].expand(-1, k).reshape(-1)
    at = torch.stack([source, index.reshape(-1)])
    both = torch.cat([at, at.flip(0)], 1)
    key, inverse = torch.unique(both[0] * n + both[1], return_inverse=True)
    values = torch.zeros(len(key), dtype=points.dtype)
    values = values.scatter_reduce(0, inverse, weight.reshape(-1).repeat(2), "amax")
    where = torch.stack([key // n, key % n])
    w = torch.sparse_coo_tensor(where, values, (n, n), check_invariants=True).coalesce()
    return w if (n > _DENSE if sparse is None else sparse) else w.to_dense()


def to_edges(graph: Any) -> tuple[Int[Tensor, "2 E"], Float[Tensor, "E"]]:  # noqa: ANN401
    """Return a graph in PyTorch Geometric's convention: `edge_index` and `edge_weight`, each edge in both directions.

    Args:
        graph: Adjacency, (N, N).

    Raises:
        ValueError: The adjacency is refused.

    Example:
        >>> to_edges([[0, 2], [2, 0]])
        (tensor([[0, 1],
                [1, 0]]), tensor([2., 2.], dtype=torch.float64))
    """
    w = as_adjacency(graph, "to_edges")
    w = w if w.is_sparse else w.to_sparse_coo().coalesce()
    return w.indices(), w.values()
