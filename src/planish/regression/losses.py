"""What a quantile process is trained on: the pinball loss at given levels, and the penalty on falling curves.

Legend: b any shape of rows; d features.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad

__all__ = ["NonCrossingPenalty", "PinballLoss", "noncrossing_penalty", "pinball_loss"]

Reduction = Literal["mean", "sum", "none"]


def _reduced(value: Tensor, reduction: str, where: str) -> Tensor:
    if reduction == "none":
        return value
    if reduction == "mean":
        return value.mean()
    if reduction == "sum":
        return value.sum()
    raise bad(where, "reduction", "'mean', 'sum' or 'none'", reduction)


def pinball_loss(
    prediction: Tensor, target: Tensor, level: Tensor | float, *, reduction: Reduction = "mean"
) -> Float[Tensor, "..."]:
    """Return the pinball loss, level * z where z = target - prediction is positive and (level - 1) * z elsewhere.

    Args:
        prediction: Predicted quantiles.
        target: Observations, of the very shape of `prediction`: (n, 1) beside (n,) would pair all with all.
        level: Level of each prediction, in (0, 1): a float, or a tensor that broadcasts to `prediction` and no further.
        reduction: "mean" (default), "sum" or "none".

    Returns:
        A scalar, or one loss a prediction.

    Raises:
        ValueError: The shapes differ, a float level lies outside (0, 1), or the reduction is unknown.

    Example:
        >>> import torch
        >>> q, y = torch.tensor([0.0, 0.0]), torch.tensor([2.0, -2.0])
        >>> pinball_loss(q, y, 0.75, reduction="none")
        tensor([1.5000, 0.5000])
    """
    if prediction.shape != target.shape:
        allowed = f"of the shape of `prediction`, {tuple(prediction.shape)}"
        raise bad("pinball_loss", "target", allowed, tuple(target.shape))
    if isinstance(level, Tensor):
        wider = level.dim() > prediction.dim() or any(
            own not in (1, other) for own, other in zip(level.shape[::-1], prediction.shape[::-1], strict=False)
        )
        if wider:
            allowed = f"a float or of a shape that broadcasts to {tuple(prediction.shape)}"
            raise bad("pinball_loss", "level", allowed, tuple(level.shape))
    elif not 0 < level < 1:
        raise bad("pinball_loss", "level", "in (0, 1)", level)
    z = target - prediction
    return _reduced(torch.maximum(level * z, (level - 1) * z), reduction, "pinball_loss")


def noncrossing_penalty(
    net: Callable[[Tensor, Tensor], Tensor], x: Tensor, level: Tensor, *, reduction: Reduction = "mean"
) -> Float[Tensor, "..."]:
    """Return how steeply a network's quantile falls with the level: max(0, -d net(x, level) / d level).

    It is zero exactly where the network rises at all the given points. Use it in the loss of any network that is
    twice differentiable; with ReLU the slope is constant by pieces, and its gradient next to useless.

    Args:
        net: Takes `x` and `level`, returns one number for each level, each depending on its own row only.
        x: Inputs, a row a level.
        level: Levels in (0, 1).
        reduction: "mean" (default), "sum" or "none".

    Returns:
        A scalar, or one value a level; differentiable by the weights of `net`.

    Raises:
        ValueError: `net` returns another number of values than there are levels, or the reduction is unknown.

    Example:
        >>> import torch
        >>> float(noncrossing_penalty(lambda x, t: x[:, 0] - 3 * t, torch.zeros(4, 2), torch.full((4,), 0.5)))
        3.0
    """
    with torch.enable_grad():
        level = level.detach().requires_grad_()
        value = net(x, level)
        if value.numel() != level.numel():
            allowed = f"a network of one value a level, {level.numel()}"
            raise bad("noncrossing_penalty", "net", allowed, value.numel())
        (slope,) = torch.autograd.grad(value.sum(), level, create_graph=True)
    return _reduced((-slope).clamp_min(0), reduction, "noncrossing_penalty")


class PinballLoss(nn.Module):
    """Apply `pinball_loss`, as a module.

    Args:
        reduction: "mean" (default), "sum" or "none".

    Example:
        >>> import torch
        >>> PinballLoss()(torch.zeros(2), torch.ones(2), torch.tensor([0.25, 0.75]))
        tensor(0.5000)
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction: Reduction = reduction

    def forward(self, prediction: Tensor, target: Tensor, level: Tensor | float) -> Tensor:
        """Return `pinball_loss(prediction, target, level)`."""
        return pinball_loss(prediction, target, level, reduction=self.reduction)


class NonCrossingPenalty(nn.Module):
    """Apply `noncrossing_penalty` times a weight, as a module.

    Args:
        weight: What the penalty counts beside the loss, >= 0; the paper takes the logarithm of the number of samples.
        reduction: "mean" (default), "sum" or "none".

    Raises:
        ValueError: The weight is negative.

    Example:
        >>> import torch
        >>> net = lambda x, t: x[:, 0] + t
        >>> float(NonCrossingPenalty(5.0)(net, torch.zeros(4, 2), torch.full((4,), 0.5)))
        0.0
    """

    def __init__(self, weight: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        if not weight >= 0:
            raise bad("NonCrossingPenalty", "weight", "a float >= 0", weight)
        self.weight = weight
        self.reduction: Reduction = reduction

    def forward(self, net: Callable[[Tensor, Tensor], Tensor], x: Tensor, level: Tensor) -> Tensor:
        """Return `weight * noncrossing_penalty(net, x, level)`."""
        return self.weight * noncrossing_penalty(net, x, level, reduction=self.reduction)
