"""Fractional equations: the r-Laplacian of fractional order, Riesz potentials, and the Choquard equation's solutions.

How to choose: `FractionalLaplacian1D`, `FractionalLaplacian2D` and `RieszPotential` stand alone, differentiable, for
equations of your own, which `minimize_on_nehari` solves if they have a mountain-pass energy. `ChoquardProblem` states
the (p, q)-Choquard equation, `solve_ground_state` solves it and says how well, `find_solutions` finds several
solutions, `concentration_sweep` follows one of them to the bottom of its well.
"""

from planish.pde.choquard import ChoquardProblem, Norms, growth_bound
from planish.pde.nonlinearities import ExpNonlinearity, Nonlinearity, PowerNonlinearity
from planish.pde.operators import FractionalLaplacian1D, FractionalLaplacian2D, classical_constant
from planish.pde.riesz import RieszPotential
from planish.pde.solutions import Sweep, concentration_sweep, find_solutions, lower_bound
from planish.pde.solver import Functional, GroundState, certify, minimize_on_nehari, solve_ground_state

__all__ = [
    "ChoquardProblem",
    "ExpNonlinearity",
    "FractionalLaplacian1D",
    "FractionalLaplacian2D",
    "Functional",
    "GroundState",
    "Nonlinearity",
    "Norms",
    "PowerNonlinearity",
    "RieszPotential",
    "Sweep",
    "certify",
    "classical_constant",
    "concentration_sweep",
    "find_solutions",
    "growth_bound",
    "lower_bound",
    "minimize_on_nehari",
    "solve_ground_state",
]
