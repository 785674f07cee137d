r"""How much privacy a sequence of noisy sums costs: the distribution of the privacy loss, on a grid, composed by FFT.

One step draws each sample with probability q, adds up what the drawn ones contribute (vectors of norm at most 1), and
adds normal noise of deviation z. Two data sets that differ in one sample then look at worst like these two laws of x:

    add or remove one    (1 - q) N(0, z^2) + q N(1, z^2)   and   N(0, z^2), in both orders
    replace one          (1 - q) N(0, z^2) + q N(1, z^2)   and   (1 - q) N(0, z^2) + q N(-1, z^2)

(for the second: the hockey-stick divergence grows when the angle between the two contributions or the norm of either
grows, because in every direction in which it can be changed its region of positivity is a half line). The loss is the
logarithm of the ratio of the two densities; losses of successive steps add up. Each cell of the grid gives its mass to
its two ends such that both laws keep their mass: the discretized pair is never more private than the true one. What is
cut off, and the rounding of the FFT, is added to delta. All bounds are therefore from above.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Adjacency = Literal["add_remove", "replace"]
History = Sequence[tuple[float, float, int]]
Pair = Literal["remove", "add", "replace"]
_MOST = 2**22  # points of the grid; beyond it the grid is coarsened, which only makes the bound larger
_EPS = torch.finfo(torch.float64).eps


def pairs(adjacency: Adjacency) -> tuple[Pair, ...]:
    """Return the pairs of laws whose worst counts."""
    return ("remove", "add") if adjacency == "add_remove" else ("replace",)


def _loss(x: Tensor, z: float, q: float, pair: Pair) -> Tensor:
    """Return the loss at x; `add` is the negative of `remove`, with the laws exchanged."""

    def mixture(m: float) -> Tensor:  # logarithm of ((1 - q) N(0) + q N(m)) / N(0)
        away = math.log(q) + (2 * m * x - 1) / (2 * z * z)
        return away if q == 1 else torch.logaddexp(torch.full_like(x, math.log1p(-q)), away)

    return mixture(1.0) - mixture(-1.0) if pair == "replace" else mixture(1.0)


def _where(loss: Tensor, z: float, q: float, pair: Pair) -> Tensor:
    """Return the x at which the (increasing) loss of `remove` or `replace` is `loss`."""
    if pair != "replace":
        inner = torch.expm1(loss) / q
        return torch.where(inner > -1, z * z * torch.log1p(inner.clamp(min=-1.0)) + 0.5, -math.inf)
    up = loss.abs()  # odd in x; a root of k y^2 - a (E - 1) y - E k = 0 with y = exp(x / z^2)
    a, log_k = 1 - q, math.log(q) - 1 / (2 * z * z)
    grown = a * torch.expm1(up)
    root = torch.sqrt(grown.square() + 4 * math.exp(2 * log_k) * torch.exp(up))
    y = torch.where(up > 0, torch.log((grown + root) / 2) - log_k, 0.0)
    return z * z * y * loss.sign()


def _cells(edges: Tensor, mean: float, z: float) -> Tensor:
    t = (edges - mean) / z
    low, high = torch.special.ndtr(t), torch.special.ndtr(-t)
    return torch.where(t[1:] <= 0, low[1:] - low[:-1], high[:-1] - high[1:])  # the smaller tail is the exact one


@dataclass(frozen=True)
class Loss:
    """Masses of the first law at losses (first + i) step, and what is taken for an infinite loss."""

    mass: Tensor
    first: int
    step: float
    infinite: float

    @property
    def values(self) -> Tensor:
        """The losses."""
        return (self.first + torch.arange(len(self.mass), dtype=torch.float64)) * self.step


def _range(z: float, q: float, pair: Pair, tail: float) -> tuple[float, float, float]:
    """Return least and largest loss but for `tail` of the first law's mass, and the loss's standard deviation."""
    t = math.sqrt(2 * math.log(2 / tail)) * z
    x = torch.linspace(-t, 1 + t, 4001, dtype=torch.float64)
    loss = _loss(x, z, q, pair)
    base, far = torch.exp(-0.5 * (x / z) ** 2), torch.exp(-0.5 * ((x - 1) / z) ** 2)
    weight = base if pair == "add" else (1 - q) * base + q * far
    weight = weight / weight.sum()
    mean = (weight * loss).sum()
    spread = float((weight * (loss - mean).square()).sum().sqrt())
    low, high = float(loss[0]), float(loss[-1])
    return (-high, -low, spread) if pair == "add" else (low, high, spread)


def _single(z: float, q: float, pair: Pair, step: float, tail: float) -> Loss:
    """Put the loss of one step on the grid, from above."""
    low, high, _ = _range(z, q, pair, tail)
    first, last = math.floor(low / step), math.ceil(high / step)
    grid = torch.arange(first, last + 1, dtype=torch.float64) * step
    edges = _where(-grid, z, q, pair).flip(0) if pair == "add" else _where(grid, z, q, pair)
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    edges = torch.cat([ends[:1], edges, ends[1:]])
    base, far = _cells(edges, 0.0, z), _cells(edges, 1.0, z)
    mixture = (1 - q) * base + q * far
    if pair == "replace":
        P, Q = mixture, (1 - q) * base + q * _cells(edges, -1.0, z)
    else:
        P, Q = (mixture, base) if pair == "remove" else (base.flip(0), mixture.flip(0))
    inner, other = P[1:-1], Q[1:-1]
    up = ((inner - torch.exp(grid[:-1]) * other) / -math.expm1(-step)).clamp(min=0.0).minimum(inner)
    mass = torch.zeros(len(grid), dtype=torch.float64)
    mass[1:] += up
    mass[:-1] += inner - up
    mass[0] += P[0]  # losses below the grid are taken for its least
    return Loss(mass, first, step, float(P[-1]))


@dataclass(frozen=True)
class Composed:
    """The loss of all steps together; `extra` is what must be added to delta to stay above."""

    losses: Tensor
    mass: Tensor
    extra: float

    def delta(self, epsilon: float) -> float:
        """Return the least delta for an epsilon, from above."""
        over = self.losses > epsilon
        gap = -torch.expm1(epsilon - self.losses[over])
        return min(1.0, float((self.mass[over] * gap).sum()) + self.extra)


def compose(history: History, pair: Pair, delta: float) -> Composed:
    """Add up the losses of runs of steps, each (noise multiplier, sample rate, steps), to a small part of `delta`.

    Args:
        history: The runs, at least one.
        pair: Which two laws.
        delta: The delta that will be asked for: cut-offs are a thousandth of it.
    """
    count = sum(steps for _, _, steps in history)
    tail = delta / 4000
    spread = [_range(z, q, pair, tail / count) for z, q, _ in history]
    # cells narrower than the deviation by 25, and whose rounding up, about step^2 / 8 a time, adds up to little
    step = min(min(s for *_, s in spread) / 25, 0.02 / math.sqrt(count))
    step = max(step, max(high - low for low, high, _ in spread) / (_MOST / 4))
    parts = [(_single(z, q, pair, step, tail / count), steps) for z, q, steps in history]
    wide = math.sqrt(sum(s * s * run[2] for (*_, s), run in zip(spread, history, strict=True)))
    low, high = _window(parts, math.log(2 / tail), wide)
    first = math.floor(low / step)
    size = max(16, 2 ** math.ceil(math.log2(math.ceil(high / step) - first + 2)))
    modulus, angle = torch.ones(size // 2 + 1, dtype=torch.float64), torch.zeros(size // 2 + 1, dtype=torch.float64)
    for part, steps in parts:
        index = (part.first + torch.arange(len(part.mass))) % size
        wave = torch.fft.rfft(torch.zeros(size, dtype=torch.float64).index_add_(0, index, part.mass))
        modulus, angle = modulus * wave.abs() ** steps, angle + steps * wave.angle()
    whole = torch.fft.irfft(torch.polar(modulus, angle), n=size).roll(-first % size)
    infinite = -math.expm1(sum(steps * math.log1p(-part.infinite) for part, steps in parts))
    rounding = 8 * count * _EPS * math.sqrt(size) * float(torch.linalg.vector_norm(whole))
    losses = (first + torch.arange(size, dtype=torch.float64)) * step
    return Composed(losses, whole.clamp(min=0.0), infinite + tail + rounding)


def _window(parts: Sequence[tuple[Loss, int]], rarity: float, wide: float) -> tuple[float, float]:
    """Return bounds that the sum of losses, of deviation `wide`, leaves with probability exp(-rarity) on either side.

    By Chernoff: for a normal sum the best slope is sqrt(2 rarity) / wide.
    """
    slopes = torch.logspace(-2, 1.5, 40, dtype=torch.float64) * 10 / wide
    ends = []
    for sign in (-1.0, 1.0):
        growth = torch.full_like(slopes, rarity)
        for part, steps in parts:
            log_mass, values = part.mass.log(), part.values
            growth += steps * torch.stack([torch.logsumexp(log_mass + sign * s * values, 0) for s in slopes])
        ends.append(sign * float((growth / slopes).min()))
    return ends[0], max(ends[1], ends[0] + parts[0][0].step)
