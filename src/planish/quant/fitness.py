"""How far a quantized model's outputs are from the float model's: no labels, one number a batch.

Legend: N rows (samples, or tokens), C channels (classes, or features).
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""loss(quantized outputs, float outputs), both (N, C): the mean over rows."""

LOSSES = ("infonce", "mse", "kl", "cosine")
NEGATIVES = 128
"""Rows that are contrasted with one another; more of them are taken in parts of about this many."""


def infonce(
    outputs: Float[Tensor, "rows channels"], targets: Float[Tensor, "rows channels"], temperature: float = 3.0
) -> Float[Tensor, ""]:
    """Return how hard it is to tell from a row's output which row of the float model it belongs to.

    Args:
        outputs: The quantized model's.
        targets: The float model's.
        temperature: T, above 0. Default 3.0, as in the authors' code.

    Returns:
        2T times the mean cross-entropy of the cosines over T, each row against all.

    Raises:
        ValueError: There are fewer than two rows, so that there is nothing to be told apart from; or T is not positive.

    Example:
        >>> rows = torch.eye(3)
        >>> bool(infonce(rows, rows) < infonce(rows, rows.roll(1, 0)))
        True
    """
    if not temperature > 0:
        raise bad("infonce", "temperature", "a float above 0", temperature)
    if len(outputs) < 2:
        raise bad("infonce", "outputs", "at least 2 rows", len(outputs))
    ours, theirs = (nn.functional.normalize(x, dim=-1) for x in (outputs, targets))
    parts = max(1, round(len(ours) / NEGATIVES))
    total = ours.new_zeros(())
    for q, k in zip(ours.tensor_split(parts), theirs.tensor_split(parts), strict=True):
        cosines = q @ k.T / temperature
        total = total + nn.functional.cross_entropy(cosines, torch.arange(len(q), device=q.device), reduction="sum")
    return 2 * temperature * total / len(ours)


def mse(outputs: Float[Tensor, "rows channels"], targets: Float[Tensor, "rows channels"]) -> Float[Tensor, ""]:
    """Return the mean squared difference.

    Example:
        >>> mse(torch.ones(2, 2), torch.zeros(2, 2)).item()
        1.0
    """
    return nn.functional.mse_loss(outputs, targets)


def kl(outputs: Float[Tensor, "rows channels"], targets: Float[Tensor, "rows channels"]) -> Float[Tensor, ""]:
    """Return the mean divergence KL(float || quantized) of the predicted distributions, in nats a row.

    Example:
        >>> kl(torch.zeros(2, 4), torch.zeros(2, 4)).item()
        0.0
    """
    ours, theirs = outputs.log_softmax(-1), targets.log_softmax(-1)
    return nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def cosine(outputs: Float[Tensor, "rows channels"], targets: Float[Tensor, "rows channels"]) -> Float[Tensor, ""]:
    """Return one minus the mean cosine of a row with the float model's.

    Example:
        >>> cosine(torch.eye(2), torch.eye(2).roll(1, 0)).item()
        1.0
    """
    return 1 - nn.functional.cosine_similarity(outputs, targets, dim=-1).mean()


def loss_of(loss: str | Loss, temperature: float) -> Loss:
    """Return the function that a name stands for; a function is taken as it is."""
    if not isinstance(loss, str):
        return loss
    if loss == "infonce":
        return lambda outputs, targets: infonce(outputs, targets, temperature)
    named: dict[str, Loss] = {"mse": mse, "kl": kl, "cosine": cosine}
    return named[loss]
