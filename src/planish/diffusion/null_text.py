"""Keep a real image while guidance pulls: null-text inversion, and editing by a change of prompt on the way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.diffusion.inversion import Grid, ddim_invert, grid
from planish.diffusion.prediction import Cond, Denoiser, NoiseScheduler, ask


@dataclass(frozen=True)
class NullTextInversion:
    """What it takes to make an image again under guidance.

    Attributes:
        trajectory: DDIM's inversion, from the image, first, to the noise, last.
        null_embeddings: The embedding in place of the empty prompt's, one a step.
        losses: Where the optimization of each step ended: mean squared distance from the trajectory; of the worst
            image, or summed over images that share the embedding.

    Example:
        >>> found = NullTextInversion(torch.zeros(3, 1, 2), torch.zeros(2, 1, 4, 8), torch.zeros(2))
        >>> found.noise.shape
        torch.Size([1, 2])
    """

    trajectory: Float[Tensor, "levels batch *shape"]
    null_embeddings: Float[Tensor, "steps nulls *embedding"]
    losses: Float[Tensor, " steps"]

    @property
    def noise(self) -> Tensor:
        """The noisiest level: slerp this to go between real images."""
        return self.trajectory[-1]


class NullTextInverter:
    """Find, step by step, the null embedding with which guided sampling stays on an image's own trajectory.

    Args:
        model: As in `ddim_sample`; differentiable in the embedding.
        scheduler: As in `ddim_sample`.
        steps: Sampling steps, in [1, training steps]; default 50.
        guidance_scale: > 1; default 7.5.
        inner_steps: Steps of Adam a sampling step, >= 0; default 10.
        lr: Their size at the first sampling step, falling by 1 % a step; default 0.01.
        tolerance: Stop a step below this loss, growing by twice itself a step; default 1e-5.
        key: Which of the model's keyword arguments is the embedding; default "encoder_hidden_states".

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> from types import SimpleNamespace
        >>> scheduler = SimpleNamespace(
        ...     config={"num_train_timesteps": 4}, alphas_cumprod=torch.tensor([0.9, 0.6, 0.3, 0.1]),
        ...     timesteps=torch.tensor([3, 2, 1, 0]), set_timesteps=lambda steps: None)
        >>> inverter = NullTextInverter(lambda z, t, e: 0.3 * z + e, scheduler, steps=4, key="e", lr=0.1)
        >>> x0, cond, null = torch.ones(1, 2), {"e": torch.ones(1, 2)}, {"e": torch.zeros(1, 2)}
        >>> found = inverter.invert(x0, cond, null)
        >>> torch.allclose(inverter.reconstruct(found, cond), x0, atol=0.05)
        True
    """

    def __init__(
        self,
        model: Denoiser,
        scheduler: NoiseScheduler,
        *,
        steps: int = 50,
        guidance_scale: int | float = 7.5,
        inner_steps: int = 10,
        lr: int | float = 1e-2,
        tolerance: int | float = 1e-5,
        key: str = "encoder_hidden_states",
    ) -> None:
        if not guidance_scale > 1:
            raise bad(
                "NullTextInverter", "guidance_scale", "> 1 (without guidance there is nothing to keep)", guidance_scale
            )
        if inner_steps < 0:
            raise bad("NullTextInverter", "inner_steps", "at least 0", inner_steps)
        for name, value in (("lr", lr), ("tolerance", tolerance)):
            if not value > 0:
                raise bad("NullTextInverter", name, "> 0", value)
        self.model, self.scheduler, self.steps, self.key = model, scheduler, steps, key
        self.guidance_scale, self.inner_steps, self.lr, self.tolerance = guidance_scale, inner_steps, lr, tolerance
        self._path: Grid = grid(scheduler, steps, "NullTextInverter")

    def invert(
        self,
        x0: Float[Tensor, "batch *shape"],
        cond: Mapping[str, object],
        null_cond: Mapping[str, object],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> NullTextInversion:
        """Invert images by DDIM without guidance, then fit the null embeddings to that trajectory.

        Args:
            x0: Images or latents.
            cond: Their prompts.
            null_cond: The empty prompt; its embedding (`key`) has one row a image, or a single one that all share.
            progress: Called with (steps done, steps), for the second part.

        Raises:
            ValueError: The embedding is missing or of another size, or the trajectory is not finite.
        """
        null = null_cond.get(self.key)
        if not isinstance(null, Tensor) or not null.is_floating_point():
            raise bad("NullTextInverter", "null_cond", f"a float tensor under '{self.key}'", sorted(null_cond))
        if len(null) not in {1, len(x0)}:
            raise bad("NullTextInverter", "null_cond", f"of 1 or {len(x0)} rows under '{self.key}'", len(null))
        pivots = ddim_invert(self.model, x0, self.scheduler, cond=cond, steps=self.steps)
        if not bool(pivots.isfinite().all()):
            raise bad("NullTextInverter", "x0", "an image whose inversion is finite", "nan or inf on the way")
        z, embedding, found, losses = pivots[-1], null.detach().clone(), [], []
        for i in range(self.steps):
            with torch.no_grad():
                told = ask(self.model, z, self._path.times[i], cond, where="NullTextInverter")
            embedding, loss = self._fit(i, z, told, pivots[self.steps - 1 - i], embedding, null_cond)
            found.append(embedding)
            losses.append(loss)
            with torch.no_grad():
                z = self._next(i, z, told, embedding, null_cond)
            if progress is not None:
                progress(i + 1, self.steps)
        return NullTextInversion(pivots, torch.stack(found), torch.tensor(losses))

    def reconstruct(self, inversion: NullTextInversion, cond: Cond, *, null_cond: Cond = None) -> Tensor:
        """Sample under guidance with the embeddings found.

        Args:
            inversion: What `invert` returned.
            cond: The prompts.
            null_cond: Further arguments of the empty prompt, if the model takes any besides the embedding.
        """
        return self._sample(inversion, lambda _: cond, null_cond)

    @torch.no_grad()
    def _sample(self, inversion: NullTextInversion, cond_at: Callable[[Tensor], Cond], null_cond: Cond) -> Tensor:
        if len(inversion.null_embeddings) != self.steps:
            raise bad("NullTextInverter", "inversion", f"of {self.steps} steps", len(inversion.null_embeddings))
        z = inversion.noise
        for i, t in enumerate(self._path.times):
            told = ask(self.model, z, t, cond_at(t), where="NullTextInverter")
            z = self._next(i, z, told, inversion.null_embeddings[i], null_cond or {})
        return z

    def _next(self, i: int, z: Tensor, told: Tensor, embedding: Tensor, null_cond: Mapping[str, object]) -> Tensor:
        """Take one guided step."""
        shared = embedding.expand(len(z), *embedding.shape[1:])
        null = ask(self.model, z, self._path.times[i], {**null_cond, self.key: shared}, where="NullTextInverter")
        return self._path.step(null + self.guidance_scale * (told - null), z, i, i + 1)

    def _fit(
        self, i: int, z: Tensor, told: Tensor, pivot: Tensor, start: Tensor, null_cond: Mapping[str, object]
    ) -> tuple[Tensor, float]:
        """Move the embedding of one step; return it with the loss at it."""
        embedding = start.detach().clone().requires_grad_()
        adam = torch.optim.Adam([embedding], lr=self.lr * max(1 - i / 100, 0.0))
        for taken in range(self.inner_steps + 1):
            with torch.enable_grad():
                loss = (self._next(i, z, told, embedding, null_cond) - pivot).square().flatten(1).mean(1)
            value = float(loss.detach().sum() if len(embedding) < len(z) else loss.detach().max())
            if taken == self.inner_steps or value < self.tolerance * (1 + 2 * i):
                break
            (embedding.grad,) = torch.autograd.grad(loss.sum(), embedding)
            adam.step()
        return embedding.detach(), value


def edit_by_prompt_switch(
    inverter: NullTextInverter,
    inversion: NullTextInversion,
    source: Cond,
    target: Cond,
    *,
    switch_at: int | float = 0.8,
    null_cond: Cond = None,
) -> Float[Tensor, "batch *shape"]:
    """Edit an image: sample by the prompt it was inverted with at first, then by another.

    Args:
        inverter: With the model and its settings.
        inversion: Of the image.
        source: The prompt it was inverted with, for times above `switch_at`.
        target: The prompt for the rest.
        switch_at: Share of the training times, in [0, 1]; default 0.8. 1 is all the target's, 0 all the source's.
        null_cond: Further arguments of the empty prompt, if the model takes any besides the embedding.

    Raises:
        ValueError: `switch_at` is out of range.

    Example:
        >>> from types import SimpleNamespace
        >>> scheduler = SimpleNamespace(
        ...     config={"num_train_timesteps": 4}, alphas_cumprod=torch.tensor([0.9, 0.6, 0.3, 0.1]),
        ...     timesteps=torch.tensor([3, 2, 1, 0]), set_timesteps=lambda steps: None)
        >>> inverter = NullTextInverter(lambda z, t, e: 0.3 * z + e, scheduler, steps=4, key="e")
        >>> one, two, null = ({"e": torch.full((1, 2), x)} for x in (1.0, 2.0, 0.0))
        >>> found = inverter.invert(torch.ones(1, 2), one, null)
        >>> same = edit_by_prompt_switch(inverter, found, one, one)
        >>> torch.equal(same, inverter.reconstruct(found, one))
        True
    """
    if not 0 <= switch_at <= 1:
        raise bad("edit_by_prompt_switch", "switch_at", "in [0, 1]", switch_at)
    last = switch_at * int(inverter.scheduler.config["num_train_timesteps"])
    return inverter._sample(inversion, lambda t: source if float(t) > last or last == 0 else target, null_cond)
