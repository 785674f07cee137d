r"""Normalized gradient descent: steps that stay sane where curvature grows with the gradient.

Where the Hessian may be as large as a power alpha of the gradient, a step that is safe at the start crawls at the end,
and one that is fast at the end explodes at the start. Dividing by a power of the gradient's norm mends both:

    w <- w - gamma m / max(||m||, c)^beta,        m <- mu m + (1 - mu) grad f(w)

beta = 0 is gradient descent, beta = 1 moves by gamma each time, c > 0 with beta = 1 is clipping. The norm is that of
all parameters together. With `lr="auto"` the length is instead the one whose decrease is guaranteed to be largest.

==============  ================================  ================================
paper           here                              range
==============  ================================  ================================
gamma           ``lr``                            > 0, or "auto"
beta            ``beta``                          [alpha, 1] for the theory; 1
c               ``clip``                          >= 0; 0
mu              ``momentum``                      [0, 1); 0
==============  ================================  ================================

Differs from the paper: `lr="auto"` is ours, and needs neither a target accuracy nor a choice of beta.
When to use: polynomial, exponential or robust losses, and losses of sequence models. See ``docs/jobs/optim.md``.

Reference:
    Chen et al., Generalized-Smooth Nonconvex Optimization is As Efficient As Smooth Nonconvex Optimization, 2023.
    https://arxiv.org/abs/2303.02854
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from planish._support import bad, warn_once
from planish.optim.generalized import GeneralizedSmoothness

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Closure = Callable[[], Tensor | float]


class NormalizedGD(Optimizer):
    """Descend along the gradient divided by a power of its norm; the norm is global, over all groups.

    Args:
        params: Parameters or groups of them, as for any optimizer of torch.
        lr: The step gamma, > 0, in units of (length) (gradient)^(beta - 1); or "auto", the length of the largest
            guaranteed decrease, which needs `smoothness`, leaves `beta` aside and takes neither `clip` nor `momentum`.
            The groups' `lr` is then a factor of that length, 1, for schedulers.
        beta: Power of the norm, in [0, 1]; 0 is SGD, bit for bit. Default 1.
        clip: Norms below it are taken as it, >= 0; with beta = 1 this is SGD with step lr / clip on gradients clipped
            at `clip`. Default 0.
        momentum: Share of the old direction, in [0, 1); the first direction is the gradient. Default 0.
        eps: Least norm divided by, > 0: a gradient of 0 moves nothing. Default 1e-12.
        smoothness: What is known of the function; required by "auto", else only to warn of a `beta` below its alpha.

    Raises:
        ValueError: An argument is out of range; in `step`, a gradient that must be measured is sparse or not finite
            (parameters and state are then unchanged).

    Example:
        >>> w = torch.tensor([3.0, -4.0], requires_grad=True)
        >>> optimizer = NormalizedGD([w], lr=0.5)
        >>> (w**2).sum().backward()
        >>> _ = optimizer.step()
        >>> [round(x, 6) for x in w.tolist()]  # half a unit nearer to the origin
        [2.7, -3.6]
    """

    def __init__(
        self,
        params: Params,
        lr: float | Literal["auto"],
        beta: float = 1.0,
        clip: float = 0.0,
        momentum: float = 0.0,
        eps: float = 1e-12,
        *,
        smoothness: GeneralizedSmoothness | None = None,
    ) -> None:
        where, auto = "NormalizedGD", lr == "auto"
        if auto:
            if smoothness is None:
                raise bad(where, "smoothness", "given where lr='auto'", smoothness)
            lr = 1.0  # times the length, so that schedulers of torch work
        elif not isinstance(lr, int | float) or not 0 < lr < math.inf:
            raise bad(where, "lr", "a finite float > 0 or 'auto'", lr)
        elif smoothness is not None and beta < smoothness.alpha:
            warn_once(f"{where}: beta = {beta:.4g} is below alpha = {smoothness.alpha:.4g}; no rate is known there.")
        settings = {"lr": lr, "beta": beta, "clip": clip, "momentum": momentum, "eps": eps, "auto": auto}
        # plain numbers: a state that is stored holds no class of ours
        constants = None if smoothness is None else (smoothness.alpha, smoothness.L0, smoothness.L1)
        super().__init__(params, {**settings, "smoothness": constants})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own step, beta, clip and momentum; the norm remains that of all groups.

        Args:
            param_group: As for any optimizer of torch.

        Raises:
            ValueError: A setting of the group is out of range.
        """
        settings = {**self.defaults, **param_group}
        check_settings("NormalizedGD", settings)
        if settings["auto"] and (settings["clip"] or settings["momentum"]):
            name = "clip" if settings["clip"] else "momentum"
            raise bad(
                "NormalizedGD", name, "0 where lr='auto': the guarantee is for the plain gradient", settings[name]
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # noqa: ANN401  (as torch has it)
        """Move the parameters in place.

        Args:
            closure: Computes the loss and its gradients again; default: gradients are there.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: A gradient is sparse, or its norm is needed and not finite.
        """
        loss = evaluated(closure)
        where = "NormalizedGD.step"
        moves: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            refuse_sparse(where, params)
            mu = group["momentum"]
            directions = [p.grad for p in params]
            if mu:
                buffers = [self.state[p].get("momentum_buffer") for p in params]
                # this order of operations is that of SGD with dampening = momentum, bit for bit
                directions = [
                    g.clone() if m is None else m.mul(mu).add_(g, alpha=1 - mu)
                    for g, m in zip(directions, buffers, strict=True)
                ]
            moves.append((group, params, directions))
        every = [m for _, _, directions in moves for m in directions]
        wanted = any(group["auto"] or group["beta"] for group, _, _ in moves)
        norm = global_norm(where, every) if wanted else math.nan
        for group, params, directions in moves:
            if group["auto"]:
                length = GeneralizedSmoothness(*group["smoothness"]).step_length(norm)
                factor = group["lr"] * length / max(norm, group["eps"])
            else:
                factor = normalized_step(group, norm)
            for p, m in zip(params, directions, strict=True):
                if group["momentum"]:
                    self.state[p]["momentum_buffer"] = m
                p.add_(m, alpha=-factor)
        return loss


def check_settings(where: str, settings: dict[str, Any]) -> None:
    """Refuse a group whose settings are out of range.

    Raises:
        ValueError: One is.
    """
    lr = settings["lr"]
    if not (isinstance(lr, int | float) and 0 < lr < math.inf):
        raise bad(where, "lr", "a finite float > 0", lr)
    if not 0 <= settings["beta"] <= 1:
        raise bad(where, "beta", "a float in [0, 1]", settings["beta"])
    if not 0 <= settings.get("clip", 0.0) < math.inf:
        raise bad(where, "clip", "a finite float >= 0", settings["clip"])
    if not 0 <= settings.get("momentum", 0.0) < 1:
        raise bad(where, "momentum", "a float in [0, 1)", settings["momentum"])
    if not 0 < settings["eps"] < math.inf:
        raise bad(where, "eps", "a finite float > 0", settings["eps"])


def evaluated(closure: Closure | None) -> Any:  # noqa: ANN401  (whatever the user's closure gives)
    """Call a closure with gradients switched on."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def refuse_sparse(where: str, params: Sequence[Tensor]) -> None:
    """Refuse sparse gradients.

    Raises:
        ValueError: A parameter has one.
    """
    for p in params:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise bad(
                where, "grad", "dense; use an embedding with sparse=False", f"a gradient of layout {p.grad.layout}"
            )


def global_norm(where: str, tensors: Sequence[Tensor]) -> float:
    """Return the norm of all tensors together, in float64, so that neither 1e-30 nor 1e30 is lost.

    Raises:
        ValueError: It is not finite.
    """
    squares: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        wide = torch.complex128 if t.is_complex() else torch.float64
        square = torch.linalg.vector_norm(t.detach().to(wide)).square()
        squares.setdefault(t.device, []).append(square)
    norm = math.sqrt(sum(float(torch.stack(parts).sum()) for parts in squares.values()))  # one wait a device
    if not math.isfinite(norm):
        raise bad(where, "grad", "finite", f"a global norm of {norm}")
    return norm


def normalized_step(group: dict[str, Any], norm: float) -> float:
    """Return lr / max(norm, clip, eps)^beta."""
    if not group["beta"]:
        return float(group["lr"])
    return float(group["lr"] / max(norm, group.get("clip", 0.0), group["eps"]) ** group["beta"])
