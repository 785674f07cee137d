"""A learned density as a force in OpenMM: same energies, same forces, same dynamics."""

import math

import pytest
import torch

openmm = pytest.importorskip("openmm")

from planish.flows import FlowPotential, SmoothFlow, dihedrals, simulate_nve  # noqa: E402

unit = openmm.unit
F64 = torch.float64


def source():
    return torch.Generator().manual_seed(0)


def context_of(force, positions, masses, step=0.001):
    system = openmm.System()
    for mass in masses:
        system.addParticle(mass)
    system.addForce(force)
    integrator = openmm.VerletIntegrator(step)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    return context


def read(context):
    state = context.getState(energy=True, forces=True, positions=True, velocities=True)
    return (
        state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole),
        torch.tensor(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)),
        torch.tensor(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)),
        state.getKineticEnergy().value_in_unit(unit.kilojoule_per_mole),
    )


def test_positions_in_a_box():
    flow = SmoothFlow(3, periodic=True, components=4, hidden_features=(16,), generator=source()).double()
    potential = FlowPotential(flow, 300)
    x = torch.tensor([[0.2, 0.7, 0.4]], dtype=F64)
    context = context_of(potential.to_openmm(), x.numpy(), [10.0])
    energy, force, *_ = read(context)
    assert energy == pytest.approx(potential.energy(x)[0].item(), abs=1e-10)
    assert (force - potential.force(x)).abs().max() < 1e-8
    context.getIntegrator().step(50)
    moved, kinetic = read(context)[2:]
    assert context.getSystem().getForce(0).usesPeriodicBoundaryConditions() is False
    assert kinetic > 0
    # a leap-frog that starts with velocity 0 half a step early is Verlet's to the order of the step
    start = 0.5 * 0.001 * potential.force(x) / 10.0
    ours = simulate_nve(potential.energy, x, start, step=0.001, n_steps=50, mass=10.0).positions[-1]
    assert (moved - ours).abs().max() < 1e-5


def test_angles_of_some_atoms():
    flow = SmoothFlow(1, periodic=True, low=-math.pi, high=math.pi, generator=source()).double()
    chain = torch.tensor([[0.1, 0, 0.02], [0, 0, 0], [0, 0, 0.15], [0.05, 0.1, 0.2], [1, 1, 1]], dtype=F64)
    potential = FlowPotential(flow, 300, coordinates=lambda p: dihedrals(p, [(0, 1, 2, 3)]), particles=range(4))
    context = context_of(potential.to_openmm(periodic=True), chain.numpy(), [12.0] * 5)
    energy, force, *_ = read(context)
    assert energy == pytest.approx(potential.energy(chain[:4]).item(), abs=1e-10)
    assert (force[:4] - potential.force(chain[:4])).abs().max() < 1e-8 and force[4].abs().max() == 0
    assert force.sum(0).abs().max() < 1e-9  # an angle pulls on no centre of mass
    torque = torch.linalg.cross(chain, force).sum(0)
    assert torque.abs().max() < 1e-9


def test_what_does_not_fit_is_said_by_openmm():
    context = context_of(FlowPotential(SmoothFlow(2), 300).to_openmm(), torch.full((1, 3), 0.5).numpy(), [1.0])
    with pytest.raises(openmm.OpenMMException, match="of 2 numbers on the last axis"):
        read(context)
