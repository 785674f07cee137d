"""Ask any denoiser in one way, and translate what it predicts: noise, velocity, flow, or the sample itself.

Everything is written for z_t = a x0 + s noise. Schedulers with `alphas_cumprod` have a^2 + s^2 = 1; flow matching has
a = 1 - s and s = t / num_train_timesteps.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad

Denoiser = Callable[..., object]
"""A diffusers model, or any function (sample, timesteps, **cond) -> prediction."""
Cond = Mapping[str, object] | None
"""The model's further keyword arguments: {"encoder_hidden_states": ...}, {"class_labels": ...}."""

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@runtime_checkable
class NoiseScheduler(Protocol):
    """What is needed of a scheduler: diffusers' have it.

    Schedulers of noise have `alphas_cumprod` besides; without it, flow matching is meant.

    Example:
        >>> from types import SimpleNamespace
        >>> config = {"num_train_timesteps": 4, "prediction_type": "epsilon"}
        >>> isinstance(SimpleNamespace(config=config, timesteps=None, set_timesteps=print), NoiseScheduler)
        True
    """

    timesteps: Tensor

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings, with `num_train_timesteps` and mostly `prediction_type`."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the times to visit, from the noisiest on."""


def is_flow(scheduler: NoiseScheduler) -> bool:
    """Tell whether z_t = (1 - s) x0 + s noise."""
    return scheduler.config.get("prediction_type") == "flow_prediction" or not hasattr(scheduler, "alphas_cumprod")


def prediction_type(scheduler: NoiseScheduler) -> str:
    """Return which of PREDICTIONS the model of a scheduler makes."""
    found = "flow_prediction" if is_flow(scheduler) else str(scheduler.config.get("prediction_type", "epsilon"))
    if found not in PREDICTIONS:
        raise bad("predict_x0", "prediction_type", f"one of {', '.join(PREDICTIONS)}", found)
    return found


def train_timesteps(scheduler: NoiseScheduler) -> int:
    """Return how many times the model was trained on."""
    return int(scheduler.config["num_train_timesteps"])


def levels(scheduler: NoiseScheduler, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and s of times, as numbers of `like` shaped (times, 1, ...) to meet it."""
    if is_flow(scheduler):
        s = t.double() / train_timesteps(scheduler)
        a = 1 - s
    else:
        table: Tensor = scheduler.alphas_cumprod  # type: ignore[attr-defined]
        alphas = table.to(t.device).double()[t.long()]
        a, s = alphas.sqrt(), (1 - alphas).sqrt()
    shape = (-1,) + (1,) * (like.ndim - 1)
    return a.to(like).reshape(shape), s.to(like).reshape(shape)


def ask(model: Denoiser, sample: Tensor, t: Tensor | float, cond: Cond = None, *, where: str = "ask") -> Tensor:
    """Return a model's prediction: by keyword where it takes `timestep`, without a learned variance."""
    times = torch.as_tensor(t, device=sample.device).expand(len(sample))
    inner = getattr(model, "module", model)
    forward = inner.forward if isinstance(inner, nn.Module) else inner
    named = isinstance(inner, nn.Module) and "timestep" in inspect.signature(forward).parameters
    made = model(sample, timestep=times, **(cond or {})) if named else model(sample, times, **(cond or {}))
    found = made[0] if isinstance(made, tuple) else getattr(made, "sample", made)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{where}: `model` must return a tensor, a tuple, or have `.sample`; got {type(made).__name__}."
        )
    if found.ndim == sample.ndim > 1 and found.shape[1] == 2 * sample.shape[1]:
        found = found[:, : sample.shape[1]]
    if found.shape != sample.shape:
        raise bad(where, "model", f"predicting {tuple(sample.shape)}", tuple(found.shape))
    return found


def guided(
    model: Denoiser, sample: Tensor, t: Tensor | float, cond: Cond, null_cond: Cond, scale: int | float, *, where: str
) -> Tensor:
    """Return the prediction under classifier-free guidance; scale 1 asks once."""
    made = ask(model, sample, t, cond, where=where)
    if scale == 1:
        return made
    null = ask(model, sample, t, null_cond, where=where)
    return null + scale * (made - null)


def split(kind: str, made: Tensor, sample: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predicted x0 and the predicted noise."""
    if kind == "epsilon":
        return (sample - s * made) / a, made
    if kind == "v_prediction":
        return a * sample - s * made, a * made + s * sample
    if kind == "flow_prediction":
        return sample - s * made, sample + (1 - s) * made
    return made, (sample - a * made) / s


def target(kind: str, x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Return what a model should predict."""
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return a * noise - s * x0
    return noise - x0 if kind == "flow_prediction" else x0


def predict_x0(
    model_output: Float[Tensor, "batch *shape"],
    sample: Float[Tensor, "batch *shape"],
    t: Tensor | int | float,
    scheduler: NoiseScheduler,
) -> Float[Tensor, "batch *shape"]:
    """Return the clean sample that a model's output stands for, differentiably.

    Args:
        model_output: What the model said.
        sample: The noisy sample that it was asked about.
        t: The time of each sample, or one for all.
        scheduler: Names the kind of prediction in `config["prediction_type"]`: epsilon, v_prediction or sample; a
            scheduler without `alphas_cumprod` is of flow matching.

    Returns:
        x0, such that sample = a x0 + s noise.

    Raises:
        ValueError: The kind is unknown, shapes differ, a time is out of range, or noise is predicted where no signal
            is left.

    Example:
        >>> from types import SimpleNamespace
        >>> scheduler = SimpleNamespace(
        ...     config={"num_train_timesteps": 2, "prediction_type": "epsilon"},
        ...     alphas_cumprod=torch.tensor([0.64, 0.36]), timesteps=torch.tensor([1, 0]), set_timesteps=print)
        >>> x0, noise = torch.ones(1, 3), torch.full((1, 3), 2.0)
        >>> predict_x0(noise, 0.6 * x0 + 0.8 * noise, 1, scheduler)
        tensor([[1., 1., 1.]])
    """
    if model_output.shape != sample.shape:
        raise bad("predict_x0", "model_output", f"of the sample's shape {tuple(sample.shape)}", model_output.shape)
    times = torch.as_tensor(t, device=sample.device)
    times = times[None] if times.ndim == 0 else times
    if times.shape not in {(1,), (len(sample),)}:
        raise bad("predict_x0", "t", f"one time or {len(sample)}", tuple(times.shape))
    last = train_timesteps(scheduler) - (0 if is_flow(scheduler) else 1)
    if bool((times < 0).any() or (times > last).any()):
        raise bad("predict_x0", "t", f"in [0, {last}]", times.tolist())
    kind = prediction_type(scheduler)
    a, s = levels(scheduler, times, sample)
    if kind == "epsilon" and not bool((a > 0).all()):
        raise bad("predict_x0", "scheduler", "one with signal at every time if noise is predicted", "none left at t")
    if kind == "sample":
        return model_output
    return split(kind, model_output, sample, a, s)[0]
