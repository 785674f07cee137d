"""From noise to image without chance, and back: deterministic sampling (DDIM), and its inverse for real images."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.diffusion.prediction import (
    Cond,
    Denoiser,
    NoiseScheduler,
    guided,
    is_flow,
    levels,
    prediction_type,
    split,
    train_timesteps,
)


@dataclass(frozen=True)
class Grid:
    """The times of a sampler, from the noisiest on, with a and s before and after each step."""

    kind: str
    times: Tensor
    a: Tensor
    s: Tensor

    def step(self, made: Tensor, sample: Tensor, start: int, end: int) -> Tensor:
        """Go from level `start` to level `end` with what the model said."""
        x0, noise = split(self.kind, made, sample, *(level.to(sample)[start] for level in (self.a, self.s)))
        return self.a.to(sample)[end] * x0 + self.s.to(sample)[end] * noise

    def back(self, made: Tensor, sample: Tensor, start: int, end: int) -> Tensor:
        """Undo `step`, given the same prediction: a step is linear in the sample and in what the model said."""
        one, zero = sample.new_ones(()), sample.new_zeros(())
        return (sample - self.step(one, zero, start, end) * made) / self.step(zero, one, start, end)


def grid(scheduler: NoiseScheduler, steps: int, where: str) -> Grid:
    """Return the times that a scheduler would visit in so many steps; it is left as it was."""
    if not 1 <= steps <= train_timesteps(scheduler):
        raise bad(where, "steps", f"in [1, {train_timesteps(scheduler)}], the number of training steps", steps)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    times = own.timesteps.detach().cpu().double()
    if not is_flow(scheduler):
        times = times.round().long()
    if len(times) != steps:
        raise bad(
            where, "scheduler", "one that visits each time once (DDIMScheduler.from_config(...))", type(scheduler)
        )
    one = torch.zeros(1, dtype=torch.float64)
    a, s = levels(scheduler, times, one)
    if float(a[0]) == 0 and prediction_type(scheduler) == "epsilon":
        raise bad(where, "scheduler", "one with signal at every time if noise is predicted", "none left at the first")
    final = 1.0 if is_flow(scheduler) else getattr(scheduler, "final_alpha_cumprod", 1.0)
    last = torch.as_tensor(final).cpu().double().reshape(1)
    return Grid(prediction_type(scheduler), times, torch.cat([a, last.sqrt()]), torch.cat([s, (1 - last).sqrt()]))


@torch.no_grad()
def ddim_sample(
    model: Denoiser,
    noise: Float[Tensor, "batch *shape"],
    scheduler: NoiseScheduler,
    *,
    cond: Cond = None,
    null_cond: Cond = None,
    steps: int = 50,
    guidance_scale: int | float = 1.0,
) -> Float[Tensor, "batch *shape"]:
    """Generate from noise, deterministically; the predicted sample is never clipped, so that it can be inverted.

    Args:
        model: A diffusers model (UNet, DiT), or a function (sample, timesteps, **cond) -> prediction.
        noise: Standard normal.
        scheduler: Gives the levels of noise and the times: diffusers' DDIM, DDPM or flow-matching schedulers.
        cond: The model's further keyword arguments.
        null_cond: Those without a prompt, for guidance.
        steps: Steps, in [1, training steps]; default 50.
        guidance_scale: 1 for no guidance; the paper's images have 7.5. It changes how smooth a model is.

    Raises:
        ValueError: An argument is out of range, or the model's output does not fit.

    Example:
        >>> from types import SimpleNamespace
        >>> scheduler = SimpleNamespace(
        ...     config={"num_train_timesteps": 4}, alphas_cumprod=torch.tensor([0.9, 0.6, 0.3, 0.1]),
        ...     timesteps=torch.tensor([3, 2, 1, 0]), set_timesteps=lambda steps: None)
        >>> x = ddim_sample(lambda z, t: 0 * z, torch.ones(1, 1), scheduler, steps=4)    # no noise is seen in it
        >>> torch.allclose(x, torch.tensor([[0.1**-0.5]]))
        True
    """
    _refuse_guidance("ddim_sample", guidance_scale, null_cond)
    path = grid(scheduler, steps, "ddim_sample")
    z = noise
    for i, t in enumerate(path.times):
        z = path.step(guided(model, z, t, cond, null_cond, guidance_scale, where="ddim_sample"), z, i, i + 1)
    return z


@torch.no_grad()
def ddim_invert(
    model: Denoiser,
    x0: Float[Tensor, "batch *shape"],
    scheduler: NoiseScheduler,
    *,
    cond: Cond = None,
    null_cond: Cond = None,
    steps: int = 50,
    guidance_scale: int | float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "levels batch *shape"]:
    """Find the noise from which `ddim_sample` would nearly make an image.

    Each step of sampling is undone with the prediction at its own time, asked about the sample that is known, the
    cleaner one. So the error is that of taking the two samples for one: it falls as 1 / steps, and the smoother the
    model, the smaller it is. Where noise or samples are predicted, this is diffusers' DDIMInverseScheduler without
    clipping; where velocities are, that one undoes its steps only to first order.

    Args:
        model: As in `ddim_sample`.
        x0: Images, or a VAE's latents (its posterior mean, scaled).
        scheduler: As in `ddim_sample`.
        cond: The model's further keyword arguments.
        null_cond: Those without a prompt, for guidance.
        steps: Steps, in [1, training steps]; default 50.
        guidance_scale: Default 1: inversion under guidance drifts away.
        progress: Called with (steps done, steps).

    Returns:
        All levels from the image, first, to the noise, last.

    Raises:
        ValueError: An argument is out of range, or the model's output does not fit.

    Example:
        >>> from types import SimpleNamespace
        >>> scheduler = SimpleNamespace(
        ...     config={"num_train_timesteps": 4}, alphas_cumprod=torch.tensor([0.9, 0.6, 0.3, 0.1]),
        ...     timesteps=torch.tensor([3, 2, 1, 0]), set_timesteps=lambda steps: None)
        >>> def predict(z, t):                       # depends on the time alone: inversion is exact
        ...     return 0.1 * t.float()[:, None].expand_as(z)
        >>> noise = ddim_invert(predict, torch.ones(1, 2), scheduler, steps=4)[-1]
        >>> torch.allclose(ddim_sample(predict, noise, scheduler, steps=4), torch.ones(1, 2), atol=1e-5)
        True
    """
    _refuse_guidance("ddim_invert", guidance_scale, null_cond)
    path = grid(scheduler, steps, "ddim_invert")
    found = [x0]
    for i in range(steps - 1, -1, -1):
        z = found[-1]
        made = guided(model, z, path.times[i], cond, null_cond, guidance_scale, where="ddim_invert")
        if path.kind == "sample" and float(path.s[i + 1]) == 0:
            raise bad("ddim_invert", "scheduler", "with final_alpha_cumprod < 1 where samples are predicted", 1.0)
        found.append(path.back(made, z, i, i + 1))
        if progress is not None:
            progress(steps - i, steps)
    return torch.stack(found)


def _refuse_guidance(where: str, scale: int | float, null_cond: Cond) -> None:
    if scale != 1 and null_cond is None:
        raise bad(where, "null_cond", f"given, for guidance_scale is {scale}", None)
