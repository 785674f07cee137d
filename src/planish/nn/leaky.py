"""SAU: Leaky ReLU convolved with an approximate identity, so that it is smooth; slope and width may be trained.

Leaky ReLU has a corner at zero. Averaging it over a window of width sigma, with weights phi, rounds the corner off and
leaves the rest: the result is smooth, convex and increasing where 0 <= a <= 1, lies above Leaky ReLU, and tends to it
uniformly as sigma tends to 0.

    SAU(x) = (L_a * phi_sigma)(x) = E[ L_a(x + sigma U) ],   U distributed as phi
    Gaussian phi:   a x + (1 - a) [ x Phi(x / sigma) + sigma phi(x / sigma) ]

=============  ================  =================================================================
paper          here              shape, range
=============  ================  =================================================================
alpha          ``slope``         one, or one a channel; any real, convex for [0, 1]; default 0.15
beta           1 / ``sigma``     one, or one a channel; sigma >= 0; default 5e-5
approximate    ``kernel``        seven kernels, see `planish.nn.profiles`
identity
=============  ================  =================================================================

Differs from the paper: any kernel; sigma can be trained (its logarithm is, so it stays positive); the way back is one
operation that keeps only x. At the paper's width the unit is within 1.7e-5 of Leaky ReLU, and behaves as PReLU: take
sigma of 0.1 to 1, or train it, where smoothness is wanted.
When to use: where derivatives of the network matter. See ``docs/jobs/nn.md``. On a CPU, float32 runs in the compiled
module; where that is absent, it may give NaN below -1e26, as GELU does for -inf.

Reference:
    Biswas, Kumar, Banerjee and Pandey, SAU: Smooth activation function using convolution with approximate identities,
    2021. https://arxiv.org/abs/2109.13210
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.nn.parameters import SlopeAndWidth, as_parameter, check_input
from planish.nn.profiles import Kernel, check_kernel
from planish.nn.smoothed import smoothed
from planish.nn.unit import along, upcast, value


def sau(
    x: Float[Tensor, "*shape"],
    slope: float | Tensor = 0.15,
    sigma: float | Tensor = 5e-5,
    *,
    kernel: Kernel = "gaussian",
    channel_dim: int = 1,
) -> Float[Tensor, "*shape"]:
    """Return Leaky ReLU smoothed by a kernel, elementwise.

    Args:
        x: Any floating-point tensor; half precision is computed in float32.
        slope: Slope for x < 0; one number, or one a channel. Default 0.15, the paper's.
        sigma: Width of the kernel, >= 0, in units of x; 0 gives Leaky ReLU itself. Default 5e-5, the paper's. A tensor
            is taken as it is, unchecked.
        kernel: "gaussian" (the paper's), "logistic", "laplace", "uniform", "triangular", "epanechnikov" or "student".
        channel_dim: Dimension of x that holds the channels, where there is a number a channel.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: `x` is not of a floating-point dtype.
        ValueError: `sigma` is negative, `kernel` unknown, or there are not as many numbers as channels.

    Example:
        >>> import torch
        >>> sau(torch.tensor([-4.0, 0.0, 4.0]), slope=0.25, sigma=1.0)
        tensor([-1.0000,  0.2992,  4.0000])
    """
    check_input("sau", x)
    check_kernel("sau", kernel)
    a = as_parameter("sau", "slope", slope, x, channel_dim)
    s = as_parameter("sau", "sigma", sigma, x, channel_dim, least=0.0)
    dim = channel_dim % max(x.dim(), 1)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return value(x.to(upcast(x)), along(a, x, dim), along(s, x, dim), kernel).to(x.dtype)
    return smoothed(x, a, s, kernel, dim)


class SAU(SlopeAndWidth):
    """Smooth Leaky ReLU with a slope and a width that may be trained, as a layer.

    Args:
        num_parameters: 1, or the number of channels for a slope and a width each. Default 1.
        init: First slope, in (-1, 1). Default 0.15, the paper's.
        sigma: First width, >= 0 (> 0 to be trained), in units of the input. Default 5e-5, the paper's.
        kernel: As for `sau`.
        learn_slope: Whether the slope is trained. Default True.
        learn_sigma: Whether the width is trained, by its logarithm. Default False.
        slope_constraint: None (default), or the open interval that the slope is held in while trained.
        channel_dim: Dimension that holds the channels. Default 1.
        inplace: Taken so that the class can stand where nn.ReLU is expected, and ignored: nothing is ever overwritten.
        device: Where the parameters lie.
        dtype: Their dtype.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import torch
        >>> unit = SAU(sigma=0.5, learn_sigma=True)
        >>> sorted(unit.state_dict())
        ['log_sigma', 'raw_slope']
        >>> round(unit.error_bound(), 4)
        0.1696
        >>> unit(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    width_name = "sigma"

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.15,
        sigma: float = 5e-5,
        *,
        kernel: Kernel = "gaussian",
        learn_slope: bool = True,
        learn_sigma: bool = False,
        slope_constraint: tuple[float, float] | None = None,
        channel_dim: int = 1,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_kernel("SAU", kernel)
        self.kernel = kernel
        super().__init__(
            num_parameters, init, sigma, learn_slope, learn_sigma, slope_constraint, channel_dim, device, dtype
        )

    @property
    def sigma(self) -> Tensor:
        """The width: a new tensor, differentiable where it is trained; assigning a number sets it."""
        return self.width

    @sigma.setter
    def sigma(self, width: float | Tensor) -> None:
        self.width = width

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return `sau(x)` with this unit's slope and width."""
        return sau(x, self.slope, self.sigma, kernel=self.kernel, channel_dim=self.channel_dim)

    def error_bound(self) -> float:
        """Return the largest distance of this unit from Leaky ReLU with its slope, over all inputs and channels.

        Returns:
            max |1 - slope| sigma tail(0); the Gaussian's tail(0) is 1 / sqrt(2 pi).

        Example:
            >>> SAU().error_bound() < 1.7e-5
            True
        """
        peak = check_kernel("SAU", self.kernel).peak
        return float(((1 - self.slope.detach()).abs() * self.sigma.detach()).max() * peak)

    def to_leaky_relu(self) -> nn.Module:
        """Return the exact Leaky ReLU that this unit smooths; `error_bound` says how far apart the two can be.

        Returns:
            An nn.LeakyReLU; or an nn.PReLU, not to be trained, where there is a slope a channel.

        Raises:
            ValueError: There is a slope a channel, and channels are not dimension 1, as nn.PReLU has them.

        Example:
            >>> SAU(init=0.25).to_leaky_relu()
            LeakyReLU(negative_slope=0.25)
        """
        slope = self.slope.detach()
        if self.num_parameters == 1:
            return nn.LeakyReLU(float(slope)).train(self.training)
        if self.channel_dim != 1:
            raise bad("SAU.to_leaky_relu", "channel_dim", "1 where there is a slope a channel", self.channel_dim)
        exact = nn.PReLU(self.num_parameters, device=slope.device, dtype=slope.dtype).train(self.training)
        exact.weight.requires_grad_(False)
        exact.weight.copy_(slope)
        return exact

    def extra_repr(self) -> str:
        """Return what the repr shows."""
        return f"{super().extra_repr()}, kernel={self.kernel!r}"
