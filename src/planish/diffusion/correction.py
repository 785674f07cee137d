"""ChannelMap corrections of channels, fitted to moments and held to identity unless held-out samples say otherwise.

A cached feature x stands for the true one y. Per channel, y ~= scale x + slope d + shift, where d is how far x moved
between the two refreshes before (left out unless extrapolation is asked for). Nothing but sums of products is kept.

Legend: C channels, F folds, z = (1, x, d, y).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad

Match = Literal["least_squares", "variance"]
_ONE, _X, _D, _Y = range(4)


@dataclass(frozen=True)
class ChannelMap:
    """What is done to the channels of a feature: scale x + slope d + shift.

    Attributes:
        scale: (C,).
        slope: (C,), of the way between two refreshes.
        shift: (C,).
        kept: Share of the fit that held-out samples bear out, in [0, 1]; at 0 it is the identity.

    Example:
        >>> one = torch.ones(2)
        >>> ChannelMap(2 * one, 0 * one, one)(torch.ones(1, 3, 2), None, axis=-1)[0, 0].tolist()
        [3.0, 3.0]
    """

    scale: Float[Tensor, " c"]
    slope: Float[Tensor, " c"]
    shift: Float[Tensor, " c"]
    kept: float = 1.0

    def __call__(self, x: Tensor, moved: Tensor | None, *, axis: int) -> Tensor:
        """Correct a feature whose channels lie along `axis`."""
        shape = [1] * x.ndim
        shape[axis] = -1
        scale, slope, shift = (v.to(x).view(shape) for v in (self.scale, self.slope, self.shift))
        corrected = scale * x + shift
        return corrected if moved is None else corrected + slope * moved


class Moments:
    """Sums of products of cached and true features, by fold and channel.

    Args:
        folds: Parts that samples are dealt to in turn, >= 2.

    Example:
        >>> x = torch.randn(8, 5, 3, dtype=torch.float64)
        >>> sums = Moments(2)
        >>> sums.add(x, 2 * x + 1, axis=-1)
        >>> fit = sums.fit()
        >>> [round(float(v[0]), 6) for v in (fit.scale, fit.shift)], fit.kept
        ([2.0, 1.0], 1.0)
    """

    def __init__(self, folds: int = 2) -> None:
        if folds < 2:
            raise bad("Moments", "folds", "at least 2", folds)
        self.folds = folds
        self.sums: Tensor | None = None  # (F, C, 4, 4)
        self.samples = 0

    def add(self, x: Tensor, y: Tensor, moved: Tensor | None = None, *, axis: int) -> None:
        """Take samples (the first axis) of a cached feature, the true one, and how far the cached one moved."""
        if x.shape != y.shape:
            raise bad("Moments", "y", f"of shape {tuple(x.shape)}", tuple(y.shape))
        flat = [v.detach().movedim(axis, -1).double().flatten(1, -2) for v in (x, y)]
        d = torch.zeros_like(flat[0]) if moved is None else moved.detach().movedim(axis, -1).double().flatten(1, -2)
        z = torch.stack([torch.ones_like(flat[0]), flat[0], d, flat[1]], -1)  # (samples, places, C, 4)
        each = torch.einsum("npci,npcj->ncij", z, z)
        if not torch.isfinite(each).all():
            raise bad("Moments", "x", "finite, as `y`", "NaN or Inf")
        if self.sums is None:
            self.sums = each.new_zeros(self.folds, each.shape[1], 4, 4)
        fold = (torch.arange(len(each), device=each.device) + self.samples) % self.folds
        self.sums.index_add_(0, fold, each)
        self.samples += len(each)

    def fit(self, match: Match = "least_squares") -> ChannelMap:
        """Fit on everything, then shrink to the identity by the share that folds left out bear out.

        That share minimizes the squared error on the left-out folds; as 0 is among them, the correction is there never
        worse than none.

        Args:
            match: "least_squares", which takes variance away where the correlation is weak, or "variance", which
                gives the feature the mean and spread of the true one.

        Returns:
            The correction.

        Raises:
            ValueError: Fewer samples than folds.
        """
        if self.sums is None or self.samples < self.folds:
            raise bad("Moments", "samples", f"at least {self.folds}, one a fold", self.samples)
        total = self.sums.sum(0)
        gain = bend = total.new_zeros(())
        for out in self.sums:  # of E|y - x - k c|^2 with c = (scale - 1) x + slope d + shift, summed over channels
            c = _change(_solve(total - out, match))
            gain = gain + torch.einsum("ci,cij,cj->", c, out, _residual(c))
            bend = bend + torch.einsum("ci,cij,cj->", c, out, c)
        kept = float((gain / bend).clamp(0, 1)) if bend > 0 else 0.0
        return _blend(_solve(total, match), kept)

    def error(self, fit: ChannelMap | None = None) -> Float[Tensor, " c"]:
        """Return the mean squared error of each channel, corrected or (None) as it is, over all that was seen."""
        if self.sums is None:
            raise bad("Moments", "samples", "at least 1", 0)
        total = self.sums.sum(0)
        e = _residual(total[..., 0])
        if fit is not None:
            e = e - _change(torch.stack([fit.shift, fit.scale, fit.slope], -1).to(e))
        return torch.einsum("ci,cij,cj->c", e, total, e).clamp(min=0) / total[:, _ONE, _ONE]


def _change(w: Tensor) -> Tensor:
    """Return c as coefficients of z, for coefficients (shift, scale, slope)."""
    c = w.new_zeros(len(w), 4)
    c[:, :3] = w
    c[:, _X] -= 1
    return c


def _residual(like: Tensor) -> Tensor:
    """Return y - x as coefficients of z."""
    r = like.new_zeros(len(like), 4)
    r[:, _Y], r[:, _X] = 1, -1
    return r


def _solve(total: Tensor, match: Match) -> Float[Tensor, "c 3"]:
    """Return (shift, scale, slope) of each channel; a channel that does not vary is shifted only."""
    mean = total[:, _ONE] / total[:, _ONE, _ONE, None]  # (C, 4)
    centred = total / total[:, _ONE, _ONE, None, None] - mean[:, :, None] * mean[:, None, :]
    var_x, cov = centred[:, _X, _X], centred[:, _X, _Y]
    flat = var_x <= 1e-12 * total[:, _X, _X] / total[:, _ONE, _ONE]
    scale, slope = torch.ones_like(var_x), torch.zeros_like(var_x)
    if match == "variance":
        usable = ~flat & (cov > 0)
        scale[usable] = (centred[usable, _Y, _Y] / var_x[usable]).sqrt()
    else:
        pair = centred[:, _X : _D + 1, _X : _D + 1]
        seen = pair[:, 1, 1] > 1e-12 * total[:, _D, _D] / total[:, _ONE, _ONE]
        apart = (pair[:, 0, 1] ** 2 < (1 - 1e-9) * var_x * pair[:, 1, 1]) & seen & ~flat
        scale[~flat] = cov[~flat] / var_x[~flat]
        both = torch.linalg.solve(pair[apart], centred[apart, _X : _D + 1, _Y, None])
        scale[apart], slope[apart] = both[:, 0, 0], both[:, 1, 0]
    shift = mean[:, _Y] - scale * mean[:, _X] - slope * mean[:, _D]
    return torch.stack([shift, scale, slope], -1)


def _blend(w: Tensor, kept: float) -> ChannelMap:
    return ChannelMap(1 + kept * (w[:, 1] - 1), kept * w[:, 2], kept * w[:, 0], kept)


@torch.no_grad()
def fold_correction(
    layer: nn.Module,
    scale: Float[Tensor, " out"],
    shift: Float[Tensor, " out"],
    *,
    channels: slice | None = None,
) -> None:
    """Put a correction of a layer's outputs into its weight and bias, in place.

    With `channels`, only what those input channels contribute is scaled, as CacheQuant does with the half that comes
    from the cache: the bias belongs to the other half and is shifted, never scaled.

    Args:
        layer: `nn.Linear` or `nn.Conv2d` (of one group), in float.
        scale: a2, for each output.
        shift: b2, for each output.
        channels: Input channels that are meant; default all, and with them the bias.

    Raises:
        TypeError: The layer is of another class.
        ValueError: The correction is of another length.

    Example:
        >>> layer, x = nn.Linear(4, 2), torch.randn(3, 4)
        >>> before = layer(x)
        >>> fold_correction(layer, torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0]))
        >>> torch.allclose(layer(x), before * torch.tensor([2.0, 1.0]) + torch.tensor([0.0, 3.0]), atol=1e-6)
        True
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d) or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
        raise TypeError(f"fold_correction: `layer` must be nn.Linear or nn.Conv2d of one group; got {type(layer)}.")
    outputs = len(layer.weight)
    for name, value in (("scale", scale), ("shift", shift)):
        if value.shape != (outputs,):
            raise bad("fold_correction", name, f"of shape ({outputs},)", tuple(value.shape))
    per_row = scale.to(layer.weight).view(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight[:, channels if channels is not None else slice(None)] *= per_row
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(outputs))
    elif channels is None:
        layer.bias *= scale.to(layer.bias)
    layer.bias += shift.to(layer.bias)
