"""A latent space that is the image itself, so that pipelines made for latents run on pixels."""

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import require

_diffusers = require("diffusers", "diffusers", "Pixels")
ModelMixin, ConfigMixin = _diffusers.ModelMixin, _diffusers.ConfigMixin  # diffusers finds the loader by name, here


class Pixels(ModelMixin, ConfigMixin):  # type: ignore[misc, valid-type]
    """An autoencoder that changes nothing: in the place of a pipeline's `vae`.

    Args:
        scaling_factor: What pipelines divide latents by before decoding.

    Example:
        >>> bool((Pixels().decode(torch.ones(1, 1, 8, 8)).sample == 1).all())
        True
    """

    @_diffusers.configuration_utils.register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, scaling_factor: int | float = 1.0) -> None:
        super().__init__()
        # Pipelines ask every part where it lies and in which dtype, and files hold at least one tensor.
        self.register_buffer("place", torch.zeros(1))

    def encode(self, x: Float[Tensor, "n c h w"]) -> Any:  # noqa: ANN401  (diffusers' own shape of an answer)
        """Return the image as a distribution that holds nothing else."""
        there = SimpleNamespace(sample=lambda generator=None: x, mode=lambda: x)
        return SimpleNamespace(latent_dist=there)

    def decode(self, z: Float[Tensor, "n c h w"], **_: object) -> Any:  # noqa: ANN401
        """Return the image."""
        return SimpleNamespace(sample=z)
