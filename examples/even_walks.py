"""Walk between two noises in even steps: train a smooth adapter for a small diffusion model of digits, and look."""

from collections.abc import Iterator

import matplotlib as mpl
import torch
from diffusers import DDIMScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn

from planish.diffusion import ddim_sample, interpolate, istd, smooth_lora_config, train_smooth_lora

mpl.use("agg")
import matplotlib.pyplot as plt

bunch = load_digits()
images, classes = torch.tensor(bunch.data, dtype=torch.float32) / 8 - 1, torch.tensor(bunch.target)
scheduler = DDIMScheduler(200, beta_start=0.00425, beta_end=0.06, beta_schedule="scaled_linear")


class Denoiser(nn.Module):
    """A small network that predicts the noise; a diffusers model stands here in earnest."""

    def __init__(self) -> None:
        super().__init__()
        self.told = nn.Embedding(10, 192)
        self.time, self.enter, self.leave = nn.Linear(1, 192), nn.Linear(64, 192), nn.Linear(192, 64)
        self.inner = nn.ModuleList(nn.Linear(192, 192) for _ in range(4))

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return the predicted noise."""
        h = self.enter(z) + self.told(label) + self.time(t[:, None] / 100 - 1)
        for layer in self.inner:
            h = h + nn.functional.silu(layer(h))
        return self.leave(h)


class Batches:
    """Images with their classes, without end."""

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        draw = torch.Generator().manual_seed(0)
        while True:
            chosen = torch.randint(len(images), (128,), generator=draw)
            yield images[chosen], {"label": classes[chosen]}


torch.manual_seed(0)
model = Denoiser()
adam = torch.optim.AdamW(model.parameters(), 2e-3)
for _, (x0, cond) in zip(range(800), Batches(), strict=False):  # a model to begin with
    t, noise = torch.randint(200, (128,)), torch.randn_like(x0)
    loss = (model(scheduler.add_noise(x0, noise, t), t, **cond) - noise).square().mean()
    adam.zero_grad()
    loss.backward()
    adam.step()


def generate(noise: Tensor, label: Tensor) -> Tensor:
    return ddim_sample(model, noise, scheduler, cond={"label": label}, steps=20).clamp(-1, 1)


def walk() -> Tensor:
    return interpolate(lambda z: generate(z, labels[:4].repeat(11)), *pairs[:, :4], num_frames=11)


pairs, labels = torch.randn(2, 60, 64), torch.arange(60) % 10
print("before:", istd(generate, pairs, labels, data_range=2, pairs_per_call=60))
walks = {"before": walk()}

config = smooth_lora_config(8, r"time|enter|leave|inner\.\d")  # for diffusers' models: smooth_lora_config()
print(train_smooth_lora(model, Batches(), scheduler, "smooth-lora", steps=300, config=config, lr=1e-3))

print("after: ", istd(generate, pairs, labels, data_range=2, pairs_per_call=60))
walks["after"] = walk()

figure, axes = plt.subplots(2, 1, figsize=(6, 5.2), layout="constrained")
for axis, (name, frames) in zip(axes, walks.items(), strict=True):
    tiles = nn.functional.pad(frames.reshape(11, 4, 8, 8), (1, 1, 1, 1), value=-1.0)
    axis.imshow(tiles.permute(1, 2, 0, 3).reshape(40, 110), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_axis_off()
    axis.set_title(f"{name}: four walks between noises")
figure.savefig("walks.png")
print("adapter: smooth-lora, picture: walks.png")
