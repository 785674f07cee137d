"""What a tuned schedule is to be good at: scores of images, one each, the higher the better."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad


@dataclass(frozen=True)
class JAQLoss:
    """Joint alignment and quality: TC(image, prompt) + k IQ(image). Needs no reference; called a loss, yet maximised.

    Args:
        alignment: TC(images, prompts): a score an image, e.g. the logarithm of a CLIP score.
        quality: IQ(images): a score an image, e.g. of an aesthetic model.
        prompts: Handed to `alignment`.
        k: Weight of quality, >= 0; default 2, as published; infinite for quality alone.

    Raises:
        ValueError: k is negative, or a score is not one number an image.

    Example:
        >>> loss = JAQLoss(lambda x, p: -(x.mean((1, 2, 3)) - p).abs(), lambda x: x.std((1, 2, 3)), torch.zeros(2))
        >>> loss(torch.ones(2, 1, 4, 4)).tolist()
        [-1.0, -1.0]
    """

    alignment: Callable[[Tensor, Any], Tensor]
    quality: Callable[[Tensor], Tensor]
    prompts: Any
    k: int | float = 2.0

    def __post_init__(self) -> None:
        """Check the weight."""
        if not self.k >= 0:
            raise bad("JAQLoss", "k", "at least 0", self.k)

    def __call__(self, images: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
        """Score each image."""
        parts = []
        if self.k != float("inf"):
            parts.append(_one_each("alignment", self.alignment(images, self.prompts), images))
        if self.k > 0:
            weight = 1.0 if self.k == float("inf") else self.k
            parts.append(weight * _one_each("quality", self.quality(images), images))
        return torch.stack(parts).sum(0)


def _one_each(name: str, scores: Tensor, images: Tensor) -> Tensor:
    if scores.shape != (len(images),):
        raise bad("JAQLoss", name, f"a function that gives {len(images)} scores", tuple(scores.shape))
    return scores


@dataclass(frozen=True)
class ReferenceLoss:
    """Nearness to the images that another model draws from the same noise: minus the mean squared error.

    Args:
        reference: Those images.

    Raises:
        ValueError: Images of another shape.

    Example:
        >>> ReferenceLoss(torch.zeros(2, 1, 4, 4))(torch.ones(2, 1, 4, 4)).tolist()
        [-1.0, -1.0]
    """

    reference: Float[Tensor, "n ..."]

    def __call__(self, images: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
        """Score each image."""
        if images.shape != self.reference.shape:
            raise bad("ReferenceLoss", "images", f"of shape {tuple(self.reference.shape)}", tuple(images.shape))
        return -(images - self.reference).flatten(1).square().mean(1)
