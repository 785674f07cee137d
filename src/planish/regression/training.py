"""The training of a quantile process: random levels at every step, a penalty between samples, the best epoch kept.

Legend: e members; n rows; d features; m levels of a row.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from planish._support import require
from planish.regression.losses import pinball_loss
from planish.regression.network import Network

logger = logging.getLogger("planish")

_CLIP = 1.0  # norm of a member's gradient: the square of a square of an outlier explodes
_VALIDATION_LEVELS = 20
_STEPS_BETWEEN = 10  # validations are no closer than this many steps


@dataclass(frozen=True)
class Settings:
    """How to train.

    `penalty` is lambda; `levels` None draws uniform ones, a pair those of a Beta law. With `resample` levels are drawn
    anew, n_levels a row and stratified, and the penalty looks between samples; without, once a sample, as in the paper.
    """

    penalty: float
    levels: tuple[float, float] | None
    resample: bool
    n_levels: int
    learning_rate: float
    max_epochs: int
    batch_size: int
    patience: int | None
    average: float


@dataclass(frozen=True)
class Data:
    """Standardised rows of all members together, and which of them each member learns from and is judged on."""

    x: Tensor  # (n, d)
    y: Tensor  # (n,)
    weight: Tensor | None  # (n,), mean 1
    train: Tensor  # (e, n_train) indices
    held_out: Tensor | None  # (e, n_val) indices


@dataclass
class History:
    """What happened: the training loss of each epoch, validation losses, and the epoch that was kept."""

    loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_epoch: int = 0


def draw_levels(
    shape: tuple[int, ...], law: tuple[float, float] | None, generator: torch.Generator, like: Tensor
) -> Tensor:
    """Draw levels, the last axis stratified: one in each m-th part of (0, 1); Beta laws by their quantile function."""
    m = shape[-1]
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    uniform = (torch.arange(m) + uniform) / m
    if law is not None:
        special = require("scipy.special", "sklearn", "a Beta law of levels")
        uniform = torch.from_numpy(special.betaincinv(*law, uniform.numpy()))
    tiny = 1e-6
    return uniform.clamp(tiny, 1 - tiny).to(like)


def between(x: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Return points between pairs of rows, more often near corners of the box that a pair spans than inside.

    On the line between two rows all features are near their means, and curves cross far from there. So each feature
    goes its part of the way from either end, by a coin, and the part is near 0 or 1 mostly (its law is the arcsine).
    """
    part = torch.rand((*x.shape[:-1], 1), generator=generator).mul(math.pi / 2).sin().square()
    swapped = torch.rand(x.shape, generator=generator) < 0.5
    return torch.lerp(x, other, torch.where(swapped, 1 - part, part).to(x))


def _mean(loss: Tensor, weight: Tensor | None) -> Tensor:
    """Return the weighted mean of each member, summed: members do not touch each other's gradients."""
    return (loss if weight is None else loss * weight[..., None]).mean((1, 2))


class Training:
    """One training under way.

    Args:
        net: Trained in place; ends with its best weights.
        data: What to learn from.
        settings: How.
        generator: Source of everything random, on the CPU.
    """

    def __init__(self, net: Network, data: Data, settings: Settings, generator: torch.Generator) -> None:
        self.net, self.data, self.settings, self.generator = net, data, settings, generator
        self.history = History()
        self.best = torch.full((len(data.train),), torch.inf)  # validation loss of each member's kept weights
        self._parameters = list(net.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=settings.learning_rate, fused=True)
        self._averaged = [p.detach().clone() for p in self._parameters]
        self._step = 0
        self._fixed = None
        if not settings.resample:
            self._fixed = draw_levels((len(data.x), 1), settings.levels, generator, data.x)

    def run(self, progress: Callable[[int, float], None] | None = None) -> History:
        """Train to the end; `progress` is told every epoch and its loss."""
        data, settings = self.data, self.settings
        n_train = data.train.shape[1]
        steps = math.ceil(n_train / settings.batch_size)
        every = max(1, _STEPS_BETWEEN // steps)
        kept = [p.detach().clone() for p in self._parameters]
        last_best = 0
        for epoch in range(1, settings.max_epochs + 1):
            loss = 0.0
            for rows in self._batches(n_train):
                loss += self._one_step(rows) * rows.shape[1] / n_train
            self.history.loss.append(loss)
            if progress is not None:
                progress(epoch, loss)
            if not math.isfinite(loss):
                logger.warning("The loss is not finite at epoch %d; the best epoch so far is kept.", epoch)
                break
            if data.held_out is None or (epoch % every and epoch < settings.max_epochs):
                continue
            losses = self._validate(data.held_out)
            self.history.validation.append((epoch, float(losses.mean())))
            better = losses < self.best
            self.best = torch.where(better, losses, self.best)
            for keep, now in zip(kept, self._averaged, strict=True):
                keep[better] = now[better]
            if better.any():
                last_best = self.history.best_epoch = epoch
            if settings.patience is not None and epoch - last_best >= settings.patience:
                break
        final = self._averaged if data.held_out is None else kept
        if data.held_out is None:
            self.history.best_epoch = len(self.history.loss)
        with torch.no_grad():
            for p, value in zip(self._parameters, final, strict=True):
                p.copy_(value)
        return self.history

    def _batches(self, n_train: int) -> Iterator[Tensor]:
        e = len(self.data.train)
        order = torch.rand((e, n_train), generator=self.generator).argsort(1).to(self.data.train.device)
        yield from self.data.train.gather(1, order).split(self.settings.batch_size, 1)

    def _one_step(self, rows: Tensor) -> float:
        data, settings = self.data, self.settings
        x, y = data.x[rows], data.y[rows]
        weight = None if data.weight is None else data.weight[rows]
        e, b = rows.shape
        if self._fixed is not None:
            level = self._fixed[rows]
            value, slope = self.net.with_slope(x, level)
            points = weight
        else:
            level = draw_levels((e, b, settings.n_levels), settings.levels, self.generator, x)
            value, slope, points = self.net(x, level), None, None
            if settings.penalty > 0:
                half = (b + 1) // 2  # slopes cost what two values do
                other = rows[:, torch.randperm(b, generator=self.generator)[:half].to(rows.device)]
                inside = between(x[:, :half], data.x[other], self.generator)
                _, slope = self.net.with_slope(inside, draw_levels((e, half, 1), settings.levels, self.generator, x))
        target = y[..., None].expand_as(value)
        losses = _mean(pinball_loss(value, target, level, reduction="none"), weight)
        total = losses.sum()
        if slope is not None and settings.penalty > 0:
            total = total + settings.penalty * _mean((-slope).clamp_min(0), points).sum()
        self._optimizer.zero_grad()
        total.backward()
        self._clip()
        self._optimizer.step()
        self._step += 1
        decay = min(settings.average, self._step / (self._step + 10))  # short memory at first
        torch._foreach_lerp_(self._averaged, [p.detach() for p in self._parameters], 1 - decay)
        return float(losses.detach().mean())

    def _clip(self) -> None:
        """Shorten the gradient of each member to the norm `_CLIP`, after the backward pass has made it."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        square = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0)
        factor = (_CLIP / square.sqrt().clamp_min(1e-12)).clamp_max(1)[:, None, None]
        for g in gradients:
            g.mul_(factor)

    @torch.no_grad()
    def _validate(self, held_out: Tensor) -> Tensor:
        """Return the integrated pinball loss of each member's averaged weights on the rows that it does not see."""
        data = self.data
        x, y = data.x[held_out], data.y[held_out]
        weight = None if data.weight is None else data.weight[held_out]
        level = (torch.arange(_VALIDATION_LEVELS).to(x) + 0.5) / _VALIDATION_LEVELS
        level = level.expand(*y.shape, -1)
        current = [p.detach().clone() for p in self._parameters]
        torch._foreach_copy_([p.data for p in self._parameters], self._averaged)
        value = self.net(x, level)
        torch._foreach_copy_([p.data for p in self._parameters], current)
        return _mean(pinball_loss(value, y[..., None].expand_as(value), level, reduction="none"), weight).cpu()
