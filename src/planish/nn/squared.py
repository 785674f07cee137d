"""ReQU: the square of ReLU, the simplest unit whose networks have continuous derivatives.

    ReQU(x) = max(0, x)^2        ReQU'(x) = 2 max(0, x)        ReQU''(x) = 2 for x > 0, 0 for x <= 0

A penalty on a derivative of a ReLU network is piecewise constant and tells its weights next to nothing; of a ReQU
network it is continuous, and trains. Networks of ReQU hold every polynomial exactly:

    z^2 = ReQU(z) + ReQU(-z)        z w = ((z + w)^2 - (z - w)^2) / 4        z = ((z + 1)^2 - (z - 1)^2) / 4

When to use: where derivatives of the network enter the loss (monotone quantiles, forces, equations), on standardised
inputs and with few layers. L layers make a polynomial of degree 2^L outside the data, and float16 overflows at x = 256.

Reference:
    Shen, Jiao, Lin, Horowitz and Huang, Estimation of Non-Crossing Quantile Regression Process with Deep ReQU Neural
    Networks, 2022. https://arxiv.org/abs/2207.10442
"""

from jaxtyping import Float
from torch import Tensor, nn


def requ(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return max(0, x)^2, elementwise and differentiable twice.

    Args:
        x: Any floating-point tensor.

    Returns:
        A tensor of the same shape and dtype, >= 0; NaN stays NaN.

    Raises:
        TypeError: `x` is not of a floating-point dtype.

    Example:
        >>> import torch
        >>> requ(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([0., 0., 9.])
    """
    if not x.is_floating_point():
        raise TypeError(f"requ: `x` must be a floating-point tensor; got {x.dtype}.")
    return x.relu().square()


class ReQU(nn.Module):
    """Apply `requ`, as a layer.

    Args:
        inplace: Taken so that the class can stand where nn.ReLU is expected, and ignored: nothing is ever overwritten.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), ReQU(), torch.nn.Linear(8, 1))
        >>> net(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return `requ(x)`."""
        return requ(x)
