"""Molecular dynamics on any differentiable energy, to see whether its forces are those of one smooth function."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad


class Trajectory(NamedTuple):
    """Frames of a simulation, the first of which is the start, of many independent systems at once.

    Attributes:
        positions: (frames, *b, d).
        velocities: (frames, *b, d).
        potential: (frames, *b), in the energy's unit.
        kinetic: (frames, *b).

    Example:
        >>> one = torch.ones(2, 1)
        >>> Trajectory(one[..., None], one[..., None], one, torch.tensor([[1.0], [1.5]])).drift().tolist()
        [0.5]
    """

    positions: Tensor
    velocities: Tensor
    potential: Tensor
    kinetic: Tensor

    def total(self) -> Tensor:
        """Return the total energy at each frame, which exact dynamics conserves."""
        return self.potential + self.kinetic

    def drift(self) -> Tensor:
        """Return the largest distance of the total energy from its start, for each system."""
        total = self.total()
        made: Tensor = (total - total[0]).abs().amax(0)
        return made


def simulate_nve(
    energy: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*b d"],
    v: Float[Tensor, "*b d"],
    *,
    step: int | float,
    n_steps: int,
    mass: int | float | Tensor = 1.0,
    every: int = 1,
) -> Trajectory:
    """Simulate at constant energy by velocity Verlet; forces come from autograd.

    Velocity Verlet conserves energy to O(step^2) without drift where the energy is smooth; kinks of it add up. Compare
    densities at the same step and start, in float64.

    Args:
        energy: Energies (*b) of positions (*b, d), differentiable, as `FlowDistribution.energy` or
            `FlowPotential.energy`. Circles need no wrapping.
        x: Positions at the start.
        v: Velocities.
        step: Time step, > 0, in the unit in which energy = mass length^2 / time^2.
        n_steps: Steps, >= 1.
        mass: > 0; broadcasts with x. Default 1.
        every: Keep each frame of this many; default 1.

    Returns:
        The frames, with the start.

    Raises:
        ValueError: An argument is out of range, or shapes differ.

    Example:
        >>> x, v = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        >>> seen = simulate_nve(lambda x: x.square().sum(-1) / 2, x, v, step=0.01, n_steps=314)
        >>> round(seen.positions[-1].item(), 4), bool(seen.drift() < 2e-5)
        (-1.0, True)
    """
    if x.shape != v.shape:
        raise bad("simulate_nve", "v", f"of the shape of x, {tuple(x.shape)}", tuple(v.shape))
    if not 0 < step < float("inf"):
        raise bad("simulate_nve", "step", "above 0", step)
    for name, number in (("n_steps", n_steps), ("every", every)):
        if number < 1:
            raise bad("simulate_nve", name, "at least 1", number)
    m = torch.as_tensor(mass, dtype=x.dtype, device=x.device)
    if not bool((m > 0).all()):
        raise bad("simulate_nve", "mass", "above 0", mass)

    def forces(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            made = energy(at)
            (slope,) = torch.autograd.grad(made.sum(), at)
        return made.detach(), -slope

    x, v = x.detach(), v.detach()
    potential, force = forces(x)
    frames = [(x, v, potential)]
    for i in range(1, n_steps + 1):
        v = v + step / 2 * force / m
        x = x + step * v
        potential, force = forces(x)
        v = v + step / 2 * force / m
        if i % every == 0:
            frames.append((x, v, potential))
    positions, velocities, potentials = (torch.stack(part) for part in zip(*frames, strict=True))
    return Trajectory(positions, velocities, potentials, (m * velocities.square() / 2).sum(-1))
