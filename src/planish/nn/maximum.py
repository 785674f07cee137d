"""SMU and SMU-1: the smooth maximum of x and a x, by the error function or by a square root.

    max(x, a x) = [ (1 + a) x + (1 - a) |x| ] / 2
    SMU(x)      = [ (1 + a) x + (1 - a) x erf(mu (1 - a) x) ] / 2           |z| by z erf(mu z)
    SMU-1(x)    = [ (1 + a) x + sqrt((1 - a)^2 x^2 + mu^2) ] / 2            |z| by sqrt(z^2 + mu^2)

SMU-1 is SAU with the kernel "student" and sigma = mu / (1 - a). SMU is a smoothing by a kernel with negative parts: it
lies below Leaky ReLU, and is neither convex nor, at slope 0, increasing; a = 0 and mu = 1 / sqrt(2) is GELU.

=======  =========  ==================================================================
paper    here       shape, range
=======  =========  ==================================================================
alpha    ``slope``  one, or one a channel; default 0.25, not trained
mu       ``mu``     one, or one a channel; > 0; trained by its logarithm
=======  =========  ==================================================================

At the papers' values both are Leaky ReLU to rounding, and the gradient by mu vanishes except next to zero: take mu near
1 where smoothness is wanted.

Reference:
    Biswas, Kumar, Banerjee and Pandey, SMU: smooth activation function for deep networks using smoothing maximum
    technique, 2021. https://arxiv.org/abs/2111.04682
"""

import torch
from jaxtyping import Float
from torch import Tensor

from planish.nn.parameters import SlopeAndWidth, as_parameter, check_input
from planish.nn.unit import along, upcast


def _prepare(
    where: str, x: Tensor, slope: float | Tensor, mu: float | Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_input(where, x)
    a = as_parameter(where, "slope", slope, x, channel_dim)
    m = as_parameter(where, "mu", mu, x, channel_dim, least=0.0)
    dim = channel_dim % max(x.dim(), 1)
    return x.to(upcast(x)), along(a, x, dim), along(m, x, dim)


def smu(
    x: Float[Tensor, "*shape"], slope: float | Tensor = 0.25, mu: float | Tensor = 1e6, *, channel_dim: int = 1
) -> Float[Tensor, "*shape"]:
    """Return the smooth maximum of x and slope * x by the error function, elementwise.

    Args:
        x: Any floating-point tensor; half precision is computed in float32.
        slope: Slope for x < 0; one number, or one a channel. Default 0.25, the paper's.
        mu: Sharpness, >= 0, in units of 1 / x. Default 1e6, the paper's.
        channel_dim: Dimension of x that holds the channels, where there is a number a channel.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: `x` is not of a floating-point dtype.
        ValueError: `mu` is negative, or there are not as many numbers as channels.

    Example:
        >>> import torch
        >>> x = torch.linspace(-3, 3, 7)
        >>> torch.allclose(smu(x, slope=0.0, mu=0.5**0.5), torch.nn.functional.gelu(x), atol=1e-6)
        True
    """
    wide, a, m = _prepare("smu", x, slope, mu, channel_dim)
    apart = (1 - a) * wide
    return (((1 + a) * wide + apart * torch.erf(m * apart)) / 2).to(x.dtype)


def smu1(
    x: Float[Tensor, "*shape"],
    slope: float | Tensor = 0.25,
    mu: float | Tensor = 4.332461424154261e-9,
    *,
    channel_dim: int = 1,
) -> Float[Tensor, "*shape"]:
    """Return the smooth maximum of x and slope * x by a square root, elementwise.

    Args:
        x: Any floating-point tensor; half precision is computed in float32.
        slope: Slope for x < 0; one number, or one a channel. Default 0.25, the paper's.
        mu: Width, > 0, in units of x. Default 4.332461424154261e-9, that of the known implementation.
        channel_dim: Dimension of x that holds the channels, where there is a number a channel.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        TypeError: `x` is not of a floating-point dtype.
        ValueError: `mu` is negative, or there are not as many numbers as channels.

    Example:
        >>> import torch
        >>> smu1(torch.tensor([-3.0, 0.0, 3.0]), slope=0.0, mu=8.0)
        tensor([2.7720, 4.0000, 5.7720])
    """
    wide, a, m = _prepare("smu1", x, slope, mu, channel_dim)
    apart = (1 - a) * wide
    return (((1 + a) * wide + torch.sqrt(apart * apart + m * m)) / 2).to(x.dtype)


class SMU(SlopeAndWidth):
    """Smooth maximum of x and slope * x by the error function, as a layer.

    Args:
        num_parameters: 1, or the number of channels. Default 1.
        init: First slope, in (-1, 1). Default 0.25.
        mu: First sharpness, > 0 if trained. Default 1e6.
        learn_slope: Whether the slope is trained. Default False.
        learn_mu: Whether mu is trained, by its logarithm. Default True.
        slope_constraint: None (default), or the open interval that the slope is held in while trained.
        channel_dim: Dimension that holds the channels. Default 1.
        inplace: Taken so that the class can stand where nn.ReLU is expected, and ignored.
        device: Where the parameters lie.
        dtype: Their dtype.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import torch
        >>> SMU(mu=1.0)(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    width_name = "mu"

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        mu: float = 1e6,
        *,
        learn_slope: bool = False,
        learn_mu: bool = True,
        slope_constraint: tuple[float, float] | None = None,
        channel_dim: int = 1,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_parameters, init, mu, learn_slope, learn_mu, slope_constraint, channel_dim, device, dtype)

    @property
    def mu(self) -> Tensor:
        """The sharpness: a new tensor, differentiable where it is trained; assigning a number sets it."""
        return self.width

    @mu.setter
    def mu(self, width: float | Tensor) -> None:
        self.width = width

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return `smu(x)` with this unit's slope and mu."""
        return smu(x, self.slope, self.mu, channel_dim=self.channel_dim)


class SMU1(SlopeAndWidth):
    """Smooth maximum of x and slope * x by a square root, as a layer.

    Args:
        num_parameters: 1, or the number of channels. Default 1.
        init: First slope, in (-1, 1). Default 0.25.
        mu: First width, > 0. Default 4.332461424154261e-9.
        learn_slope: Whether the slope is trained. Default False.
        learn_mu: Whether mu is trained, by its logarithm. Default True.
        slope_constraint: None (default), or the open interval that the slope is held in while trained.
        channel_dim: Dimension that holds the channels. Default 1.
        inplace: Taken so that the class can stand where nn.ReLU is expected, and ignored.
        device: Where the parameters lie.
        dtype: Their dtype.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import torch
        >>> SMU1(mu=0.5)(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    width_name = "mu"

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        mu: float = 4.332461424154261e-9,
        *,
        learn_slope: bool = False,
        learn_mu: bool = True,
        slope_constraint: tuple[float, float] | None = None,
        channel_dim: int = 1,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_parameters, init, mu, learn_slope, learn_mu, slope_constraint, channel_dim, device, dtype)

    @property
    def mu(self) -> Tensor:
        """The width: a new tensor, differentiable where it is trained; assigning a number sets it."""
        return self.width

    @mu.setter
    def mu(self, width: float | Tensor) -> None:
        self.width = width

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return `smu1(x)` with this unit's slope and mu."""
        return smu1(x, self.slope, self.mu, channel_dim=self.channel_dim)
