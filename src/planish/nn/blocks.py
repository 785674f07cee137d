"""The unit on a processor, block by block: what lies between two operations never leaves the cache.

The Gaussian is written in place with the quickest operations that torch compiles: t Phi(t) is `gelu`, and divided by t
it is Phi; `exp2` costs a quarter of `exp`. The other kernels run their plain formulas, block by block.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from planish.nn import unit

PER_THREAD = 1 << 15  # elements: four buffers of float32 fill half of a second-level cache of 1 MB
_NARROWEST = 1e-12  # below, x / s could overflow; the plain formulas cannot
_OFF_ZERO = 1.7e-37  # added to x / s before a division by it
_LOG2_PEAK = -0.5 * math.log2(2 * math.pi)
_HALF_LOG2_E = 0.5 / math.log(2)


def quick(x: Tensor, slope: Tensor, sigma: Tensor) -> bool:
    """Tell whether these are plain tensors on a processor, of a width that float32 can divide by."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in (x, slope, sigma))
    return plain and x.numel() > 0 and float(sigma.detach().min()) >= _NARROWEST


class _Layout:
    """Views of dense tensors as (outer, channels, inner), or flat where one parameter serves all; and their blocks."""

    def __init__(self, x: Tensor, shared: bool, channel_dim: int) -> None:
        strides = x.stride()
        self.order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
        if not x.permute(self.order).is_contiguous():
            self.order = list(range(x.dim()))
        at = 0 if shared else self.order.index(channel_dim)
        sizes = [x.shape[d] for d in self.order]
        self.shape = (-1,) if shared else (math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :]))
        row = 1 if shared else sizes[at] * math.prod(sizes[at + 1 :])
        self.step = max(1, PER_THREAD * torch.get_num_threads() // row)

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.order).contiguous().view(self.shape)

    def empty(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a tensor as dense and of the same order of dimensions, and its view."""
        sizes = [like.shape[d] for d in self.order]
        flat = torch.empty(sizes, dtype=like.dtype, device=like.device)
        return flat.permute([self.order.index(d) for d in range(like.dim())]), flat.view(self.shape)

    def blocks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        for i in range(0, len(tensors[0]), self.step):
            yield tuple(t[i : i + self.step] for t in tensors)


def forward(x: Tensor, slope: Tensor, sigma: Tensor, kernel: str, channel_dim: int) -> Tensor:
    """Return the unit."""
    layout, a, s = _prepare(x, slope, sigma, channel_dim)
    out, made = layout.empty(x)
    for part, to in layout.blocks(layout.of(x), made):
        wide = part.to(a.dtype)
        if kernel == "gaussian":
            _gaussian(wide, a, s, to)
        else:
            to.copy_(unit.value(wide, a, s, kernel))
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    slope: Tensor,
    sigma: Tensor,
    kernel: str,
    channel_dim: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients by x, slope and sigma, each where it is wanted."""
    layout, a, s = _prepare(x, slope, sigma, channel_dim)
    out, made = layout.empty(x)
    by_slope, by_sigma = torch.zeros(2, *a.shape, dtype=torch.float64).unbind()
    for g, part, to in layout.blocks(layout.of(grad), layout.of(x), made):
        wide, wide_g = part.to(a.dtype), g.to(a.dtype)
        if kernel == "gaussian":
            sums = _gaussian_back(wide_g, wide, a, s, to, wanted)
        else:
            by_x, by_a, by_s = unit.slopes(wide, a, s, kernel)
            torch.mul(wide_g, by_x, out=to if to.dtype == a.dtype else by_x)
            if to.dtype != a.dtype:
                to.copy_(by_x)
            sums = _sum(wide_g, by_a, a) if wanted[1] else None, _sum(wide_g, by_s, a) if wanted[2] else None
        for whole, one in zip((by_slope, by_sigma), sums, strict=True):
            if one is not None:
                whole.add_(one)
    grads = [
        unit.total(whole.reshape(-1), parameter, 0) if want else None
        for whole, parameter, want in zip((by_slope, by_sigma), (slope, sigma), wanted[1:], strict=True)
    ]
    return out if wanted[0] else None, grads[0], grads[1]


def _prepare(x: Tensor, slope: Tensor, sigma: Tensor, channel_dim: int) -> tuple[_Layout, Tensor, Tensor]:
    shared = slope.numel() == sigma.numel() == 1
    dtype, size = unit.upcast(x), max(slope.numel(), sigma.numel())
    shape = () if shared else (size, 1)
    a, s = (p.detach().to(dtype).reshape(-1).expand(size).reshape(shape) for p in (slope, sigma))
    return _Layout(x, shared, channel_dim), a, s


def _sum(g: Tensor, elements: Tensor, parameter: Tensor) -> Tensor:
    """Sum g * elements over all that shares a parameter."""
    if parameter.dim() == 0:
        return torch.dot(g, elements)
    return (g * elements).sum((0, 2))[:, None]


def _density(t: Tensor) -> Tensor:
    """Return the standard normal density."""
    top = torch.tensor(_LOG2_PEAK, dtype=t.dtype)
    return torch.addcmul(top, t, t, value=-_HALF_LOG2_E).exp2_()


def _gaussian(x: Tensor, a: Tensor, s: Tensor, out: Tensor) -> None:
    """Write s lerp(t Phi(t) + phi(t), t, a) with t = x / s: the unit, with one reading of x."""
    t = x * s.reciprocal()
    psi = torch.nn.functional.gelu(t).add_(_density(t))
    torch.lerp(psi, t, a, out=psi)
    if out.dtype == x.dtype:
        torch.mul(psi, s, out=out)
    else:
        out.copy_(psi.mul_(s))


def _gaussian_back(
    g: Tensor, x: Tensor, a: Tensor, s: Tensor, out: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Write g (Phi + a (1 - Phi)); return the sums of g (x (1 - Phi) - s phi) and of g (1 - a) phi where wanted."""
    t = torch.addcmul(torch.tensor(_OFF_ZERO, dtype=x.dtype), x, s.reciprocal())
    passed = torch.nn.functional.gelu(t).div_(t).mul_(g)
    held = g - passed
    if out.dtype == x.dtype:
        torch.addcmul(passed, held, a, out=out)
    else:
        out.copy_(passed.addcmul_(held, a))
    if not (wanted[1] or wanted[2]):
        return None, None
    felt = _sum(g, _density(t), a)
    return _sum(held, x, a) - s * felt if wanted[1] else None, (1 - a) * felt if wanted[2] else None
