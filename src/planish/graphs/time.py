"""Along time: differences, their cosine basis, and linear interpolation. Legend: N nodes, M times."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from planish._support import bad


def temporal_difference(x: Float[Tensor, "*N M"]) -> Float[Tensor, "*N M-1"]:
    """Return x D: what each value adds to the one before it.

    Args:
        x: Signals, times last; at least two.

    Raises:
        ValueError: There are fewer than two times.

    Example:
        >>> temporal_difference(torch.tensor([[1.0, 3.0, 2.0]]))
        tensor([[ 2., -1.]])
    """
    if x.shape[-1] < 2:
        raise bad("temporal_difference", "x", "of at least two times", tuple(x.shape))
    return x[..., 1:] - x[..., :-1]


def second_difference(x: Float[Tensor, "*N M"]) -> Float[Tensor, "*N M"]:
    """Return x D D': the Laplacian of the path of times."""
    steps = x[..., 1:] - x[..., :-1]
    zero = torch.zeros_like(x[..., :1])
    return torch.cat([zero, steps], -1) - torch.cat([steps, zero], -1)


def frequencies(m: int, like: Tensor) -> Float[Tensor, "M"]:
    """Return the eigenvalues of D D', 2 - 2 cos(pi j / M), whose eigenvectors are the cosines of `cosines`."""
    return 2 - 2 * torch.cos(math.pi * torch.arange(m, dtype=torch.float64) / m).to(like)


def cosines(x: Float[Tensor, "*N M"]) -> Float[Tensor, "*N M"]:
    """Return the orthonormal cosine transform (DCT-II) of the last axis."""
    m = x.shape[-1]
    half = torch.fft.rfft(torch.cat([x, x.flip(-1)], -1))[..., :m]
    c: Tensor = (half * _turns(m, x, -1)).real * math.sqrt(0.5 / m)
    return torch.cat([c[..., :1] * math.sqrt(0.5), c[..., 1:]], -1)


def from_cosines(c: Float[Tensor, "*N M"]) -> Float[Tensor, "*N M"]:
    """Undo `cosines`."""
    m = c.shape[-1]
    c = torch.cat([c[..., :1] * math.sqrt(2.0), c[..., 1:]], -1) * math.sqrt(2.0 * m)
    spectrum = torch.nn.functional.pad(c * _turns(m, c, 1), (0, 1))
    x: Tensor = torch.fft.irfft(spectrum, n=2 * m)[..., :m]
    return x


def _turns(m: int, like: Tensor, sign: int) -> Tensor:
    angle = (sign * math.pi / (2 * m) * torch.arange(m, dtype=torch.float64)).to(like)
    return torch.polar(torch.ones_like(angle), angle)


def interpolate_time(x: Float[Tensor, "N M"], mask: Bool[Tensor, "N M"]) -> Float[Tensor, "N M"]:
    """Join the samples of each node by straight lines; hold the first and the last one to the ends.

    Args:
        x: Signals; only entries of the mask are read.
        mask: Which entries are samples.

    Returns:
        The filled signals; a node without samples has the mean of all samples at each time, 0 if there is none.

    Raises:
        ValueError: Shapes differ.

    Example:
        >>> x = torch.tensor([[0.0, 9.0, 4.0, 9.0]])
        >>> interpolate_time(x, torch.tensor([[True, False, True, False]]))
        tensor([[0., 2., 4., 4.]])
    """
    if x.shape != mask.shape or x.ndim != 2:
        raise bad("interpolate_time", "mask", f"of the signals' shape {tuple(x.shape)}", tuple(mask.shape))
    m = x.shape[1]
    t = torch.arange(m, device=x.device).expand_as(x)
    before = torch.where(mask, t, -1).cummax(1).values
    after = torch.where(mask, t, m).flip(1).cummin(1).values.flip(1)
    known = torch.where(mask, x, 0.0)
    left = known.gather(1, before.clamp_min(0))
    right = known.gather(1, after.clamp_max(m - 1))
    left, right = torch.where(before < 0, right, left), torch.where(after >= m, left, right)
    part = (t - before) / (after - before).clamp_min(1)
    filled = torch.lerp(left, right, part.to(x.dtype))
    seen = mask.any(1)
    if not bool(seen.all()):
        filled = torch.where(seen[:, None], filled, _means(filled[seen]))
    return torch.where(mask, x, filled)


def _means(rows: Tensor) -> Tensor:
    return rows.mean(0) if len(rows) else torch.zeros(rows.shape[1]).to(rows)
