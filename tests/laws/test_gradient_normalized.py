"""Gradient-normalized Newton: each accepted step keeps its promises, solvers agree, units do not matter."""

import pytest
import torch
from torch.nn import functional as F

from planish.optim import Composite, LogSumExp, LowRank, PowerNorm, gamma_estimate, gram, minimize_gns
from planish.optim.gradient_normalized import Point, passes
from planish.optim.regularized import Krylov, Metric, prepare

pytest.importorskip("scipy")
f64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=f64, generator=generator(seed))


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def chebyshev(x):
    return torch.cat([(1 - x[:1]) / 2, x[1:] - 2 * x[:-1] ** 2 + 1])


def soft_maximum(n=12, seed=1):
    a = normal(n, n, seed=seed)
    b = normal(n, seed=seed + 1)
    return LogSumExp(a - LogSumExp(a, b).gradient(torch.zeros(n, dtype=f64)), b)


ROWS, SIGNS = normal(40, 5, seed=7), (-1.0) ** torch.arange(40, dtype=f64)
LOGISTIC = Composite(lambda z: F.softplus(-SIGNS * z) + 0.02 * z.square(), lambda x: ROWS @ x)

CHAIN, SOFT = PowerNorm(chebyshev, 4.0), soft_maximum()
# name -> function, start, settings
CASES = {
    "rosenbrock, exact": (rosenbrock, torch.tensor([-2.0, 2.0], dtype=f64), {}),
    "chebyshev, gauss-newton": (CHAIN, torch.rand(8, dtype=f64, generator=generator()), {"hess": CHAIN.gauss_newton}),
    "soft maximum, weighted": (SOFT, torch.ones(12, dtype=f64), {"hess": SOFT.weighted, "metric": SOFT.metric}),
    "logistic, exact": (LOGISTIC, torch.ones(5, dtype=f64), {}),
    "logistic, ggn": (LOGISTIC, torch.ones(5, dtype=f64), {"hess": "ggn"}),
    "logistic, fisher": (LOGISTIC, torch.ones(5, dtype=f64), {"hess": "fisher"}),
    "logistic, diagonal": (LOGISTIC, torch.ones(5, dtype=f64), {"hess": "diag", "metric": torch.arange(1, 6)}),
    "logistic, nothing": (LOGISTIC, torch.ones(5, dtype=f64), {"hess": "zero", "maxiter": 30}),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


def run(function, start, **settings):
    path = [start]
    found = minimize_gns(function, start, callback=path.append, **{"maxiter": 40, **settings})
    return found, torch.stack(path)


@cases
@pytest.mark.parametrize("regrow", ["first", "always"])
def test_every_accepted_step_keeps_its_promises(case, regrow):
    function, start, settings = CASES[case]
    found, path = run(function, start, regrow=regrow, **settings)
    metric = Metric("test", settings.get("metric"), start)
    gradient = torch.func.grad(function)
    values = [float(function(x)) for x in path]
    h = found.history
    assert found.nit == len(path) - 1 >= 5
    for k in range(found.nit):
        here, there = path[k], path[k + 1]
        lam, gamma = h["regularization"][k], h["gamma"][k]
        assert lam == pytest.approx(metric.dual_norm(gradient(here)) / gamma)
        slack = 1e-12 * abs(values[k])
        assert values[k] - values[k + 1] >= metric.dual_norm(gradient(there)) ** 2 / (8 * lam) - slack
        assert values[k + 1] < values[k] + slack
        if case != "rosenbrock, exact":  # H >= 0
            assert metric.norm(there - here) <= gamma * (1 + 1e-9)
        if k:
            allowed = [h["gamma"][k - 1] * 2.0**j for j in range(1, -40, -1)]
            assert any(gamma == pytest.approx(g) for g in allowed)
    assert found.nfev >= found.nit + 1 and found.nsolve >= found.nit
    if "nothing" not in case:
        assert found.history["gradient_norm"][-1] < 0.1 * metric.dual_norm(gradient(start))


SOLVERS = ["cholesky", "eigh", "cg"]


@pytest.mark.parametrize("kind", ["matrix", "low rank", "diagonal", "product"])
@pytest.mark.parametrize("metric", [None, "diagonal", "matrix"])
def test_solvers_agree_with_the_plain_system(kind, metric):
    n, rank = 9, 3
    rows, g = normal(rank, n), normal(n, seed=3)
    H = {"matrix": normal(n, n, seed=4), "low rank": rows.T @ rows, "product": normal(n, n, seed=5)}.get(kind)
    H = torch.diag(torch.arange(n, dtype=f64)) if H is None else H @ H.T if kind != "low rank" else H
    given = {"matrix": H, "low rank": LowRank(rows), "diagonal": H.diagonal(), "product": H.matmul}[kind]
    M = normal(n, n, seed=6)
    B = {None: None, "diagonal": torch.arange(1, n + 1, dtype=f64), "matrix": M @ M.T + torch.eye(n, dtype=f64)}[metric]
    measure = Metric("test", B, g)
    solvers = [*SOLVERS, "auto", *(["low_rank"] if kind == "low rank" else [])]
    prepared = {name: prepare("test", given, measure, g, name) for name in solvers}
    for lam in (0.5, 3.0, 1e3):
        plain = torch.linalg.solve(H + lam * measure.dense(), g)
        for name, solve in prepared.items():
            assert torch.allclose(solve(lam, 1e-13), plain, rtol=1e-9, atol=1e-10), name
    assert measure.norm(g) == pytest.approx(float(g @ measure.dense() @ g) ** 0.5)
    assert measure.dual_norm(g) == pytest.approx(float(g @ torch.linalg.solve(measure.dense(), g)) ** 0.5)


def test_an_indefinite_system_has_no_answer():
    H, g = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=f64)), torch.ones(3, dtype=f64)
    measure = Metric("test", None, g)
    for name in SOLVERS:
        solve = prepare("test", H, measure, g, name)
        assert solve(1.0, 1e-12) is None
        assert torch.allclose(solve(3.0, 1e-12), g / (H.diagonal() + 3.0), atol=1e-10)
    solve = prepare("test", H.diagonal(), measure, g, "auto")
    assert solve(1.0, 0.0) is None and torch.allclose(solve(3.0, 0.0), g / (H.diagonal() + 3))


def test_a_larger_lambda_needs_no_more_products_and_the_tolerance_holds():
    M, g = normal(40, 40), normal(40, seed=1)
    H = M @ M.T
    krylov = Krylov(H.matmul, Metric("test", None, g), g)
    counts = []
    for lam in (1.0, 2.0, 4.0, 8.0):
        h = krylov(lam, 0.05)
        assert float((H @ h + lam * h - g).norm()) <= 0.05 * float(g.norm()) * (1 + 1e-9)
        counts.append(krylov.products)
    assert counts[0] < 40 and set(counts) == {counts[0]}
    assert Krylov(H.matmul, Metric("test", None, g), g, limit=3)(1.0, 0.0) is not None


@pytest.mark.parametrize("case", ["rosenbrock, exact", "chebyshev, gauss-newton", "soft maximum, weighted"])
def test_coordinates_do_not_matter(case):
    function, start, settings = CASES[case]
    n = len(start)
    S = torch.eye(n, dtype=f64) + 0.3 * normal(n, n, seed=11) / n**0.5
    B = settings.get("metric", torch.eye(n, dtype=f64))
    hess = settings.get("hess", torch.func.jacrev(torch.func.grad(function)))
    _, plain = run(function, start, hess=hess, metric=B, maxiter=8)
    _, turned = run(
        lambda y: function(S @ y), torch.linalg.solve(S, start), maxiter=8,
        hess=lambda y: S.T @ hess(S @ y) @ S, metric=(S.T @ B @ S + (S.T @ B @ S).T) / 2,
    )  # fmt: skip
    assert torch.allclose(turned @ S.T, plain, atol=1e-6)


@cases
def test_the_scale_of_the_function_does_not_matter(case):
    function, start, settings = CASES[case]
    hess = settings.get("hess", "exact")
    scaled = Composite(lambda z: 64 * function.outer(z), function.inner) if isinstance(function, Composite) else (
        lambda x: 64 * function(x))  # fmt: skip
    if callable(hess):
        settings = {**settings, "hess": lambda x: 64 * hess(x)}
    elif hess == "fisher":  # the one matrix that does not scale with f: squares of gradients
        settings = {**settings, "hess": lambda x: LowRank(8 * function.fisher(x).rows)}
    one, path = run(function, start, **{**CASES[case][2], "maxiter": 10})
    two, other = run(scaled, start, **{**settings, "maxiter": 10, "gtol": 64e-6})
    assert torch.allclose(path, other, rtol=1e-9) and one.history["gamma"] == pytest.approx(two.history["gamma"])


def test_on_a_quadratic_the_radius_grows_without_bound_and_convergence_is_fast():
    Q = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=f64))
    found, _ = run(lambda x: x @ Q @ x / 2, torch.ones(3, dtype=f64) * 50, gtol=1e-10)
    gamma, size = found.history["gamma"], found.history["gradient_norm"]
    assert found.success and found.nsolve == found.nit and gamma[-1] == 2.0 ** (found.nit - 1)
    assert all(later < 0.2 * former for former, later in zip(size[-4:], size[-3:], strict=False))
    assert size[-1] / size[-2] < size[-2] / size[-3] < size[-3] / size[-4]  # superlinear


def test_radii_are_as_large_as_the_theory_has_them():
    # Lipschitz Hessian with L = 2: gamma(x) >= |g|^(1/2), so at least half of it is found
    start = normal(6) * 3
    cubic, path = run(lambda x: (x.abs() ** 3).sum() / 3, start, hess=lambda x: torch.diag(2 * x.abs()))
    sizes = [float((x * x.abs()).norm()) for x in path[:-1]]
    assert all(g >= 0.5 * s**0.5 for g, s in zip(cubic.history["gamma"][4:], sizes[4:], strict=True))
    # without a Hessian, on an L-smooth function: gamma(x) = |g| / L
    Q = torch.linspace(1, 20, 6, dtype=f64)
    plain, path = run(lambda x: (Q * x * x).sum() / 2, start, hess="zero", maxiter=60)
    sizes = [float((Q * x).norm()) for x in path[:-1]]
    assert all(g / s >= 1 / 40 for g, s in zip(plain.history["gamma"][8:], sizes[8:], strict=True))
    # logistic regression is quasi-self-concordant: a constant bounds the radius from below
    logistic, _ = run(LOGISTIC, torch.ones(5, dtype=f64) * 4)
    assert min(logistic.history["gamma"]) >= 0.5 / float(ROWS.norm(dim=1).max())


def test_the_estimate_of_the_radius_is_that_of_closed_forms():
    x = torch.tensor([2.0], dtype=f64)
    cubic = gamma_estimate(lambda x: (x.abs() ** 3).sum() / 3, torch.tensor([[4.0]]), x)
    assert 2 / 1.13 <= cubic <= 2.0
    Q = torch.diag(torch.tensor([1.0, 4.0], dtype=f64))
    at = torch.tensor([1.0, 1.0], dtype=f64)
    assert gamma_estimate(lambda x: x @ Q @ x / 2, Q, at) == 1e3
    wrong = gamma_estimate(lambda x: x @ Q @ x / 2, torch.zeros(2, 2), at, n_dirs=256)
    assert 17**0.5 / 4 / 1.13 <= wrong <= 17**0.5 / 4 * 1.05  # |g| / L, reached along the steepest axis
    turned = gamma_estimate(lambda x: x @ Q @ x / 2, torch.zeros(2, 2), at, metric=Q)
    assert turned == pytest.approx(5**0.5, rel=0.13)  # in Q's own metric L is 1


def test_every_hessian_formula_by_differences():
    def differences(gradient, x, step=1e-5):
        eye = step * torch.eye(len(x), dtype=f64)
        return torch.stack([(gradient(x + e) - gradient(x - e)) / (2 * step) for e in eye])

    f, x = soft_maximum(5), normal(5, seed=9)
    g = torch.func.grad(f)
    assert torch.allclose(f.gradient(x), g(x))
    assert torch.allclose(f.hessian(x), differences(g, x), atol=1e-7)
    assert torch.allclose(f.weighted(x), f.hessian(x) + torch.outer(g(x), g(x)), atol=1e-9)
    a, b = normal(4, 6, seed=2), normal(4, seed=3)
    for p in (2.0, 2.5, 4.0):
        linear, x = PowerNorm(lambda x: a @ x - b, p), normal(6, seed=4)
        g = torch.func.grad(linear)(x)
        full = linear.gauss_newton(x)
        assert torch.allclose(full, differences(torch.func.grad(linear), x), atol=1e-5)
        size, rank_one = float((a @ x - b).norm()), linear.fisher(x).rows
        assert torch.allclose(rank_one.T @ rank_one, (p - 2) * size**-p * torch.outer(g, g))
        assert torch.allclose(full, size ** (p - 2) * a.T @ a + rank_one.T @ rank_one)
    at_zero = PowerNorm(lambda x: x, 3.0)
    assert torch.equal(at_zero.gauss_newton(torch.zeros(2, dtype=f64)), torch.zeros(2, 2, dtype=f64))
    x = normal(5, seed=5)
    exact = differences(torch.func.grad(LOGISTIC), x)
    assert torch.allclose(LOGISTIC.gauss_newton(x), exact, atol=1e-8)
    v = normal(5, seed=6)
    assert torch.allclose(LOGISTIC.gauss_newton_product(x)(v), exact @ v, atol=1e-7)
    grads = torch.stack([torch.func.grad(lambda x, i=i: LOGISTIC.losses(x)[i])(x) for i in range(40)])
    rows = LOGISTIC.fisher(x).rows
    assert torch.allclose(rows.T @ rows, grads.T @ grads / 40)
    assert torch.equal(gram(a) - a.T @ a, torch.diag((gram(a) - a.T @ a).diagonal()))


def test_where_values_drown_in_rounding_gradients_decide():
    metric = Metric("test", None, torch.zeros(1, dtype=f64))
    here = Point(torch.tensor([1.0], dtype=f64), 1e16, torch.tensor([1.0], dtype=f64))
    good = Point(torch.tensor([0.0], dtype=f64), 1e16, torch.tensor([0.1], dtype=f64))
    beyond = Point(torch.tensor([0.0], dtype=f64), 1e16, torch.tensor([-0.1], dtype=f64))
    assert passes(here, good, 1.0, metric) and not passes(here, beyond, 1.0, metric)
    small = Point(here.x, 1.0, here.gradient), Point(good.x, 1.0, good.gradient)
    assert passes(*small, 1.0, metric)
    assert not passes(small[0], Point(good.x, 1.0 - 1e-4, good.gradient), 1.0, metric)  # too little, and visible
