"""The Riesz potential |x|^(-mu) * f of a function on a grid."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.pde.operators import cell_integrals, even_convolve, hat_moments, wrapped


class RieszPotential:
    """Convolve with |x|^(-mu) on a line or in the plane; differentiable, batched over leading axes.

    On a line the function is taken to be linear between grid points and integrated exactly; in the plane the kernel is
    averaged over cells. No constant is put before the integral.

    Args:
        n: Grid points (a side), >= 3.
        step: Their distance, > 0.
        mu: Power, in (0, dim).
        dim: 1 (default) or 2.

    Raises:
        ValueError: An argument is out of range, or the function does not fit the grid.

    Example:
        >>> x = torch.linspace(-6, 6, 601, dtype=torch.float64)
        >>> potential = RieszPotential(601, 0.02, 0.5)(torch.exp(-(x**2)))
        >>> round(float(potential[300]), 3), round(math.gamma(0.25), 3)
        (3.625, 3.626)
    """

    def __init__(self, n: int, step: int | float, mu: int | float, *, dim: int = 1) -> None:
        if dim not in {1, 2}:
            raise bad("RieszPotential", "dim", "1 or 2", dim)
        if not 0 < mu < dim:
            raise bad("RieszPotential", "mu", f"in (0, {dim})", mu)
        if n < 3:
            raise bad("RieszPotential", "n", "at least 3", n)
        if not 0 < step < math.inf:
            raise bad("RieszPotential", "step", "above 0", step)
        self.n, self.step, self.mu, self.dim = n, step, mu, dim
        if dim == 1:
            self.weights = hat_moments(n, step, -mu)
            self.centre = 2 * step ** (1 - mu) / ((1 - mu) * (2 - mu))
        else:
            self.weights = cell_integrals(n, step, -mu)
            self._spectrum = torch.fft.rfft2(wrapped(self.weights))

    def __call__(self, f: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """Return |x|^(-mu) * f at the grid points."""
        shape = (self.n,) * self.dim
        if f.dtype is not torch.float64 or f.shape[-self.dim :] != shape:
            raise bad("RieszPotential", "f", f"float64 with last axes {shape}", f"{f.dtype} {tuple(f.shape)}")
        if self.dim == 1:
            return even_convolve(self.weights, f, centre=self.centre)
        spectrum = torch.fft.rfft2(f, (2 * self.n,) * 2) * self._spectrum
        made: Tensor = torch.fft.irfft2(spectrum, (2 * self.n,) * 2)[..., : self.n, : self.n]
        return made
