"""What the noise benchmark trains: waves of one dimension made here, and CIFAR-10 with a really trained ResNet-20."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import shared_data

CLASSES, LENGTH = 10, 40


@dataclass(frozen=True)
class Task:
    """Data, a network, how it is trained in float and with rounding.

    Attributes:
        name: What tables call it.
        train: Inputs and labels.
        test: Inputs and labels.
        make: Makes the network for a seed; trained already where `epochs_float` is 0.
        batch: Examples a step.
        epochs_float: Epochs before anything is rounded.
        epochs: Epochs with rounding or its stand-in.
        settling: How many of these the noise methods spend rounding, at the end.
        lr: Of Adam, falling to zero along a cosine, in the second part; in float it is 3e-3.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    make: Callable[[int], nn.Module]
    batch: int
    epochs_float: int
    epochs: int
    settling: int
    lr: float


def waves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return n noisy waves (n, 1, 40) of ten kinds, made in the manner of MNIST-1D from templates of our own.

    A template of twelve points is stretched, scaled, moved around a circle, sheared, buried in smooth noise, and read
    off at forty places.
    """
    kinds = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(42), dtype=torch.float64)
    kinds = (kinds - kinds.mean(1, keepdim=True)) / kinds.std(1, keepdim=True)
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    made = torch.zeros(n, 72, dtype=torch.float64)
    lengths = torch.randint(36, 61, (n,), generator=random)
    scales = 1 + 0.3 * torch.randn(n, generator=random, dtype=torch.float64)
    shifts = torch.randint(0, 72, (n,), generator=random)
    for i in range(n):
        length = int(lengths[i])
        wave = F.interpolate(kinds[labels[i]][None, None], size=length, mode="linear", align_corners=True)[0, 0]
        made[i, :length] = wave * scales[i]
        made[i] = made[i].roll(int(shifts[i]))
    places = torch.linspace(-0.5, 0.5, 72, dtype=torch.float64)
    made += 0.75 * torch.randn(n, 1, generator=random, dtype=torch.float64) * places
    bell = torch.exp(-(torch.arange(-6, 7, dtype=torch.float64) ** 2) / 8)
    rough = torch.randn(n, 1, 72 + 12, generator=random, dtype=torch.float64)
    made += 0.3 * F.conv1d(rough, (bell / bell.norm())[None, None])[:, 0]
    x = F.interpolate(made[:, None], size=LENGTH, mode="linear", align_corners=True)
    order = torch.randperm(n, generator=random)
    return ((x - x.mean()) / x.std()).float()[order], labels[order]


class WaveNet(nn.Module):
    """A separable convolutional net for waves."""

    def __init__(self) -> None:
        super().__init__()

        def block(inp: int, out: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv1d(inp, inp, 5, stride, 2, groups=inp, bias=False), nn.BatchNorm1d(inp), nn.ReLU(),
                nn.Conv1d(inp, out, 1, bias=False), nn.BatchNorm1d(out), nn.ReLU(),
            ]  # fmt: skip

        self.body = nn.Sequential(
            nn.Conv1d(1, 16, 5, 1, 2, bias=False), nn.BatchNorm1d(16), nn.ReLU(), *block(16, 32, 2), *block(32, 32, 2)
        )
        self.head = nn.Linear(32 * 10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        return self.head(self.body(x).flatten(1))


def wave_task(quick: bool) -> Task:
    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.random.default_generator.manual_seed(seed)
            return WaveNet()

    train, test = (waves(500, 0), waves(500, 1)) if quick else (waves(3000, 0), waves(2000, 1))
    epochs, settling = (4, 1) if quick else (16, 3)
    return Task("MNIST-1D-like", train, test, make, 100, 5 if quick else 20, epochs, settling, 2e-3)


class Basic(nn.Module):
    """A residual block; where sizes change the shortcut drops every other place and pads channels with zeros."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - inp

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """The CIFAR ResNet with 20 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Basic(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Basic(16, 32, 2), Basic(32, 32, 1), Basic(32, 32, 1))
        self.layer3 = nn.Sequential(Basic(32, 64, 2), Basic(64, 64, 1), Basic(64, 64, 1))
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def cifar_task(quick: bool) -> Task:
    """Return CIFAR-10's task.

    Raises:
        FileNotFoundError: The shared data is absent.
    """
    from safetensors.torch import load_file  # noqa: PLC0415

    folder = shared_data()
    if folder is None or not (folder / "cifar10" / "images.npz").is_file():
        raise FileNotFoundError("the shared data is absent (PLANISH_DATA)")
    images = np.load(folder / "cifar10" / "images.npz")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def part(name: str) -> tuple[Tensor, Tensor]:
        x = ((torch.from_numpy(images[f"{name}_images"]).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        y = torch.from_numpy(images[f"{name}_labels"])
        return (x[::8], y[::8]) if quick else (x, y)

    def make(_seed: int) -> nn.Module:
        model = ResNet20()
        model.load_state_dict(load_file(folder / "cifar10" / "resnet20.safetensors"), strict=False)
        return model

    return Task("CIFAR-10, ResNet-20", part("train"), part("test"), make, 50, 0, 4, 1, 1e-3)
