"""Any module of torch: an MLP learns a curve, goes to 3 bits, and is judged by how far its outputs move."""

import copy
import tempfile

import torch
from torch import nn

import planish
from planish.quant import best, rtn

generator = torch.Generator().manual_seed(0)
model = nn.Sequential(
    nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 32), nn.Linear(32, 1)
)
points = torch.rand(4096, 2, generator=generator) * 4 - 2
curve = (points[:, :1] * 3).sin() * points[:, 1:].exp()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(400):
    part = slice(step % 8 * 512, step % 8 * 512 + 512)
    loss = nn.functional.mse_loss(model(points[part]), curve[part])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"trained to a mean squared error of {loss.item():.4f}; the curve's variance is {curve.var().item():.2f}")

fresh = torch.rand(2048, 2, generator=generator) * 4 - 2
for method in (rtn(bits=3, group_size=None), best(bits=3, group_size=None)):
    small = copy.deepcopy(model)
    report = planish.quantize(small, points.split(512), method, skip=("0", "5"))  # the first and the last stay float
    error = planish.evaluate(small, fresh.split(256), model).relative_error
    print(f"{method.name:<5} {report.bytes_before} -> {report.bytes_after} bytes, relative error {error.value:.4f}")

with tempfile.TemporaryDirectory() as home:
    layout = planish.save(small, f"{home}/small", report=report)
    twin = planish.load(f"{home}/small", into=copy.deepcopy(model))
    print(f"saved in {layout}'s layout; same outputs:", torch.equal(twin(fresh), small(fresh)))
