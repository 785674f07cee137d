"""Two wells, two standing waves: as eps falls, each settles in its well. A table, and a picture of the way there."""

import torch

from planish.pde import ChoquardProblem, concentration_sweep, find_solutions, lower_bound, solve_ground_state


def wells(x: torch.Tensor) -> torch.Tensor:
    w = (x[..., 0] ** 2 - 1) ** 2
    return 1 + w / (1 + w)


def problem(eps: float) -> ChoquardProblem:
    half_width = 24 + 2 / eps
    return ChoquardProblem(wells, eps=eps, half_width=half_width, n=round(20 * half_width) + 1)


flat = solve_ground_state(ChoquardProblem(lambda x: torch.ones_like(x[..., 0]), half_width=40, n=801))
print(f"ground level of the flat problem: {flat.energy:.4f}, Pohozaev's defect {flat.pohozaev:.1e}")

sweep = concentration_sweep(problem, [1, 1 / 2, 1 / 4, 1 / 8], [1.0], level=flat.energy)
print(sweep)
sweep.plot().savefig("waves.svg")
print("picture: waves.svg")

found = find_solutions(problem(0.25), [[-1.0], [1.0]])
print(f"solutions found: {len(found)}, promised: {lower_bound([[-1.0], [1.0]])}")
