"""Weights and activations of four bits: outliers in a few channels, a branch that takes them, an adapter on top."""

import copy

import torch
from torch import nn

import planish
from planish.quant import Affine, rtn, svdquant

generator = torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


model = nn.Sequential(
    nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 64)
).requires_grad_(False)
model[0].weight[[5, 40]] *= 60.0  # what large models do: a few channels far above the rest ...
model[1].weight[:, [5, 40]] /= 60.0  # ... that meet small weights, so that little comes of them
batches, fresh = [noise(256, 64) for _ in range(4)], noise(512, 64)
wanted = model(fresh)


def show(name: str, small: nn.Module) -> None:
    error = (small(fresh) - wanted).square().sum() / wanted.square().sum()
    size = sum(t.nbytes for t in small.state_dict().values())
    print(f"{name:<40} {-10 * error.log10().item():5.1f} dB   {size:6} bytes")


four = {"bits": 4, "group_size": 32, "symmetric": True}
methods = {
    "rounded to nearest": planish.quant.Method("rtn", rtn(**four).weight, Affine(4, 32, True)),
    "smoothed": svdquant(**four, rank=0, grid=6),
    "smoothed, with a branch of rank 8": svdquant(**four, rank=8, grid=6),
    "the same in four-bit floats": svdquant(precision="fp4", rank=8, grid=6),
}
for name, method in methods.items():
    small = copy.deepcopy(model)
    planish.quantize(small, batches, method)
    show(name, small)

before = small(fresh)
small[5].add_lora("style", noise(2, 64) / 8, noise(64, 2) / 8, scale=0.5)
print(f"an adapter moves the output by {(small(fresh) - before).norm() / before.norm():.3f} of its size;", end=" ")
small[5].remove_lora("style")
print("without it every bit is as before:", torch.equal(small(fresh), before))
