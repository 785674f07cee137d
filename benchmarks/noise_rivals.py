"""Other ways to train with few bits, written small: the learned step, the clipped activation, noise on min-max ranges.

Each is a module that stands where a weight's or an input's proxy does. One scale a tensor throughout.
"""

import torch
from torch import Tensor, nn


def _through(exact: Tensor, smooth: Tensor) -> Tensor:
    """Return the exact value with the smooth one's gradient."""
    return smooth + (exact - smooth).detach()


class LearnedStep(nn.Module):
    """LSQ (Esser et al., 2020): a step learned through the straight-through estimator, its gradient scaled down."""

    def __init__(self, x: Tensor, bits: int, *, signed: bool) -> None:
        super().__init__()
        self.low, self.high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        self.step = nn.Parameter(2 * x.abs().mean() / self.high**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the values that the layer computes with."""
        gain = (x.numel() * self.high) ** -0.5
        step = self.step.detach() + (self.step - self.step.detach()) * gain
        value = (x / step).clamp(self.low, self.high)
        return _through(value.round(), value) * step

    def codes(self, x: Tensor) -> Tensor:
        """Return the whole codes."""
        return (x / self.step).clamp(self.low, self.high).round()


class TanhWeight(nn.Module):
    """DoReFa's weights, as PACT has them: squashed by tanh, rounded evenly; then brought back to the weight's size."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.top = 2**bits - 1

    def _value(self, w: Tensor) -> Tensor:
        squashed = w.tanh()
        return (squashed / squashed.abs().max() / 2 + 0.5) * self.top

    def forward(self, w: Tensor) -> Tensor:
        """Return the values that the layer computes with."""
        value = self._value(w)
        unit = _through(value.round(), value) * 2 / self.top - 1
        return unit * (w.std() / unit.std()).detach()

    def codes(self, w: Tensor) -> Tensor:
        """Return the whole codes."""
        return self._value(w).round()


class ClippedInput(nn.Module):
    """PACT (Choi et al., 2018): the end of an activation's range, learned by what is clipped, its square held down."""

    def __init__(self, x: Tensor, bits: int) -> None:
        super().__init__()
        self.alpha, self.top = nn.Parameter(x.abs().max().clone()), 2**bits - 1
        self.low = 0.0 if bool((x >= 0).all()) else -1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the values that the layer computes with."""
        clipped = torch.where(x >= self.alpha, self.alpha, torch.maximum(x, self.low * self.alpha))
        step = (self.alpha * (1 - self.low) / self.top).detach()
        return _through((clipped / step).round() * step, clipped)


class MinMaxNoise(nn.Module):
    """DiffQ (Defossez et al., 2021) at a fixed width: uniform noise of the step between the extremes; then rounding."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.top, self.noisy = 2**bits - 1, True

    def _grid(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w.min().detach(), ((w.max() - w.min()) / self.top).detach()

    def forward(self, w: Tensor) -> Tensor:
        """Return the values that the layer computes with."""
        low, step = self._grid(w)
        if self.training and self.noisy:
            return w + (torch.rand_like(w) - 0.5) * step
        return _through(self.codes(w) * step + low, w)

    def codes(self, w: Tensor) -> Tensor:
        """Return the whole codes."""
        low, step = self._grid(w)
        return ((w - low) / step).round()
