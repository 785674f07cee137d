"""The exact answer where there is one: Kalman's filter and smoother, and draws of whole paths."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from planish.statespace.models import LinearGaussian
from planish.statespace.particles import check_series


@dataclass(frozen=True)
class KalmanResult:
    """Exact laws of a linear Gaussian model; a leading axis for several series.

    Attributes:
        loglik: log p(y).
        filter_mean: E[X_t | y_{0:t}], (n_steps, d).
        filter_cov: Its covariance, (n_steps, d, d).
        mean: E[X_t | y], (n_steps, d).
        cov: Its covariance, (n_steps, d, d).
        lag_cov: Cov(X_t, X_{t+1} | y), (n_steps - 1, d, d).
        gain: Of the smoother: E[X_t | x_{t+1}, y] moves by this times x_{t+1}, (n_steps - 1, d, d).
        transition_matrix: A of the model.

    Example:
        >>> found: KalmanResult = kalman(LinearGaussian(0.5, 1.0), torch.zeros(3, 1))
        >>> found.mean.flatten().tolist(), found.lag_cov.shape
        ([0.0, 0.0, 0.0], torch.Size([2, 1, 1]))
    """

    loglik: Tensor
    filter_mean: Tensor
    filter_cov: Tensor
    mean: Tensor
    cov: Tensor
    lag_cov: Tensor
    gain: Tensor
    transition_matrix: Tensor

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw paths from the smoothing law of one series: (n, n_steps, d).

        Args:
            n: How many, >= 1.
            generator: Source of randomness.

        Returns:
            The paths; with several series, those in front: (series, n, n_steps, d).
        """
        *batch, n_steps, d = self.mean.shape

        def around(mean: Tensor, cov: Tensor) -> Tensor:
            noise = torch.randn(*batch, n, d, generator=generator, dtype=mean.dtype, device=mean.device)
            made: Tensor = mean + noise @ torch.linalg.cholesky(cov).mT
            return made

        path = [around(self.mean[..., -1:, :], self.cov[..., -1, :, :])]
        for t in range(n_steps - 2, -1, -1):
            gain, cov = self.gain[..., t, :, :], self.filter_cov[..., t, :, :]
            rest = cov - gain @ self.transition_matrix @ cov
            shift = (path[-1] - self.mean[..., t + 1, None, :]) @ gain.mT
            path.append(around(self.mean[..., t, None, :] + shift, (rest + rest.mT) / 2))
        return torch.stack(path[::-1], -2)


def kalman(model: LinearGaussian, y: Float[Tensor, "..."]) -> KalmanResult:
    """Filter and smooth exactly; differentiable in the model's parameters, through `loglik` to its exact gradient.

    Args:
        model: The model.
        y: Observations (n_steps, dy), or several series in front; rows of NaN where missing.

    Raises:
        ValueError: `y` is no series, or a row is missing in part.

    Example:
        >>> model = LinearGaussian(0.9, 0.25, observation_cov=1.0)
        >>> y = torch.tensor([[1.0], [float("nan")], [1.0]])
        >>> found = kalman(model, y)
        >>> [round(m, 3) for m in found.mean.flatten().tolist()]
        [0.704, 0.7, 0.704]
    """
    series, single = check_series("kalman", y)
    A, B = model.transition_matrix, model.observation_matrix
    Q, R = model.transition_cov, model.observation_cov
    n_series, n_steps, dy = series.shape
    d = len(A)
    eye = torch.eye(d, dtype=A.dtype, device=A.device)
    mean = model.initial_mean.expand(n_series, d)
    cov = model.initial_cov.expand(n_series, d, d)
    loglik = mean.new_zeros(n_series)
    means, covs = [], []
    for t in range(n_steps):
        if t:
            mean, cov = mean @ A.mT, A @ cov @ A.mT + Q
        seen = ~series[:, t].isnan().any(-1)
        off = torch.where(seen[:, None], series[:, t], 0) - mean @ B.mT
        lower = torch.linalg.cholesky(B @ cov @ B.mT + R)
        gain = torch.cholesky_solve(B @ cov, lower).mT
        white = torch.linalg.solve_triangular(lower, off[..., None], upper=False)[..., 0]
        density = -white.square().sum(-1) / 2 - lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        loglik = loglik + torch.where(seen, density - dy / 2 * math.log(2 * math.pi), 0)
        keep = eye - gain @ B  # Joseph's form stays positive definite
        better = keep @ cov @ keep.mT + gain @ R @ gain.mT
        mean = torch.where(seen[:, None], mean + (gain @ off[..., None])[..., 0], mean)
        cov = torch.where(seen[:, None, None], better, cov)
        means.append(mean)
        covs.append(cov)
    smooth_mean, smooth_cov, lags, gains = [mean], [cov], [], []
    for t in range(n_steps - 2, -1, -1):
        ahead = A @ covs[t] @ A.mT + Q
        gain = torch.linalg.solve(ahead, A @ covs[t]).mT
        smooth_mean.append(means[t] + (gain @ (smooth_mean[-1] - means[t] @ A.mT)[..., None])[..., 0])
        lags.append(gain @ smooth_cov[-1])
        cov = covs[t] + gain @ (smooth_cov[-1] - ahead) @ gain.mT
        smooth_cov.append((cov + cov.mT) / 2)
        gains.append(gain)
    empty = A.new_zeros(n_series, 0, d, d)

    def first(part: Tensor) -> Tensor:
        return part[0] if single else part

    return KalmanResult(
        loglik=first(loglik), filter_mean=first(torch.stack(means, 1)), filter_cov=first(torch.stack(covs, 1)),
        mean=first(torch.stack(smooth_mean[::-1], 1)), cov=first(torch.stack(smooth_cov[::-1], 1)),
        lag_cov=first(torch.stack(lags[::-1], 1) if lags else empty),
        gain=first(torch.stack(gains[::-1], 1) if gains else empty), transition_matrix=A,
    )  # fmt: skip
