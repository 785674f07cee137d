"""How far apart two Gaussians are: the Frechet distance, behind FID and its kin.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2) - 2 tr (S_1^1/2 S_2 S_1^1/2)^1/2

The last trace is the sum of the singular values of S_1^1/2 S_2^1/2, which squares nothing: it keeps half of the digits
that the root of a product loses where covariances are singular, as those of few samples are.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.linalg.lyapunov import in_full
from planish.linalg.sqrtm import matrix_sqrth


def frechet_distance(
    mu1: Float[Tensor, "*b n"],
    sigma1: Float[Tensor, "*b n n"],
    mu2: Float[Tensor, "*b n"],
    sigma2: Float[Tensor, "*b n n"],
) -> Float[Tensor, "*b"]:
    """Return the squared Frechet (2-Wasserstein) distance of two Gaussians, differentiably.

    Args:
        mu1: Mean of the first.
        sigma1: Covariance of the first, symmetric positive semidefinite, may be singular.
        mu2: Mean of the second.
        sigma2: Covariance of the second.

    Returns:
        The distance, >= 0: the FID, where the Gaussians are those of features.

    Raises:
        ValueError: Shapes do not fit.
        torch.linalg.LinAlgError: A covariance is not finite, not symmetric, or not positive semidefinite.

    Example:
        >>> mu, sigma = torch.zeros(2), torch.eye(2)
        >>> round(frechet_distance(mu, sigma, mu + 1, 4 * sigma).item(), 4)  # |1|^2 + n (2 - 1)^2
        4.0
    """
    where = "frechet_distance"
    if mu1.ndim < 1 or mu1.shape != mu2.shape:
        raise bad(where, "mu2", f"of shape {tuple(mu1.shape)}, as `mu1`", tuple(mu2.shape))
    for name, sigma in (("sigma1", sigma1), ("sigma2", sigma2)):
        if tuple(sigma.shape) != (*mu1.shape, mu1.shape[-1]):
            raise bad(where, name, f"of shape {(*mu1.shape, mu1.shape[-1])}", tuple(sigma.shape))
    roots = matrix_sqrth(sigma1), matrix_sqrth(sigma2)
    with in_full(mu1):
        shared = torch.linalg.svdvals(roots[0] @ roots[1]).sum(-1)
        traces = (sigma1 + sigma2).diagonal(dim1=-2, dim2=-1).sum(-1)
        found: Tensor = (mu1 - mu2).square().sum(-1) + traces - 2 * shared
        return found.clamp(min=0)
