"""Training on forces: a density whose gradient is to be the force field's, not only its height the data's."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.flows.distribution import FlowDistribution


class ForceMatchingLoss(NamedTuple):
    """The loss and its parts, scalars each.

    Attributes:
        total: Weighted mean of the parts; call `.backward()` on it.
        nll: Negative log-likelihood, nats.
        force_mse: Mean square of the components' errors, (kT per unit of x)^2.
        kl: Reverse Kullback-Leibler divergence up to a constant, nats; 0 where it has no weight.

    Example:
        >>> loss = ForceMatchingLoss(*torch.tensor([1.5, 1.0, 2.0, 0.0]))
        >>> loss.total.item()
        1.5
    """

    total: Tensor
    nll: Tensor
    force_mse: Tensor
    kl: Tensor


def force_matching_loss(
    density: FlowDistribution,
    x: Float[Tensor, "*b d"],
    forces: Float[Tensor, "*b d"],
    *,
    nll_weight: int | float = 0.999,
    force_weight: int | float = 0.001,
    kl_weight: int | float = 0.0,
    energy: Callable[[Tensor], Tensor] | None = None,
    n_samples: int = 128,
    generator: torch.Generator | None = None,
) -> ForceMatchingLoss:
    """Return how badly a density explains data, and its forces the data's forces.

    L = w_n E[-log p(x)] + w_f E|d log p / dx - F|^2 (mean over components) + w_k E_q[u + log q], the weights divided by
    their sum. A force weight of 0.01 can cost likelihood; 0.001 rarely does. Outlying forces rule a mean of squares:
    clip gradients.

    Args:
        density: What a `SmoothFlow` returns.
        x: Data.
        forces: Minus the gradient of the reduced energy at x, in kT per unit of x: what a force field says, over kT.
        nll_weight: w_n, >= 0; default 0.999.
        force_weight: w_f, >= 0; default 0.001.
        kl_weight: w_k, >= 0; default 0. Above, the density's samples are compared with `energy`.
        energy: The reduced energy u(x), in kT, differentiable; needed if `kl_weight` is above 0.
        n_samples: Samples drawn for that part, >= 1; default 128.
        generator: Source of these.

    Returns:
        The loss and its parts.

    Raises:
        ValueError: Weights are negative or all 0; forces have another shape or are not finite; x is not in the box.

    Example:
        >>> from planish.flows import SmoothFlow
        >>> x = torch.rand(16, 2)
        >>> loss = force_matching_loss(SmoothFlow(2)(), x, torch.zeros(16, 2))
        >>> loss.total.requires_grad, bool(loss.force_mse > 0)
        (True, True)
    """
    weights = {"nll_weight": nll_weight, "force_weight": force_weight, "kl_weight": kl_weight}
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise bad("force_matching_loss", name, "at least 0", weight)
    whole = sum(weights.values())
    if whole == 0:
        raise bad("force_matching_loss", "nll_weight", "above 0 where the other weights are 0", nll_weight)
    if forces.shape != x.shape:
        raise bad("force_matching_loss", "forces", f"of the shape of x, {tuple(x.shape)}", tuple(forces.shape))
    if not bool(torch.isfinite(forces).all()):
        raise bad("force_matching_loss", "forces", "finite", "NaN or infinity")
    if kl_weight and energy is None:
        raise bad("force_matching_loss", "energy", "given where kl_weight is above 0", energy)
    if n_samples < 1:
        raise bad("force_matching_loss", "n_samples", "at least 1", n_samples)
    zero = x.new_zeros(())
    force_mse = kl = zero
    if force_weight:
        keep = torch.is_grad_enabled()
        with torch.enable_grad():  # a validation loss has forces too
            at = x.detach().requires_grad_()
            log_prob = density.log_prob(at)
            (made,) = torch.autograd.grad(log_prob.sum(), at, create_graph=keep)
        force_mse = (made - forces).square().mean()
    else:
        log_prob = density.log_prob(x)
    nll = -log_prob.mean() if torch.is_grad_enabled() else -log_prob.detach().mean()
    if kl_weight and energy is not None:
        drawn, log_q = density.rsample_and_log_prob((n_samples,), generator)
        kl = (energy(drawn) + log_q).mean()
    total = (nll_weight * nll + force_weight * force_mse + kl_weight * kl) / whole
    return ForceMatchingLoss(total, nll, force_mse, kl)
