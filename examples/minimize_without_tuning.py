"""No learning rate: Newton with a Gauss-Newton matrix trains a small net, and a safe step descends a steep quartic."""

import torch
from torch import nn

from planish.optim import GradNormNewton, NormalizedGD, PhaseRetrieval

torch.manual_seed(0)  # of the net's weights
x = torch.linspace(-3, 3, 200, dtype=torch.float64)[:, None]
y = x.sin() + 0.3 * (3 * x).cos()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()


model = net()
newton = GradNormNewton(model.parameters(), hessian="ggn")


def evaluate() -> tuple[torch.Tensor, torch.Tensor]:
    out = model(x)
    return (out - y).square().mean(), out  # no backward


for _ in range(60):
    newton.step(evaluate)
print(f"60 steps of Newton:  error {float(evaluate()[0].detach()):.2e}")

model = net()
adam = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(1000):
    adam.zero_grad()
    loss = evaluate()[0]
    loss.backward()
    adam.step()
print(f"1000 steps of Adam:  error {float(evaluate()[0].detach()):.2e}")

problem = PhaseRetrieval.random(1000, 50, generator=torch.Generator().manual_seed(0))
descent = NormalizedGD(problem.parameters(), lr="auto", smoothness=problem.smoothness())
for step in range(201):
    descent.zero_grad()
    value = problem()
    value.backward()
    if step % 50 == 0:
        print(f"phase retrieval, step {step:3d}: {float(value.detach()):.4g}")
    descent.step()
