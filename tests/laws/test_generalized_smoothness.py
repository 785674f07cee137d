"""The bounds of generalized smoothness hold on functions whose constants are known, and are used as they say."""

import math

import pytest
import torch

from planish.optim import GeneralizedSmoothness, NormalizedGD, PenalizedDRO, PhaseRetrieval
from planish.optim.problems import regression_loss

x = torch.linspace(-3, 3, 241, dtype=torch.float64)


def power(k):
    a = (k - 2) / (k - 1)
    return GeneralizedSmoothness(a, 0.0, k * (k - 1) / k**a)


# |x|^k: |f''| = k(k-1)|x|^(k-2) = k(k-1)/k^alpha |f'|^alpha; cosh: f''^2 = 1 + f'^2; sin 3x + x^4: 9 more
FUNCTIONS = {
    "x^4": (lambda x: x**4, power(4)),
    "|x|^3": (lambda x: x.abs() ** 3, power(3)),
    "x^6": (lambda x: x**6, power(6)),
    "cosh": (torch.cosh, GeneralizedSmoothness(1.0, 1.0, 1.0)),
    "exp": (torch.exp, GeneralizedSmoothness(1.0, 0.0, 1.0)),
    "square": (lambda x: 3 * x**2, GeneralizedSmoothness(0.0, 6.0, 0.0)),
    # |f''| <= 12 x^2 + 9 and |f'|^(2/3) >= |4|x|^3 - 3|^(2/3) >= 4^(2/3) x^2 - 3^(2/3)
    "sin 3x + x^4": (
        lambda x: torch.sin(3 * x) + x**4,
        GeneralizedSmoothness(2 / 3, 9 + 12 * (3 / 4) ** (2 / 3), 12 / 4 ** (2 / 3)),
    ),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def slopes(function):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@functions
def test_the_two_bounds_hold_on_a_grid(name):
    function, known = FUNCTIONS[name]
    f, g = function(x), slopes(function)
    for i in range(0, len(x), 4):
        for j in range(0, len(x), 3):
            d, size = abs(float(x[j] - x[i])), abs(float(g[i]))
            slope = float(g[i] * (x[j] - x[i]))
            scale = 1e-12 * (1 + abs(float(f[i])) + abs(float(f[j])) + abs(slope))
            assert abs(float(g[j] - g[i])) <= known.lipschitz_bound(size, d) + scale
            assert float(f[j]) <= known.descent_bound(float(f[i]), slope, size, d) + scale


@functions
def test_the_bounds_can_be_wrong(name):
    function, known = FUNCTIONS[name]
    f, g = function(x), slopes(function)
    tenth = GeneralizedSmoothness(known.alpha, known.L0 / 50, known.L1 / 50)
    over = [
        abs(float(g[j] - g[i])) > tenth.lipschitz_bound(abs(float(g[i])), abs(float(x[j] - x[i])))
        for i in range(0, len(x), 8)
        for j in range(0, len(x), 6)
    ]
    assert any(over) and f.isfinite().all()


def test_the_bounds_hold_for_polynomials_of_several_variables():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 5):
        a = torch.rand(n, dtype=torch.float64, generator=generator) + 0.5

        def function(w, a=a):
            return (a * w**4).sum(-1)

        # the Hessian's norm is max 12 a w^2 <= 12 max(a^(1/3)) |g|^(2/3) / 4^(2/3)
        known = GeneralizedSmoothness(2 / 3, 0.0, 12 / 4 ** (2 / 3) * float(a.max()) ** (1 / 3))
        for _ in range(200):
            w, v = torch.randn(2, n, dtype=torch.float64, generator=generator)
            gw, gv = 4 * a * w**3, 4 * a * v**3
            d, size, slope = float((v - w).norm()), float(gw.norm()), float(gw @ (v - w))
            assert float((gv - gw).norm()) <= known.lipschitz_bound(size, d) * (1 + 1e-12)
            assert float(function(v)) <= known.descent_bound(float(function(w)), slope, size, d) + 1e-12


@functions
@pytest.mark.parametrize("g", [1e-6, 0.3, 10.0, 1e6])
def test_the_length_is_where_the_guarantee_is_greatest(name, g):
    known = FUNCTIONS[name][1]
    s = known.step_length(g)
    best = known.descent_bound(0.0, -g * s, g, s)
    assert 0 < s and best < 0
    for factor in (0.5, 0.99, 1.01, 2.0):
        t = s * factor
        assert known.descent_bound(0.0, -g * t, g, t) >= best * (1 + 1e-12)
    assert known.step_length(0.0) == 0.0


def descend(start, eps, lr, beta, known):
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = NormalizedGD([w], lr, beta, smoothness=known)
    for taken in range(10_000):
        w.grad = 4 * w.detach() ** 3
        if abs(float(w.grad)) <= eps:
            return taken
        before = float(w.detach()) ** 4
        optimizer.step()
        assert float(w.detach()) ** 4 <= before
    return math.inf


def test_iterations_on_a_quartic_are_those_of_the_sheet():
    known = power(4)
    theory = descend(5.0, 0.1, known.stepsize(0.1), known.alpha, known)
    automatic = [descend(5.0, eps, "auto", 1.0, known) for eps in (1e-1, 1e-2, 1e-3)]
    assert theory == 1251 <= known.iterations(0.1, 625.0)
    assert automatic == [44, 56, 68]


def test_the_paper_s_step_is_at_least_twelve_times_shorter_and_exponentials_have_one():
    known = power(4)
    K = known.K0 + known.K1 + 2 * known.K2
    assert known.stepsize(0.1, rule="paper") == pytest.approx(0.1 ** (2 / 3) / (12 * K + 1))
    assert known.stepsize(0.1) >= 12 * known.stepsize(0.1, rule="paper")
    cosh = GeneralizedSmoothness(1.0, 1.0, 1.0)
    assert cosh.stepsize(0.1) == pytest.approx(0.1 / (math.e * 1.1))
    assert (cosh.K0, cosh.K1, cosh.K2) == (1.0, 1.0, 0.0)
    smooth = GeneralizedSmoothness(0.0, 2.0, 3.0)
    assert (smooth.K0, smooth.K1, smooth.K2) == (5.0, 0.0, 0.0) and smooth.step_length(10.0) == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["x^4", "x^6", "square", "|x|^3"])
def test_constants_are_found_from_gradients(name):
    function, known = FUNCTIONS[name]
    points = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    found = GeneralizedSmoothness.estimate(lambda w: function(w).sum(), points, known.alpha)
    # a neighbour is beyond the outermost point, so the quotient may be a ten-thousandth larger
    assert found.L0 == pytest.approx(known.L0, rel=1e-3, abs=1e-2)
    assert found.L1 == pytest.approx(known.L1, rel=1e-2)


def test_an_estimate_lies_above_every_quotient_and_touches_one():
    problem = PhaseRetrieval.random(200, 6, generator=torch.Generator().manual_seed(1))
    points = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    found = GeneralizedSmoothness.estimate(problem.at, points, 2 / 3)
    g = torch.func.vmap(torch.func.grad(problem.at))(points)
    i, j = torch.triu_indices(30, 30, 1)
    quotient = (g[i] - g[j]).norm(dim=1) / (points[i] - points[j]).norm(dim=1)
    above = found.L0 + found.L1 * torch.maximum(g.norm(dim=1)[i], g.norm(dim=1)[j]) ** (2 / 3)
    assert bool((above >= quotient * (1 - 1e-12)).all())
    # the largest curvature at each point is below the curve, too: the neighbours were chosen to show it
    curvature = torch.stack([torch.func.jacrev(torch.func.grad(problem.at))(z) for z in points])
    largest = torch.linalg.eigvalsh(curvature)[:, -1]
    assert bool((found.L0 + found.L1 * g.norm(dim=1) ** (2 / 3) >= 0.9 * largest).all())


@pytest.mark.parametrize("divergence", ["chi2", "kl", "cvar"])
def test_the_robust_value_is_the_least_over_eta(divergence):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    start = torch.randn(3, dtype=torch.float64, generator=generator)
    problem = PenalizedDRO(x, x.sum(1), divergence, penalty=0.5, start=start)
    losses = regression_loss(start, problem.x, problem.y)
    best = problem.robust()
    seen = []
    for eta in torch.linspace(float(losses.min()), float(losses.max()), 2001, dtype=torch.float64):
        problem.eta.data = eta
        seen.append(float(problem().detach()))
    assert best <= min(seen) and best == pytest.approx(min(seen), abs=1e-4)
    assert float(losses.mean()) <= best <= float(losses.max())  # between the mean and the worst
    if divergence == "kl":
        assert best == pytest.approx(0.5 * float(torch.logsumexp(losses / 0.5, 0) - math.log(40)), rel=1e-9)
    assert torch.autograd.gradcheck(lambda w, eta: problem._dual(problem.loss(w, x, problem.y), eta), (
        start.requires_grad_(), losses.detach().mean().requires_grad_()))  # fmt: skip


def test_the_gradient_of_phase_retrieval_is_twice_the_official_one():
    problem = PhaseRetrieval.random(50, 4, generator=torch.Generator().manual_seed(0))
    problem().backward()
    p = problem.a @ problem.z.detach()
    official = problem.a.T @ ((p**2 - problem.y) * p) / 50
    assert torch.allclose(problem.z.grad, 2 * official)
