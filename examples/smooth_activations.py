"""Does a network know the derivative of what it learnt? ReLU against a smooth unit; then back to exact Leaky ReLU."""

import torch
from torch import nn

from planish.nn import SAU, WidthSchedule, replace_activations, to_leaky_relu

x = torch.linspace(-2, 2, 64)[:, None]
between = torch.linspace(-2, 2, 1001)[:, None]


def train(net: nn.Module, steps: int = 1000, schedule: WidthSchedule | None = None) -> None:
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - torch.sin(3 * x)).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def error_of_the_derivative(net: nn.Module) -> float:
    at = between.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(at).sum(), at)
    return (slope - 3 * torch.cos(3 * between)).square().mean().sqrt().item()


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


corners = perceptron()
train(corners)
print(f"ReLU:                error of the derivative {error_of_the_derivative(corners):.3f}")

smooth = perceptron()
replaced = replace_activations(smooth, nn.ReLU, SAU, sigma=0.5, learn_sigma=True)
train(smooth)
print(f"SAU ({replaced} units):       error of the derivative {error_of_the_derivative(smooth):.3f}")

narrowed = perceptron()
replace_activations(narrowed, nn.ReLU, SAU)
train(narrowed, schedule=WidthSchedule(narrowed, start=1.0, end=1e-3, n_steps=800))
before = narrowed(between).detach()
bounds = to_leaky_relu(narrowed)
change = (narrowed(between) - before).abs().max().item()
print(f"narrowed, now exact: outputs moved by {change:.1e}; each unit by at most {max(bounds.values()):.1e}")
