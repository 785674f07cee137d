"""The smoothed Leaky ReLU and its derivatives, by plain operations.

Legend: a the slope, s the width, u = |x| / s; L_a(x) = x for x >= 0, a x below.

    y       = L_a(x) + (1 - a) s tail(u)
    dy / dx = 1 - (1 - a) sf(u) for x >= 0,  a + (1 - a) sf(u) below
    dy / da = min(x, 0) - s tail(u)
    dy / ds = (1 - a) gap(u)

Half precision is computed in float32, where no x / s overflows.
"""

import torch
from torch import Tensor

from planish.nn.profiles import PROFILES


def upcast(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def along(parameter: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """Return one number, or a number a channel, in the shape that broadcasts over x, and in the dtype to compute in."""
    parameter = parameter.to(upcast(x))
    if parameter.numel() == 1:
        return parameter.reshape(())
    return parameter.reshape(-1, *[1] * (x.dim() - channel_dim - 1))


def distance(x: Tensor, s: Tensor, reach: float) -> Tensor:
    """Return u = |x| / s, at most `reach`; its derivative by x is +1 / s at zero, as that of the branch x >= 0."""
    size = torch.where(x < 0, -x, x)
    return (size / s.clamp_min(torch.finfo(s.dtype).tiny)).clamp_max(reach)


def value(x: Tensor, a: Tensor, s: Tensor, kernel: str) -> Tensor:
    """Return the unit by plain operations: what compilers and exporters see."""
    profile = PROFILES[kernel]
    tail = profile.tail(distance(x, s, profile.reach))
    return torch.where(x < 0, a * x, x) + (1 - a) * s * tail


def slopes(x: Tensor, a: Tensor, s: Tensor, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives by x, by a and by s, elementwise, by plain operations."""
    profile = PROFILES[kernel]
    u = distance(x, s, profile.reach)
    lost = (1 - a) * profile.sf(u)
    return torch.where(x < 0, a + lost, 1 - lost), x.clamp_max(0) - s * profile.tail(u), (1 - a) * profile.gap(u)


def total(elements: Tensor, parameter: Tensor, channel_dim: int) -> Tensor:
    """Sum over all that shares a parameter, in the parameter's shape and dtype."""
    over = [d for d in range(elements.dim()) if parameter.numel() == 1 or d != channel_dim]
    out = elements.sum(over) if over else elements
    return out.reshape(parameter.shape).to(parameter.dtype)
