"""Sweeps, pictures and certificates of the room of equations; bad input."""

import math
import re

import pytest
import torch

from planish._support import NotConverged, PlanishWarning
from planish.pde import (
    ChoquardProblem,
    ExpNonlinearity,
    FractionalLaplacian1D,
    FractionalLaplacian2D,
    PowerNonlinearity,
    RieszPotential,
    certify,
    classical_constant,
    concentration_sweep,
    find_solutions,
    growth_bound,
    lower_bound,
    minimize_on_nehari,
    solve_ground_state,
)

F64 = torch.float64


def flat(x):
    return torch.ones_like(x[..., 0])


def wells(x):
    w = (x[..., 0] ** 2 - 1) ** 2
    return 1 + w / (1 + w)


def small(**changed):
    return ChoquardProblem(**{"potential": flat, "half_width": 10, "n": 101, **changed})


def test_sweep_prints_and_draws():
    import matplotlib as mpl

    mpl.use("Agg")
    told = []
    sweep = concentration_sweep(
        lambda eps: ChoquardProblem(wells, eps=eps, half_width=12 + 2 / eps, n=161), [0.5, 1.0], [1.0], level=0.66,
        progress=lambda *args: told.append(args),
    )  # fmt: skip
    assert sweep.eps == (1.0, 0.5) and [n for n, _ in told] == [1, 2]
    assert len(str(sweep).splitlines()) == 3
    figure = sweep.plot()
    assert {ax.get_xlabel() for ax in figure.axes} >= {"x", "eps"}


def test_a_start_that_fails_is_left_out_and_all_that_fail_raise(caplog):
    problem = small(q=3)
    good = solve_ground_state(problem).u
    found = find_solutions(problem, [[3.0], good], max_iter=1)
    assert len(found) == 1 and "start 1" in caplog.text
    with pytest.raises(NotConverged, match="none of 1 starts converged") as caught:
        find_solutions(problem, [[3.0]], max_iter=1)
    assert caught.value.best.residual > 1e-6


def test_what_did_not_converge_comes_with_the_error():
    with pytest.raises(
        NotConverged, match=r"solve_ground_state: the residual is .* after 2 steps, above 1e-06"
    ) as caught:
        solve_ground_state(small(), max_iter=2)
    assert caught.value.best.n_iter == 2 and caught.value.best.residual > 1e-6


def test_progress_is_told():
    told = []
    state = solve_ground_state(small(), progress=lambda *args: told.append(args))
    assert [n for n, _ in told] == list(range(1, state.n_iter + 1))
    assert told[-1][1] == state.residual


def test_certificate_of_any_function():
    problem = small(potential=wells)
    state = certify(problem, torch.exp(-((problem.points[..., 0] - 2) ** 2)))
    assert state.pohozaev is None and state.residual > 0.1
    assert state.peak[0] == pytest.approx(2, abs=1e-6) and state.barycentre[0] == pytest.approx(2, abs=1e-3)


def test_a_potential_that_is_lower_at_the_edge_warns():
    with pytest.warns(PlanishWarning, match="take a wider one"):
        small(potential=lambda x: 2 - x[..., 0] ** 2 / 100)


def test_a_power_for_a_nonlinearity():
    state = solve_ground_state(small(nonlinearity=PowerNonlinearity(4), q=3))
    assert state.residual < 1e-6 and state.u.min() > 0


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: small(s=0.0), "ChoquardProblem: `s` must be in (0, 1); got 0.0."),
        (lambda: small(s=0.7), "ChoquardProblem: `s` must be at most 0.5, so that p = 1 / s is at least 2; got 0.7."),
        (lambda: small(q=2), "ChoquardProblem: `q` must be above p = 2; got 2."),
        (lambda: small(mu=1), "ChoquardProblem: `mu` must be in (0, 1); got 1."),
        (lambda: small(dim=3), "ChoquardProblem: `dim` must be 1 or 2; got 3."),
        (lambda: small(eps=0), "ChoquardProblem: `eps` must be above 0; got 0."),
        (lambda: small(half_width=-1), "ChoquardProblem: `half_width` must be above 0; got -1."),
        (
            lambda: small(potential=lambda x: x[..., 0]),
            "ChoquardProblem: `potential` must be positive and finite; got -10.0.",
        ),
        (lambda: small(potential=lambda x: x), "`potential` must be a function that gives (101,); got (101, 1)."),
        (
            lambda: small(nonlinearity=PowerNonlinearity(2)),
            "`nonlinearity` must be one that starts with a power above q / 2 = 2",
        ),
        (lambda: small(n=2), "`n` must be at least 3; got 2."),
        (lambda: small(dim=2, s=0.5, q=5, mu=1.0, n=9), "FractionalLaplacian2D: `r` must be 2, 4 or 6; got 5.0."),
        (lambda: small().energy(torch.zeros(3, dtype=F64)), "`v` must be float64 of shape (101,)"),
        (lambda: small().project(-torch.ones(101, dtype=F64)), "`v` must be positive somewhere"),
        (lambda: small(potential=wells).pohozaev(torch.ones(101, dtype=F64)), "`potential` must be constant"),
        (
            lambda: solve_ground_state(small(), [0.0, 1.0]),
            "`start` must be a function or a point of 1 coordinates; got [0.0, 1.0].",
        ),
        (lambda: minimize_on_nehari(small(), torch.ones(101, dtype=F64), tol=0), "`tol` must be in (0, 1); got 0."),
        (
            lambda: minimize_on_nehari(small(), torch.ones(101, dtype=F64), max_iter=0),
            "`max_iter` must be at least 1; got 0.",
        ),
        (lambda: find_solutions(small(), []), "find_solutions: `starts` must be at least one; got []."),
        (lambda: find_solutions(small(), [[0.0]], apart=2), "find_solutions: `apart` must be in (0, 1); got 2."),
        (
            lambda: concentration_sweep(lambda e: small(), [], [0.0], level=0.0),
            "`eps` must be at least one value; got [].",
        ),
        (lambda: lower_bound([]), "lower_bound: `minima` must be at least one point; got []."),
        (lambda: lower_bound("disc"), "`minima` must be points, 'circle', 'sphere' or 'torus'; got 'disc'."),
        (lambda: lower_bound("torus"), "lower_bound: `torus_dim` must be at least 1; got None."),
        (lambda: classical_constant(0, 0.5), "classical_constant: `dim` must be at least 1; got 0."),
        (lambda: classical_constant(1, 1.0), "classical_constant: `s` must be in (0, 1); got 1.0."),
        (lambda: FractionalLaplacian1D(9, 0.1, s=1.2), "FractionalLaplacian1D: `s` must be in (0, 1); got 1.2."),
        (
            lambda: FractionalLaplacian1D(9, 0.1, s=0.5, r=1.5),
            "FractionalLaplacian1D: `r` must be at least 2; got 1.5.",
        ),
        (lambda: FractionalLaplacian1D(9, 0.0, s=0.5), "FractionalLaplacian1D: `step` must be above 0; got 0.0."),
        (lambda: FractionalLaplacian1D(9, 0.1, s=0.5)(torch.zeros(8)), "`u` must be float64 with last axes (9,)"),
        (lambda: FractionalLaplacian2D(9, 0.1, s=0.5, r=3), "FractionalLaplacian2D: `r` must be 2, 4 or 6; got 3."),
        (lambda: RieszPotential(9, 0.1, 1.5), "RieszPotential: `mu` must be in (0, 1); got 1.5."),
        (lambda: RieszPotential(9, 0.1, 0.5, dim=3), "RieszPotential: `dim` must be 1 or 2; got 3."),
        (lambda: RieszPotential(2, 0.1, 0.5), "RieszPotential: `n` must be at least 3; got 2."),
        (lambda: RieszPotential(9, -0.1, 0.5), "RieszPotential: `step` must be above 0; got -0.1."),
        (lambda: RieszPotential(9, 0.1, 0.5)(torch.zeros(9)), "`f` must be float64 with last axes (9,)"),
        (lambda: PowerNonlinearity(1), "PowerNonlinearity: `power` must be above 1; got 1."),
        (lambda: ExpNonlinearity(amplitude=0), "ExpNonlinearity: `amplitude` must be above 0; got 0."),
        (lambda: ExpNonlinearity(terms=0), "ExpNonlinearity: `terms` must be at least 1; got 0."),
        (lambda: ExpNonlinearity(exponent=1), "ExpNonlinearity: `exponent` must be above 1; got 1."),
    ],
)
def test_a_mistake_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


def test_growth_bound_is_its_series():
    for dim, s in ((1, 0.5), (1, 0.4), (2, 0.5), (2, 0.8)):
        p = dim / s
        terms = sum((k + 1) ** (dim - 1) / (dim + 2 * k) ** p for k in range(160))
        last = 160
        # what is left of the series, as an integral: k + 1/2 in the middle of a step
        rest = (
            (1 + 2 * last - 1) ** (1 - p) / (2 * (p - 1)) if dim == 1 else 2.0**-p * (last + 0.5) ** (2 - p) / (p - 2)
        )
        sphere = 2.0 if dim == 1 else 2 * math.pi
        series = dim * (2 * sphere**2 * math.gamma(p + 1) / math.factorial(dim) * (terms + rest)) ** (s / (dim - s))
        assert growth_bound(dim, s) == pytest.approx(series, rel=1e-4)


def test_growth_of_a_solution_is_reported_and_admissible():
    state = solve_ground_state(small(q=4, half_width=20, n=201))
    norm = float(state.u.square().sum() * 0.2) + float(small(q=4, half_width=20, n=201).first.energy(state.u))
    assert state.growth == pytest.approx(norm * 4 / 3 / (2 * math.pi**2))
    assert 0 < state.growth < 1
    assert small(nonlinearity=PowerNonlinearity(4), q=4).exponential_growth(torch.ones(101, dtype=F64)) is None


def test_a_power_too_small_for_the_potential_is_refused():
    with pytest.raises(ValueError, match=r"`nonlinearity` must be one that starts with a power of 1.9 or more"):
        small(q=2.5, mu=0.1, nonlinearity=PowerNonlinearity(1.5))
