"""Train a LoRA that makes a diffusion model's noise space smooth."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from planish._support import CheckpointError, bad
from planish.diffusion.lora_files import add_lora, read, save_smooth_lora, smooth_lora_config, write
from planish.diffusion.prediction import (
    NoiseScheduler,
    ask,
    is_flow,
    levels,
    predict_x0,
    prediction_type,
    target,
    train_timesteps,
)
from planish.diffusion.smooth_diffusion import StepwiseVariationRegularizer, VariationStats

_WHERE = "train_smooth_lora"
STATE = "training/state.safetensors"  # apart: diffusers guesses among all files of the folder itself
Batches = Iterable[tuple[Tensor, Mapping[str, object]]]


@dataclass(frozen=True)
class SmoothLoraRun:
    """What a training did.

    Attributes:
        steps: Updates in all, those of an earlier run included.
        losses: Mean squared error of the prediction, one an update of this run.
        variations: (mean, standard deviation) of n at each regularized pass of this run.
        file: The adapter on disk, None without `output`.

    Example:
        >>> print(SmoothLoraRun(2, [0.5, 0.4], [(1.0, 0.2), (1.0, 0.1)], None))
        2 steps, error 0.4, variation 1 +- 0.1
    """

    steps: int
    losses: list[float]
    variations: list[tuple[float, float]]
    file: Path | None

    def __str__(self) -> str:
        text = f"{self.steps} steps"
        if self.losses:
            text += f", error {self.losses[-1]:.4g}"
        if self.variations:
            text += ", variation {:.4g} +- {:.2g}".format(*self.variations[-1])
        return text


def train_smooth_lora(
    model: nn.Module,
    batches: Batches,
    scheduler: NoiseScheduler,
    output: str | Path | None = None,
    *,
    steps: int = 30_000,
    config: object = None,
    regularizer: StepwiseVariationRegularizer | None = None,
    method: Literal["vjp", "jvp", "difference"] = "vjp",
    share: int | float = 1.0,
    lr: int | float = 1e-4,
    weight_decay: int | float = 1e-4,
    clip: int | float = 1.0,
    accumulate: int = 1,
    resume: bool = True,
    save_every: int = 500,
    progress: Callable[[int, int, float], None] | None = None,
    generator: torch.Generator | None = None,
) -> SmoothLoraRun:
    """Add a LoRA to a model in place and train it under step-wise variation regularization.

    The base weights are frozen, dropout is off. A stopped training goes on from its last saved state and ends with the
    same bits, if `batches` gives the same batches again.

    Args:
        model: A diffusers UNet or transformer, or any module (sample, timesteps, **cond) -> prediction; not float16.
        batches: (x0, cond) with cond the model's keyword arguments; begun anew when it ends. Leave out prompts in some
            of them if the model is to be guided.
        scheduler: The one of the model's training, e.g. `DDPMScheduler.from_config(pipe.scheduler.config)`.
        output: Folder for the adapter and the state of training; None keeps nothing.
        steps: Updates, >= 1; default 30,000, the paper's.
        config: peft's LoraConfig; default `smooth_lora_config()`.
        regularizer: Default `StepwiseVariationRegularizer()`; weight 0 trains a plain LoRA on the same draws.
        method: "vjp", the published one, twice the time and memory; "jvp" for forward mode; "difference" for two
            passes and any attention.
        share: Of each batch that is regularized, in (0, 1], rounded up; default 1, as published. A half
            costs less time and memory, and makes the penalty noisier.
        lr: AdamW's step size, > 0, constant; default 1e-4, the paper's.
        weight_decay: >= 0; default 1e-4, the paper's.
        clip: Bound on the gradient's norm, > 0; default 1.
        accumulate: Batches an update, >= 1; default 1.
        resume: Go on from the state in `output` if there is one of the same settings; default True.
        save_every: Updates between two saves, >= 1; default 500.
        progress: Called with (updates done, updates, error).
        generator: Source of the adapter's start, times, noises and directions; a CPU's.

    Returns:
        What was done; the adapter "smooth" stays on the model.

    Raises:
        ValueError: An argument is out of range, there are no batches, or the loss is not finite.
        CheckpointError: The state on disk is of other settings or unreadable.
        MissingExtra: peft is not installed.

    Example:
        >>> from types import SimpleNamespace
        >>> scheduler = SimpleNamespace(config={"num_train_timesteps": 2}, alphas_cumprod=torch.tensor([0.8, 0.2]),
        ...     timesteps=torch.tensor([1, 0]), set_timesteps=print)
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Linear(3, 3)
        ...     def forward(self, z, t):
        ...         return self.inner(z).tanh()
        >>> batches = [(torch.randn(8, 3), {})]
        >>> train_smooth_lora(Net(), batches, scheduler, steps=4, config=smooth_lora_config(2, ["inner"])).steps
        4
    """
    _check(model, steps, accumulate, save_every, lr, clip, weight_decay, method, share)
    generator = generator or torch.Generator().manual_seed(0)
    regularizer = StepwiseVariationRegularizer() if regularizer is None else regularizer
    trained = add_lora(model, smooth_lora_config() if config is None else config, generator=generator)
    device = trained[0][1].device
    regularizer.to(device).train()
    directions = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))
    adam = torch.optim.AdamW([p for _, p in trained], lr=lr, weight_decay=weight_decay)
    settings = [lr, weight_decay, clip, accumulate, method, share, repr(regularizer), _sum_of_others(model, trained)]
    told = json.dumps(settings)
    run = _Run(trained, adam, regularizer, (generator, directions), told)
    begun = 0
    folder = None if output is None else Path(output)
    if folder is not None and resume and (folder / STATE).exists():
        begun = run.load(folder / STATE)
        if begun > steps:
            raise bad(_WHERE, "steps", f"at least {begun}, the steps already done", steps)
    stream = _endless(batches)
    for _ in range(begun * accumulate):
        next(stream)
    was = {module: module.training for module in model.modules()}
    model.eval()
    losses, variations = [], []
    try:
        for step in range(begun, steps):
            error = 0.0
            for _ in range(accumulate):
                base, extra, stats = _pass(
                    model, next(stream), scheduler, regularizer, method, share, step, run.generators
                )
                total = base if extra is None else base + extra
                if not math.isfinite(float(total.detach())):
                    raise bad(
                        f"{_WHERE}, step {step}", "batches", "such that the loss is finite", float(total.detach())
                    )
                (total / accumulate).backward()
                error += float(base.detach()) / accumulate
                if stats is not None:
                    variations.append((stats.mean, stats.std))
            torch.nn.utils.clip_grad_norm_([p for _, p in trained], clip)
            adam.step()
            adam.zero_grad()
            losses.append(error)
            if progress is not None:
                progress(step + 1, steps, error)
            if folder is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                run.save(folder / STATE, step + 1)
    finally:
        for module, mode in was.items():
            module.training = mode
    file = None if folder is None else save_smooth_lora(model, folder)
    return SmoothLoraRun(steps, losses, variations, file)


def _check(
    model: nn.Module,
    steps: int,
    accumulate: int,
    save_every: int,
    lr: float,
    clip: float,
    weight_decay: float,
    method: str,
    share: float,
) -> None:
    for name, count in (("steps", steps), ("accumulate", accumulate), ("save_every", save_every)):
        if count < 1:
            raise bad(_WHERE, name, "at least 1", count)
    if not (lr > 0 and clip > 0):
        raise bad(_WHERE, "lr and clip", "> 0", (lr, clip))
    if weight_decay < 0:
        raise bad(_WHERE, "weight_decay", ">= 0", weight_decay)
    if method not in {"vjp", "jvp", "difference"}:
        raise bad(_WHERE, "method", "'vjp', 'jvp' or 'difference'", method)
    if not 0 < share <= 1:
        raise bad(_WHERE, "share", "in (0, 1]", share)
    if any(p.dtype is torch.float16 for p in model.parameters()):
        raise bad(_WHERE, "model", "in float32 or bfloat16, for second derivatives overflow in float16", "float16")


def _pass(
    model: nn.Module,
    batch: tuple[Tensor, Mapping[str, object]],
    scheduler: NoiseScheduler,
    regularizer: StepwiseVariationRegularizer,
    method: str,
    share: float,
    step: int,
    generators: tuple[torch.Generator, torch.Generator],
) -> tuple[Tensor, Tensor | None, VariationStats | None]:
    """Return the error of one batch, and the regularizer's loss where it is due."""
    x0, cond = batch
    x0 = x0.detach()
    first = 1 if is_flow(scheduler) else 0  # without noise, flow matching has nothing to say
    t = torch.randint(first, train_timesteps(scheduler) + first, (len(x0),), generator=generators[0]).to(x0.device)
    noise = torch.randn(x0.shape, generator=generators[0]).to(x0)
    kind = prediction_type(scheduler)
    a, s = levels(scheduler, t, x0)
    due = regularizer.due(step)
    if not due:
        with torch.enable_grad():
            said = ask(model, a * x0 + s * noise, t, cond, where=_WHERE)
        return (said - target(kind, x0, noise, a, s).detach()).square().mean(), None, None
    count = math.ceil(share * len(x0))
    rows, rest = slice(count), slice(count, None)
    made: list[Tensor] = []

    def pred_x0(noise: Tensor) -> Tensor:
        z = a[rows] * x0[rows] + s[rows] * noise
        made.append(ask(model, z, t[rows], _of(cond, rows, len(x0)), where=_WHERE))
        return predict_x0(made[-1], z, t[rows], scheduler)

    alphas = (a.square() / (a.square() + s.square())).flatten()[rows]
    probed = noise[rows].clone()
    with sdpa_kernel(SDPBackend.MATH) if method != "difference" else nullcontext():
        if method == "vjp":
            probed.requires_grad_()
            x0hat = pred_x0(probed)
            extra, stats = regularizer(x0hat, probed, alphas, generator=generators[1])
        else:
            distance = None if method == "jvp" else 0.1
            _, extra, stats = regularizer.along(pred_x0, probed, alphas, step=distance, generator=generators[1])
            if method == "jvp":  # what it said was inside the transform
                pred_x0(probed)
    said = made[-1] if method == "jvp" else made[0]
    if count < len(x0):
        z = (a * x0 + s * noise)[rest]
        said = torch.cat([said, ask(model, z, t[rest], _of(cond, rest, len(x0)), where=_WHERE)])
    base = (said - target(kind, x0, noise, a, s).detach()).square().mean()
    return base, extra, stats


def _of(cond: Mapping[str, object], rows: slice, size: int) -> dict[str, object]:
    """Return some samples' conditions: of every tensor that has a row for each of them, these rows."""
    return {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == size else v for k, v in cond.items()}


def _sum_of_others(model: nn.Module, trained: list[tuple[str, nn.Parameter]]) -> float:
    """Add up the frozen weights: training on another base would not be noticed otherwise."""
    mine = {name for name, _ in trained}
    return sum(float(p.detach().double().abs().sum()) for name, p in model.named_parameters() if name not in mine)


def _endless(batches: Batches) -> Iterator[tuple[Tensor, Mapping[str, object]]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise bad(_WHERE, "batches", "an iterable that can be begun anew, of at least one batch", batches)


@dataclass(frozen=True)
class _Run:
    """What must be on disk to go on with a training."""

    trained: list[tuple[str, nn.Parameter]]
    adam: torch.optim.AdamW
    regularizer: StepwiseVariationRegularizer
    generators: tuple[torch.Generator, torch.Generator]
    settings: str

    def save(self, path: Path, step: int) -> None:
        tensors = {f"generator.{i}": generator.get_state() for i, generator in enumerate(self.generators)}
        tensors |= {f"regularizer.{name}": tensor for name, tensor in self.regularizer.state_dict().items()}
        for name, parameter in self.trained:
            tensors[f"lora.{name}"] = parameter
            tensors |= {f"adam.{key}.{name}": value for key, value in self.adam.state[parameter].items()}
        write(path, tensors, {"step": str(step), "settings": self.settings})

    def load(self, path: Path) -> int:
        tensors, metadata = read(path)
        if metadata.get("settings") != self.settings:
            raise CheckpointError(
                f"{path}: a training of other settings ({metadata.get('settings')}, not {self.settings}); use "
                "resume=False or another folder.",
                "unsupported",
            )
        lora = {name.removeprefix("lora."): t for name, t in tensors.items() if name.startswith("lora.")}
        if {n: t.shape for n, t in lora.items()} != {n: p.shape for n, p in self.trained}:
            raise CheckpointError(f"{path}: the training of another adapter.", "shape")
        with torch.no_grad():
            for name, parameter in self.trained:
                parameter.copy_(lora[name])
                self.adam.state[parameter] = {
                    key: tensors[f"adam.{key}.{name}"].to("cpu" if key == "step" else parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        mine = {n.removeprefix("regularizer."): t for n, t in tensors.items() if n.startswith("regularizer.")}
        self.regularizer.load_state_dict(mine)
        for i, generator in enumerate(self.generators):
            generator.set_state(tensors[f"generator.{i}"])
        return int(metadata["step"])
