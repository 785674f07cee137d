"""Alanine dipeptide, 160 ps of it: learn the free energy of its two torsions, draw it, and hand it back to OpenMM.

Needs `pip install 'planish[flows,plot]'`. Far too short for equilibrium: the basins it visited, not their true shares.
"""

import math

import matplotlib
import numpy as np
import openmm
import torch
from openmm import app, unit

from planish.flows import FlowPotential, SmoothFlow, dihedrals, force_matching_loss

matplotlib.use("agg")
import matplotlib.pyplot as plt

TEMPERATURE, FRAMES, EVERY = 300, 4000, 10  # K; frames of 10 steps of 4 fs
HEAVY = [("ACE", "CH3"), ("ACE", "C"), ("ACE", "O"), ("ALA", "N"), ("ALA", "CA"), ("ALA", "C"), ("ALA", "O"),
         ("ALA", "CB"), ("NME", "N"), ("NME", "C")]  # fmt: skip
# each atom from the fourth on: the three it hangs on, bond (nm), angle and torsion (degrees)
PLACES = [(2, 0, 1, 0.1335, 116, 180), (0, 1, 3, 0.146, 122, 180), (1, 3, 4, 0.152, 111, -70),
          (3, 4, 5, 0.123, 120, -30), (1, 3, 4, 0.153, 110, 168), (3, 4, 5, 0.1335, 116, 150),
          (4, 5, 8, 0.146, 122, 180)]  # fmt: skip


def peptide() -> app.Modeller:
    """Build the molecule from bonds and angles, and let OpenMM add its hydrogens."""
    xyz = [np.zeros(3), np.array([0.15, 0, 0]), np.array([0.2115, 0.1065, 0])]
    for i, j, k, bond, angle, torsion in PLACES:
        along = (xyz[k] - xyz[j]) / np.linalg.norm(xyz[k] - xyz[j])
        up = np.cross(xyz[j] - xyz[i], along)
        up /= np.linalg.norm(up)
        a, t = math.radians(angle), math.radians(torsion)
        side = math.cos(t) * np.cross(up, along) + math.sin(t) * up
        xyz.append(xyz[k] + bond * (math.sin(a) * side - math.cos(a) * along))
    topology = app.Topology()
    chain, residues = topology.addChain(), {}
    for residue, name in HEAVY:
        if residue not in residues:
            residues[residue] = topology.addResidue(residue, chain)
        topology.addAtom(name, app.Element.getBySymbol(name[0]), residues[residue])
    topology.createStandardBonds()
    return app.Modeller(topology, np.array(xyz) * unit.nanometer)


molecule, field = peptide(), app.ForceField("amber14-all.xml", "implicit/obc1.xml")
molecule.addHydrogens(field)
system = field.createSystem(molecule.topology, constraints=app.HBonds, hydrogenMass=3 * unit.amu)
atoms = {(atom.residue.name, atom.name): atom.index for atom in molecule.topology.atoms()}
phi = [atoms[key] for key in (("ACE", "C"), ("ALA", "N"), ("ALA", "CA"), ("ALA", "C"))]
psi = [atoms[key] for key in (("ALA", "N"), ("ALA", "CA"), ("ALA", "C"), ("NME", "N"))]

integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1 / unit.picosecond, 4 * unit.femtoseconds)
integrator.setRandomNumberSeed(1)
platform = openmm.Platform.getPlatformByName("CPU")
simulation = app.Simulation(molecule.topology, system, integrator, platform, {"Threads": "1"})
simulation.context.setPositions(molecule.positions)
simulation.minimizeEnergy()
simulation.context.setVelocitiesToTemperature(TEMPERATURE, 1)
frames = torch.empty(FRAMES, molecule.topology.getNumAtoms(), 3)
for i in range(FRAMES):
    simulation.step(EVERY)
    state = simulation.context.getState(positions=True)
    frames[i] = torch.from_numpy(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
angles = dihedrals(frames, [phi, psi])

g = torch.Generator().manual_seed(0)
flow = SmoothFlow(2, periodic=True, low=-math.pi, high=math.pi, floor=0.01, generator=g)
optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
for _ in range(300):
    x = angles[torch.randint(FRAMES, (256,), generator=g)]
    loss = force_matching_loss(flow(), x, torch.zeros_like(x), force_weight=0)  # mean forces are not known
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    schedule.step()
print(f"{FRAMES * EVERY * 0.004:.0f} ps; negative log-likelihood {-flow().log_prob(angles).mean().item():.3f} nats")

potential = FlowPotential(flow.double(), TEMPERATURE, coordinates=lambda p: dihedrals(p, [phi, psi]))
extra = potential.to_openmm()
extra.setForceGroup(1)
system.addForce(extra)
simulation.context.reinitialize(preserveState=True)
state = simulation.context.getState(energy=True, groups={1})
energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
here = [round(math.degrees(a)) for a in angles[-1].tolist()]
print(f"at phi, psi = {here} OpenMM reads {energy:.2f} kJ/mol, planish {potential.energy(frames[-1].double()):.2f}")

axis = torch.linspace(-math.pi, math.pi, 121, dtype=torch.float64)
grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
with torch.no_grad():
    surface = potential.kT * flow().energy(grid)
surface -= surface.min()
figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.2), layout="constrained", sharex=True, sharey=True)
left.plot(*torch.rad2deg(angles).T, ".", markersize=1, color="#2a6f97")
left.set(title="frames", xlabel="phi, degrees", ylabel="psi, degrees", xlim=(-180, 180), ylim=(-180, 180))
degrees = torch.rad2deg(axis)
levels = right.contourf(degrees, degrees, surface, levels=range(0, 26, 2), cmap="viridis", extend="max")
figure.colorbar(levels, label="free energy, kJ/mol")
arrows = grid[4::8, 4::8]
pull = flow().force(arrows)
pull = torch.where(surface[4::8, 4::8, None] < 20, pull, torch.nan)
right.quiver(*torch.rad2deg(arrows).unbind(-1), *pull.unbind(-1), color="white", scale=250, width=0.003)
right.set(title="learned free energy, and its forces", xlabel="phi, degrees")
figure.savefig("alanine_dipeptide.png", dpi=110)
print("picture: alanine_dipeptide.png")
