"""How curved is a loss? The largest curvature by products with the Hessian; the typical one by function values alone.

A loss is beta-smooth when its gradient changes by at most beta times the distance: beta is the largest absolute
eigenvalue of the Hessian, over the region at hand. At one point it costs a few gradients (`hessian_norm`); where there
are no gradients, second differences along random directions tell the mean curvature (`directional_curvature`).
"""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import NotConverged, bad


def hessian_norm(
    loss: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    *,
    tolerance: float = 1e-3,
    iterations: int = 200,
    generator: torch.Generator | None = None,
) -> float:
    """Return the largest absolute eigenvalue of a loss's Hessian at the present parameters.

    Lanczos' recursion with full reorthogonalization: one product with the Hessian, two backward passes, an iteration.
    The bound |largest Ritz value - eigenvalue| <= residual stops it.

    Args:
        loss: Computes the scalar loss from `parameters`, differentiably.
        parameters: Tensors with `requires_grad`; they are not changed. A module's `parameters()` will do.
        tolerance: Residual at which to stop, relative to the value, > 0. Default 1e-3.
        iterations: Most products with the Hessian, >= 1; never more than there are parameters. Default 200.
        generator: Source of the first direction; default a fixed one.

    Returns:
        The spectral norm, >= 0; 0 where the loss is linear.

    Raises:
        ValueError: An argument is out of range, the loss is no finite scalar, or no parameter requires a gradient.
        NotConverged: The tolerance was not reached; `best` carries the last value, a lower bound.

    Example:
        >>> x = torch.zeros(3, requires_grad=True)
        >>> curve = torch.tensor([1.0, -4.0, 2.0])
        >>> round(hessian_norm(lambda: (curve * x**2).sum() / 2, [x]), 4)
        4.0
    """
    if not tolerance > 0:
        raise bad("hessian_norm", "tolerance", "above 0", tolerance)
    if iterations < 1:
        raise bad("hessian_norm", "iterations", "an int >= 1", iterations)
    leaves = [p for p in parameters if p.requires_grad]
    if not leaves:
        raise bad("hessian_norm", "parameters", "tensors of which at least one requires a gradient", "none")
    with torch.enable_grad():
        value = loss()
        if value.numel() != 1 or not bool(torch.isfinite(value).all()):
            raise bad("hessian_norm", "loss", "a function that returns one finite number", value.detach())
        gradient = _flat(_gradients(value.reshape(()), leaves, create_graph=True), leaves)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the loss is linear: its gradient depends on nothing
            return torch.zeros_like(v)
        return _flat(_gradients(gradient @ v, leaves, retain_graph=True), leaves).detach()

    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(gradient.shape, dtype=gradient.dtype, generator=generator).to(gradient.device)
    return _lanczos(product, start, tolerance, min(iterations, len(start)))


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, steps: int) -> float:
    basis = [start / start.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    largest, residual = 0.0, math.inf
    for step in range(steps):
        w = product(basis[-1])
        diagonal.append(w @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # once leaves a rounding error that brings found directions back
            w = w - known.T @ (known @ w)
        beta = w.norm()
        off = torch.stack(beside).double().cpu() if beside else torch.zeros(0, dtype=torch.float64)
        small = torch.diag(torch.stack(diagonal).double().cpu()) + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(small)
        top = int(values.abs().argmax())
        largest = float(values[top].abs())
        residual = float(beta) * float(vectors[-1, top].abs())
        if residual <= tolerance * largest or step + 1 == len(start):
            return largest
        if float(beta) <= torch.finfo(start.dtype).eps * largest:
            return largest  # the directions seen so far are closed under the Hessian
        beside.append(beta)
        basis.append(w / beta)
    raise NotConverged(
        f"hessian_norm: {steps} iterations left a residual of {residual:.3g} at {largest:.6g}; "
        f"give more `iterations` or a larger `tolerance`.",
        best=largest,
    )


def _gradients(
    value: Tensor, leaves: list[Tensor], *, create_graph: bool = False, retain_graph: bool = False
) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(
            value, leaves, create_graph=create_graph, retain_graph=retain_graph or create_graph, allow_unused=True
        )
    )


def _flat(gradients: list[Tensor | None], leaves: list[Tensor]) -> Float[Tensor, " n"]:
    pairs = zip(gradients, leaves, strict=True)
    return torch.cat([(torch.zeros_like(leaf) if g is None else g).reshape(-1) for g, leaf in pairs])


def directional_curvature(
    function: Callable[[Float[Tensor, "rows dims"]], Float[Tensor, " rows"]],
    points: Float[Tensor, "rows dims"],
    *,
    step: float = 1e-3,
    generator: torch.Generator | None = None,
) -> float:
    """Return the mean absolute second difference of a function along one random direction a point.

        mean over points x of |f(x + e v) + f(x - e v) - 2 f(x)| / e^2,   v uniform on the unit sphere

    No gradient is taken, so the function may be anything: a score of another library, a simulation.

    Args:
        function: Gives one number a row.
        points: Where to measure; computed in float64.
        step: The e of the formula, in the units of `points`, > 0. Default 1e-3: in float64 the rounding error is then
            about 1e-10 of the function's size, while the authors' 1e-6 leaves 1e-4 of it, which is noise.
        generator: Source of the directions; default a fixed one.

    Returns:
        The mean curvature, >= 0; not finite where the function is not.

    Raises:
        ValueError: `step` is not above 0, there is no point, or the function gives not one number a row.

    Example:
        >>> points = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
        >>> round(directional_curvature(lambda x: 3 * (x**2).sum(1), points), 4)
        6.0
    """
    if not step > 0:
        raise bad("directional_curvature", "step", "above 0", step)
    if points.ndim != 2 or not points.numel():
        raise bad("directional_curvature", "points", "a matrix of at least one row and column", tuple(points.shape))
    generator = generator or torch.Generator().manual_seed(0)
    x = points.double()
    v = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.device)
    v = v / v.norm(dim=1, keepdim=True) * step
    ahead, back, here = (function(at).double() for at in (x + v, x - v, x))
    if here.shape != x.shape[:1]:
        raise bad("directional_curvature", "function", f"one that gives {len(x)} numbers", tuple(here.shape))
    return float((ahead + back - 2 * here).abs().mean()) / step**2
