"""Matrix functions: square roots with gradients, whitening, distances of Gaussians, corrections of low rank.

How to choose: `matrix_sqrth` and `matrix_inv_sqrth` for one of the roots, `matrix_sqrth_pair` for both;
`solve_lyapunov_psd` for the equation behind their gradients. `ZCAWhitening2d` stands in for `nn.BatchNorm2d`,
`CovPool2d` and `SqrtCov` for average pooling; `frechet_distance` compares Gaussians; `low_rank_correction` mends the
error of a rounded layer.
"""

from planish.linalg.covariance import CovPool2d, SqrtCov, ZCAWhitening2d
from planish.linalg.gaussians import frechet_distance
from planish.linalg.low_rank import low_rank_correction
from planish.linalg.lyapunov import solve_lyapunov_psd
from planish.linalg.sqrtm import matrix_inv_sqrth, matrix_sqrth, matrix_sqrth_pair

__all__ = [
    "CovPool2d",
    "SqrtCov",
    "ZCAWhitening2d",
    "frechet_distance",
    "low_rank_correction",
    "matrix_inv_sqrth",
    "matrix_sqrth",
    "matrix_sqrth_pair",
    "solve_lyapunov_psd",
]
