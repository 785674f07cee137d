"""A learned density as a potential in chemists' units (kJ/mol, nm), and as a force in OpenMM."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad, require
from planish.flows.distribution import FlowDistribution
from planish.flows.flow import SmoothFlow

if TYPE_CHECKING:
    import openmm

GAS_CONSTANT = 8.31446261815324e-3  # kJ / (mol K)


def dihedrals(positions: Float[Tensor, "*b n 3"], atoms: Sequence[Sequence[int]]) -> Float[Tensor, "*b m"]:
    """Return signed dihedral angles, in [-pi, pi], by the convention of chemists (trans is pi).

    Args:
        positions: Of n atoms, in any unit.
        atoms: Four atoms each, in the order of the chain.

    Returns:
        Angles in radians, differentiable where no three neighbours lie on a line.

    Raises:
        ValueError: An entry of `atoms` does not name four atoms that are there.

    Example:
        >>> chain = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
        >>> round(dihedrals(chain, [(0, 1, 2, 3)]).item(), 4)
        1.5708
    """
    n = positions.shape[-2]
    for four in atoms:
        if len(four) != 4 or not all(0 <= i < n for i in four):
            raise bad("dihedrals", "atoms", f"four numbers below {n} each", tuple(four))
    a, b, c, d = (positions[..., [four[i] for four in atoms], :] for i in range(4))
    first, axis, last = a - b, c - b, d - c
    axis = axis / axis.norm(dim=-1, keepdim=True)
    left = first - (first * axis).sum(-1, keepdim=True) * axis
    right = last - (last * axis).sum(-1, keepdim=True) * axis
    sine = (torch.linalg.cross(axis, left) * right).sum(-1)
    return torch.atan2(sine, (left * right).sum(-1))


class FlowPotential:
    """Read a density as a potential: energy -kT log p in kJ/mol, force in kJ/mol/nm.

    With `coordinates` (angles, say) it is the free energy of these, and pulls on the atoms through them; no Jacobian of
    the change of coordinates is added. Without, the density is one of positions themselves, in nm.

    Args:
        density: What a `SmoothFlow` returns, or a flow without context.
        temperature: In K, > 0.
        coordinates: From positions (*b, n, 3) in nm to the flow's features, differentiable; default: positions (*b, d)
            are the features.
        particles: Those in OpenMM's system that positions are made of; default all.

    Raises:
        ValueError: The temperature is not above 0.

    Example:
        >>> potential = FlowPotential(SmoothFlow(3), temperature=300)
        >>> x = torch.full((2, 3), 0.25)
        >>> potential.energy(x).shape, potential.force(x).shape
        (torch.Size([2]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        density: FlowDistribution | SmoothFlow,
        temperature: int | float,
        *,
        coordinates: Callable[[Tensor], Tensor] | None = None,
        particles: Sequence[int] | None = None,
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise bad("FlowPotential", "temperature", "above 0 K", temperature)
        self.density = density() if isinstance(density, SmoothFlow) else density
        self.kT = GAS_CONSTANT * temperature
        self.coordinates, self.particles = coordinates, particles

    def energy(self, positions: Tensor) -> Tensor:
        """Return -kT log p, in kJ/mol, differentiable."""
        features = positions if self.coordinates is None else self.coordinates(positions)
        made: Tensor = self.kT * self.density.energy(features)
        return made

    def force(self, positions: Tensor) -> Tensor:
        """Return minus the gradient of the energy, in kJ/mol/nm."""
        return self.energy_and_force(positions)[1]

    def energy_and_force(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return both for the price of one, without a graph."""
        with torch.enable_grad():
            at = positions.detach().requires_grad_()
            energy = self.energy(at)
            (slope,) = torch.autograd.grad(energy.sum(), at)
        return energy.detach(), -slope

    def to_openmm(self, *, periodic: bool = False) -> "openmm.PythonForce":
        """Return an `openmm.PythonForce` to add to a system, for runs on any of its platforms.

        Args:
            periodic: Say that the force knows of the system's box; default False.

        Raises:
            MissingExtra: OpenMM is not installed.
            ValueError: When it runs: positions and features do not match.
        """
        openmm = require("openmm", "flows", "FlowPotential.to_openmm")
        dtype = self.density.flow.low.dtype

        def compute(state: Any) -> tuple[float, Any]:  # noqa: ANN401  (OpenMM's state)
            positions = torch.as_tensor(
                state.getPositions(asNumpy=True).value_in_unit(openmm.unit.nanometer), dtype=dtype
            )
            at = positions if self.coordinates is not None else positions.reshape(-1)
            energy, force = self.energy_and_force(at)
            if energy.numel() != 1:
                raise bad("FlowPotential", "coordinates", "the features of one system", tuple(energy.shape))
            return float(energy), force.reshape(-1, 3).double().numpy()

        made = openmm.PythonForce(compute)
        if self.particles is not None:
            made.setParticles(list(self.particles))
        made.setUsesPeriodicBoundaryConditions(periodic)
        return made
