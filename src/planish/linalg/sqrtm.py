r"""Square roots of symmetric positive (semi)definite matrices, with gradients that are finite and cheap.

Autograd through an eigendecomposition divides by differences of eigenvalues, which are zero where two coincide. The
gradient of the root itself does not: with X = A^1/2 and G = dl/dX it solves X D + D X = G, and in the eigenbasis of A,
A = V diag(sigma^2) V', that is a division by sums,

    D = V [(V' G V)_ij / (sigma_i + sigma_j)] V'

The paper goes without the decomposition, which GPUs do slowly for batches of small matrices: A / s is near enough to
the unit for Taylor's series or Pade's quotient of sqrt(1 - z), and D comes from products alone (`lyapunov`).

================  =========================================  ====================================
paper             here                                       range, default
================  =========================================  ====================================
A                 ``A``                                      symmetric, semidefinite
MTP, MPA          ``method`` "mtp", "mpa"                    "auto"
K, [M / N]        ``order`` m: degree 2 m, quotient [m / m]  >= 1; 5
\|A\|_F           ``scale`` "fro"                            "auto"
iterations of B   ``backward_steps``                         >= 1 or "auto"; the paper takes 8
================  =========================================  ====================================

Differs from the paper (``paper=True`` is the published algorithm): Pade's quotient is summed in partial fractions, by
Cholesky, and scaled by the mean eigenvalue, about which it is as good upwards as downwards; the root is A over the
quotient, exact on the null space; it may be iterated ("pade_iter"); each matrix of a batch has its own scale in the
gradient, too; steps backward go on until they converge.

When to use: on a CPU leave everything at its default. See ``docs/jobs/linalg.md``.

Reference:
    Song, Sebe and Wang, Fast Differentiable Matrix Square Root, ICLR 2022. https://arxiv.org/abs/2201.08663
    The inverse root: Song, Sebe and Wang, T-PAMI 2022. https://arxiv.org/abs/2201.12543
"""

from typing import Unpack

from jaxtyping import Inexact
from torch import Tensor

from planish.linalg.lyapunov import Steps
from planish.linalg.options import Backward, Method, RootOptions, Scale, options
from planish.linalg.roots import both


def matrix_sqrth(
    A: Inexact[Tensor, "*b n n"],
    *,
    method: Method = "auto",
    tolerance: float | None = None,
    order: int = 5,
    scale: Scale | float = "auto",
    steps: int | None = None,
    backward: Backward = "auto",
    backward_steps: Steps | None = None,
    eps: float = 0.0,
    check: bool = True,
    paper: bool = False,
) -> Inexact[Tensor, "*b n n"]:
    """Return the positive semidefinite X with X X = A, for each matrix of a batch on its own.

    Differentiable twice and more, also where eigenvalues coincide. Inside the null space of a singular A, where the
    derivative is infinite, the gradient is zero ("eigh") or large and finite (the others). Half precision is computed
    in float32 and cast back; complex Hermitian matrices take "eigh".

    Args:
        A: Symmetric (or Hermitian) positive semidefinite matrices. Eigenvalues that are negative by less than rounding
            explains, max(n, 16) eps of the largest, count as zero.
        method: "eigh" is exact; "mpa" (Pade), "mtp" (Taylor), "pade_iter" (Pade, repeated) and "newton_schulz" take
            products and Cholesky inverses only. "auto" is "eigh", unless a `tolerance` lets it be quicker.
        tolerance: For "auto": relative Frobenius error of X that will do, in (0, 1). A method is taken only if the
            spectrum is certified to lie where it keeps to this; "eigh" otherwise.
        order: Degree m of Pade's quotient; Taylor's series goes to 2 m. Default 5, the paper's.
        scale: What A is divided by, for all but "eigh": the mean eigenvalue ("trace"), the Frobenius norm ("fro"), the
            largest eigenvalue ("spectral"), or a number. Default "trace" for Pade, "fro" for the others.
        steps: Of "pade_iter" (default 3) and "newton_schulz" (default 15).
        backward: How the gradient is solved for: "eigh", "lyapunov" (products only), or "autograd", the gradient of the
            approximation itself at a fixed scale (not for "eigh"). Default "eigh" for "eigh", "autograd" for "mpa",
            "lyapunov" for the others.
        backward_steps: Of "lyapunov": a number, or "auto", until converged. Default "auto"; 8 with `paper`.
        eps: Added to the diagonal, >= 0. Default 0.
        check: Whether to refuse bad values, which waits for a GPU's results; False under `torch.func.vmap`.
        paper: Take the published algorithm: "mpa" (or "mtp"), scaled by "fro", eight steps of "lyapunov".

    Returns:
        X, in the dtype of A.

    Raises:
        ValueError: A is not of square matrices, or an option is not one of the above.
        torch.linalg.LinAlgError: A is not finite, not symmetric, or not positive semidefinite.

    Source: Fast Differentiable Matrix Square Root (arXiv 2201.08663).

    Example:
        >>> import torch
        >>> a = torch.tensor([[5.0, 4.0], [4.0, 5.0]], requires_grad=True)
        >>> x = matrix_sqrth(a)
        >>> torch.allclose(x, torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        True
        >>> x.trace().backward()
        >>> torch.allclose(a.grad, torch.linalg.inv(x) / 2)  # of tr A^1/2
        True
    """
    where = "matrix_sqrth"
    chosen = options(
        where, method=method, tolerance=tolerance, order=order, scale=scale, steps=steps, backward=backward,
        backward_steps=backward_steps, eps=eps, check=check, paper=paper,
    )  # fmt: skip
    root, _ = both(where, A, chosen, root=True, inverse=False)
    return root  # type: ignore[return-value]


def matrix_inv_sqrth(A: Inexact[Tensor, "*b n n"], **given: Unpack[RootOptions]) -> Inexact[Tensor, "*b n n"]:
    """Return the positive definite Y with Y A Y = 1, for each matrix of a batch on its own.

    Args:
        A: Symmetric (or Hermitian) positive definite matrices.
        **given: Options of `matrix_sqrth`.

    Returns:
        Y, in the dtype of A.

    Raises:
        ValueError: See `matrix_sqrth`.
        torch.linalg.LinAlgError: See `matrix_sqrth`; or A is singular: no eigenvalue may be below max(n, 16) eps of the
            largest. `eps` above zero mends that.

    Source: T-PAMI 2022 (arXiv 2201.12543).

    Example:
        >>> import torch
        >>> matrix_inv_sqrth(torch.diag(torch.tensor([4.0, 0.25], dtype=torch.float64)))
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]], dtype=torch.float64)
    """
    where = "matrix_inv_sqrth"
    _, inverse = both(where, A, options(where, **given), root=False, inverse=True)
    return inverse  # type: ignore[return-value]


def matrix_sqrth_pair(
    A: Inexact[Tensor, "*b n n"], **given: Unpack[RootOptions]
) -> tuple[Inexact[Tensor, "*b n n"], Inexact[Tensor, "*b n n"]]:
    """Return the square root and its inverse, for about the price of one.

    Args:
        A: Symmetric (or Hermitian) positive definite matrices.
        **given: Options of `matrix_sqrth`.

    Returns:
        (X, Y), with X X = A and X Y = 1.

    Raises:
        ValueError: See `matrix_sqrth`.
        torch.linalg.LinAlgError: See `matrix_inv_sqrth`.

    Example:
        >>> import torch
        >>> root, inverse = matrix_sqrth_pair(torch.diag(torch.tensor([4.0, 0.25])))
        >>> torch.allclose(root.diag(), torch.tensor([2.0, 0.5])), torch.allclose(root @ inverse, torch.eye(2))
        (True, True)
    """
    where = "matrix_sqrth_pair"
    return both(where, A, options(where, **given), root=True, inverse=True)  # type: ignore[return-value]
