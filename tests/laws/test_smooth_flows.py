"""Smooth maps of intervals and circles, their inverses and densities: the equations they must satisfy."""

import itertools
import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from planish.flows import (
    Bumps,
    ImplicitInverse,
    SmoothCircularTransform,
    SmoothFlow,
    SmoothIntervalTransform,
    SplineCircularTransform,
    SplineIntervalTransform,
    force_matching_loss,
    simulate_nve,
    smooth_step,
    unimodal_alpha,
)

F64 = torch.float64
SMOOTH = (SmoothIntervalTransform, SmoothCircularTransform)
ALL = (*SMOOTH, SplineIntervalTransform, SplineCircularTransform)
K = 6


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def raw_of(cls, *batch, seed=0, spread=1.5):
    sizes = {SplineIntervalTransform: (K, K, K + 1), SplineCircularTransform: (K,) * 3}.get(cls, (K,) * 5)
    g = source(seed)
    return [spread * torch.randn(*batch, n, generator=g, dtype=F64) for n in sizes]


def derivatives(f, x, order):
    """Return f and its derivatives at x, one list."""
    found = [f(x)]
    for _ in range(order):
        found.append(grad(found[-1].sum(), x, create_graph=True)[0])
    return found


# steps


@pytest.mark.parametrize("beta", [0.5, 1, 1.5, 2])
def test_a_step_is_symmetric_and_flat_at_both_ends(beta):
    x = torch.linspace(-0.5, 1.5, 401, dtype=F64, requires_grad=True)
    value, slope = smooth_step(x, 1.7, beta)
    assert (value + smooth_step(1 - x, 1.7, beta)[0] - 1).abs().max() < 1e-14
    assert (grad(value.sum(), x, create_graph=True)[0] - slope).abs().max() < 1e-12
    assert (value.diff() >= 0).all()
    ends = torch.tensor([-1.0, 0.0, 1e-4, 1 - 1e-4, 1.0, 2.0], dtype=F64, requires_grad=True)
    expected = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=F64)
    here = derivatives(lambda x: smooth_step(x, 1.7, beta)[0], ends, 4)
    assert (here[0] - expected).abs().max() < 1e-20
    assert all(d.abs().max() < 1e-12 for d in here[1:])
    assert all(torch.isfinite(d).all() for d in here)


def test_a_step_is_the_quotient_of_ramps():
    x = torch.linspace(0.05, 0.95, 91, dtype=F64)
    ramp, back = (torch.exp(2.5 * (1 - t**-2)) for t in (x, 1 - x))
    assert (smooth_step(x, 2.5, 2)[0] - ramp / (ramp + back)).abs().max() < 1e-15


@pytest.mark.parametrize("beta", [0.5, 1, 2])
def test_a_bump_has_one_maximum_from_the_stated_alpha_on(beta):
    x = torch.linspace(0.1, 0.9, 20001, dtype=F64)
    for factor, maxima in ((1.0005, 1), (0.9995, 2), (0.9, 2)):
        rises = smooth_step(x, factor * unimodal_alpha(beta), beta)[1].log().diff()
        turns = rises[rises.abs() > 1e-14].sign().diff().ne(0).sum()
        assert turns == 2 * maxima - 1


# maps


@pytest.mark.parametrize("cls", ALL)
def test_a_map_keeps_the_ends_rises_and_has_the_slope_it_says(cls):
    transform = cls(*raw_of(cls, 3), low=-2, high=1)
    x = torch.linspace(-2, 1, 301, dtype=F64)[:, None].expand(301, 3).clone().requires_grad_()
    y, ladj = transform.call_and_ladj(x)
    assert (y[0] + 2).abs().max() < 1e-14 and (y[-1] - 1).abs().max() < 1e-14
    assert (y.diff(dim=0) > 0).all()
    assert (grad(y.sum(), x)[0].log() - ladj).abs().max() < 1e-10
    assert torch.equal(transform.log_abs_det_jacobian(x, y), ladj) and torch.equal(transform(x), y)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_map_and_its_inverse_undo_each_other(cls, dtype):
    eps = torch.finfo(dtype).eps * (1 if cls in SMOOTH else 20)  # the root of a quadratic equation cancels
    transform = cls(*(r.to(dtype) for r in raw_of(cls, 5)), low=-1, high=3)
    x = torch.rand(200, 5, generator=source(), dtype=dtype) * 4 - 1
    y = transform(x)
    assert (transform(transform.inv(x)) - x).abs().max() < 30 * eps
    assert (transform.inv(y) - x).abs().max() < 5e3 * eps  # x is as uncertain as the least slope lets it be
    ends = torch.tensor([[-1.0], [3.0]], dtype=dtype)
    assert (transform.inv(ends) - ends).abs().max() < 5e3 * eps


@pytest.mark.parametrize("floor", [1e-3, 0.3])
@pytest.mark.parametrize("cls", SMOOTH)
def test_the_floor_bounds_the_slope(cls, floor):
    transform = cls(*raw_of(cls, 4, spread=8), floor=floor)
    slope = transform.value_and_slope(torch.linspace(0, 1, 2001, dtype=F64)[:, None])[1]
    assert slope.min() >= floor * (1 - 1e-12)
    assert slope.min() < 2 * floor  # and is met where no bump is


def test_every_derivative_agrees_at_the_seam_of_a_circle():
    transform = SmoothCircularTransform(*raw_of(SmoothCircularTransform, 7))
    ends = torch.tensor([[0.0], [1.0], [-3.0]], dtype=F64).expand(3, 7).clone().requires_grad_()
    value, *rest = derivatives(lambda x: transform.value_and_slope(x)[0], ends, 4)
    assert (value[1] - value[0] - 1).abs().max() < 1e-14 and (value[2] - value[0] + 3).abs().max() < 1e-13
    for d in rest:
        scale = d.abs().max()
        assert (d[1] - d[0]).abs().max() < 1e-10 * scale and (d[2] - d[0]).abs().max() < 1e-9 * scale


@pytest.mark.parametrize(("cls", "spectral"), [(SmoothCircularTransform, True), (SplineCircularTransform, False)])
def test_a_sum_over_a_circle_converges_as_fast_as_the_density_is_smooth(cls, spectral):
    transform = cls(*raw_of(cls, spread=0.7))
    errors = []
    for n in (16, 32, 64, 128, 256):
        x = torch.arange(n, dtype=F64) / n
        errors.append(abs(float(transform.value_and_slope(x)[1].mean()) - 1))
    assert (errors[-1] < 1e-9) is spectral
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("cls", ALL)
def test_the_force_jumps_at_knots_of_splines_alone(cls):
    transform = cls(*raw_of(cls, spread=0.7))
    if cls in SMOOTH:
        bumps = transform.bumps
        half = 0.5 / bumps.scale
        knots = torch.cat([bumps.center - half, bumps.center + half, torch.tensor([0.3], dtype=F64)]).remainder(1)
    else:
        knots = transform.x[1:-1]
    eps = 1e-7
    sides = torch.stack([knots - eps, knots + eps]).clamp(0, 1).requires_grad_()
    force = grad(transform.value_and_slope(sides)[1].log().sum(), sides)[0]
    jumps = (force[1] - force[0]).abs()
    assert (jumps.max() < 1e-3) if cls in SMOOTH else (jumps.min() > 1e-2)


@pytest.mark.parametrize("cls", SMOOTH)
def test_parameters_given_are_those_of_the_formula(cls):
    one = torch.ones(1, dtype=F64)
    x = torch.linspace(0, 1, 101, dtype=F64)
    alone = cls.of(Bumps(one, 0.5 * one, 2 * one, 1.5 * one, 0.1 * one))
    formula = 0.9 * smooth_step(2 * (x - 0.5) + 0.5, 1.5)[0] + 0.1 * x
    assert (alone(x) - formula).abs().max() < 1e-15
    two = cls.of(Bumps(torch.tensor([0.25, 0.75], dtype=F64), 0.5 * one, 2 * one, 1.5 * one, 0.1 * one))
    assert (two(x) - formula).abs().max() < 1e-15


def test_a_bump_over_the_seam_is_one_bump():
    one = torch.ones(1, dtype=F64)
    x = torch.arange(100, dtype=F64) / 100

    def slope(center):
        bumps = Bumps(one, center * one, 2 * one, 1.5 * one, 0.1 * one)
        return SmoothCircularTransform.of(bumps).value_and_slope(x)[1]

    assert (slope(0.5).roll(50) - slope(0.0)).abs().max() < 1e-12
    assert (slope(0.5).roll(45) - slope(0.95)).abs().max() < 1e-12


# inverses


@pytest.mark.parametrize("f", [torch.exp, lambda x: x**3 + x, lambda x: -x.sinh()], ids=["exp", "cubic", "falling"])
def test_derivatives_of_an_inverse_are_exact_to_the_order_of_its_steps(f):
    y = f(torch.tensor([-0.9, 0.2, 1.3], dtype=F64)).requires_grad_()
    exact = {"exp": torch.log}.get(getattr(f, "__name__", ""))
    for steps in (1, 2):
        inverse = ImplicitInverse(f, (-2.0, 2.0), newton_steps=steps)
        found = derivatives(inverse, y, 2**steps - 1)
        assert (f(found[0]) - y).abs().max() < 1e-13
        x = found[0].detach().requires_grad_()
        _, d1, d2, d3 = derivatives(f, x, 3)
        expected = [1 / d1, -d2 / d1**3, 3 * d2**2 / d1**5 - d3 / d1**4]
        for got, want in zip(found[1:], expected, strict=False):
            assert (got - want).abs().max() < 1e-11
        if exact is not None:
            assert (found[0] - exact(y)).abs().max() < 1e-14
    one = derivatives(ImplicitInverse(f, (-2.0, 2.0), newton_steps=1), y, 1)[1]
    assert grad(one.sum(), y, allow_unused=True)[0] is None  # one step is linear in y


def test_the_gradient_of_an_inverse_is_that_of_the_formula():
    theta = torch.tensor([0.4, 1.2], dtype=F64, requires_grad=True)
    y = torch.tensor([0.3, 2.0], dtype=F64, requires_grad=True)
    gx, gl = torch.tensor([0.7, -1.1], dtype=F64), torch.tensor([-0.2, 0.5], dtype=F64)
    x, ladj = ImplicitInverse(lambda x: theta * x + x**3, (-3.0, 3.0)).call_and_ladj(y)
    made = grad((gx * x + gl * ladj).sum(), (y, theta))
    slope, second = theta + 3 * x**2, 6 * x
    inner = gx / slope - gl * second / slope**2
    assert (made[0] - inner).abs().max() < 1e-13
    assert (made[1] - (-x * inner - gl / slope)).abs().max() < 1e-13


@pytest.mark.parametrize("cls", SMOOTH)
def test_gradients_of_second_order_through_a_transform_and_its_inverse(cls):
    raw = [r[..., :2].clone().requires_grad_() for r in raw_of(cls, 2)]
    y = torch.tensor([0.3, 0.77], dtype=F64, requires_grad=True)

    def both(y, *raw):
        transform = cls(*raw)
        x = transform.inv(y)
        return x, transform.log_abs_det_jacobian(x, y)

    assert gradcheck(both, (y, *raw)) and gradgradcheck(both, (y, *raw))
    assert gradgradcheck(lambda y, *raw: cls(*raw).call_and_ladj(y), (y, *raw))


@pytest.mark.parametrize("bins", [2, 7, 100])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_number_of_bins_changes_no_root(bins, dtype):
    transform = SmoothIntervalTransform(*(r.to(dtype) for r in raw_of(SmoothIntervalTransform, spread=4)))
    y = torch.cat([torch.rand(300, generator=source(), dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)])
    x = ImplicitInverse(transform.value_and_slope, (0.0, 1.0), bins=bins)(y)
    assert (transform(x) - y).abs().max() <= 8 * torch.finfo(dtype).eps


def test_an_inverse_of_a_fixed_number_of_steps_compiles_into_vmap():
    inverse = ImplicitInverse(lambda x: (x**3 + x, 3 * x**2 + 1), (-2.0, 2.0), validate=False, steps=6)
    y = torch.linspace(-3, 3, 12, dtype=F64).reshape(3, 4)
    assert torch.equal(torch.func.vmap(inverse)(y), inverse(y))
    assert (inverse(y) - ImplicitInverse(lambda x: x**3 + x, (-2.0, 2.0))(y)).abs().max() < 1e-14


# flows


def flow_of(periodic, univariate="smooth", context=0, features=2, **kind):
    kind = {"components": 4, "hidden_features": (8,), "generator": source(), **kind}
    return SmoothFlow(features, context, periodic=periodic, univariate=univariate, **kind).double()


@pytest.mark.parametrize("univariate", ["smooth", "spline"])
@pytest.mark.parametrize("periodic", [True, False, [True, False]], ids=["torus", "square", "cylinder"])
def test_a_density_integrates_to_one(periodic, univariate):
    flow = flow_of(periodic, univariate, low=(-1, 0), high=(2, 0.5))
    axes, weights = [], []
    for low, high, around in zip((-1, 0), (2, 0.5), flow.periodic, strict=True):
        if around:  # the rule of trapezia converges spectrally
            axes.append(low + (high - low) * torch.arange(160, dtype=F64) / 160)
            weights.append(torch.full((160,), (high - low) / 160, dtype=F64))
        else:
            nodes, node_weights = (torch.from_numpy(a) for a in __import__("numpy").polynomial.legendre.leggauss(120))
            axes.append(low + (high - low) * (nodes + 1) / 2)
            weights.append(node_weights * (high - low) / 2)
    at = torch.cartesian_prod(*axes)
    mass = (flow().log_prob(at).detach().exp() * (weights[0][:, None] * weights[1]).flatten()).sum()
    assert float(mass) == pytest.approx(1, abs=1e-6 if univariate == "smooth" else 2e-3)


@pytest.mark.parametrize("features", [1, 2, 3, 5])
@pytest.mark.parametrize("univariate", ["smooth", "spline"])
def test_samples_carry_their_own_density(features, univariate):
    periodic = [i % 2 == 0 for i in range(features)]
    flow = flow_of(periodic, univariate, context=2, features=features, low=-1, high=1.5)
    density = flow(torch.randn(3, 2, generator=source(1), dtype=F64))
    x, log_prob = density.rsample_and_log_prob((40,), source(2))
    assert x.shape == (40, 3, features) and log_prob.shape == (40, 3)
    assert (density.log_prob(x) - log_prob).abs().max() < 1e-10
    assert density.support.check(x).all() and (x >= -1).all() and (x <= 1.5).all()
    assert torch.equal(x, density.rsample((40,), source(2)))
    noise = flow.to_noise(x, density.context.expand(40, 3, 2))[0]
    again = torch.rand(40, 3, features, generator=source(2), dtype=F64)
    apart = noise - again
    assert (apart - apart.round() * torch.tensor(periodic)).abs().max() < 1e-11


def test_a_torus_has_no_seam():
    flow = flow_of(True, low=-math.pi, high=math.pi)
    x = torch.rand(20, 2, generator=source(), dtype=F64) * 6 - 3
    for turn in itertools.product((-1, 0, 2), (0, 1)):
        moved = x + 2 * math.pi * torch.tensor(turn, dtype=F64)
        assert (flow().log_prob(moved) - flow().log_prob(x)).abs().max() < 1e-11
        assert (flow().force(moved) - flow().force(x)).abs().max() < 1e-9


def test_the_third_derivative_of_a_log_density_is_finite_everywhere():
    flow = flow_of([True, False])
    x = torch.cartesian_prod(*[torch.linspace(0, 1, 41, dtype=F64)] * 2).requires_grad_()
    for d in derivatives(flow().log_prob, x, 3)[1:]:
        assert torch.isfinite(d).all()


def test_force_is_the_gradient_of_the_log_density():
    flow = flow_of([True, False])
    x = torch.rand(6, 2, generator=source(), dtype=F64)
    eps = 1e-5 * torch.eye(2, dtype=F64)
    numeric = torch.stack([(flow().log_prob(x + e) - flow().log_prob(x - e)) / 2e-5 for e in eps], -1)
    assert (flow().force(x) - numeric).abs().max() < 1e-5
    assert torch.equal(flow().energy(x), -flow().log_prob(x))


def test_gradients_through_samples_reach_the_network_and_the_context():
    flow = flow_of([True, False], context=1, components=2, hidden_features=(3,), transforms=2)
    context = torch.tensor([[0.3]], dtype=F64, requires_grad=True)
    parameter = flow.layers[0].conditioner[0].weight

    def draw(context, weight):
        return torch.func.functional_call(Sampled(flow), {"flow.layers.0.conditioner.0.weight": weight}, (context,))

    weight = parameter.detach().clone().requires_grad_()
    assert gradcheck(draw, (context, weight)) and gradgradcheck(draw, (context, weight))
    assert grad(draw(context, weight)[0].sum(), context)[0].abs() > 1e-4


class Sampled(torch.nn.Module):
    """What a flow's samples are, as a module to call with other parameters."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, context):
        return self.flow(context).rsample_and_log_prob((2,), source(3))


@pytest.mark.parametrize("force_weight", [0.0, 0.3])
def test_the_loss_is_the_mean_that_its_weights_say_and_differentiates(force_weight):
    flow = flow_of(True, components=2, hidden_features=(3,), transforms=2)
    x, forces = (torch.rand(5, 2, generator=source(s), dtype=F64) for s in (0, 1))
    target = lambda x: (2 * math.pi * x).cos().sum(-1)  # noqa: E731
    kind = {"nll_weight": 0.5, "force_weight": force_weight, "kl_weight": 0.2, "energy": target, "n_samples": 8}
    loss = force_matching_loss(flow(), x, forces, **kind, generator=source(4))
    nll, force_mse = -flow().log_prob(x).mean(), (flow().force(x) - forces).square().mean()
    drawn, log_q = flow().rsample_and_log_prob((8,), source(4))
    kl = (target(drawn) + log_q).mean()
    expected = (0.5 * nll + force_weight * force_mse + 0.2 * kl) / (0.7 + force_weight)
    assert loss.total.item() == pytest.approx(expected.item(), abs=1e-12)
    assert loss.nll.item() == pytest.approx(nll.item(), abs=1e-12)
    parameter = flow.layers[0].conditioner[2].bias
    (slope,) = grad(loss.total, parameter)
    for i in (0, 7):
        with torch.no_grad():
            values = []
            for change in (1e-5, -2e-5):
                parameter[i] += change
                values.append(force_matching_loss(flow(), x, forces, **kind, generator=source(4)).total.item())
            parameter[i] += 1e-5
        assert slope[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


# dynamics


def test_verlet_is_of_second_order_and_reversible():
    energy = lambda x: (x.square().sum(-1) + x[..., 0] ** 4) / 2  # noqa: E731
    x, v = torch.tensor([[1.0, 0.2]], dtype=F64), torch.tensor([[0.0, 0.5]], dtype=F64)
    drifts = [float(simulate_nve(energy, x, v, step=h, n_steps=round(4 / h)).drift()) for h in (0.02, 0.01)]
    assert drifts[0] / drifts[1] == pytest.approx(4, rel=0.05)
    there = simulate_nve(energy, x, v, step=0.01, n_steps=300, mass=2.0, every=100)
    back = simulate_nve(energy, there.positions[-1], -there.velocities[-1], step=0.01, n_steps=300, mass=2.0)
    assert there.positions.shape == (4, 1, 2)
    assert (back.positions[-1] - x).abs().max() < 1e-12 and (back.velocities[-1] + v).abs().max() < 1e-12
