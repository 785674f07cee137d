"""SciPy takes `minimize_gns` as a method, passes what it passes to its own, and gets what they give."""

import numpy as np
import pytest

from planish.optim import minimize_gns

optimize = pytest.importorskip("scipy.optimize")


@pytest.mark.parametrize("how", ["jac and hess", "jac=True", "hessp", "no hessian"])
def test_scipy_runs_it_on_its_own_rosenbrock(how):
    settings = {
        "jac and hess": {"jac": optimize.rosen_der, "hess": optimize.rosen_hess},
        "jac=True": {"jac": True, "hess": optimize.rosen_hess},
        "hessp": {"jac": optimize.rosen_der, "hessp": optimize.rosen_hess_prod},
        "no hessian": {"jac": optimize.rosen_der, "options": {"maxiter": 20}},
    }[how]
    fun = (lambda x: (optimize.rosen(x), optimize.rosen_der(x))) if how == "jac=True" else optimize.rosen
    start = np.array([-1.2, 1.0, 0.8])
    kept = start.copy()
    found = optimize.minimize(fun, start, method=minimize_gns, tol=1e-8, **settings)
    assert isinstance(found, optimize.OptimizeResult) and isinstance(found.x, np.ndarray)
    assert np.array_equal(start, kept)
    if how == "no hessian":
        assert not found.success and found.fun < optimize.rosen(start)
        return
    theirs = optimize.minimize(
        optimize.rosen, start, jac=optimize.rosen_der, hess=optimize.rosen_hess, method="trust-exact", tol=1e-8
    )
    assert found.success and np.allclose(found.x, theirs.x, atol=1e-6) and found.fun < 1e-12
    assert np.allclose(found.jac, optimize.rosen_der(found.x)) and found.nit <= 2 * theirs.nit


def test_scipy_passes_args_and_both_kinds_of_callback():
    seen = []

    def with_result(intermediate_result):
        seen.append(intermediate_result.fun)
        if len(seen) == 3:
            raise StopIteration

    def fun(x, a):
        return float(((x - a) ** 4).sum())

    settings = {"jac": lambda x, a: 4 * (x - a) ** 3, "hess": lambda x, a: np.diag(12 * (x - a) ** 2), "args": (2.0,)}
    stopped = optimize.minimize(fun, np.zeros(2), method=minimize_gns, callback=with_result, **settings)
    assert stopped.status == 99 and seen == sorted(seen, reverse=True) and len(seen) == 3
    path = []
    whole = optimize.minimize(fun, np.zeros(2), method=minimize_gns, callback=path.append, **settings)
    assert whole.success and len(path) == whole.nit and np.allclose(path[-1], whole.x)
    assert np.allclose(whole.x, 2.0, atol=1e-2)
