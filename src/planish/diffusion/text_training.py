"""Train a `TextDiffusionModel`: pairs of token ids in, a model with averaged weights out; a stopped run goes on."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from planish._support import CheckpointError, bad
from planish.diffusion.folders import written
from planish.diffusion.text_model import TextDiffusionModel
from planish.diffusion.text_schedulers import TextScheduler
from planish.quant.files import write_shard

_LEAST_TIME = 1e-5
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TextTrainingReport:
    """What a training did.

    Attributes:
        losses: The loss of every step. Losses of different schedulers do not compare.
        seconds: Time of this run, without that of runs that it went on from.
        resumed_at: The step it went on from, 0 for the beginning.

    Example:
        >>> TextTrainingReport(torch.tensor([4.0, 2.0]), 1.0, 0).loss
        2.0
    """

    losses: Tensor
    seconds: float
    resumed_at: int

    @property
    def loss(self) -> float:
        """Mean of the last tenth of the losses."""
        return float(self.losses[-math.ceil(len(self.losses) / 10) :].mean())


class _Run:
    """What must be kept for a run to go on: weights, their average, the optimizer, the generator, losses."""

    def __init__(self, model: TextDiffusionModel, lr: float, weight_decay: float, steps: int) -> None:
        self.parameters = dict(model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay, fused=True
        )
        self.losses, self.step = torch.zeros(steps), 0

    def advance(self, loss: Tensor, lr: float, clip: float, follow: float) -> None:
        """Take a step along the loss, and let the average follow."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), clip)
        self.optimizer.step()
        with torch.no_grad():
            for name, p in self.parameters.items():
                self.average[name].lerp_(p, follow)
        self.losses[self.step] = loss.detach()
        self.step += 1

    def save(self, path: Path, generator: torch.Generator, settings: str) -> None:
        tensors = {"generator": generator.get_state(), "losses": self.losses}
        for name, p in self.parameters.items():
            tensors |= {f"weight.{name}": p.detach(), f"average.{name}": self.average[name]}
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        with written(path) as partial:
            write_shard(partial, tensors, {"step": str(self.step), "settings": settings})

    def load(self, path: Path, generator: torch.Generator, settings: str) -> None:
        try:
            with safe_open(path, "pt") as file:
                kept, there = file.metadata() or {}, set(file.keys())
                if kept.get("settings") != settings:
                    told = f"of other settings: {kept.get('settings')}; this run's are {settings}"
                    raise CheckpointError(f"train_text_diffusion: {path} is {told}", "unsupported")
                generator.set_state(file.get_tensor("generator"))
                self.losses, self.step = file.get_tensor("losses"), int(kept["step"])
                for name, p in self.parameters.items():
                    p.data.copy_(file.get_tensor(f"weight.{name}"))
                    self.average[name].copy_(file.get_tensor(f"average.{name}"))
                    if f"step.{name}" in there:  # what no loss has reached yet has no moments
                        self.optimizer.state[p] = {
                            key: file.get_tensor(f"{key}.{name}").to(p.device) for key in _MOMENTS
                        }
        except SafetensorError as error:
            raise CheckpointError(f"train_text_diffusion: {path} cannot be read: {error}", "unreadable") from None


def train_text_diffusion(
    model: TextDiffusionModel,
    scheduler: TextScheduler,
    targets: Int[Tensor, "n m"],
    sources: Int[Tensor, "n S"] | None = None,
    *,
    steps: int,
    batch_size: int = 64,
    lr: int | float = 2e-4,
    warmup: int | float = 0.01,
    decay: Literal["none", "cosine"] = "none",
    weight_decay: int | float = 0.01,
    clip: int | float = 1.0,
    ema: int | float = 0.9999,
    source_pad_id: int = 0,
    source_dropout: int | float = 0.0,
    pad_id: int | None = None,
    pad_weight: int | float = 1.0,
    checkpoint: str | Path | None = None,
    save_every: int = 500,
    progress: Callable[[str, int, int], None] | None = None,
    generator: torch.Generator | None = None,
) -> TextTrainingReport:
    """Train a model in place to predict tokens' embeddings, and leave the running average of its weights in it.

    Args:
        model: The model; with self-conditioning, half of the batches show it its own prediction.
        scheduler: What noise is; its space is set.
        targets: Texts, padded; the pad is an ordinary token, by which lengths come out.
        sources: Sources, padded; None for texts without.
        steps: Batches in all, >= 1.
        batch_size: Pairs a batch, >= 1. Default 64.
        lr: Step, > 0. Default 2e-4, the paper's.
        warmup: Share of the steps over which the step grows, in [0, 1). Default 0.01.
        decay: What the step does then: "none" (the paper's) or "cosine" to zero. Default "none".
        weight_decay: >= 0. Default 0.01.
        clip: Largest norm of a gradient, > 0. Default 1.
        ema: How slowly the average follows, in [0, 1). Faster at first. Default 0.9999.
        source_pad_id: What pads sources. Default 0.
        source_dropout: Share of sources left out, in [0, 1): above 0 allows `guidance_scale` when sampling. Default 0.
        pad_id: What pads targets; needed for `pad_weight` alone.
        pad_weight: Weight of the padding's loss, >= 0. Default 1, the paper's.
        checkpoint: File to keep the run in, every `save_every` steps and at the end; a run that finds it goes on, and
            ends with the same weights as one that was not stopped (with dropout 0).
        save_every: Steps between two savings, >= 1. Default 500.
        progress: Called as progress("train", done, total).
        generator: Source of batches, times and noise; default a new one with seed 0.

    Returns:
        Losses and time.

    Raises:
        ValueError: An argument is out of range, or the loss is not finite.
        CheckpointError: `checkpoint` is unreadable, or of other settings.

    Example:
        >>> from planish.diffusion import EmbeddingSpace, SmoothieScheduler, TextDiffusionConfig
        >>> sizes = TextDiffusionConfig(4, 3, hidden_size=8, num_layers=1, num_encoder_layers=0, num_heads=2)
        >>> scheduler = SmoothieScheduler().set_space(EmbeddingSpace(torch.randn(9, 4)))
        >>> report = train_text_diffusion(TextDiffusionModel(sizes), scheduler, torch.randint(9, (20, 3)), steps=5)
        >>> len(report.losses)
        5
    """
    where = "train_text_diffusion"
    _check(where, locals())
    device = next(model.parameters()).device
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    run = _Run(model, float(lr), float(weight_decay), steps)
    names = ("steps", "batch_size", "lr", "warmup", "decay", "weight_decay", "clip", "ema", "pad_weight")
    given = locals()
    settings = json.dumps({**{k: given[k] for k in names}, "pairs": len(targets), "dropped": source_dropout})
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.is_file():
        run.load(path, generator, settings)
    began, resumed_at = time.perf_counter(), run.step
    model.train()
    for step in range(run.step, steps):
        rows = torch.randint(len(targets), (batch_size,), generator=generator)
        ids = targets[rows].to(device)
        source = _source(model, scheduler, None if sources is None else sources[rows].to(device), source_pad_id)
        if source and source_dropout > 0:
            stays = torch.rand(batch_size, generator=generator) >= source_dropout
            source["encoder_attention_mask"] = source["encoder_attention_mask"] & stays[:, None].to(device)
        weights = torch.ones(ids.shape, device=device)
        if pad_id is not None:
            weights[ids == pad_id] = float(pad_weight)
        loss = _loss(model, scheduler, ids, source, weights, generator)
        if not torch.isfinite(loss):
            raise bad(
                where, "loss", f"finite; take a smaller `lr` than {lr:g}", f"{float(loss.detach())} at step {step}"
            )
        rate = min(1.0, (step + 1) / max(warmup * steps, 1))
        if decay == "cosine":
            rate *= 0.5 + 0.5 * math.cos(math.pi * max(0.0, step - warmup * steps) / max(steps - warmup * steps, 1))
        run.advance(loss, rate * lr, float(clip), 1 - min(float(ema), (1 + step) / (10 + step)))
        if path is not None and (run.step % save_every == 0 or run.step == steps):
            run.save(path, generator, settings)
        if progress is not None:
            progress("train", run.step, steps)
    with torch.no_grad():
        for name, p in run.parameters.items():
            p.copy_(run.average[name])
    model.eval()
    return TextTrainingReport(run.losses, time.perf_counter() - began, resumed_at)


def _loss(
    model: TextDiffusionModel,
    scheduler: TextScheduler,
    ids: Tensor,
    source: dict[str, Tensor],
    weights: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Return the weighted squared error of predicted embeddings, each text at a random time."""
    t = _LEAST_TIME + (1 - _LEAST_TIME) * torch.rand(len(ids), generator=generator)
    t = t.to(ids.device)
    seen = scheduler.scale_model_input(scheduler.corrupt(ids, t, generator), t)
    previous = None
    if model.config.self_conditioning and float(torch.rand((), generator=generator)) < 0.5:
        with torch.no_grad():
            previous = model(seen, t, **source)
    predicted: Tensor = model(seen, t, **source, self_cond=previous)
    error = (predicted - scheduler.space.encode(ids)).square().mean(-1)
    return (weights * error).sum() / weights.sum().clamp_min(1e-12)


def _source(
    model: TextDiffusionModel, scheduler: TextScheduler, sources: Tensor | None, pad_id: int
) -> dict[str, Tensor]:
    """Return what the model takes of sources: ids or embeddings, and where they are no padding."""
    if sources is None:
        return {}
    mask = {"encoder_attention_mask": sources != pad_id}
    if model.config.source_vocab_size is None:
        return {"encoder_embeds": scheduler.space.encode(sources), **mask}
    return {"encoder_input_ids": sources, **mask}


def _check(where: str, given: dict[str, Any]) -> None:
    """Refuse arguments that are out of range.

    Raises:
        ValueError: One is.
    """
    model, targets, sources = given["model"], given["targets"], given["sources"]
    if not len(targets) or targets.shape[1] > model.config.max_length:
        wanted = f"at least one row of at most {model.config.max_length} positions"
        raise bad(where, "targets", wanted, tuple(targets.shape))
    if sources is not None and len(sources) != len(targets):
        raise bad(where, "sources", f"as many as targets, {len(targets)}", len(sources))
    size = model.config.source_vocab_size
    if sources is not None and size is not None and not (0 <= int(sources.min()) and int(sources.max()) < size):
        raise bad(where, "sources", f"ids in [0, {size})", f"{int(sources.min())} to {int(sources.max())}")
    if given["scheduler"].space.dim != model.config.embedding_dim:
        raise bad(where, "model", f"of embedding_dim {given['scheduler'].space.dim}", model.config.embedding_dim)
    for name in ("steps", "batch_size", "save_every"):
        if given[name] < 1:
            raise bad(where, name, "at least 1", given[name])
    for name in ("warmup", "ema", "source_dropout"):
        if not 0 <= given[name] < 1:
            raise bad(where, name, "in [0, 1)", given[name])
    for name in ("lr", "clip"):
        if not 0 < given[name] < math.inf:
            raise bad(where, name, "a finite number > 0", given[name])
    for name in ("weight_decay", "pad_weight"):
        if not 0 <= given[name] < math.inf:
            raise bad(where, name, "a finite number >= 0", given[name])
    if given["pad_weight"] != 1 and given["pad_id"] is None:
        raise bad(where, "pad_id", "given where `pad_weight` is not 1", None)
    if given["decay"] not in ("none", "cosine"):
        raise bad(where, "decay", "'none' or 'cosine'", given["decay"])
