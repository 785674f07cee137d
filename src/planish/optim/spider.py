r"""SPIDER: a stochastic gradient that is corrected by differences instead of drawn anew.

Small batches are noisy, but the *difference* of a batch's gradients at two near points is not. Every q steps a large
batch gives an anchor; between anchors the same small batch is evaluated here and at the last point:

    v_t = grad f_{S1}(w_t)                                          t divisible by q
    v_t = v_{t-1} + grad f_{S2}(w_t) - grad f_{S2}(w_{t-1})         otherwise
    w_{t+1} = w_t - gamma v_t / ||v_t||^beta

==============  ================================  ================================
paper           here                              range
==============  ================================  ================================
gamma           ``lr``                            > 0; of the order of epsilon
q               ``q``                             >= 1; of the order of 1 / epsilon
S1              ``step(closure, anchor)``         of the order of epsilon^-2
S2              ``step(closure, ...)``            of the order of 1 / epsilon
==============  ================================  ================================

Count gradients honestly: an inner step costs 2 S2, although the authors' programs count S2.
When to use: noisy gradients, and a large batch is affordable now and then. See ``docs/jobs/optim.md``.

Reference:
    Chen et al., Generalized-Smooth Nonconvex Optimization is As Efficient As Smooth Nonconvex Optimization, 2023.
    https://arxiv.org/abs/2303.02854
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from planish._support import bad
from planish.optim.normalized import Closure, Params, check_settings, evaluated, global_norm, normalized_step
from planish.optim.normalized import refuse_sparse as _refuse_sparse


class Spider(Optimizer):
    """Descend along a variance-reduced gradient, divided by a power of its norm; the norm is global.

    Args:
        params: Parameters or groups of them, as for any optimizer of torch.
        lr: The step gamma, > 0; with beta = 1 the length of every move.
        q: Steps from one anchor to the next, >= 1; 1 is `NormalizedGD` on the anchors.
        beta: Power of the norm, in [0, 1]. Default 1.
        eps: Least norm divided by, > 0. Default 1e-12.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> target = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> w = torch.tensor([3.0, -4.0], requires_grad=True)
        >>> optimizer = Spider([w], lr=0.05, q=8)
        >>> def loss(rows):
        ...     optimizer.zero_grad()
        ...     value = ((w - target[rows]) ** 2).sum(1).mean()
        ...     value.backward()
        ...     return value
        >>> for t in range(120):
        ...     few = slice(t % 8 * 8, t % 8 * 8 + 8)
        ...     _ = optimizer.step(lambda: loss(few), lambda: loss(slice(None)))
        >>> bool((w - target.mean(0)).norm() < 0.06)
        True
    """

    def __init__(self, params: Params, lr: float, q: int, beta: float = 1.0, eps: float = 1e-12) -> None:
        if isinstance(q, bool) or not isinstance(q, int) or q < 1:
            raise bad("Spider", "q", "an int >= 1", q)
        super().__init__(params, {"lr": lr, "q": q, "beta": beta, "eps": eps, "t": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own step and beta; the next step takes an anchor.

        Args:
            param_group: As for any optimizer of torch.

        Raises:
            ValueError: A setting of the group is out of range.
        """
        check_settings("Spider", {**self.defaults, **param_group})
        super().add_param_group(param_group)
        for group in self.param_groups:
            group["t"] = 0  # the anchors are those of all groups together

    @property
    def anchors(self) -> bool:
        """Whether the next step takes an anchor; prepare the large batch then."""
        return bool(self.param_groups[0]["t"] % self.param_groups[0]["q"] == 0)

    @torch.no_grad()
    def step(self, closure: Closure, anchor_closure: Closure | None = None) -> Any:  # type: ignore[override]  # noqa: ANN401  (as torch has it)
        """Move the parameters in place.

        Between anchors `closure` is called twice, the second time with the parameters of the step before; it must be
        the same function both times: the same batch, and the same noise where the model is random. The parameters come
        back bit for bit before they move. `grad` holds the gradient of the last evaluation.

        Args:
            closure: Clears the gradients, computes the loss of a small batch and its gradients, and returns the loss.
            anchor_closure: The same with a large batch; called instead where `anchors`. Default `closure`.

        Returns:
            The loss at the point before the move.

        Raises:
            ValueError: No closure is given, or a gradient is sparse or not finite.
        """
        if closure is None:
            raise bad("Spider.step", "closure", "a callable: gradients are needed at two points", closure)
        params = [p for group in self.param_groups for p in group["params"]]
        if self.anchors:
            loss = evaluated(closure if anchor_closure is None else anchor_closure)
            estimates = _gradients(params)
        else:
            loss = evaluated(closure)
            estimates = _gradients(params)
            here = [p.clone() for p in params]
            try:
                for p in params:
                    p.copy_(self.state[p]["previous"])
                evaluated(closure)
            finally:  # whatever the closure does, the parameters stay the user's
                for p, kept in zip(params, here, strict=True):
                    p.copy_(kept)
            for p, v, g in zip(params, estimates, _gradients(params), strict=True):
                v.sub_(g).add_(self.state[p]["estimate"])
        norm = global_norm("Spider.step", estimates)
        known = dict(zip(params, estimates, strict=True))
        for group in self.param_groups:
            factor = normalized_step(group, norm)
            for p in group["params"]:
                self.state[p]["previous"] = p.clone()
                self.state[p]["estimate"] = known[p]
                p.add_(known[p], alpha=-factor)
            group["t"] += 1
        return loss


def _gradients(params: list[Tensor]) -> list[Tensor]:
    """Return copies of the gradients; a parameter that the loss does not use has 0."""
    _refuse_sparse("Spider.step", params)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
