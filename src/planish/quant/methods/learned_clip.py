"""Learn each row's range of weights by gradient descent on the block's output.

Codes span sigmoid(gamma) of a group's largest value and sigmoid(beta) of its lowest. Both start near 1 and follow the
squared difference between what the block makes of the quantized model's inputs and what the float block made of its
own; rounding passes gradients straight through. OmniQuant's learnable weight clipping, which DuQuant adds to its
rotations.

Reference:
    Shao et al., OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models, 2023.
    https://arxiv.org/abs/2308.13137
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.calls import moved_to
from planish.quant.engine import Method, place
from planish.quant.formats import Format, Limits, affine
from planish.quant.layers import QLinear
from planish.quant.sites import weight_of
from planish.quant.stream import Block, call_model, first_tensor
from planish.quant.transforms import Transform


@dataclass(frozen=True)
class LearnClip:
    """Refine a rounded block: learn where the ranges of its weights end, and round to nearest within them.

    Args:
        epochs: Passes over the calibration batches; default 20, as published.
        lr: Step of AdamW; default 0.01, as published.
        start: Where the logits start; default 4, a range of 0.98.

    A block whose loss does not fall is left as it is.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> LearnClip(epochs=5).lr
        0.01
    """

    epochs: int = 20
    lr: float = 0.01
    start: float = 4.0

    sees_clean = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.epochs < 1:
            raise bad("LearnClip", "epochs", "at least 1", self.epochs)
        if not self.lr > 0:
            raise bad("LearnClip", "lr", "above 0", self.lr)

    def __call__(self, block: Block, method: Method) -> None:
        """Replace the block's quantized layers by better ones, if there are."""
        twin = block.twin
        layers = {name: layer for name, layer in block.finished.items() if isinstance(layer, QLinear)}
        if twin is None or not layers:
            return
        targets = [t.detach() for t in twin.run()]
        student, rows = copy.deepcopy(twin.module), {}
        for name, layer in layers.items():
            old = student.get_submodule(name)
            rows[name] = _Clipped(weight_of(old), layer, self.start)
            student.set_submodule(name, rows[name])
        student.requires_grad_(False)
        least, best = _loss(block, block.module, targets, None), None
        ends = [row.ends.requires_grad_() for row in rows.values()]
        optimizer = torch.optim.AdamW(ends, lr=self.lr, weight_decay=0.0)
        for _ in range(self.epochs):
            _loss(block, student, targets, optimizer)
            loss = _loss(block, student, targets, None)
            if loss < least:
                least, best = loss, {name: row.limits() for name, row in rows.items()}
        if best is not None:
            place(block, {name: _relimited(rows[name].weight, layers[name], best[name]) for name in rows})


def _loss(block: Block, student: nn.Module, targets: list[Tensor], optimizer: torch.optim.Optimizer | None) -> float:
    """Return the mean squared error over the batches, with a step after each where there is an optimizer."""
    total = 0.0
    for hidden, context, target in zip(block.inputs, block.context, targets, strict=True):
        with torch.set_grad_enabled(optimizer is not None):
            loss = (_output(block, student, hidden, context) - target).square().mean()
            total += loss.item()
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return total / len(targets)


def _output(block: Block, module: nn.Module, hidden: Any, context: dict[str, Any]) -> Tensor:  # noqa: ANN401
    hidden, context = moved_to(hidden, block.device, torch.float32), moved_to(context, block.device)
    if block.first is None:
        return first_tensor(call_model(module, hidden))
    return first_tensor(module(**{block.first: hidden}, **context))


def _relimited(weight: Float[Tensor, "out in"], layer: QLinear, limits: Limits) -> QLinear:
    """Round a weight anew within limits; all else as the layer has it."""
    low_rank = None if layer.down is None or layer.up is None else (layer.down, layer.up)
    made = layer.format.encode(weight, limits=limits)
    return QLinear.of(made, layer.bias, transform=layer.transform, act=layer.act, low_rank=low_rank)


class _Clipped(nn.Module):
    """What a quantized layer computes, with gradients for the ends of its weight's ranges."""

    def __init__(self, weight: Float[Tensor, "out in"], layer: QLinear, start: float) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach().clone(), layer.bias
        self.format = affine("LearnClip", layer.format)
        self.transform: Transform | None = layer.transform
        self.act: Format | None = layer.act
        self.branch = None if layer.down is None or layer.up is None else (layer.down, layer.up)
        self.low, self.high = self.format.ranges(self.weight)
        self.ends = nn.Parameter(torch.full((2, *self.low.shape), start, dtype=self.weight.dtype))

    def limits(self) -> Limits:
        """Return where the ranges end now."""
        share = self.ends.detach().sigmoid()
        return self.low * share[0], self.high * share[1]

    def rounded(self) -> Tensor:
        """Return the weight's values on the grid, differentiable in the ends."""
        share, top = self.ends.sigmoid(), 2**self.format.bits - 1
        low, high = self.low * share[0], self.high * share[1]
        if self.format.symmetric:
            step = torch.maximum(-low, high) / (self.format.middle - 0.5)
            zero = torch.full_like(step, float(self.format.middle))
        else:
            step = (high - low) / top
        step = torch.where(step > 0, step, torch.ones_like(step))
        if not self.format.symmetric:
            zero = _round(-low / step)
        size = self.format.group_size or self.weight.shape[1]
        step, zero = (t.repeat_interleave(size, 1)[:, : self.weight.shape[1]] for t in (step, zero))
        codes = (_round(self.weight / step) + zero).clamp(0, top)
        return (codes - zero) * step

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Return the layer's output."""
        if self.transform is not None:
            x = self.transform(x)
        beside = 0.0 if self.branch is None else x @ self.branch[0].T @ self.branch[1].T
        if self.act is not None:
            x = x + (self.act.fake(x.detach()) - x.detach())
        return nn.functional.linear(x, self.rounded(), self.bias) + beside


def _round(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()
