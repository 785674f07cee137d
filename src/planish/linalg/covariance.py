"""Layers about covariances of channels: whitening in place of normalization, and pooling of second order.

Batch normalization gives every channel variance 1; whitening takes the correlations as well, by the inverse root of the
covariance, of which the symmetric one (ZCA) moves features least.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.linalg.options import Method
from planish.linalg.sqrtm import matrix_inv_sqrth, matrix_sqrth


class ZCAWhitening2d(nn.Module):
    """Whiten groups of channels: a drop-in for `nn.BatchNorm2d` that decorrelates.

    In training by the batch's own mean and covariance, of which running averages serve in evaluation. Averaged are the
    covariances, whose inverse root is then taken: the average of inverse roots is not the inverse root of anything.

    Args:
        num_features: Channels, a multiple of `groups`.
        groups: Groups of neighbouring channels, each whitened on its own. Default 1.
        eps: Added to the variances, > 0. Default 1e-2, as in the paper's experiments.
        momentum: Weight of the new batch in the running averages, in [0, 1]; None averages all batches alike.
        affine: Whether to learn a scale and a shift for each channel.
        track_running_stats: Whether to keep running averages; without, batches are whitened in evaluation, too.
        method: Of `matrix_inv_sqrth`.

    Raises:
        ValueError: An argument is out of range, or a batch in training has one value a channel.

    Source: Decorrelated batch normalization (arXiv 1804.08450), with the roots of arXiv 2201.12543.

    Example:
        >>> layer = ZCAWhitening2d(4, eps=1e-6)
        >>> x = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))
        >>> y = layer(x).transpose(0, 1).flatten(1)
        >>> torch.allclose(y @ y.T / y.shape[1], torch.eye(4), atol=1e-4)
        True
    """

    running_mean: Tensor | None
    running_cov: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        groups: int = 1,
        eps: float = 1e-2,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        method: Method = "auto",
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise bad("ZCAWhitening2d", "num_features", "an int >= 1", num_features)
        if groups < 1 or num_features % groups:
            raise bad("ZCAWhitening2d", "groups", f"a divisor of {num_features} channels", groups)
        if not eps > 0:
            raise bad("ZCAWhitening2d", "eps", "above 0", eps)
        if momentum is not None and not 0 <= momentum <= 1:
            raise bad("ZCAWhitening2d", "momentum", "in [0, 1], or None", momentum)
        self.num_features, self.groups, self.eps, self.momentum = num_features, groups, eps, momentum
        self.affine, self.track_running_stats, self.method = affine, track_running_stats, method
        size = num_features // groups
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(groups, size, 1) if track_running_stats else None)
        self.register_buffer("running_cov", torch.eye(size).repeat(groups, 1, 1) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if track_running_stats else None)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return (
            f"{self.num_features}, groups={self.groups}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}"
        )

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Return the whitened features."""
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise bad("ZCAWhitening2d", "x", f"of shape (batch, {self.num_features}, height, width)", tuple(x.shape))
        rows = x.transpose(0, 1).reshape(self.groups, self.num_features // self.groups, -1)
        rows = rows.float() if x.dtype in (torch.float16, torch.bfloat16) else rows
        with torch.autocast(x.device.type, enabled=False):
            if self.training or self.running_mean is None or self.running_cov is None:
                if rows.shape[-1] < 2:
                    raise bad("ZCAWhitening2d", "x", "more than one value a channel in training", tuple(x.shape))
                mean = rows.mean(-1, keepdim=True)
                cov = (rows - mean) @ (rows - mean).mT / rows.shape[-1]
                if self.training:
                    self._track(mean.detach(), cov.detach() * (rows.shape[-1] / (rows.shape[-1] - 1)))
            else:
                mean, cov = self.running_mean.to(rows.dtype), self.running_cov.to(rows.dtype)
            white = matrix_inv_sqrth(cov, method=self.method, eps=self.eps) @ (rows - mean)
        shape = (self.num_features, x.shape[0], *x.shape[2:])
        y = white.reshape(shape).transpose(0, 1).to(x.dtype)
        if self.weight is None or self.bias is None:
            return y
        return y * self.weight.to(x.dtype)[:, None, None] + self.bias.to(x.dtype)[:, None, None]

    def _track(self, mean: Tensor, cov: Tensor) -> None:
        if self.running_mean is None or self.running_cov is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_cov.lerp_(cov.to(self.running_cov.dtype), share)


class CovPool2d(nn.Module):
    """Pool a feature map into the covariance of its channels, (batch, channels, channels).

    Args:
        eps: Added to the diagonal, >= 0. Default 0.

    Raises:
        ValueError: `eps` is negative, or the input has another number of axes.

    Source: Second-order pooling, as in So-ViT and the paper's experiments (arXiv 2201.08663).

    Example:
        >>> CovPool2d()(torch.tensor([[[[1.0, -1.0]], [[2.0, -2.0]]]])).tolist()
        [[[1.0, 2.0], [2.0, 4.0]]]
    """

    def __init__(self, eps: float = 0.0) -> None:
        super().__init__()
        if not eps >= 0:
            raise bad("CovPool2d", "eps", "a float >= 0", eps)
        self.eps = eps

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels channels"]:
        """Return the covariance of the channels over the places."""
        if x.ndim != 4 or 0 in x.shape:
            raise bad("CovPool2d", "x", "of shape (batch, channels, height, width), none of them 0", tuple(x.shape))
        rows = x.flatten(2)
        with torch.autocast(x.device.type, enabled=False):
            rows = rows - rows.mean(-1, keepdim=True)
            eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            return rows @ rows.mT / rows.shape[-1] + self.eps * eye


class SqrtCov(nn.Module):
    """Take the square root of covariances: features of second order that a linear classifier can use.

    Args:
        vectorize: Whether to return the upper triangle alone, as (batch, n (n + 1) / 2). Default True.
        method: Of `matrix_sqrth`.

    Source: Fast Differentiable Matrix Square Root (arXiv 2201.08663).

    Example:
        >>> SqrtCov()(torch.tensor([[[5.0, 4.0], [4.0, 5.0]]])).round(decimals=4).tolist()
        [[2.0, 1.0, 2.0]]
    """

    def __init__(self, vectorize: bool = True, *, method: Method = "auto") -> None:
        super().__init__()
        self.vectorize, self.method = vectorize, method

    def forward(self, cov: Float[Tensor, "*b n n"]) -> Tensor:
        """Return the roots."""
        root = matrix_sqrth(cov, method=self.method)
        if not self.vectorize:
            return root
        row, column = torch.triu_indices(*root.shape[-2:], device=root.device)
        return root[..., row, column]
