"""Densities on intervals and tori that are smooth to every order, so that their energies have forces to compute with.

How to choose: `SmoothFlow` learns a density and gives log-probabilities, samples, energies and forces;
`force_matching_loss` trains it on forces too; `FlowPotential` reads it in kJ/mol and nm and hands it to OpenMM;
`simulate_nve` shows whether energy is conserved on it. `SmoothIntervalTransform` and `SmoothCircularTransform` are its
parts, for flows of other libraries; splines are the baseline; `ImplicitInverse` inverts any monotone function.
"""

from planish.flows.bumps import Bumps, smooth_step, unimodal_alpha
from planish.flows.distribution import FlowDistribution
from planish.flows.dynamics import Trajectory, simulate_nve
from planish.flows.flow import SmoothFlow
from planish.flows.forces import ForceMatchingLoss, force_matching_loss
from planish.flows.inverse import ImplicitInverse
from planish.flows.potential import FlowPotential, dihedrals
from planish.flows.splines import SplineCircularTransform, SplineIntervalTransform
from planish.flows.transforms import SmoothCircularTransform, SmoothIntervalTransform

__all__ = [
    "Bumps",
    "FlowDistribution",
    "FlowPotential",
    "ForceMatchingLoss",
    "ImplicitInverse",
    "SmoothCircularTransform",
    "SmoothFlow",
    "SmoothIntervalTransform",
    "SplineCircularTransform",
    "SplineIntervalTransform",
    "Trajectory",
    "dihedrals",
    "force_matching_loss",
    "simulate_nve",
    "smooth_step",
    "unimodal_alpha",
]
