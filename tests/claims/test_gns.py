"""Gradient-normalized Newton in miniature: approximate Hessians are nearly as good as exact ones."""

import pytest
import torch

from benchmarks.newton import chebyshev, rosenbrock
from planish.optim import LogSumExp, PowerNorm, gram, minimize_gns

pytest.importorskip("scipy")
f64 = torch.float64


def counts(function, start, least, **settings):
    def stop(intermediate_result):
        if intermediate_result.fun - least <= 1e-8:
            raise StopIteration

    found = minimize_gns(function, start, gtol=1e-14, maxiter=400, callback=stop, **settings)
    assert found.status == 99
    return found.nit, found.nsolve


@pytest.fixture(scope="module")
def soft_maximum():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(60, 60, dtype=f64, generator=generator) * 2 - 1
    b = torch.rand(60, dtype=f64, generator=generator) * 2 - 1
    f = LogSumExp(a - LogSumExp(a, b).gradient(torch.zeros(60, dtype=f64)), b)
    start = torch.ones(60, dtype=f64)
    least = float(f(start * 0))
    settings = {"jac": f.gradient, "metric": f.metric}
    hessians = {"exact": f.hessian, "weighted": f.weighted, "zero": "zero"}
    return {name: counts(f, start, least, hess=hess, **settings) for name, hess in hessians.items()}


@pytest.mark.claim("gns", "steps of a soft maximum with the weighted Gauss-Newton matrix, against the exact Hessian")
def test_the_weighted_matrix_is_nearly_the_hessian(soft_maximum, record_claim):
    record_claim(soft_maximum["weighted"][0] / soft_maximum["exact"][0], 2.0, "times", at_least=False)


@pytest.mark.claim("gns", "steps of a soft maximum without a Hessian, against the weighted Gauss-Newton matrix")
def test_without_a_hessian_it_takes_longer(soft_maximum, record_claim):
    record_claim(soft_maximum["zero"][0] / soft_maximum["weighted"][0], 1.5, "times")


@pytest.mark.claim(
    "gns", "steps of Rosenbrock's ||u||^5 / 5 from (-2, 2), exact and Gauss-Newton (published: 56 and 57)"
)
def test_rosenbrock(record_claim):
    f, start = PowerNorm(rosenbrock, 5), torch.tensor([-2.0, 2.0], dtype=f64)
    steps = [counts(f, start, 0.0, hess=hess, regrow="always")[0] for hess in ("exact", f.gauss_newton)]
    record_claim(max(steps), 73, "steps", at_least=False)


@pytest.mark.claim("gns", "solves when the radius is doubled only after a first trial that passed, against always")
def test_patient_doubling_saves_solves(record_claim):
    shares = []
    linear = torch.rand(25, 50, dtype=f64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for u, p, start, metric in (
        (rosenbrock, 5, torch.tensor([-2.0, 2.0], dtype=f64), None),
        (chebyshev, 4, torch.rand(30, dtype=f64, generator=torch.Generator().manual_seed(2)), None),
        (lambda x: linear @ x - 1, 4, torch.ones(50, dtype=f64), gram(linear)),
    ):
        f = PowerNorm(u, p)
        first, always = (
            counts(f, start, 0.0, hess=f.gauss_newton, metric=metric, regrow=r)[1] for r in ("first", "always")
        )
        shares.append(first / always)
    record_claim(max(shares), 0.88, "of the solves, worst of three problems", at_least=False)


@pytest.mark.claim("gns", "steps of ||Ax - b||^4 / 4 with the rank-one Fisher matrix, against the exact Hessian")
def test_rank_one_is_enough(record_claim):
    generator = torch.Generator().manual_seed(3)
    a = torch.rand(50, 100, dtype=f64, generator=generator) * 2 - 1
    f, start = PowerNorm(lambda x: a @ x - 1, 4), torch.ones(100, dtype=f64)
    exact, fisher = (counts(f, start, 0.0, hess=h, metric=gram(a))[0] for h in (f.gauss_newton, f.fisher))
    record_claim(fisher / exact, 1.0, "times", at_least=False)
