"""What flows refuse, and how their parts behave at edges."""

import math
import re

import pytest
import torch

from planish._support import MissingExtra, NotConverged
from planish.flows import (
    Bumps,
    FlowPotential,
    ImplicitInverse,
    SmoothCircularTransform,
    SmoothFlow,
    SmoothIntervalTransform,
    SplineCircularTransform,
    SplineIntervalTransform,
    dihedrals,
    force_matching_loss,
    simulate_nve,
    smooth_step,
    unimodal_alpha,
)

F64 = torch.float64
ONE = torch.ones(1, dtype=F64)
X = torch.full((3, 2), 0.5)


def small(features=2, context=0, **kind):
    return SmoothFlow(features, context, components=2, transforms=2, hidden_features=(4,), **kind)


def bumps(**changed):
    return Bumps(**{"weight": ONE, "center": ONE / 2, "scale": 2 * ONE, "alpha": ONE, "floor": ONE / 10, **changed})


def raw(n=5):
    return [torch.zeros(3)] * n


def cube(x):
    return x**3


def loss(**changed):
    given = {"x": X, "forces": torch.zeros(3, 2), **changed}
    return force_matching_loss(small()(), given.pop("x"), given.pop("forces"), **given)


def nve(**changed):
    given = {"x": X, "v": X, "step": 0.1, "n_steps": 1, **changed}
    return simulate_nve(lambda x: x.sum(-1), given.pop("x"), given.pop("v"), **given)


NAN = torch.tensor([[0.5, math.nan]])
REFUSED = [
    (lambda: unimodal_alpha(3), "unimodal_alpha: `beta` must be in [0.5, 2]; got 3."),
    (lambda: smooth_step(X, beta=0.1), "smooth_step: `beta` must be in [0.5, 2]; got 0.1."),
    (lambda: smooth_step(X, alpha=0), "smooth_step: `alpha` must be above 0; got 0."),
    (lambda: SmoothIntervalTransform.of(bumps(weight=ONE / 2)), "`weight` must be non-negative with sum 1; got 0.5."),
    (lambda: SmoothIntervalTransform.of(bumps(center=2 * ONE)), "`center` must be in [0, 1]; got 2.0."),
    (lambda: SmoothIntervalTransform.of(bumps(scale=0 * ONE)), "`scale` must be above 0; got 0.0."),
    (lambda: SmoothCircularTransform.of(bumps(scale=ONE / 2)), "`scale` must be at least 1 on a circle; got 0.5."),
    (lambda: SmoothIntervalTransform.of(bumps(alpha=-ONE)), "`alpha` must be above 0; got -1.0."),
    (lambda: SmoothIntervalTransform.of(bumps(floor=0 * ONE)), "`floor` must be in (0, 1]; got 0.0."),
    (lambda: SmoothIntervalTransform.of(bumps(beta=9)), "SmoothIntervalTransform: `beta` must be in [0.5, 2]; got 9."),
    (lambda: SmoothIntervalTransform(*raw(), floor=0), "SmoothIntervalTransform: `floor` must be in (0, 1); got 0."),
    (lambda: SmoothCircularTransform(*raw(), low=1, high=1), "`high` must be above low (1); got 1."),
    (lambda: SplineIntervalTransform(*raw(3)), "SplineIntervalTransform: `slopes` must be 4 on the last axis; got 3."),
    (lambda: SplineCircularTransform(*raw(2), torch.zeros(4)), "`slopes` must be 3 on the last axis; got 4."),
    (lambda: SmoothIntervalTransform(*raw()).inv(torch.tensor([1.5])), "`y` must be between the values of f at the"),
    (lambda: SmoothCircularTransform(*raw()).inv(torch.tensor([math.nan])), "`y` must be finite; got 'NaN or inf"),
    (lambda: ImplicitInverse(cube, (0, 1), bins=1), "ImplicitInverse: `bins` must be at least 2; got 1."),
    (lambda: ImplicitInverse(cube, (0, 1), newton_steps=-1), "`newton_steps` must be at least 0; got -1."),
    (lambda: ImplicitInverse(cube, (0, 1), steps=-1), "`steps` must be at least 0; got -1."),
    (lambda: ImplicitInverse(cube, (0, 1), tol=1e-9)(X), "`tol` must be at least 1.2e-07, what torch.float32 resolves"),
    (lambda: ImplicitInverse(cube, (1, 0))(X), "`bracket` must be two different ends in order, with two values of f"),
    (lambda: ImplicitInverse(torch.square, (-1, 1))(X), "`bracket` must be two different ends in order"),
    (lambda: ImplicitInverse(lambda x: (5 * x).sin() + x, (0, 4))(X), "`f` must be monotone between the ends of the"),
    (lambda: ImplicitInverse(torch.log, (0, 1))(-X), "`f` must be finite at the ends of the bracket; got 'NaN or inf"),
    (lambda: small(0), "SmoothFlow: `features` must be at least 1; got 0."),
    (lambda: small(context=-1), "SmoothFlow: `context` must be at least 0; got -1."),
    (lambda: SmoothFlow(2, components=0), "SmoothFlow: `components` must be at least 1; got 0."),
    (lambda: SmoothFlow(2, transforms=0), "SmoothFlow: `transforms` must be at least 1; got 0."),
    (lambda: small(univariate="cubic"), "`univariate` must be one of ('smooth', 'spline'); got 'cubic'."),
    (lambda: small(periodic=[True]), "SmoothFlow: `periodic` must be one value, or 2; got [True]."),
    (lambda: small(low=1), "SmoothFlow: `high` must be above low (1); got 1.0."),
    (lambda: small(high=math.inf), "SmoothFlow: `high` must be above low (0.0); got inf."),
    (lambda: small(floor=1), "SmoothFlow: `floor` must be in (0, 1); got 1."),
    (lambda: small(beta=0), "SmoothFlow: `beta` must be in [0.5, 2]; got 0."),
    (lambda: small()(X), "SmoothFlow: `context` must be None: the flow has none; got (3, 2)."),
    (lambda: small(context=3).forward(None), "`context` must be of 3 numbers on the last axis; got None."),
    (lambda: small(context=3)(X), "`context` must be of 3 numbers on the last axis; got (3, 2)."),
    (lambda: small()().log_prob(X[:, :1]), "log_prob: `x` must be of 2 numbers on the last axis; got (3, 1)."),
    (lambda: small()().log_prob(NAN), "log_prob: `x` must be free of NaN; got 'NaN'."),
    (lambda: small()().force(2 * X + 0.5), "log_prob: `x` must be in the box; got [1.5, 1.5]."),
    (lambda: loss(force_weight=-1), "force_matching_loss: `force_weight` must be at least 0; got -1."),
    (lambda: loss(nll_weight=0, force_weight=0), "`nll_weight` must be above 0 where the other weights are 0; got 0."),
    (lambda: loss(forces=X[:1]), "`forces` must be of the shape of x, (3, 2); got (1, 2)."),
    (lambda: loss(forces=X * math.inf), "force_matching_loss: `forces` must be finite; got 'NaN or infinity'."),
    (lambda: loss(kl_weight=1), "`energy` must be given where kl_weight is above 0; got None."),
    (lambda: loss(n_samples=0), "force_matching_loss: `n_samples` must be at least 1; got 0."),
    (lambda: loss(x=3 * X), "log_prob: `x` must be in the box; got [1.5, 1.5]."),
    (lambda: nve(v=X[:1]), "simulate_nve: `v` must be of the shape of x, (3, 2); got (1, 2)."),
    (lambda: nve(step=0), "simulate_nve: `step` must be above 0; got 0."),
    (lambda: nve(n_steps=0), "simulate_nve: `n_steps` must be at least 1; got 0."),
    (lambda: nve(every=0), "simulate_nve: `every` must be at least 1; got 0."),
    (lambda: nve(mass=0), "simulate_nve: `mass` must be above 0; got 0."),
    (lambda: dihedrals(torch.zeros(4, 3), [(0, 1, 2)]), "`atoms` must be four numbers below 4 each; got (0, 1, 2)."),
    (
        lambda: dihedrals(torch.zeros(4, 3), [(0, 1, 2, 4)]),
        "`atoms` must be four numbers below 4 each; got (0, 1, 2, 4",
    ),
    (lambda: FlowPotential(small(), 0), "FlowPotential: `temperature` must be above 0 K; got 0."),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED, ids=[sentence[:60] for _, sentence in REFUSED])
def test_a_bad_argument_is_refused_in_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


def test_a_search_needs_no_true_slopes_but_says_where_it_fails():
    lying = ImplicitInverse(lambda x: (x.sign() * x.abs() ** (1 / 3), 1e9 * torch.ones_like(x)), (-1.0, 2.0))
    assert lying(torch.tensor([0.0], dtype=F64)).abs() < 1e-9  # halving finds it all the same
    broken = ImplicitInverse(lambda x: (x * math.nan, x), (0.0, 1.0), validate=False)
    with pytest.raises(NotConverged, match="did not end") as caught:
        broken(ONE / 3)
    assert caught.value.best.shape == (1,)


def test_places_outside_have_no_probability_where_they_are_not_refused():
    flow = small(periodic=[False, True])
    density = flow(validate_args=False)
    x = torch.tensor([[0.5, 0.5], [1.5, 0.5], [0.5, 7.5], [math.nan, 0.5]])
    log_prob = density.log_prob(x)
    assert log_prob[[1, 3]].tolist() == [-math.inf, -math.inf] and torch.isfinite(log_prob[[0, 2]]).all()
    assert torch.isfinite(density.force(x)).all()  # 0 outside
    assert density.support.check(x).tolist() == [True, False, True, False]


def test_a_density_is_a_torch_distribution():
    flow = small(context=3)
    density = flow(torch.zeros(5, 3))
    assert isinstance(density, torch.distributions.Distribution) and density.has_rsample
    assert density.batch_shape == (5,) and density.event_shape == (2,)
    x = density.sample((4,))
    assert x.shape == (4, 5, 2) and not x.requires_grad and density.rsample().requires_grad
    assert density.log_prob(x[0, 0]).shape == (5,) and density.force(x[0, 0]).shape == (5, 2)


def test_the_same_generator_makes_the_same_flow_and_samples():
    flows = [small(generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*(f.parameters() for f in flows), strict=True))
    drawn = [f().sample((5,), torch.Generator().manual_seed(4)) for f in flows]
    assert torch.equal(*drawn)
    flows[1].load_state_dict(flows[0].state_dict())
    assert "periodic=[False, False]" in repr(flows[0])


def test_samples_of_a_circle_lie_below_its_upper_end():
    flow = small(1, periodic=True, low=-math.pi, high=math.pi)
    for layer in flow.layers:
        torch.nn.init.zeros_(layer.conditioner[-1].weight)
        torch.nn.init.zeros_(layer.conditioner[-1].bias)
    x, _ = flow.from_noise(torch.tensor([[1 - 2**-24], [0.0], [-1e-9]]), None)
    assert (x >= -torch.tensor(math.pi)).all() and (x < torch.tensor(math.pi)).all()


def test_a_loss_without_gradients_still_knows_forces():
    with torch.no_grad():
        made = loss()
    assert made.force_mse > 0 and not made.total.requires_grad and loss().total.requires_grad


def test_dihedrals_of_known_chains():
    angles = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0], dtype=F64)
    last = torch.stack([angles.cos(), angles.sin(), torch.ones(5, dtype=F64)], -1)  # looking along z, x is 0
    chain = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1.0]], dtype=F64).expand(5, 3, 3)
    atoms = torch.cat([chain, last[:, None]], 1)
    assert (dihedrals(atoms, [(0, 1, 2, 3)])[:, 0] - angles).abs().max() < 1e-14
    assert (dihedrals(atoms, [(3, 2, 1, 0)])[:, 0] - angles).abs().max() < 1e-14  # read from the other end


def test_a_potential_is_in_kilojoules():
    flow = small(3).double()
    potential = FlowPotential(flow, 300)
    x = torch.full((2, 3), 0.25, dtype=F64)
    assert potential.kT == pytest.approx(2.494339, abs=1e-6)
    energy, force = potential.energy_and_force(x)
    assert torch.equal(energy, (potential.kT * flow().energy(x)).detach())
    assert (force - potential.kT * flow().force(x)).abs().max() < 1e-12 and torch.equal(potential.force(x), force)


def test_openmm_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openmm", None)
    with pytest.raises(
        MissingExtra, match=re.escape("FlowPotential.to_openmm needs `openmm`: pip install 'planish[fl")
    ):
        FlowPotential(small(3), 300).to_openmm()
