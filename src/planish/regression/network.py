"""Networks of a quantile process: a value and its slope in the level, for many levels of each row at once.

`ProcessNetwork` takes the level as an input, and may fall; `RisingNetwork` predicts the density of levels, and cannot.
Both hold several independent members, trained side by side, each on data of its own.

Legend: e members; n rows; d features; m levels of a row; w width of a layer.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish.nn import requ

ACTIVATIONS = ("requ", "relu", "tanh")
ENCODINGS = ("level", "logit")
_KNOTS = (0, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99, 1)
_EDGE = 1e-3  # logits are those of levels no closer to 0 and 1


def _value(z: Tensor, activation: str) -> Tensor:
    if activation == "requ":
        return requ(z)
    return z.relu() if activation == "relu" else z.tanh()


def _derivative(z: Tensor, activation: str) -> Tensor:
    if activation == "requ":
        return 2 * z.relu()
    return (z > 0).to(z.dtype) if activation == "relu" else 1 - z.tanh().square()


def encode_level(level: Tensor, encoding: str) -> tuple[Tensor, Tensor]:
    """Return what the network sees of a level, as a last axis, and its derivative by the level."""
    centred, two = 2 * level - 1, torch.full_like(level, 2)
    if encoding == "level":
        return centred[..., None], two[..., None]
    inner = level.clamp(_EDGE, 1 - _EDGE)
    logit, slope = inner.logit() / 4, 1 / (4 * inner * (1 - inner))  # / 4: about the range of the other input
    return torch.stack([centred, logit], -1), torch.stack([two, slope * (inner == level)], -1)


def rising(level: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return Bernstein's polynomial of coefficients (e, k + 1) at levels (b, n, m), and its slope; both (e, n, m)."""
    degree = coefficients.shape[-1] - 1
    place = torch.arange(degree + 1, dtype=level.dtype, device=level.device)
    binomial = torch.lgamma(place + 1) + torch.lgamma(degree - place + 1)
    inner = level.clamp(1e-6, 1 - 1e-6)[..., None]
    shares = (math.lgamma(degree + 1) - binomial + place * inner.log() + (degree - place) * (-inner).log1p()).exp()
    value = (shares @ coefficients[:, None, :, None])[..., 0]
    rises = coefficients.diff() * (degree - place[:-1])  # positive terms: no digits are lost
    slope = (shares[..., :-1] @ rises[:, None, :, None])[..., 0] / (1 - inner[..., 0])
    return value, slope


class _Layers(nn.Module):
    """Linear layers of e members: weights (e, in, out), biases (e, 1, out); and what their output is added to."""

    slopes: Tensor
    rise: Tensor

    def __init__(self, sizes: Sequence[int], n_members: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            for kind, shape in ((self.weights, (n_members, fan_in, fan_out)), (self.biases, (n_members, 1, fan_out))):
                uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
                kind.append(nn.Parameter(((2 * uniform - 1) / math.sqrt(fan_in)).to(dtype)))
        self.register_buffer("slopes", torch.zeros(n_members, 0, dtype=dtype))
        self.register_buffer("rise", torch.zeros(n_members, 0, dtype=dtype))

    @torch.no_grad()
    def start_from(self, slopes: Float[Tensor, "e d"], rise: Float[Tensor, "e k"]) -> None:
        """Add slopes . x and a rising polynomial of the level to the output, and let that be all of it at first."""
        self.slopes, self.rise = slopes.to(self.weights[0]), rise.to(self.weights[0])
        self.weights[-1].zero_()
        self.biases[-1].zero_()

    @torch.no_grad()
    def keep(self, members: Tensor) -> None:
        """Drop all members but some."""
        for kind in (self.weights, self.biases):
            for i, p in enumerate(kind):
                kind[i] = nn.Parameter(p[members])
        self.slopes, self.rise = self.slopes[members], self.rise[members]

    def _line(self, x: Tensor) -> Tensor:
        return x @ self.slopes[..., None]


class ProcessNetwork(_Layers):
    """A feed-forward network of (x, level) with a linear output.

    Args:
        n_features: Columns of x.
        hidden: Widths of the hidden layers, at least one.
        activation: One of `ACTIVATIONS`.
        encoding: One of `ENCODINGS`: the level itself, or its logit beside it.
        n_members: Independent networks.
        dtype: Of the weights.
        generator: Source of the initial weights, on the CPU.
    """

    def __init__(
        self,
        n_features: int,
        hidden: Sequence[int],
        *,
        activation: str = "requ",
        encoding: str = "level",
        n_members: int = 1,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator,
    ) -> None:
        n_levels = 1 if encoding == "level" else 2
        super().__init__([n_features + n_levels, *hidden, 1], n_members, dtype, generator)
        self.n_features, self.activation, self.encoding = n_features, activation, encoding

    def forward(self, x: Float[Tensor, "a n d"], level: Float[Tensor, "b n m"]) -> Float[Tensor, "e n m"]:
        """Return the quantiles; a and b are e, or 1 where members share rows."""
        h = self._first(x, encode_level(level, self.encoding)[0])
        for weight, bias in zip(list(self.weights)[1:], list(self.biases)[1:], strict=True):
            h = torch.baddbmm(bias, _value(h, self.activation), weight)
        h = h.reshape(len(h), *level.shape[1:])
        if not self.rise.numel():
            return h
        return h + self._line(x) + rising(level, self.rise)[0]

    def with_slope(
        self, x: Float[Tensor, "a n d"], level: Float[Tensor, "b n m"]
    ) -> tuple[Float[Tensor, "e n m"], Float[Tensor, "e n m"]]:
        """Return the quantiles and their derivatives by the level, carried forward beside the values."""
        encoded, rate = encode_level(level, self.encoding)
        h = self._first(x, encoded)
        slope = (rate @ self.weights[0][:, None, self.n_features :]).flatten(1, 2)
        for weight, bias in zip(list(self.weights)[1:], list(self.biases)[1:], strict=True):
            slope = (_derivative(h, self.activation) * slope) @ weight
            h = torch.baddbmm(bias, _value(h, self.activation), weight)
        shape = (len(h), *level.shape[1:])
        h, slope = h.reshape(shape), slope.reshape(shape)
        if not self.rise.numel():
            return h, slope
        value, rise = rising(level, self.rise)
        return h + self._line(x) + value, slope + rise

    def _first(self, x: Tensor, encoded: Tensor) -> Tensor:
        """Return what enters the first activation, (e, n m, w); of x once a row, whatever m is."""
        first: Tensor = self.weights[0]
        rows: Tensor = x @ first[:, : self.n_features] + self.biases[0]
        return (rows[:, :, None] + encoded @ first[:, None, self.n_features :]).flatten(1, 2)


class RisingNetwork(_Layers):
    """A network of x whose quantiles rise by construction: a median, and a positive density of levels to integrate.

    The derivative by the level is linear between fixed knots, positive at each, and 0 at none; quantiles are its
    integral from the median. Arguments are those of `ProcessNetwork`, without an encoding.
    """

    knots: Tensor

    def __init__(
        self,
        n_features: int,
        hidden: Sequence[int],
        *,
        activation: str = "requ",
        n_members: int = 1,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator,
    ) -> None:
        super().__init__([n_features, *hidden, 1 + len(_KNOTS)], n_members, dtype, generator)
        self.activation = activation
        self.register_buffer("knots", torch.tensor(_KNOTS, dtype=dtype))

    @torch.no_grad()
    def start_from(self, slopes: Float[Tensor, "e d"], rise: Float[Tensor, "e k"]) -> None:
        """Add slopes . x, and begin with the median and the densities of a rising polynomial of the level."""
        super().start_from(slopes, rise)
        middle, slope = rising(torch.tensor([[[0.5], *([k] for k in _KNOTS)]], dtype=torch.float64), rise.double())
        self.biases[-1][:, 0, 0] = middle[:, 0, 0]
        self.biases[-1][:, 0, 1:] = slope[:, 1:, 0].clamp_min(1e-3).expm1().log()  # softplus takes it back

    def forward(self, x: Float[Tensor, "a n d"], level: Float[Tensor, "b n m"]) -> Float[Tensor, "e n m"]:
        """Return the quantiles."""
        return self.with_slope(x, level)[0]

    def with_slope(
        self, x: Float[Tensor, "a n d"], level: Float[Tensor, "b n m"]
    ) -> tuple[Float[Tensor, "e n m"], Float[Tensor, "e n m"]]:
        """Return the quantiles and their derivatives by the level."""
        h = torch.baddbmm(self.biases[0], x.expand(len(self.weights[0]), -1, -1), self.weights[0])
        for weight, bias in zip(list(self.weights)[1:], list(self.biases)[1:], strict=True):
            h = torch.baddbmm(bias, _value(h, self.activation), weight)
        if self.rise.numel():
            h = torch.cat([h[..., :1] + self._line(x), h[..., 1:]], -1)
        median, density = h[..., :1], nn.functional.softplus(h[..., 1:])  # (e, n, knots)
        gaps = self.knots.diff()
        steps = (density[..., 1:] + density[..., :-1]) / 2 * gaps  # what the quantile gains from knot to knot
        rises = torch.cat([torch.zeros_like(median), steps.cumsum(-1)], -1)
        level = level.expand(len(h), -1, -1).contiguous()
        cell = (torch.searchsorted(self.knots, level.detach(), right=True) - 1).clamp(0, len(gaps) - 1)
        part = level - self.knots[cell]
        low, high = density.gather(-1, cell), density.gather(-1, cell + 1)
        bend = (high - low) / gaps[cell]
        middle = rises[..., len(gaps) // 2 : len(gaps) // 2 + 1]
        value = median + rises.gather(-1, cell) - middle + part * (low + part * bend / 2)
        return value, low + part * bend


Network = ProcessNetwork | RisingNetwork
