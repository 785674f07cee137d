r"""Smoothie: text diffusion over the distances to every token's embedding.

A token is described by its squared distances to all tokens. Noise makes the kernel around it wider, so that at first
only tokens near in meaning are confused with it and at last all are: neither the order of tokens is lost, as in
diffusion over one-hot vectors, nor the way back to tokens, as in diffusion over embeddings.

    D_0[i, j] = -|E_(w_i) - E_j|^2 / (2 s_min^2)
    D_t = mu(t) D_0 + nu(t) eps,    mu = b^-2,    nu = delta sqrt(1 - b^-4)
    b(t) = (s_max / s_min - 1) (2 / pi) arctan(sqrt(t / (1 - t)) / d) + 1

The network sees X_t = softmax(D_t) E and predicts the embeddings E_w; a step takes D of the prediction to the next
time, with fresh noise. The last prediction's nearest tokens are the text.

================  =======================  ==========================================================
paper             here                     range, default
================  =======================  ==========================================================
sigma_min         ``sigma_min``            > 0, in units of the embeddings; "auto" (1.5 in the paper)
sigma_max         ``sigma_max_ratio``      sigma_max / sigma_min, > 1; 200 / 1.5
d                 ``d``                    > 0; 9
delta             ``delta``                >= 0; 1
N                 ``num_inference_steps``  >= 1; 200
================  =======================  ==========================================================

Differs from the paper: sigma_min is solved for the embeddings at hand; states stream over the vocabulary, so that
memory does not grow with it; embeddings are fixed; the Euler solver of the SDE is not here.
When to use: texts of bounded length, all tokens at once, where distances between embeddings mean something.

Reference:
    Shabalin, Meshchaninov and Vetrov, Smoothie: Smoothing Diffusion on Token Embeddings for Text Generation, 2025.
    https://arxiv.org/abs/2505.18853
"""

import math
from typing import Literal

import torch
from torch import Tensor

from planish._support import bad
from planish.diffusion.embeddings import EmbeddingSpace
from planish.diffusion.text_schedulers import Solver, TextScheduler, check_chunk, register_to_config
from planish.diffusion.token_state import TokenState

_FIRST, _LAST = 5e-4, 0.9995  # times are kept off the ends, where the kernel's width has no derivative


class SmoothieScheduler(TextScheduler):
    """Widen a Gaussian kernel around each token over the embeddings of all tokens.

    Args:
        sigma_min: Width of the kernel at the start, > 0; "auto" solves for the width at which the typical token
            weighs as much as all others together at the time `transition`. Default "auto".
        sigma_max_ratio: Width at the end over that at the start, > 1. Default 200 / 1.5.
        d: How late the kernel widens, > 0. Default 9.
        delta: Noise on the distances, >= 0; 0 is a blur without chance. Default 1.
        transition: For "auto", in (0, 1). Default 0.2, about where the paper's settings have it.
        solver: "fresh" (the paper's: forgets the state, keeps the prediction), "ddpm" or "ddim". Default "fresh".
        chunk_size: Tokens of the vocabulary at a time: memory is in proportion to it, and the noise of a seed depends
            on it. Default 1024.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> space = EmbeddingSpace(torch.randn(50, 16))
        >>> scheduler = SmoothieScheduler().set_space(space)
        >>> ids = torch.tensor([[3, 1, 4]])
        >>> noisy = scheduler.corrupt(ids, 0.1, torch.Generator().manual_seed(0))
        >>> scheduler.scale_model_input(noisy, 0.1).shape
        torch.Size([1, 3, 16])
        >>> scheduler.set_timesteps(10)
        >>> out = scheduler.step(space.encode(ids), 0.1, noisy)  # as if the network knew the tokens
        >>> bool((out.prev_sample.dense().argmax(-1) == ids).all())
        True
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sigma_min: int | float | Literal["auto"] = "auto",
        sigma_max_ratio: int | float = 200 / 1.5,
        d: int | float = 9.0,
        delta: int | float = 1.0,
        transition: int | float = 0.2,
        solver: Solver = "fresh",
        chunk_size: int = 1024,
    ) -> None:
        where = "SmoothieScheduler"
        if sigma_min != "auto" and not (isinstance(sigma_min, int | float) and 0 < sigma_min < math.inf):
            raise bad(where, "sigma_min", "a finite number > 0 or 'auto'", sigma_min)
        if not 1 < sigma_max_ratio < math.inf:
            raise bad(where, "sigma_max_ratio", "a finite number > 1", sigma_max_ratio)
        if not 0 < d < math.inf:
            raise bad(where, "d", "a finite number > 0", d)
        if not 0 <= delta < math.inf:
            raise bad(where, "delta", "a finite number >= 0", delta)
        if not 0 < transition < 1:
            raise bad(where, "transition", "in (0, 1)", transition)
        check_chunk(where, chunk_size)
        self._begin(solver)
        self.sigma_min = math.nan if sigma_min == "auto" else float(sigma_min)

    def set_space(self, space: EmbeddingSpace) -> "SmoothieScheduler":
        """Work in these embeddings, and solve for `sigma_min` if it is "auto"; return itself.

        A token i weighs as much as all others together where sum_j exp(mu D_0[i, j] + nu^2 / 2) = 1 over j other than
        i, noise averaged. Half of the tokens do so at a time later than `transition`, half earlier.

        Args:
            space: The embeddings.

        Raises:
            ValueError: Half of the tokens have the same embedding as another.
        """
        super().set_space(space)
        if self.config.sigma_min == "auto":
            gaps = space.neighbour_distances().double()
            if not float(gaps.amin(1).median()) > 0:
                raise bad("SmoothieScheduler", "space", "such that most embeddings differ", "equal embeddings")
            mu, nu = (float(x) for x in self.level(self.config.transition))
            low, high = 1e-4 * float(gaps.amin(1).median()) ** 0.5, 1e4 * float(gaps.max()) ** 0.5
            for _ in range(50):  # halves the logarithm's interval
                middle = math.sqrt(low * high)
                others = float((-gaps * (mu / (2 * middle**2))).logsumexp(1).median()) + nu**2 / 2
                low, high = (middle, high) if others < 0 else (low, middle)
            self.sigma_min = math.sqrt(low * high)
        return self

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        clipped = t.clamp(_FIRST, _LAST)
        widened = (2 / math.pi) * torch.arctan((clipped / (1 - clipped)).sqrt() / self.config.d)
        mu = ((self.config.sigma_max_ratio - 1) * widened + 1).pow(-2)
        return mu, self.config.delta * (1 - mu.square()).sqrt()

    def _clean(self, embeddings: Tensor) -> TokenState:
        return TokenState.of(self.space, embeddings, sharpness=self.sigma_min**-2, chunk_size=self.config.chunk_size)
