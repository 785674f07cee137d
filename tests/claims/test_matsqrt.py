"""The paper's claims in miniature, and what the improvements on it are worth."""

import math

import pytest
import torch
from torch import nn

from planish.linalg import ZCAWhitening2d, low_rank_correction, matrix_sqrth, solve_lyapunov_psd

F64 = torch.float64


def wishart(n=64, batch=4, rows=4):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n, rows * n, generator=g, dtype=F64)
    return x @ x.mT / (rows * n)


def off(x, a):
    """The error of a root, relative to the exact one."""
    values, vectors = torch.linalg.eigh(a)
    exact = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    return ((x - exact).norm() / exact.norm()).item()


@pytest.mark.claim(
    "matsqrt", "error of Newton-Schulz (5 steps) over that of Pade's quotient, as published, Wishart 64 x 64"
)
def test_pade_is_more_accurate_than_newton_schulz(record_claim):
    a = wishart()
    taylor = off(matrix_sqrth(a, paper=True, method="mtp"), a)
    newton = off(matrix_sqrth(a, method="newton_schulz", steps=5), a)
    pade = off(matrix_sqrth(a, paper=True), a)
    assert taylor > newton > pade  # the order of the paper
    record_claim(newton / pade, 1.5, "times")


@pytest.mark.claim(
    "matsqrt", "gradient error of Newton-Schulz (5 steps) over that of the published quotient's own gradient"
)
def test_the_quotients_own_gradient_is_more_accurate_than_newton_schulz(record_claim):
    a = wishart()
    g = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    g = g + g.mT
    values, vectors = torch.linalg.eigh(a)
    exact = solve_lyapunov_psd((vectors * values.sqrt()[..., None, :]) @ vectors.mT, g)
    errors = []
    for given in (
        {"method": "newton_schulz", "steps": 5, "backward": "autograd"},
        {"paper": True, "backward": "autograd"},
    ):
        leaf = a.clone().requires_grad_()
        (d,) = torch.autograd.grad(matrix_sqrth(leaf, **given), leaf, g)
        errors.append(((d - exact).norm() / exact.norm()).item())
    record_claim(errors[0] / errors[1], 1.5, "times")


@pytest.mark.claim("matsqrt", "error of Pade's quotient as published over that scaled by the mean eigenvalue")
def test_the_mean_is_the_better_scale(record_claim):
    a = wishart()
    record_claim(off(matrix_sqrth(a, paper=True), a) / off(matrix_sqrth(a, method="mpa"), a), 1000, "times")


@pytest.mark.claim(
    "matsqrt", "largest gradient entry at coinciding eigenvalues, where autograd through eigh is not finite"
)
def test_gradients_where_eigenvalues_coincide(record_claim):
    a = torch.eye(8, dtype=F64).requires_grad_()
    values, vectors = torch.linalg.eigh(a)
    ((vectors * values.sqrt()) @ vectors.mT)[0].sum().backward()
    assert not torch.isfinite(a.grad).all()
    a.grad = None
    matrix_sqrth(a)[0].sum().backward()
    record_claim(a.grad.abs().max().item(), 0.5 + 1e-12, at_least=False)


def train(layer):
    """Train a small net on pictures of stripes; return its training loss before and after."""
    torch.manual_seed(0)
    angle = torch.rand(256) * math.pi
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    wave = angle.cos()[:, None, None] * grid[0] + angle.sin()[:, None, None] * grid[1]
    x, y = (
        (wave + torch.rand(256, 1, 1) * 6).sin()[:, None] + 0.3 * torch.randn(256, 1, 8, 8),
        (angle > math.pi / 2).long(),
    )
    net = nn.Sequential(nn.Conv2d(1, 8, 3), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (net.eval()(x).argmax(1) == y).double().mean().item()


@pytest.mark.claim("matsqrt", "accuracy of a net that whitens by Pade's quotient, less that by eigendecomposition")
def test_training_with_an_approximation_is_training(record_claim):
    exact, quick = train(ZCAWhitening2d(8, method="eigh")), train(ZCAWhitening2d(8, method="mpa"))
    assert exact > 0.8
    record_claim(abs(quick - exact), 0.02, at_least=False)


@pytest.mark.claim(
    "matsqrt", "output error of the correction over the published root's, over that without a root; rank 16"
)
def test_low_rank_needs_no_root(record_claim):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 256, generator=g, dtype=F64) * torch.logspace(0, -2, 256, dtype=F64)
    x[:, :4] *= 30
    moment, w = x.T @ x / 1024, torch.randn(192, 256, generator=g, dtype=F64)
    step = w.abs().amax(-1, keepdim=True) / 3.5
    error = w - step * (w / step).round().clamp(-4, 3)
    scale = matrix_sqrth(moment, paper=True)
    u, s, v = torch.linalg.svd(error @ scale)
    published = (u[:, :16] * s[:16]) @ torch.linalg.solve(scale, v[:16].T).T
    up, down = low_rank_correction(error, moment, 16)
    left = [torch.linalg.norm((error - c) @ matrix_sqrth(moment)).item() for c in (published, up @ down)]
    record_claim(left[0] / left[1], 1.12, "times")
