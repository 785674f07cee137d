"""Gradient-normalized Newton as an optimizer of torch: all derivatives are taken from what the closure returns."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from planish._support import bad, logger
from planish.optim.gradient_normalized import Point, Regrow, search
from planish.optim.normalized import Params
from planish.optim.regularized import Curvature, LowRank, Metric, Solver, check_solver, prepare

Hessian = Literal["exact", "ggn", "fisher", "diag", "zero"]
Evaluation = Callable[[], Tensor | tuple[Tensor, Tensor]]


class GradNormNewton(Optimizer):
    """Step by (H + lambda I)^-1 gradient, lambda = |gradient| / gamma, with gamma found by trying: nothing to tune.

    The closure returns the loss, and neither clears gradients nor calls `backward`; it is called at every point that is
    tried, two or three a step, and must be the same function within a step (one batch, no dropout).

    Args:
        params: Parameters, or one group of them; all of one dtype and device. float64 where accuracy below a
            thousandth matters.
        gamma0: First radius, in the units of the parameters, > 0. Default 1.
        hessian: "exact", products by differentiating twice. "ggn", Gauss-Newton, positive semidefinite for a loss
            convex in the model's outputs; the closure returns (loss, outputs), the loss computed from `outputs` alone.
            "fisher", of the gradients of examples; the closure returns one loss an example, whose mean is minimized.
            "diag", the absolute diagonal of the exact one, for a few thousand parameters. "zero", none: gradient
            descent with a step found by trying. Default "exact".
        solver: "cg", conjugate gradients; "cholesky" and "eigh", dense, to a few thousand parameters; "low_rank", for
            "fisher", at the cost of the batch size cubed. "auto" is "cg" for "exact" and "ggn", "low_rank" for
            "fisher".
        cg_iterations: Most products a step, >= 1. Each keeps a vector of the parameters' size. Default 100.
        regrow: When the radius is doubled: after a "first" trial that passed, or "always" as in the paper.
        trials: Most radii a step, >= 1. Default 40.

    Raises:
        ValueError: An argument is out of range, there are several groups, or parameters of several dtypes or devices.

    Example:
        >>> x = torch.tensor([-2.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = GradNormNewton([x], solver="cholesky")
        >>> for _ in range(60):
        ...     _ = optimizer.step(lambda: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)
        >>> [round(v, 6) for v in x.tolist()]
        [1.0, 1.0]
    """

    def __init__(
        self,
        params: Params,
        gamma0: float = 1.0,
        *,
        hessian: Hessian = "exact",
        solver: Solver = "auto",
        cg_iterations: int = 100,
        regrow: Regrow = "first",
        trials: int = 40,
    ) -> None:
        where = "GradNormNewton"
        if not isinstance(gamma0, int | float) or not 0 < gamma0 < math.inf:
            raise bad(where, "gamma0", "a finite float > 0", gamma0)
        if hessian not in get_args(Hessian):
            raise bad(where, "hessian", f"one of {', '.join(get_args(Hessian))}", hessian)
        check_solver(where, solver)
        if solver == "low_rank" and hessian != "fisher":
            raise bad(where, "solver", "'low_rank' only where hessian='fisher'", solver)
        for name, value in (("cg_iterations", cg_iterations), ("trials", trials)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(where, name, "an int >= 1", value)
        if regrow not in get_args(Regrow):
            raise bad(where, "regrow", f"one of {', '.join(get_args(Regrow))}", regrow)
        settings = {"hessian": hessian, "solver": solver, "cg_iterations": cg_iterations, "regrow": regrow}
        # `scale` is the norm of the first gradient: what the tolerance of products is relative to
        super().__init__(params, {"gamma": float(gamma0), "scale": 0.0, "trials": trials, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the only group.

        Args:
            param_group: As for any optimizer of torch.

        Raises:
            ValueError: There is a group already, or its parameters are of several dtypes or devices, or complex.
        """
        if self.param_groups:
            raise bad("GradNormNewton", "params", "one group: a step is one system of equations", "a second group")
        super().add_param_group(param_group)
        params = self.param_groups[0]["params"]
        kinds = {(p.dtype, p.device) for p in params}
        if len(kinds) > 1 or params[0].is_complex():
            raise bad("GradNormNewton", "params", "real, of one dtype and device", sorted(map(str, kinds)))

    @torch.no_grad()
    def step(self, closure: Evaluation) -> Tensor:  # type: ignore[override]
        """Move the parameters in place to the first point tried that passes the test; `grad` is not touched.

        Where no radius passes, which is so when f is at its smallest up to rounding, they stay.

        Args:
            closure: Returns the loss, (loss, outputs) or the losses of examples, as `hessian` asks; no `backward`.

        Returns:
            The loss before the move.

        Raises:
            ValueError: The closure returns something else, calls `backward`, or the loss or its gradient is not finite
                where the step starts.
        """
        where, group = "GradNormNewton.step", self.param_groups[0]
        if not callable(closure):
            raise bad(where, "closure", "a callable that returns the loss", closure)
        params: list[Tensor] = [p for p in group["params"] if p.requires_grad]
        if not params:
            raise bad(where, "params", "parameters of which at least one requires a gradient", "none")
        graph = _Graph(where, closure, params, group["hessian"])
        here = graph.point()
        if not here.finite:
            raise bad(where, "closure", "a function finite where the step starts", f"a loss of {here.value}")
        metric = Metric(where, None, here.gradient)
        size = metric.dual_norm(here.gradient)
        if size == 0:
            return graph.loss.detach()
        group["scale"] = group["scale"] or size
        solve = prepare(where, graph.curvature(), metric, here.gradient, group["solver"], group["cg_iterations"])

        def evaluate(x: Tensor) -> Point:
            _write(x, params)
            return _Graph(where, closure, params, "zero" if group["hessian"] != "fisher" else "losses").point()

        try:
            tolerance = min(0.1, math.sqrt(size / group["scale"]))
            options = {"trials": group["trials"], "regrow": group["regrow"]}
            found = search(here, evaluate, solve, metric, group["gamma"], tolerance=tolerance, **options)
        except BaseException:
            _write(here.x, params)
            raise
        _write(here.x if found.point is None else found.point.x, params)
        group["gamma"] = found.following
        if found.point is None:
            logger.info("%s: no radius passed the test at a gradient of norm %.3g; the parameters stay.", where, size)
        return graph.loss.detach()


class _Graph:
    """One evaluation of the closure, and the derivatives that its graph gives.

    Its products with the Hessian are gone once the parameters are written to; the Krylov basis needs none then.
    """

    def __init__(self, where: str, closure: Evaluation, params: list[Tensor], kind: str) -> None:
        self.where, self.params, self.kind = where, params, kind
        with torch.enable_grad():
            out = closure()
            self.outputs: Tensor | None = None
            if isinstance(out, tuple) and len(out) == 2:
                out, self.outputs = out
            elif kind == "ggn":
                raise bad(where, "closure", "a function that returns (loss, outputs) for hessian='ggn'", type(out))
            if not isinstance(out, Tensor) or not out.requires_grad:
                raise bad(where, "closure", "a function that returns the loss with its graph", out)
            if kind in ("fisher", "losses"):
                if out.ndim != 1:
                    what = "a function that returns one loss an example, a vector, for hessian='fisher'"
                    raise bad(where, "closure", what, tuple(out.shape))
            elif out.numel() != 1:
                raise bad(where, "closure", "a function that returns one number", tuple(out.shape))
            self.losses, self.loss = out, out.mean()
            again = kind in ("exact", "diag", "ggn", "fisher")
            try:
                self.gradient = self._flat(self._grad(self.loss, params, again=again))
            except RuntimeError as error:
                if "second time" not in str(error):
                    raise
                raise bad(where, "closure", "a function that does not call backward", "a graph that is freed") from None

    def _grad(
        self, of: Tensor, by: list[Tensor], weights: Tensor | None = None, *, again: bool = True, batch: bool = False
    ) -> list[Tensor]:
        found = torch.autograd.grad(
            of,
            by,
            weights,
            create_graph=again and not batch,
            retain_graph=again,
            allow_unused=True,
            is_grads_batched=batch,
        )
        lead = () if weights is None or not batch else weights.shape[:1]
        return [p.new_zeros((*lead, *p.shape)) if g is None else g for g, p in zip(found, by, strict=True)]

    def _flat(self, tensors: list[Tensor], lead: int = 0) -> Tensor:
        return torch.cat([t.flatten(lead) for t in tensors], dim=lead)

    def point(self) -> Point:
        x = self._flat([p.detach() for p in self.params])
        return Point(x, float(self.loss.detach()), self.gradient.detach())

    def curvature(self) -> Curvature:
        """Return H in the form that costs least."""
        g = self.gradient
        if self.kind == "zero":
            return torch.zeros_like(g.detach())
        with torch.enable_grad():
            if self.kind == "fisher":
                weights = torch.eye(len(self.losses), dtype=g.dtype, device=g.device)
                rows = self._flat(self._grad(self.losses, self.params, weights, batch=True), 1)
                return LowRank(rows.detach() / math.sqrt(len(self.losses)))
            if self.kind == "diag":
                if not g.requires_grad:  # the loss is linear
                    return torch.zeros_like(g)
                weights = torch.eye(len(g), dtype=g.dtype, device=g.device)
                rows = self._flat(self._grad(g, self.params, weights, batch=True), 1)
                return rows.detach().diagonal().abs()
        return self._gauss_newton() if self.kind == "ggn" else self._hessian

    def _hessian(self, v: Tensor) -> Tensor:
        if not self.gradient.requires_grad:
            return torch.zeros_like(v)
        with torch.enable_grad():
            found = torch.autograd.grad(self.gradient, self.params, v, retain_graph=True, allow_unused=True)
        pairs = zip(found, self.params, strict=True)
        return self._flat([torch.zeros_like(p) if t is None else t for t, p in pairs]).detach()

    def _gauss_newton(self) -> Callable[[Tensor], Tensor]:
        z = self.outputs
        if z is None or not z.requires_grad:
            raise bad(self.where, "closure", "(loss, outputs) with the graph of both", z)
        with torch.enable_grad():
            (outer,) = self._grad(self.loss, [z])
            w = torch.zeros_like(z, requires_grad=True)
            turned = self._flat(self._grad(z, self.params, w))  # J'w, linear in w: its derivative is J

        def product(v: Tensor) -> Tensor:
            with torch.enable_grad():
                (moved,) = torch.autograd.grad(turned, [w], v, retain_graph=True)
                if not outer.requires_grad:  # the loss is linear in the outputs
                    return torch.zeros_like(v)
                (bent,) = torch.autograd.grad(outer, [z], moved, retain_graph=True)
                return self._flat(self._grad(z, self.params, bent, again=True)).detach()

        return product


def _write(x: Tensor, params: list[Tensor]) -> None:
    at = 0
    for p in params:
        p.copy_(x[at : at + p.numel()].view_as(p))
        at += p.numel()
