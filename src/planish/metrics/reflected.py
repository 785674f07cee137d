"""Gaussian smoothing on [0, 1] with reflecting ends, exact in the spectrum.

A Gaussian folded back at 0 and 1 is the heat kernel of the unit interval: cosines are its eigenfunctions, cos(pi k t)
shrinks by exp(-(pi k s)^2 / 2) at bandwidth s. Weighted samples are put on a grid of cell midpoints once; after that
every bandwidth costs one cosine transform, with all reflections in it and no truncation of the kernel.

Legend: M grid cells, t_j = (j + 1/2) / M.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

GRID = 4096
FINEST = 1 << 20


def deposit(points: Float[Tensor, " n"], values: Float[Tensor, "n *more"], cells: int) -> Float[Tensor, "cells *more"]:
    """Share each value between the two nearest midpoints; beyond the outer ones it goes whole to the last cell."""
    x = points * cells - 0.5
    low = x.floor()
    share = (x - low).reshape(-1, *[1] * (values.ndim - 1))
    left = low.long().clamp(0, cells - 1)
    right = (low.long() + 1).clamp(0, cells - 1)
    grid = values.new_zeros(cells, *values.shape[1:])
    return grid.index_add(0, left, (1 - share) * values).index_add(0, right, share * values)


def cosines(grid: Float[Tensor, " cells"]) -> Float[Tensor, " cells"]:
    """Return the cosine coefficients c_k = sum_j grid_j cos(pi k t_j)."""
    cells = len(grid)
    spectrum = torch.fft.rfft(torch.cat([grid, grid.flip(0)]))[:cells]
    turned: Tensor = spectrum * _turn(cells, -1, grid)
    return turned.real / 2


def smooth(coefficients: Float[Tensor, " cells"], bandwidth: float) -> Float[Tensor, " cells"]:
    """Return the grid whose cosine coefficients are given, smoothed: the mass of each cell, not its density."""
    cells = len(coefficients)
    k = torch.arange(cells, dtype=coefficients.dtype, device=coefficients.device)
    damped = coefficients * torch.exp(-((math.pi * bandwidth * k) ** 2) / 2)
    spectrum = torch.cat([damped * _turn(cells, 1, coefficients), coefficients.new_zeros(1)])
    both: Tensor = torch.fft.irfft(spectrum, n=2 * cells)
    return 2 * both[:cells]


def midpoints(cells: int) -> Float[Tensor, " cells"]:
    """Return the middles of the cells."""
    return (torch.arange(cells, dtype=torch.float64) + 0.5) / cells


def _turn(cells: int, sign: int, like: Tensor) -> Complex[Tensor, " cells"]:
    angle = torch.arange(cells, dtype=like.dtype, device=like.device) * (sign * math.pi / (2 * cells))
    return torch.polar(torch.ones_like(angle), angle)
