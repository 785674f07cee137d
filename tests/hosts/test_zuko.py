"""Smooth maps inside zuko's autoregressive flows, and zuko's splines beside our baseline."""

import math

import pytest
import torch

zuko = pytest.importorskip("zuko")

from planish.flows import (  # noqa: E402
    ImplicitInverse,
    SmoothCircularTransform,
    SmoothFlow,
    SmoothIntervalTransform,
    SplineIntervalTransform,
)

F64 = torch.float64


@pytest.mark.parametrize("univariate", [SmoothIntervalTransform, SmoothCircularTransform])
def test_a_smooth_autoregressive_flow(univariate):
    torch.manual_seed(0)
    flow = zuko.flows.MAF(2, 1, transforms=2, univariate=univariate, shapes=[(5,)] * 5, activation=torch.nn.SiLU)
    flow.base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.BoxUniform, lower=torch.zeros(2), upper=torch.ones(2) + 1e-5, buffer=True
    )
    flow = flow.double()
    density = flow(torch.tensor([0.3], dtype=F64))
    x, log_prob = density.rsample_and_log_prob((50,))
    assert (density.log_prob(x) - log_prob).abs().max() < 1e-10
    nodes = (torch.arange(200, dtype=F64) + 0.5) / 200
    mass = density.log_prob(torch.cartesian_prod(nodes, nodes)).exp().mean().item()
    assert mass == pytest.approx(1, abs=1e-3)
    log_prob.mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.parameters())
    assert "components=5" in repr(flow.transform)


def test_our_inverse_has_second_derivatives_where_zukos_has_none():
    theta = torch.tensor(0.5, dtype=F64, requires_grad=True)
    f = lambda x: theta * x + x**3  # noqa: E731
    y = torch.tensor(0.7, dtype=F64, requires_grad=True)
    theirs = zuko.utils.bisection(f, y, -2.0, 2.0, n=50, phi=(theta,))
    ours = ImplicitInverse(f, (-2.0, 2.0))(y)
    assert (theirs - ours).abs() < 1e-13
    slopes = [torch.autograd.grad(x, (y, theta), create_graph=True) for x in (theirs, ours)]
    assert all((a - b).abs() < 1e-12 for a, b in zip(*slopes, strict=True))
    assert torch.isfinite(torch.autograd.grad(slopes[1][0], y)[0])
    assert not slopes[0][0].requires_grad  # forces of a density that went through it would train nothing


def test_our_spline_is_theirs():
    raw = [torch.linspace(-1, 1, n, dtype=F64) for n in (4, 4, 3)]
    theirs = zuko.transforms.MonotonicRQSTransform(*raw, bound=1.0)
    ours = SplineIntervalTransform(torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64), torch.zeros(5, dtype=F64))
    ours.x, ours.y = (knots / 2 + 0.5 for knots in (theirs.horizontal, theirs.vertical))
    ours.d = theirs.derivatives
    x = torch.linspace(-0.999, 0.999, 201, dtype=F64)
    value, slope = ours.value_and_slope(x / 2 + 0.5)
    assert (2 * value - 1 - theirs(x)).abs().max() < 1e-13
    assert (slope.log() - theirs.log_abs_det_jacobian(x, theirs(x))).abs().max() < 1e-12
    assert (ours.solve(x / 2 + 0.5) * 2 - 1 - theirs.inv(x)).abs().max() < 1e-12


def test_a_flow_reads_angles_as_zukos_circular_splines_do():
    angles = torch.rand(6, 2, dtype=F64) * 2 * math.pi - math.pi
    flow = SmoothFlow(2, periodic=True, low=-math.pi, high=math.pi).double()
    theirs = zuko.flows.NCSF(2).double()
    assert flow().log_prob(angles).shape == theirs().log_prob(angles).shape
    assert flow().support.check(theirs().sample((5,)).double()).all()
