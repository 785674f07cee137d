"""A small diffusion model of handwritten digits, smooth adapters for it, and what can be measured of them.

Data: scikit-learn's 1797 digits of 8 x 8 pixels. The model: a residual network of three blocks that predicts noise on
every fifth level of Stable Diffusion's schedule, its class given or not. Trained from stated seeds.
"""

import json
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import data
from benchmarks.harness import write_json
from planish.diffusion import (
    ISTDResult,
    StepwiseVariationRegularizer,
    ddim_invert,
    ddim_sample,
    istd,
    load_smooth_lora,
    save_smooth_lora,
    smooth_lora_config,
    train_smooth_lora,
)
from planish.diffusion.lora_files import WEIGHTS
from planish.linalg import frechet_distance

NULL, LEVELS, STEPS, GUIDANCE = 10, 200, 20, 2.0


class Schedule:
    """Every fifth level of Stable Diffusion's schedule, in diffusers' form."""

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0)[:: 1000 // LEVELS].float()
        self.config = {"num_train_timesteps": LEVELS, "prediction_type": "epsilon"}
        self.timesteps = torch.arange(LEVELS).flip(0)
        self.final_alpha_cumprod = 1.0

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Visit so many of the levels, evenly."""
        self.timesteps = torch.arange(num_inference_steps).flip(0) * (LEVELS // num_inference_steps)


class Net(nn.Module):
    """A residual network on pixels, told the time and the class."""

    def __init__(self, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.label = nn.Embedding(NULL + 1, width)
        self.time, self.enter = nn.Linear(64, width), nn.Linear(64, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.leave = nn.Linear(width, 64)

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return the predicted noise."""
        angle = t[:, None] * torch.exp(torch.arange(32) * (-np.log(1000) / 32))
        told = nn.functional.silu(self.time(torch.cat([angle.sin(), angle.cos()], 1)) + self.label(label))
        h = self.enter(z)
        for norm, first, second in zip(self.norms, self.first, self.second, strict=True):
            h = h + second(nn.functional.silu(first(norm(h) + told)))
        made: Tensor = self.leave(nn.functional.silu(h))
        return made


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all images (1797, 64) in [-1, 1] and their classes."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    bunch = load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32) / 8 - 1, torch.tensor(bunch.target)


class Batches:
    """Batches without end, the class of one in ten hidden; begun anew, they are the same again."""

    def __init__(
        self, seed: int, size: int = 128, *, key: str = "label", null: int = NULL, square: bool = False
    ) -> None:
        self.seed, self.size, self.key, self.null, self.square = seed, size, key, null, square

    def __iter__(self) -> Iterator[tuple[Tensor, Mapping[str, object]]]:
        images, classes = digits()
        draw = torch.Generator().manual_seed(self.seed)
        while True:
            chosen = torch.randint(len(images), (self.size,), generator=draw)
            hidden = torch.rand(self.size, generator=draw) < 0.1
            x = images[chosen].reshape(-1, 1, 8, 8) if self.square else images[chosen]
            yield x, {self.key: torch.where(hidden, self.null, classes[chosen])}


def pretrain(seed: int, steps: int) -> Net:
    """Train the model itself."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        net = Net()
    adam = torch.optim.AdamW(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, total_steps=steps)
    draw, alphas = torch.Generator().manual_seed(seed + 100), Schedule().alphas_cumprod
    for _, (x0, cond) in zip(range(steps), Batches(seed), strict=False):
        t = torch.randint(LEVELS, (len(x0),), generator=draw)
        noise = torch.randn(x0.shape, generator=draw)
        abar = alphas[t][:, None]
        loss = (net(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t, **cond) - noise).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    return net.eval()


def base(seed: int, steps: int) -> Net:
    """Return the trained model, from the cache where it is there."""

    def make(folder: Path) -> None:
        save_file(pretrain(seed, steps).state_dict(), folder / "model.safetensors")

    net = Net()
    net.load_state_dict(load_file(data.once(f"interpolation-{seed}-{steps}", make) / "model.safetensors"))
    return net.eval()


def adapted(net: nn.Module, seed: int, steps: int, weight: float, *, method: str = "vjp", **settings: object) -> float:
    """Train an adapter of rank 8 on every linear layer, in place; return the processor's seconds a step."""
    began = time.process_time()
    train_smooth_lora(
        net, Batches(seed + 1000), Schedule(), steps=steps, config=smooth_lora_config(8, LAYERS), lr=1e-3,
        method=method,  # type: ignore[arg-type]
        regularizer=StepwiseVariationRegularizer(weight, **settings),  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return (time.process_time() - began) / steps


LAYERS = r"time|enter|leave|first\.\d|second\.\d"


def sampler(net: nn.Module):  # noqa: ANN201
    """Return (noise, classes) -> images in [-1, 1] under guidance."""

    def draw(noise: Tensor, classes: Tensor) -> Tensor:
        null = {"label": torch.full_like(classes, NULL)}
        made = ddim_sample(
            net, noise, Schedule(), cond={"label": classes}, null_cond=null, steps=STEPS, guidance_scale=GUIDANCE
        )
        return made.clamp(-1, 1)

    return draw


@cache
def _judge():  # noqa: ANN202
    from sklearn.svm import SVC  # noqa: PLC0415

    images, classes = digits()
    return SVC(gamma=0.05).fit(images.numpy(), classes.numpy())


def walks(net: nn.Module, pairs: int, seed: int = 0) -> ISTDResult:
    """Measure a model's interpolations: the same noises and classes for all models."""
    noises = torch.randn(2, pairs, 64, generator=torch.Generator().manual_seed(seed + 7))
    return istd(sampler(net), noises, torch.arange(pairs) % 10, data_range=2.0, pairs_per_call=pairs)


def measure(net: nn.Module, pairs: int, images: int) -> dict[str, float]:
    """Return what is told of a model: evenness, and what it may have cost."""
    found = walks(net, pairs)
    classes = torch.arange(images) % 10
    made = sampler(net)(torch.randn(images, 64, generator=torch.Generator().manual_seed(8)), classes).double()
    real, known = digits()
    distance = frechet_distance(made.mean(0), made.T.cov(), real.double().mean(0), real.double().T.cov())
    right = float((_judge().predict(made.float().numpy()) == classes.numpy()).mean())
    some = slice(0, images // 2)
    noise = ddim_invert(net, real[some], Schedule(), cond={"label": known[some]}, steps=STEPS)[-1]
    back = ddim_sample(net, noise, Schedule(), cond={"label": known[some]}, steps=STEPS)
    return {
        "ISTD": found.istd,
        "std / mean step": found.cv,
        "largest / mean step": found.max_over_mean,
        "mean step": found.mean_step,
        "Frechet distance": float(distance),
        "right class": 100 * right,
        "inversion's error": float((back - real[some]).square().mean()) * 1e3,
    }


def kept(name: str, net: nn.Module, train, tell, *, fresh: bool = False) -> dict[str, float]:  # noqa: ANN001
    """Train an adapter and measure it, unless the cache has both; `net` ends with the adapter on."""
    folder = data.cache_dir() / name
    if (folder / "told.json").exists() and not fresh:
        if (folder / WEIGHTS).exists():
            load_smooth_lora(net, folder)
        found: dict[str, float] = json.loads((folder / "told.json").read_text())
        return found
    seconds = train(net)
    found = tell(net)
    if seconds is not None:
        save_smooth_lora(net, folder)
        found["time a step"] = 1e3 * seconds
    write_json(folder / "told.json", found)
    return found
