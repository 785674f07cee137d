"""Fractional operators against closed forms, their symmetries, and their gradients."""

import math

import pytest
import torch

from planish.pde import (
    ExpNonlinearity,
    FractionalLaplacian1D,
    FractionalLaplacian2D,
    PowerNonlinearity,
    RieszPotential,
    classical_constant,
)
from planish.pde.choquard import root
from planish.pde.operators import hat_moments

F64 = torch.float64


def line(half_width, step):
    return torch.linspace(-half_width, half_width, round(2 * half_width / step) + 1, dtype=F64)


# closed forms


def test_square_root_of_the_laplacian_of_a_rational_function():
    x = line(80, 0.05)
    seminorm = FractionalLaplacian1D(len(x), 0.05, s=0.5)
    made = seminorm(1 / (1 + x**2)) * classical_constant(1, 0.5) / 2
    inner = x.abs() < 20
    assert ((made - (1 - x**2) / (1 + x**2) ** 2).abs()[inner]).max() < 1e-4
    assert float(seminorm.energy(1 / (1 + x**2))) == pytest.approx(math.pi**2 / 2, abs=2e-5)


@pytest.mark.parametrize("s", [0.4, 0.5])
def test_getoor_function_has_a_constant_fractional_laplacian(s):
    x = line(1.5, 0.0025)
    made = FractionalLaplacian1D(len(x), 0.0025, s=s)((1 - x**2).clamp_min(0) ** s) * classical_constant(1, s) / 2
    assert (made[x.abs() < 0.8] - math.gamma(1 + 2 * s)).abs().max() < 1e-3


@pytest.mark.parametrize("r, value", [(2, 2 * math.pi), (3, 2.86610), (4, 1.52972)])
def test_seminorm_of_a_gaussian_converges_with_second_order(r, value):
    errors = []
    for n in (201, 401, 801):
        x = torch.linspace(-8, 8, n, dtype=F64)
        errors.append(abs(float(FractionalLaplacian1D(n, 16 / (n - 1), s=0.5, r=r).energy(torch.exp(-(x**2)))) - value))
    assert errors[-1] < 1e-4
    assert math.log2(errors[0] / errors[1]) > 1.7


def test_smooth_limit_is_the_dirichlet_energy():
    n = 3201
    x = torch.linspace(-6, 6, n, dtype=F64)
    energy = (1 - 0.99) * FractionalLaplacian1D(n, 12 / (n - 1), s=0.99).energy(torch.exp(-(x**2)))
    assert float(energy) == pytest.approx(math.sqrt(math.pi / 2), rel=0.02)


def test_riesz_potentials():
    x = line(10, 0.02)
    made = RieszPotential(len(x), 0.02, 0.5)(torch.exp(-(x**2)))
    assert float(made[len(x) // 2]) == pytest.approx(math.gamma(0.25), rel=1e-3)
    # the extremal of the Hardy-Littlewood-Sobolev inequality, whose tail beyond the box is missing by about 2 / sqrt(L)
    x = line(2000, 0.1)
    beta = math.gamma(0.25) * math.gamma(0.5) / math.gamma(0.75)
    made = RieszPotential(len(x), 0.1, 0.5)((1 + x**2) ** -0.75)
    inner = x.abs() < 5
    missing = 2 * 2 * 2000.0**-1.0 / 2  # int_L^inf t^(-1/2) t^(-3/2) dt on both sides
    assert (made + missing - beta * (1 + x**2) ** -0.25)[inner].abs().max() < 2e-3


def test_potential_in_the_plane_is_that_of_a_gaussian():
    n, step = 81, 0.2
    axis = step * (torch.arange(n, dtype=F64) - n // 2)
    f = torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2))
    made = RieszPotential(n, step, 1.0, dim=2)(f)
    assert float(made[n // 2, n // 2]) == pytest.approx(math.pi**1.5, rel=5e-3)  # 2 pi int exp(-t^2) dt


def test_seminorm_in_the_plane_is_that_of_a_gaussian():
    # [u]_2^2 = (2 / c) int |k|^(2 s) |u^|^2 dk / (2 pi)^2
    n, step, s = 64, 0.15, 0.5
    axis = step * (torch.arange(n, dtype=F64) - (n - 1) / 2)
    u = torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2))
    exact = 2 / classical_constant(2, s) * math.pi / 2 * math.gamma(1 + s) * 2**s / 1.0
    assert float(FractionalLaplacian2D(n, step, s=s).energy(u)) == pytest.approx(exact, rel=0.01)


# structure


@pytest.mark.parametrize(
    "r, s, dense", [(2, 0.5, False), (3, 0.4, False), (2.5, 0.7, False), (4, 0.5, False), (4, 0.5, True)]
)
def test_operator_is_the_gradient_of_the_energy(r, s, dense):
    u = torch.randn(24, dtype=F64, requires_grad=True)
    seminorm = FractionalLaplacian1D(24, 0.3, s=s, r=r, dense=dense)
    (g,) = torch.autograd.grad(seminorm.energy(u), u)
    assert torch.allclose(g / (r * 0.3), seminorm(u.detach()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("r", [2, 4, 6])
def test_operator_in_the_plane_is_the_gradient_of_its_energy(r):
    u = torch.randn(9, 9, dtype=F64, requires_grad=True)
    seminorm = FractionalLaplacian2D(9, 0.3, s=0.5, r=r)
    (g,) = torch.autograd.grad(seminorm.energy(u), u)
    scale = g.abs().max()
    assert torch.allclose(g / (r * 0.09), seminorm(u.detach()), rtol=1e-9, atol=float(1e-11 * scale))


def test_gradcheck():
    u = torch.randn(8, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(FractionalLaplacian1D(8, 0.5, s=0.5, r=4), (u,))
    assert torch.autograd.gradcheck(FractionalLaplacian1D(8, 0.5, s=0.5, r=3), (u,))
    assert torch.autograd.gradcheck(RieszPotential(8, 0.5, 0.5), (u,))
    v = torch.randn(5, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(FractionalLaplacian2D(5, 0.5, s=0.5, r=4), (v,))


@pytest.mark.parametrize("r", [2, 4, 6])
def test_fourier_and_dense_sums_agree(r):
    u = torch.randn(3, 201, dtype=F64)
    fast, dense = (FractionalLaplacian1D(201, 0.1, s=0.5, r=r, dense=d) for d in (False, True))
    assert torch.allclose(fast(u), dense(u), rtol=0, atol=1e-11 * float(dense(u).abs().max()))
    assert torch.allclose(fast.energy(u), dense.energy(u), rtol=1e-11)


@pytest.mark.parametrize("r", [2, 3, 4])
def test_symmetries_and_homogeneity(r):
    u, seminorm = torch.randn(40, dtype=F64), FractionalLaplacian1D(40, 0.2, s=0.45, r=r)
    energy = seminorm.energy(u)
    assert torch.allclose(seminorm.energy(-u), energy) and torch.allclose(seminorm.energy(u.flip(0)), energy)
    assert torch.allclose(seminorm.energy(3 * u), 3.0**r * energy)
    assert torch.allclose(seminorm(-u), -seminorm(u))


def test_a_wider_box_changes_nothing_for_what_vanishes_outside():
    u = torch.zeros(120, dtype=F64)
    u[40:80] = torch.randn(40, dtype=F64)
    for r in (2, 3):
        narrow = FractionalLaplacian1D(40, 0.1, s=0.5, r=r).energy(u[40:80])
        wide = FractionalLaplacian1D(120, 0.1, s=0.5, r=r).energy(u)
        assert float(narrow) == pytest.approx(float(wide), rel=2e-3)  # hats against exact tails


def test_moments_by_differences_and_by_series_agree():
    made = hat_moments(140, 0.1, 0.35)
    k = torch.arange(1, 141, dtype=F64)
    nodes = torch.linspace(0, 1, 2001, dtype=F64)
    for i in (0, 97, 98, 99, 100, 139):
        z = 0.1 * (k[i] + torch.cat([-nodes.flip(0), nodes[1:]]))
        hat = 1 - (z / 0.1 - k[i]).abs()
        assert torch.trapezoid(hat * z**0.35, z) == pytest.approx(float(made[i]), rel=1e-6)


@pytest.mark.parametrize(
    "f", [PowerNonlinearity(2), PowerNonlinearity(3.5), ExpNonlinearity(), ExpNonlinearity(terms=3, exponent=4 / 3)]
)
def test_nonlinearities_are_derivatives_of_their_primitives(f):
    t = torch.cat([torch.linspace(-1, 3, 81, dtype=F64), torch.tensor([1e-3, 0.547, 0.5477, 0.548], dtype=F64)])
    t.requires_grad_(True)
    (g,) = torch.autograd.grad(f.primitive(t).sum(), t)
    assert torch.allclose(g, f(t.detach()), rtol=1e-9, atol=1e-300)
    assert (f(t.detach())[t < 0] == 0).all() and (f.primitive(t.detach())[t < 0] == 0).all()


def test_exponential_less_its_first_terms_does_not_cancel():
    t = torch.tensor([1e-4], dtype=F64)
    assert float(ExpNonlinearity(amplitude=1.0).primitive(t)) == pytest.approx(1e-16 / 2, rel=1e-6)  # y^2 / 2, y = t^2
    assert torch.isfinite(ExpNonlinearity().primitive(torch.tensor([1e3], dtype=F64))).all()


def test_root_finder():
    assert root(lambda x: x**3 - 2, 0, 2) == pytest.approx(2 ** (1 / 3), abs=1e-14)
    assert root(lambda x: math.log(x) if x > 0 else -math.inf, -1, 5) == pytest.approx(1, abs=1e-13)
    assert root(lambda x: x, 0, 1) == 0
