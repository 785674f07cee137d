"""X D + D X = G, batched and differentiable: what the gradient of a matrix square root comes down to.

Two ways. In the eigenbasis of X the solution is a division by sums of eigenvalues, which no coincidence of eigenvalues
disturbs. Or, by products alone, the sign of the block matrix [[X, G], [0, -X]]: from B = X / s, C = G / s

    C <- (C (3 - B^2) - B^2 C + B C B) / 2,   B <- B (3 - B^2) / 2

until B is the unit; then D = C / 2. The smallest eigenvalue of B grows by the factor 1.5 a step until it nears 1, so a
fixed number of steps is a cut-off: eigenvalues that have not arrived count as larger than they are.

The derivative of D is once more two such equations, with S solving X S + S X = dD: dG = S, dX = -(S D + D S). So every
order of derivative is stable.

Reference:
    Song, Sebe and Wang, Fast Differentiable Matrix Square Root, ICLR 2022. https://arxiv.org/abs/2201.08663
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Inexact
from torch import Tensor

from planish._support import bad

Steps = int | Literal["auto"]
_MOST = 64  # steps of "auto": enough for eigenvalues 1e-10 apart


def solve_lyapunov_psd(
    x: Inexact[Tensor, "*b n n"],
    g: Inexact[Tensor, "*b n n"],
    *,
    method: Literal["eigh", "iteration"] = "eigh",
    steps: Steps = "auto",
) -> Inexact[Tensor, "*b n n"]:
    """Solve X D + D X = G for D, with X symmetric and positive semidefinite; differentiable at any order.

    Where X is singular there is no unique solution (nor any, for most G): "eigh" gives the one that is zero inside the
    null space, "iteration" a large but finite one there.

    Args:
        x: X, real symmetric or complex Hermitian, and positive semidefinite. Only float32, float64 and complex.
        g: G, of the same shape; need not be symmetric.
        method: "eigh" is exact; "iteration" takes six products a step, and no decomposition.
        steps: Of the iteration: a number, >= 1, or "auto", until it has converged. The published algorithm takes 8.

    Returns:
        D.

    Raises:
        ValueError: Shapes do not fit, or an option is not one of the above.

    Example:
        >>> x = torch.diag(torch.tensor([1.0, 3.0]))
        >>> solve_lyapunov_psd(x, torch.ones(2, 2)).tolist()  # divided by 1 + 1, 1 + 3 and 3 + 3
        [[0.5, 0.25], [0.25, 0.1666666716337204]]
    """
    where = "solve_lyapunov_psd"
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or 0 in x.shape:
        raise bad(where, "x", "square matrices, (*b, n, n), none of them empty", tuple(x.shape))
    if x.shape != g.shape or x.dtype != g.dtype:
        raise bad(where, "g", f"of shape {tuple(x.shape)} and {x.dtype}, as `x`", (tuple(g.shape), g.dtype))
    check_steps(where, "steps", steps)
    if method == "eigh":
        return solve(x, g, steps, *torch.linalg.eigh(x.detach()))
    if method != "iteration":
        raise bad(where, "method", 'one of "eigh", "iteration"', method)
    return solve(x, g, steps)


def check_steps(where: str, name: str, steps: object) -> None:
    """Refuse what is no number of steps."""
    if steps != "auto" and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise bad(where, name, 'an int >= 1 or "auto"', steps)


def negligible(a: Tensor) -> float:
    """Return the size, relative to the largest, below which rounding cannot tell an eigenvalue from zero."""
    return max(a.shape[-1], 16) * torch.finfo(a.dtype).eps


def divided(g: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Solve in the eigenbasis of X; a sum of eigenvalues that cannot be told from zero divides nothing."""
    pairs = values[..., :, None] + values[..., None, :]
    # what rounding leaves of a zero in A = X^2 has a root of this size
    least = negligible(vectors) ** 0.5 * values.amax(-1)[..., None, None]
    return vectors @ ((vectors.mH @ g @ vectors) / pairs.masked_fill_(pairs <= least, torch.inf)) @ vectors.mH


def _iterated(x: Tensor, g: Tensor, steps: Steps, even: bool) -> Tensor:
    """Solve by products alone: six a step, or four where G is symmetric, since C B is then the transpose of B C."""
    square = x @ x
    if steps == "auto":  # |X^4|^(1/4) is close above the largest eigenvalue, and below sqrt(3) all converge
        scale = torch.linalg.matrix_norm(square @ square).pow(0.25) / 1.6
    else:
        scale = torch.linalg.matrix_norm(square).sqrt()
    scale = torch.where(scale > 0, scale, 1)[..., None, None]
    b, c, square = x / scale, g / scale, square / scale.square()
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    close = 4 * b.shape[-1] ** 0.5 * torch.finfo(b.dtype).eps ** 0.5
    most = _MOST if steps == "auto" else steps
    for left in range(most - 1, -1, -1):
        right = c @ b
        if even:  # B^2 C - B C B + C B^2, halved: one product and its transpose
            half = (right - right.mH / 2) @ b
            c = 1.5 * c - (half + half.mH) / 2
        else:
            c = 1.5 * c - (b @ (b @ c - right) + right @ b) / 2
        # a step squares what is left: below the root of the precision, the step just taken was the last
        if not left or (steps == "auto" and bool((torch.linalg.matrix_norm(eye - square) < close).all())):
            break
        b = 1.5 * b - b @ square / 2
        square = b @ b
    return c / 2


class _Solve(torch.autograd.Function):
    """D of X D + D X = G: in the eigenbasis of X where it is given, by products otherwise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, g: Tensor, steps: Steps, values: Tensor | None, vectors: Tensor | None, even: bool
    ) -> Tensor:
        with in_full(x):
            return _iterated(x, g, steps, even) if values is None or vectors is None else divided(g, values, vectors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        x, _, ctx.steps, values, vectors, _ = inputs
        ctx.save_for_backward(x, output, values, vectors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, d, values, vectors = ctx.saved_tensors
        s = solve(x, grads[0], ctx.steps, values, vectors)
        with in_full(x):
            towards_x = -(s @ d.mH + d.mH @ s) if ctx.needs_input_grad[0] else None
        return towards_x, s, None, None, None, None


def solve(
    x: Tensor,
    g: Tensor,
    steps: Steps,
    values: Tensor | None = None,
    vectors: Tensor | None = None,
    *,
    even: bool = False,
) -> Tensor:
    """Solve X D + D X = G, differentiably: in the eigenbasis of X where it is given, by products otherwise.

    `even` promises that G is symmetric, which saves a third of the products.
    """
    found: Tensor = _Solve.apply(x, g, steps, values, vectors, even)  # type: ignore[no-untyped-call]
    return found


@contextlib.contextmanager
def in_full(x: Tensor) -> Iterator[None]:
    """Multiply in the full precision of the dtype, whatever autocast or the process ask for: iterations need it."""
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # the setting of the process cannot be part of a graph
            yield
            return
        asked = torch.get_float32_matmul_precision()
        if asked == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(asked)
