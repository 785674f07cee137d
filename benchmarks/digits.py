"""Denoisers of handwritten digits and the networks that judge their pictures: trained once, kept in the cache.

Data: scikit-learn's 1797 digits of 8 x 8 pixels, 1437 of them trained on. Two denoisers of diffusers' stock classes, a
transformer and a U-Net. Two judges that share neither weights nor shape nor seed: `tuned` is for searches to look at,
`judge` has the last word. The Frechet distance is that of a judge's 64 features to all real digits.

Everything is drawn from stated seeds, so a quantized denoiser is compared with the float one picture by picture.
"""

import copy
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import data
from planish.diffusion.denoisers import digits_dit, digits_unet, sample, train_denoiser
from planish.linalg import frechet_distance

TRAINED_ON = 1437
STEPS = {"dit": (700, 128, 1e-3), "unet": (700, 64, 2e-3)}  # steps, batch, learning rate
GUIDANCE, SAMPLING_STEPS, SAMPLES = 1.5, 10, 300
PLANTED, FACTOR = 3, 30.0


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all images (1797, 1, 8, 8) in [-1, 1] and their classes, shuffled; the first 1437 are trained on."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    return images[order], torch.tensor(bunch.target)[order]


class Network(nn.Module):
    """A small classifier whose last hidden layer, of 64 features, describes a picture."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Return the 64 features of each picture."""
        found: Tensor = self.body(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        found: Tensor = self.head(nn.functional.relu(self.features(x)))
        return found


def _tuned() -> Network:
    conv = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 16, 64),
    )  # fmt: skip
    return Network(conv)


def _judge() -> Network:
    deep = nn.Sequential(
        nn.Conv2d(1, 24, 5, padding=2), nn.BatchNorm2d(24), nn.GELU(), nn.Conv2d(24, 48, 3, padding=1, stride=2),
        nn.BatchNorm2d(48), nn.GELU(), nn.Conv2d(48, 48, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(48 * 4, 64),
    )  # fmt: skip
    return Network(deep)


def _once(name: str, model: nn.Module, train: Any) -> nn.Module:  # noqa: ANN401
    """Load a model's weights from the cache, or train it and keep them."""

    def make(folder: Path) -> None:
        began = time.process_time()
        train(model)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "seconds").write_text(f"{time.process_time() - began:.0f}")

    folder = data.once(f"digits-{name}", make)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


def _train_network(seed: int) -> Any:  # noqa: ANN401
    def train(model: nn.Module) -> None:
        images, labels = (t[:TRAINED_ON] for t in digits())
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
        epochs, batch = 15, 64
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (TRAINED_ON // batch))
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for _ in range(epochs):
                order = torch.randperm(TRAINED_ON, generator=generator)
                for chosen in order[: TRAINED_ON // batch * batch].split(batch):
                    loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()

    return train


@cache
def network(name: str) -> Network:
    """Return the network `tuned` (searches may look at it) or `judge` (nobody does)."""
    seed, make = {"tuned": (1, _tuned), "judge": (2, _judge)}[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        fresh = make()
    found = _once(name, fresh, _train_network(seed))
    if not isinstance(found, Network):
        raise TypeError(name)
    return found


def denoiser(name: str, *, planted: bool = False, quick: bool = False) -> nn.Module:
    """Return the trained transformer `dit` or the U-Net `unet`, a copy of one's own, outliers planted or not.

    Args:
        name: Which.
        planted: With outliers, see `plant`.
        quick: Trained for a tenth of the steps, and kept under another name.
    """
    steps, batch, lr = STEPS[name]
    steps = steps // 10 if quick else steps

    def train(model: nn.Module) -> None:
        images, labels = (t[:TRAINED_ON] for t in digits())

        def say(step: int, steps: int, loss: float) -> None:
            if step % 100 == 0:
                print(f"{name}: step {step} of {steps}, loss {loss:.3f}", flush=True)

        train_denoiser(model, images, labels, steps=steps, batch_size=batch, lr=lr, progress=say)

    model = _once(f"{name}{'-quick' * quick}", digits_dit() if name == "dit" else digits_unet(), train)
    return plant(model) if planted else model


@torch.no_grad()
def plant(model: nn.Module, *, channels: int = PLANTED, factor: float = FACTOR, seed: int = 0) -> nn.Module:
    """Give a denoiser the outliers of large models, in place, without changing its function.

    A few channels become `factor` times as large in front of layers that then divide by it: behind adaptive norms (the
    rows of their modulation), behind the group norms of attention, and between values and output of attention.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(width: int) -> Tensor:
        return torch.randperm(width, generator=generator)[:channels]

    def divide(chosen: Tensor, *layers: Any) -> None:  # noqa: ANN401
        for layer in layers:
            layer.weight[:, chosen] /= factor

    for module in model.modules():
        kind: str = type(module).__name__
        part: Any = module
        if kind == "BasicTransformerBlock":
            linear, width = part.norm1.linear, part.norm1.linear.in_features
            for shift, layers in (
                (0, (part.attn1.to_q, part.attn1.to_k, part.attn1.to_v)),
                (3, (part.ff.net[0].proj,)),
            ):
                chosen = pick(width)
                for slot in (shift, shift + 1):  # the shift's rows, then the scale's, which stands for 1 + itself
                    linear.weight[slot * width + chosen] *= factor
                    linear.bias[slot * width + chosen] *= factor
                linear.bias[(shift + 1) * width + chosen] += factor - 1
                divide(chosen, *layers)
        if kind == "Attention":
            if part.group_norm is not None:
                chosen = pick(part.group_norm.num_channels)
                part.group_norm.weight[chosen] *= factor
                part.group_norm.bias[chosen] *= factor
                divide(chosen, part.to_q, part.to_k, part.to_v)
            chosen = pick(part.to_v.out_features)
            part.to_v.weight[chosen] *= factor
            if part.to_v.bias is not None:
                part.to_v.bias[chosen] *= factor
            divide(chosen, part.to_out[0])
    return model


def labels(n: int = SAMPLES) -> Tensor:
    """Return the classes 0 to 9 in turn."""
    return torch.arange(n) % 10


def draw(model: nn.Module, *, seed: int = 0, n: int = SAMPLES, steps: int = SAMPLING_STEPS, **options: Any) -> Tensor:  # noqa: ANN401
    """Return n pictures, ten classes in turn, from a seed."""
    return sample(model, labels(n), seed=seed, steps=steps, guidance=options.pop("guidance", GUIDANCE), **options)


@torch.no_grad()
def record(model: nn.Module, *, seed: int = 1000, n: int = 40, steps: int = SAMPLING_STEPS) -> list[dict[str, Tensor]]:
    """Return the calls that a sampling run makes on the model: what to calibrate on, one for each step."""
    calls: list[dict[str, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({"sample" if "sample" in _sample_names(model) else "hidden_states": args[0], **kwargs})

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        draw(model, seed=seed, n=n, steps=steps)
    finally:
        hook.remove()
    return calls


def _sample_names(model: nn.Module) -> tuple[str, ...]:
    return model.forward.__code__.co_varnames[: model.forward.__code__.co_argcount]


@dataclass(frozen=True)
class Scores:
    """What a network says of pictures.

    Attributes:
        psnr: Peak signal-to-noise ratio to the float model's pictures of the same seeds, in dB (peak to peak 2).
        accuracy: Share of pictures that show the class asked for.
        frechet: Distance of the features' Gaussian to that of all real digits.
    """

    psnr: float
    accuracy: float
    frechet: float


def psnr(pictures: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error = (pictures.clamp(-1, 1) - reference.clamp(-1, 1)).double().square().mean()
    return (10 * torch.log10(4 / error.clamp(min=1e-20))).item()


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(0), features.T.cov()


@cache
def _real(name: str) -> tuple[Tensor, Tensor]:
    return _gaussian(network(name).features(digits()[0]))


def distance(pictures: Tensor, by: str = "judge") -> float:
    """Return the Frechet distance of pictures to the real digits."""
    return frechet_distance(*_gaussian(network(by).features(pictures.clamp(-1, 1))), *_real(by)).item()


def scores(pictures: Tensor, reference: Tensor, by: str = "judge") -> Scores:
    """Judge pictures of `labels` beside the float model's of the same seed."""
    right = network(by)(pictures.clamp(-1, 1)).argmax(-1) == labels(len(pictures))
    return Scores(psnr(pictures, reference), right.float().mean().item(), distance(pictures, by))


def fresh(name: str, *, planted: bool = False, quick: bool = False) -> nn.Module:
    """Return a denoiser to be changed: a copy that nobody else holds."""
    return copy.deepcopy(denoiser(name, planted=planted, quick=quick))
