"""The unit on a processor where the compiled module does not take it, block by block: temporaries stay in the cache.

The Gaussian is written in place with the quickest operations that torch compiles: t Phi(t) is `gelu`, and divided by t
it is Phi; `exp2` costs a quarter of `exp`. The other kernels run their plain formulas, block by block.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from planish.nn import unit
from planish.nn.profiles import PROFILES, Profile

PER_THREAD = (
    1 << 17
)  # elements: shorter blocks pay for calls (oneDNN's gelu costs 6 microseconds), longer ones for memory
_PLAIN = 8  # blocks of plain formulas are shorter by this: their temporaries stay below what malloc maps anew
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

    def __init__(self, x: Tensor, shared: bool, channel_dim: int, per_thread: int) -> None:
        strides = x.stride()
        self.order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
        if not x.permute(self.order).is_contiguous():
            self.order = list(range(x.dim()))
        at = 0 if shared else self.order.index(channel_dim)
        sizes = [x.shape[d] for d in self.order]
        self.shape = (-1,) if shared else (math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :]))
        row = 1 if shared else sizes[at] * math.prod(sizes[at + 1 :])
        self.step = max(1, per_thread * torch.get_num_threads() // row)

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
    layout, a, s = _prepare(x, slope, sigma, kernel, channel_dim)
    out, made = layout.empty(x)
    if kernel == "gaussian":
        _gaussian(layout, layout.of(x), a, s, made)
    else:
        for part, to in layout.blocks(layout.of(x), made):
            to.copy_(_plain(part.to(a.dtype), a, s, PROFILES[kernel]))
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
    layout, a, s = _prepare(x, slope, sigma, kernel, channel_dim)
    out, made = layout.empty(x)
    way = _gaussian_back if kernel == "gaussian" else _plain_back
    by_slope, by_sigma = way(layout, layout.of(grad), layout.of(x), a, s, made, kernel, wanted[1] or wanted[2])
    return (
        out if wanted[0] else None,
        unit.total(by_slope.reshape(-1), slope, 0) if wanted[1] else None,
        unit.total(by_sigma.reshape(-1), sigma, 0) if wanted[2] else None,
    )


def _prepare(x: Tensor, slope: Tensor, sigma: Tensor, kernel: str, channel_dim: int) -> tuple[_Layout, Tensor, Tensor]:
    shared = slope.numel() == sigma.numel() == 1
    dtype, size = unit.upcast(x), max(slope.numel(), sigma.numel())
    shape = () if shared else (size, 1)
    a, s = (p.detach().to(dtype).expand(size).reshape(shape) for p in (slope, sigma))
    return _Layout(x, shared, channel_dim, PER_THREAD if kernel == "gaussian" else PER_THREAD // _PLAIN), a, s


def _sum(g: Tensor, elements: Tensor, parameter: Tensor) -> Tensor:
    """Sum g * elements over all that shares a parameter."""
    if parameter.dim() == 0:
        return torch.dot(g, elements)
    return (g * elements).sum((0, 2))[:, None]


def _sums(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0, dtype=torch.float64)


def _gaussian(layout: _Layout, x: Tensor, a: Tensor, s: Tensor, out: Tensor) -> None:
    """Write lerp(s t Phi(t) + s phi(t), x, a) with t = x / s."""
    spare_t, spare_w = torch.empty(2, *x[: layout.step].shape, dtype=a.dtype).unbind()
    inverse, top = s.reciprocal(), s.log2() + _LOG2_PEAK
    for part, to in layout.blocks(x, out):
        wide = part.to(a.dtype)
        t, w = spare_t[: len(part)], spare_w[: len(part)]
        torch.mul(wide, inverse, out=t)
        torch.addcmul(top, t, t, value=-_HALF_LOG2_E, out=w).exp2_()
        torch.ops.aten.gelu.out(t, out=t)
        torch.addcmul(w, t, s, out=w)
        if to.dtype == w.dtype:
            torch.lerp(w, wide, a, out=to)
        else:
            to.copy_(w.lerp_(wide, a))


def _gaussian_back(
    layout: _Layout, g: Tensor, x: Tensor, a: Tensor, s: Tensor, out: Tensor, _: str, summed: bool
) -> tuple[Tensor, Tensor]:
    """Write g (Phi + a (1 - Phi)); return the sums of g (x (1 - Phi) - s phi) and of g (1 - a) phi where wanted."""
    spare_t, spare_p = torch.empty(2, *x[: layout.step].shape, dtype=a.dtype).unbind()
    inverse = s.reciprocal()
    off, top = torch.tensor([_OFF_ZERO, _LOG2_PEAK], dtype=a.dtype).unbind()
    held, felt = [], []
    for g_part, part, to in layout.blocks(g, x, out):
        wide, wide_g = part.to(a.dtype), g_part.to(a.dtype)
        t, p = spare_t[: len(part)], spare_p[: len(part)]
        torch.addcmul(off, wide, inverse, out=t)
        torch.ops.aten.gelu.out(t, out=p)
        p.div_(t).mul_(wide_g)
        if summed:
            torch.addcmul(top, t, t, value=-_HALF_LOG2_E, out=t).exp2_()
            felt.append(_sum(wide_g, t, a))
            held.append(_sum(torch.sub(wide_g, p, out=t), wide, a))
        if to.dtype == p.dtype:
            torch.lerp(p, wide_g, a, out=to)
        else:
            to.copy_(p.lerp_(wide_g, a))
    if not summed:
        return a, s
    density = _sums(felt)
    return _sums(held) - s * density, (1 - a) * density


def _distance(x: Tensor, s: Tensor, profile: Profile) -> Tensor:
    return (x.abs() / s).clamp_max_(profile.reach)


def _plain(x: Tensor, a: Tensor, s: Tensor, profile: Profile) -> Tensor:
    """Return the unit as `unit.value` does; `where` would cost more than all the rest."""
    tail = profile.tail(_distance(x, s, profile))
    return torch.addcmul(x.clamp_min(0), x.clamp_max(0), a).addcmul_(tail, (1 - a) * s)


def _plain_back(
    layout: _Layout, g: Tensor, x: Tensor, a: Tensor, s: Tensor, out: Tensor, kernel: str, summed: bool
) -> tuple[Tensor, Tensor]:
    sums: tuple[list[Tensor], list[Tensor]] = [], []
    for g_part, part, to in layout.blocks(g, x, out):
        wide_g = g_part.to(a.dtype)
        wide, profile = part.to(a.dtype), PROFILES[kernel]
        u = _distance(wide, s, profile)
        halved = (1 - a) * (0.5 - profile.sf(u))  # by x: the mean of both branches, and half their distance
        to.copy_(torch.copysign(halved, wide).add_(0.5 * (1 + a)).mul_(wide_g))
        if summed:
            sums[0].append(_sum(wide_g, wide.clamp_max(0) - s * profile.tail(u), a))
            sums[1].append(_sum(wide_g, (1 - a) * profile.gap(u), a))
    return (_sums(sums[0]), _sums(sums[1])) if summed else (a, s)
