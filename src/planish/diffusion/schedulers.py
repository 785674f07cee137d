"""diffusers' schedulers with two coefficients a step: on the sample and on the model's output.

`QSchedDDIMScheduler`, `QSchedLCMScheduler`, ... are made on first touch, here and in `planish`, of every scheduler
whose step is one evaluation of the model. They save, load and sample as the class that they are made of; with
coefficients of one they are that class, bit for bit. The multistep solvers DPM++ and UniPC keep what `step` was given,
so their history holds scaled outputs, each scaled once; solvers that evaluate the model several times a step are
refused.
"""

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from planish._support import bad, require, warn_once

_diffusers = require("diffusers", "diffusers", "A scheduler with coefficients")
SchedulerMixin = _diffusers.SchedulerMixin  # a pipeline that loads one of these classes asks its module for both
ModelMixin = _diffusers.ModelMixin

PREFIX = "QSched"
Coefficients = Sequence[int | float] | Mapping[str, int | float] | None
_HISTORY_KEPT = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
_REFUSED = tuple(
    name + "Scheduler"
    for name in (
        "PNDM", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "FlowMatchHeunDiscrete", "DPMSolverSDE",
        "DPMSolverSinglestep", "DEISMultistep", "IPNDM", "LMSDiscrete", "SASolver", "CosineDPMSolverMultistep",
        "EDMDPMSolverMultistep", "DPMSolverMultistepInverse", "CogVideoXDPM", "ScoreSdeVe", "RePaint", "VQDiffusion",
        "Amused", "KarrasVe",
    )
)  # fmt: skip
_OURS = ("sample_coeff", "model_coeff", "model_shift", "coeff_num_steps")
_made: dict[str, type] = {}
# A pipeline writes down a class's module, and loads the class from it only if the program has imported it: so the
# classes belong to `planish` itself, which resolves their names.


def scheduler_class(base: type) -> type:
    """Return the class with coefficients that is made of a scheduler's.

    Args:
        base: A scheduler class of diffusers.

    Returns:
        A subclass; the same one every time.

    Raises:
        TypeError: It is no scheduler, or its step is not one evaluation of the model.

    Example:
        >>> import diffusers
        >>> scheduler_class(diffusers.DDIMScheduler).__name__
        'QSchedDDIMScheduler'
    """
    if issubclass(base, SchedulerMixin) and base.__name__.startswith(PREFIX):
        return base
    step = getattr(base, "step", None)
    first = list(inspect.signature(step).parameters)[1:4] if step is not None else []
    fits = issubclass(base, SchedulerMixin) and first == ["model_output", "timestep", "sample"]
    if not fits or base.__name__ in _REFUSED or (getattr(base, "order", 1) != 1 and base.__name__ not in _HISTORY_KEPT):
        raise TypeError(
            f"scheduler_class: `base` must be a scheduler of diffusers whose step is one evaluation of the model; got "
            f"{base.__name__}."
        )
    name = PREFIX + base.__name__
    if name not in _made or not issubclass(_made[name], base):
        _made[name] = _make(name, base)
    return _made[name]


def _make(name: str, base: Any) -> type:  # noqa: ANN401
    signature = inspect.signature(base.__init__)
    own = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in _OURS]
    others = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401, N807
        given = {n: kwargs.pop(n, None) for n in _OURS}
        given["sample_coeff"] = _checked(name, "sample_coeff", given["sample_coeff"])
        given["model_coeff"] = _checked(name, "model_coeff", given["model_coeff"])
        base.__init__(self, *args, **kwargs)
        self.register_to_config(**given)
        self._coeff_times, self._coeff_last = None, -1
        hides = [n for n in ("thresholding", "use_dynamic_thresholding", "clip_sample") if self.config.get(n)]
        if hides and (given["sample_coeff"] or given["model_coeff"]):
            warn_once(f"{name}: `{hides[0]}` clips what the coefficients do; set it to False before tuning them.")

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        base.set_timesteps(self, *args, **kwargs)
        _expand(self, name)

    @functools.wraps(base.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        c_x, c_eps, shift = _at(self, name, timestep)
        if shift is not None:
            per_channel = torch.tensor(shift, device=model_output.device).view(1, -1, *[1] * (model_output.ndim - 2))
            model_output = (model_output.float() - per_channel).to(model_output.dtype)
        sample, model_output = _scaled(c_x, sample), _scaled(c_eps, model_output)
        return base.step(self, model_output, timestep, sample, *args, **kwargs)

    cast(Any, __init__).__signature__ = signature.replace(parameters=[*others, *own])
    text = (
        f"`diffusers.{base.__name__}` with coefficients on the sample and on the model's output; see `wrap_scheduler`."
    )
    members = {"__init__": __init__, "set_timesteps": set_timesteps, "step": step, "__doc__": text}
    return type(name, (base,), members | {"__module__": "planish"})


def _scaled(c: float, x: Tensor) -> Tensor:
    return x if c == 1 else (c * x.float()).to(x.dtype) if x.dtype in (torch.float16, torch.bfloat16) else c * x


def _checked(where: str, name: str, given: Coefficients) -> Any:  # noqa: ANN401
    if given is None:
        return None
    ends = isinstance(given, Mapping)
    if ends and set(cast(Mapping[str, int | float], given)) != {"start", "end"}:
        raise bad(where, name, "a list, or {'start': ..., 'end': ...}", given)
    values = list(cast(Mapping[str, int | float], given).values()) if ends else list(cast(Sequence[int | float], given))
    if not values or not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values):
        raise bad(where, name, "finite numbers above 0", given)
    return (
        {k: float(v) for k, v in cast(Mapping[str, int | float], given).items()} if ends else [float(v) for v in values]
    )


def linear_coefficients(start: int | float, end: int | float, steps: int) -> list[float]:
    """Return coefficients that go from one value to another in equal parts.

    Args:
        start: At the first step.
        end: At the last; not reached by one step alone.
        steps: T >= 1.

    Returns:
        T numbers.

    Example:
        >>> linear_coefficients(0.8, 1.0, 3)
        [0.8, 0.9, 1.0]
    """
    last = max(steps - 1, 1)
    return [start + (end - start) * i / last for i in range(steps)]


def _expand(scheduler: Any, name: str) -> None:  # noqa: ANN401
    """Bring the coefficients to the steps that were asked for, or say that they are for another number."""
    times = [float(t) for t in scheduler.timesteps.tolist()]
    config, steps = scheduler.config, len(times)
    if config.coeff_num_steps is not None and config.coeff_num_steps != steps:
        raise ValueError(
            f"{name}: the coefficients are for {config.coeff_num_steps} steps; got {steps}. Tune again, or clear them."
        )
    lists = []
    for key in ("sample_coeff", "model_coeff"):
        given = config[key]
        values = [1.0] * steps if given is None else given
        if isinstance(values, Mapping):
            values = linear_coefficients(values["start"], values["end"], steps)
        lists.append(list(values))
    shifts = config.model_shift if config.model_shift is not None else [None] * steps
    for key, values in zip(("sample_coeff", "model_coeff", "model_shift"), (*lists, shifts), strict=True):
        if len(values) != steps:
            raise bad(name, key, f"a list of {steps}, one a step", len(values))
    scheduler._coeff_times, scheduler._coeff_last = times, -1
    scheduler._coeff_values = list(zip(*lists, shifts, strict=True))


def _at(scheduler: Any, name: str, timestep: Any) -> tuple[float, float, list[float] | None]:  # noqa: ANN401
    """Return the coefficients of a timestep: of its next place in the list of timesteps."""
    if all(scheduler.config[key] is None for key in _OURS[:3]):
        return 1.0, 1.0, None
    if scheduler._coeff_times is None:
        raise ValueError(f"{name}: call `set_timesteps` before `step`.")
    now = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
    places = [i for i, t in enumerate(scheduler._coeff_times) if abs(t - now) <= 1e-4 * max(1.0, abs(t))]
    if not places:
        raise bad(name, "timestep", f"one of {scheduler._coeff_times}", now)
    place = next((i for i in places if i > scheduler._coeff_last), places[0])
    scheduler._coeff_last = place if place < len(scheduler._coeff_times) - 1 else -1
    found: tuple[float, float, list[float] | None] = scheduler._coeff_values[place]
    return found


def wrap_scheduler(
    scheduler: Any,  # noqa: ANN401  (any of diffusers')
    sample_coeff: Coefficients = None,
    model_coeff: Coefficients = None,
    *,
    model_shift: Sequence[Sequence[int | float]] | None = None,
    num_steps: int | None = None,
) -> Any:  # noqa: ANN401
    """Return a scheduler like the one given, with coefficients; the one given stays as it is.

    Its `step` multiplies the sample by c_x and the model's output by c_eps, then goes on as before; the network sees
    the sample as it was. The coefficients are part of its config, and so are saved and loaded with a pipeline.

    Args:
        scheduler: A scheduler of diffusers whose step is one evaluation of the model.
        sample_coeff: c_x: a positive number for each step, or {"start": ..., "end": ...} for a line; None for ones.
        model_coeff: c_eps, likewise.
        model_shift: Taken from the model's output before it is multiplied: a number a channel, for each step.
        num_steps: The number of steps that the coefficients are for; any other is refused. Lists imply theirs.

    Returns:
        A scheduler of the class `scheduler_class` gives.

    Raises:
        TypeError: The scheduler is of a class that has no such step.
        ValueError: A coefficient is not above 0 or not finite. Later, from `set_timesteps`: a list is for another
            number of steps.
        MissingExtra: diffusers is not installed.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> tuned = wrap_scheduler(DDIMScheduler(clip_sample=False), {"start": 0.9, "end": 1.0}, num_steps=4)
        >>> tuned.set_timesteps(4)
        >>> type(tuned).__name__, tuned.config.sample_coeff["start"]
        ('QSchedDDIMScheduler', 0.9)
    """
    kind = cast(Any, scheduler_class(type(scheduler)))
    config = {k: v for k, v in scheduler.config.items() if k not in _OURS}
    shift = None if model_shift is None else [[float(v) for v in row] for row in model_shift]
    return kind.from_config(
        config, sample_coeff=sample_coeff, model_coeff=model_coeff, model_shift=shift, coeff_num_steps=num_steps
    )  # fmt: skip


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: a class is made on first touch)
    base = getattr(_diffusers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(base, type) and issubclass(base, SchedulerMixin):
        return scheduler_class(base)
    raise AttributeError(f"module 'planish.diffusion.schedulers' has no attribute {name!r}")
