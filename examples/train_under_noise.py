"""Train a small network to 3 bits on average under noise, and round it: beside rounding it as it is."""

import copy

import torch
from torch import nn

import planish
from planish.quant import rtn
from planish.quant.methods import nipq

generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
)
points = torch.rand(4096, 2, generator=generator) * 4 - 2
curve = (points[:, :1] * 3).sin() * points[:, 1:].exp()
fresh = torch.rand(2048, 2, generator=generator) * 4 - 2
wanted = (fresh[:, :1] * 3).sin() * fresh[:, 1:].exp()


def train(steps: int, groups: list[dict]) -> None:
    model.train()
    optimizer = torch.optim.Adam(groups)
    for step in range(steps):
        part = slice(step % 8 * 512, step % 8 * 512 + 512)
        loss = nn.functional.mse_loss(model(points[part]), curve[part])
        if any(isinstance(m, nipq.NoiseProxy) for m in model.modules()):
            loss = loss + nipq.cost(model)  # keeps the average width at the budget
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def error(network: nn.Module) -> float:
    with torch.no_grad():
        return (nn.functional.mse_loss(network.eval()(fresh), wanted) / wanted.var()).item()


train(400, [{"params": list(model.parameters()), "lr": 3e-3}])
print(f"float                        relative error {error(model):.4f}")
rounded = copy.deepcopy(model)
planish.quantize(rounded, [points], rtn(bits=3, group_size=None))
print(f"rounded to 3 bits            relative error {error(rounded):.4f}")

nipq.attach(model, points[:256], bits=3, generator=generator)  # the last layer, of one output, stays in float
train(300, nipq.param_groups(model, 3e-3))
print("widths while they are learned:", {name: round(bits, 2) for name, (bits, _) in nipq.widths(model).items()})
print("widths within the budget:     ", nipq.freeze(model))
train(100, nipq.param_groups(model, 1e-3))  # from here on by true rounding
print(f"trained under noise          relative error {error(model):.4f}")
planish.quantize(model, [points], nipq.learned(model))
print(f"the same as quantized layers relative error {error(model):.4f}")
