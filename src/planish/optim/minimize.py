"""Minimize a function of a vector by gradient-normalized Newton, in SciPy's form."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish._support import bad, require
from planish.optim.gradient_normalized import Point, Regrow, search
from planish.optim.regularized import Curvature, LowRank, Metric, Solver, check_solver, prepare
from planish.optim.structured import Composite

Hessian = Literal["exact", "ggn", "fisher", "diag", "zero"]
Vector = Tensor | npt.NDArray[np.floating[Any]]


def minimize_gns(
    fun: Callable[..., Any],
    x0: Any,  # noqa: ANN401  (what SciPy takes: anything that becomes a vector)
    args: tuple[Any, ...] = (),
    *,
    jac: Callable[..., Any] | bool | None = None,
    hess: Hessian | Callable[..., Any] | None = None,
    hessp: Callable[..., Any] | None = None,
    metric: Vector | None = None,
    gamma0: float = 1.0,
    gtol: float = 1e-6,
    maxiter: int = 1000,
    solver: Solver = "auto",
    regrow: Regrow = "first",
    callback: Callable[..., Any] | None = None,
    bounds: None = None,
    constraints: tuple[()] = (),
    tol: float | None = None,
) -> Any:  # noqa: ANN401  (scipy.optimize.OptimizeResult, which is loaded when it is called)
    """Minimize f by x - (H + |g| B / gamma)^-1 g, gamma found by trying; also `scipy.optimize.minimize(method=...)`.

    For a tensor `x0`, `fun` is called with tensors and derivatives are taken by `torch.func`. For an array `fun` is
    called with float64 arrays; `jac` is then needed, and `hess` is a callable, or "zero".

    Args:
        fun: f(x, *args).
        x0: Start: a vector, tensor or array.
        args: Further arguments of all callables.
        jac: Gradient; True where `fun` returns (f, gradient); None to differentiate. Default None.
        hess: "exact"; "ggn" or "fisher" for a `Composite`; "diag", the absolute diagonal; "zero", none; or a callable
            that returns a matrix, a vector (its diagonal), or a `LowRank`. Default "exact", or "zero" for arrays.
        hessp: hessp(x, v, *args), the product with H, instead of `hess`.
        metric: B, a positive definite matrix or a positive diagonal. Default the identity.
        gamma0: First radius, in units of B's norm, > 0. Default 1.
        gtol: Norm of the gradient, in B^-1, at which to stop, >= 0. Default 1e-6.
        maxiter: Most steps, >= 0. Default 1000.
        solver: "cholesky", "eigh" (one factorization a step), "cg" (products only; tolerance
            min(0.1, root of the gradient relative to the first)), "low_rank", or "auto" by the form of H.
        regrow: When the radius is doubled: after a "first" trial that passed, or "always" as in the paper.
        callback: Called after each step with `intermediate_result=` (x, fun), or with x, as SciPy does; may raise
            StopIteration.
        bounds: Not supported: None.
        constraints: Not supported: empty.
        tol: The same as `gtol`, as SciPy passes it.

    Returns:
        `OptimizeResult`: x, fun, jac, nit, nfev, njev, nhev, nsolve, success, status (0 converged, 1 maxiter, 2 no
        radius passes, 99 stopped by the callback), message, and history, a dict of arrays with an entry a step: fun,
        gradient_norm, gamma, regularization, nfev, nsolve.

    Raises:
        ValueError: An argument is out of range, f or its gradient is not finite at the start, H is not symmetric or not
            finite, or B is not positive definite.
        MissingExtra: SciPy is not installed.

    Example:
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> found = minimize_gns(rosenbrock, torch.tensor([-2.0, 2.0], dtype=torch.float64))
        >>> found.success, [round(v, 5) for v in found.x.tolist()]
        (True, [1.0, 1.0])
    """
    where = "minimize_gns"
    optimize = require("scipy.optimize", "scipy", where)
    gtol = gtol if tol is None else tol
    for name, value, least in (("gamma0", gamma0, 1e-300), ("gtol", gtol, 0.0)):
        if not isinstance(value, int | float) or not least <= value < math.inf:
            raise bad(where, name, f"a finite float {'> 0' if least else '>= 0'}", value)
    if isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 0:
        raise bad(where, "maxiter", "an int >= 0", maxiter)
    check_solver(where, solver)
    if regrow not in get_args(Regrow):
        raise bad(where, "regrow", f"one of {', '.join(get_args(Regrow))}", regrow)
    if bounds is not None:
        raise bad(where, "bounds", "None: the method is for free variables", bounds)
    if not isinstance(constraints, list | tuple) or constraints:
        raise bad(where, "constraints", "empty: the method is for free variables", constraints)
    oracle = _Oracle(where, fun, x0, args, jac, hess, hessp)
    measure = Metric(where, None if metric is None else torch.as_tensor(metric), oracle.start)
    here = oracle.evaluate(oracle.start)
    if not here.finite:
        raise bad(where, "x0", "where f and its gradient are finite", f"f = {here.value}")
    size = first = measure.dual_norm(here.gradient)
    gamma, solves, status = float(gamma0), 0, 1
    history: dict[str, list[float]] = {
        k: [] for k in ("fun", "gradient_norm", "gamma", "regularization", "nfev", "nsolve")
    }
    for _ in range(maxiter):
        if size <= gtol:
            break
        solve = prepare(where, oracle.curvature(here.x, products=solver == "cg"), measure, here.gradient, solver)
        tolerance = min(0.1, math.sqrt(size / first))
        found = search(here, oracle.evaluate, solve, measure, gamma, tolerance=tolerance, regrow=regrow)
        solves += found.solves
        if found.point is None:
            status = 2
            break
        here, gamma, size = found.point, found.following, measure.dual_norm(found.point.gradient)
        entry = (here.value, size, found.gamma, found.regularization, oracle.nfev, solves)
        for known, number in zip(history.values(), entry, strict=True):
            known.append(number)
        if callback is not None and _stops(callback, oracle.own(here.x), here.value, optimize):
            status = 99
            break
    if size <= gtol:
        status = 0
    messages = {0: "The gradient is small enough.", 1: "The iterations ran out.", 99: "The callback stopped it."}
    return optimize.OptimizeResult(
        x=oracle.own(here.x),
        fun=here.value,
        jac=oracle.own(here.gradient),
        nit=len(history["fun"]),
        nfev=oracle.nfev,
        njev=oracle.nfev,
        nhev=oracle.nhev,
        nsolve=solves,
        success=status == 0,
        status=status,
        message=messages.get(status, "No radius passes the test: f cannot be told smaller in this precision."),
        history={name: np.array(known) for name, known in history.items()},
    )


def _stops(callback: Callable[..., Any], x: Vector, value: float, optimize: Any) -> bool:  # noqa: ANN401
    try:
        if list(inspect.signature(callback).parameters) == ["intermediate_result"]:
            callback(intermediate_result=optimize.OptimizeResult(x=x, fun=value))
        else:
            callback(x)
    except StopIteration:
        return True
    return False


class _Oracle:
    """f, its gradient and H of tensors, whatever the caller's own kind of vector is."""

    def __init__(
        self,
        where: str,
        fun: Callable[..., Any],
        x0: Any,  # noqa: ANN401
        args: tuple[Any, ...],
        jac: Callable[..., Any] | bool | None,
        hess: Hessian | Callable[..., Any] | None,
        hessp: Callable[..., Any] | None,
    ) -> None:
        self.where, self.args, self.fun = where, args, fun
        self.arrays = not isinstance(x0, Tensor)
        start = torch.from_numpy(np.array(x0, dtype=np.float64)) if self.arrays else x0.detach().clone()
        if start.ndim != 1 or not len(start) or not start.is_floating_point():
            raise bad(where, "x0", "a vector of floats", f"shape {tuple(start.shape)}, {start.dtype}")
        self.start = start
        self.jac, self.hessp = jac, hessp
        self.hess = ("zero" if self.arrays else "exact") if hess is None else hess
        self.nfev = self.nhev = 0
        if self.arrays and (jac is None or jac is False):
            raise bad(where, "jac", "a callable, or True, where `x0` is no tensor", jac)
        if hessp is not None:
            if hess is not None:
                raise bad(where, "hessp", "None where `hess` is given", hessp)
        elif not callable(self.hess) and self.hess not in get_args(Hessian):
            raise bad(where, "hess", f"a callable or one of {', '.join(get_args(Hessian))}", hess)
        elif self.arrays and not callable(self.hess) and self.hess != "zero":
            raise bad(where, "hess", "a callable or 'zero' where `x0` is no tensor", hess)
        elif self.hess in ("ggn", "fisher") and not isinstance(fun, Composite):
            raise bad(where, "hess", "another where `fun` is no Composite", hess)

    def own(self, x: Tensor) -> Vector:
        """Return a copy in the caller's kind."""
        return x.numpy().copy() if self.arrays else x.clone()

    def _tensor(self, value: Any, shape: tuple[int, ...] | None = None) -> Tensor:  # noqa: ANN401
        out = torch.as_tensor(value).detach().to(self.start)
        if shape is not None and out.shape != shape:
            raise bad(self.where, "jac", f"a function that gives {shape[0]} numbers", tuple(out.shape))
        return out

    def _one(self, value: Any) -> float:  # noqa: ANN401
        if torch.as_tensor(value).numel() != 1:
            raise bad(self.where, "fun", "a function that gives one number", value)
        return float(value.detach() if isinstance(value, Tensor) else value)

    def evaluate(self, x: Tensor) -> Point:
        """Return f and its gradient."""
        self.nfev += 1
        own, shape = self.own(x), tuple(self.start.shape)
        if self.jac is True:
            value, gradient = self.fun(own, *self.args)
            return Point(x, self._one(value), self._tensor(gradient, shape))
        if callable(self.jac):
            return Point(x, self._one(self.fun(own, *self.args)), self._tensor(self.jac(own, *self.args), shape))
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            out = self.fun(leaf, *self.args)
            value = self._one(out)
            if not out.requires_grad:
                raise bad(self.where, "fun", "differentiable where `jac` is None", "a value without a graph")
            (gradient,) = torch.autograd.grad(out.reshape(()), leaf)
        return Point(x, value, gradient)

    def _scalar(self, x: Tensor) -> Tensor:
        out: Tensor = (self.fun(x, *self.args)[0] if self.jac is True else self.fun(x, *self.args)).reshape(())
        return out

    def curvature(self, x: Tensor, *, products: bool) -> Curvature:
        """Return H at x, as a product only where that is asked for."""
        self.nhev += 1
        own = self.own(x)
        if self.hessp is not None:
            times = self.hessp
            return lambda v: self._tensor(times(own, self.own(v), *self.args))
        if callable(self.hess):
            found = self.hess(own, *self.args)
            return found if isinstance(found, LowRank) else self._tensor(found)
        if self.hess == "zero":
            return torch.zeros_like(x)
        if self.hess == "exact" and products:
            back = torch.func.vjp(torch.func.grad(self._scalar), x)[1]  # H is symmetric: H'v is H v

            def product(v: Tensor) -> Tensor:
                out: Tensor = back(v)[0].detach()
                return out

            return product
        if self.hess in ("exact", "diag"):
            matrix: Tensor = torch.func.jacrev(torch.func.grad(self._scalar))(x).detach()
            return matrix if self.hess == "exact" else matrix.diagonal().abs()
        if not isinstance(self.fun, Composite):
            raise bad(self.where, "hess", "another where `fun` is no Composite", self.hess)
        if self.hess == "fisher":
            return self.fun.fisher(x)
        return self.fun.gauss_newton_product(x) if products else self.fun.gauss_newton(x)
