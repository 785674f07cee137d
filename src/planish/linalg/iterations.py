"""Square roots by products and inverses: Taylor, Pade, coupled Pade, Newton-Schulz; each takes A already scaled.

Every function returns the pair (root, inverse root), either as None where it was not asked for, and is made of
differentiable operations, so that autograd gives the gradient of the approximation itself.
"""

from typing import Any

import torch
from torch import Tensor

from planish.linalg import rational

Pair = tuple[Tensor | None, Tensor | None]


class _Inverse(torch.autograd.Function):
    """The inverse of a positive definite matrix by Cholesky: symmetric to the last bit, and half of LU's work."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(a).L)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ANN401
        (inverse,) = ctx.saved_tensors
        found: Tensor = -(inverse @ grads[0] @ inverse)
        return found


def _inverse(a: Tensor) -> Tensor:
    found: Tensor = _Inverse.apply(a)  # type: ignore[no-untyped-call]
    return found


def _sum_of_inverses(a: Tensor, terms: list[tuple[float, float, float]]) -> Tensor:
    """Return the sum of w (u 1 + v A)^-1 over (w, u, v)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    total = torch.zeros_like(a)
    for w, u, v in terms:
        total = total + w * _inverse(u * eye + v * a)
    return total


def _even(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def mtp(a: Tensor, order: int, *, root: bool, inverse: bool) -> Pair:
    """Taylor's series to degree 2 order, for eigenvalues in (0, 2)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = eye - a
    wanted = (rational.taylor(2 * order), rational.taylor(2 * order, inverse=True))
    totals = [eye + c[1] * z if asked else None for asked, c in zip((root, inverse), wanted, strict=True)]
    power = z
    for k in range(2, 2 * order + 1):
        power = power @ z
        totals = [t if t is None else t + c[k] * power for t, c in zip(totals, wanted, strict=True)]
    return totals[0], totals[1]


def mpa(a: Tensor, order: int, *, root: bool, inverse: bool, whole: bool = False) -> Pair:
    """Pade's quotient, as the paper has it: root r(A), inverse root 1 / r(A).

    With `whole` as one quotient of polynomials, which takes one inverse in place of `order`, and costs the digits of
    its condition: 4^order where the spectrum lies in (0, 1]. Otherwise in partial fractions.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    if whole:
        p, q = _polynomials(a, *rational.quotient(order))
        return (_even(_inverse(q) @ p) if root else None), (_even(_inverse(p) @ q) if inverse else None)
    found = None
    if root:
        terms = [(alpha, 1 - beta, beta) for alpha, beta in rational.fractions(order)]
        found = _even(eye - (eye - a) @ _sum_of_inverses(a, terms))
    return found, _reciprocal(a, order) if inverse else None


def _polynomials(a: Tensor, *wanted: list[float]) -> list[Tensor]:
    """Return polynomials in A from coefficients, lowest first: A^2 and A^3 once, then a product for each three more."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    most = max(map(len, wanted))
    square = a @ a if most > 2 else a
    cube = square @ a if most > 3 else a
    found = []
    for c in wanted:
        total = None
        for j in reversed(range(0, len(c), 3)):
            part = c[j] * eye
            for power, factor in zip((a, square), c[j + 1 : j + 3], strict=False):
                part = torch.add(part, power, alpha=factor)
            total = part if total is None else part + total @ cube
        found.append(total)
    return found  # type: ignore[return-value]


def _reciprocal(a: Tensor, order: int) -> Tensor:
    """Return 1 / r(A): positive terms only, no products."""
    n = 2 * order + 1
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return eye / n + _sum_of_inverses(a, [(2 / n, sine, cosine) for sine, cosine in rational.shifts(order)])


def coupled(a: Tensor, order: int, steps: int, *, root: bool, inverse: bool) -> Pair:
    """Pade's iteration Y <- Y G, Z <- G Z, G = 1 / r(Z Y): each step takes the exponent of the error times N.

    One step is A / r(A), which maps zero to zero, and 1 / r(A).
    """
    z = _reciprocal(a, order)
    y = _even(a @ z) if root or steps > 1 else None
    for left in range(steps - 1, 0, -1):
        g = _reciprocal(_even(z @ y), order)  # type: ignore[operator]
        if root or left > 1:
            y = _even(y @ g)  # type: ignore[operator]
        if inverse or left > 1:
            z = _even(g @ z)
    return y if root else None, z if inverse else None


def newton_schulz(a: Tensor, steps: int, *, root: bool, inverse: bool) -> Pair:
    """Newton-Schulz' coupled iteration, for eigenvalues in (0, 3)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    turn = (3 * eye - a) / 2
    y, z = a @ turn, turn
    for left in range(steps - 2, -1, -1):
        turn = (3 * eye - z @ y) / 2
        y, z = (y @ turn if root or left else y), (turn @ z if inverse or left else z)
    return y if root else None, z if inverse else None
