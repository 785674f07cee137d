"""Finite hidden Markov models, and their smoothing laws by forward-backward: exact."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from planish._support import bad
from planish.statespace.models import Law, StateSpaceModel
from planish.statespace.particles import check_series, log_observation


class FiniteHMM(StateSpaceModel):
    """A chain on states 0 ... K-1, seen as a normal number whose mean and scale the state decides.

    Probabilities are kept as logits and scales as logarithms; these and the means are parameters.

    Args:
        initial_probs: (K,), positive, sum 1.
        transition_probs: (K, K), positive rows of sum 1.
        means: Of the observation in each state, (K,).
        scales: Standard deviations, > 0, (K,).

    Raises:
        ValueError: Shapes do not fit, or a number is out of range.

    Example:
        >>> sticky = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> model = FiniteHMM(torch.tensor([0.5, 0.5]), sticky, torch.tensor([-1.0, 1.0]), torch.ones(2))
        >>> model.transition(1, torch.tensor([0])).log_prob(torch.tensor([1])).exp()
        tensor(0.1000, grad_fn=<ExpBackward0>)
    """

    def __init__(
        self,
        initial_probs: Float[Tensor, "k"],
        transition_probs: Float[Tensor, "k k"],
        means: Float[Tensor, "k"],
        scales: Float[Tensor, "k"],
    ) -> None:
        super().__init__()
        k = len(initial_probs)
        parts = {"initial_probs": initial_probs, "transition_probs": transition_probs, "means": means, "scales": scales}
        for name, part in parts.items():
            shape = (k, k) if name == "transition_probs" else (k,)
            if tuple(part.shape) != shape:
                raise bad("FiniteHMM", name, f"of shape {shape}", tuple(part.shape))
        for name, part in (("initial_probs", initial_probs), ("transition_probs", transition_probs)):
            if (part <= 0).any() or not torch.allclose(part.sum(-1), part.new_ones(())):
                raise bad("FiniteHMM", name, "positive with sum 1", part.tolist())
        if (scales <= 0).any():
            raise bad("FiniteHMM", "scales", "above 0", scales.tolist())
        self.initial_logits = nn.Parameter(initial_probs.log())
        self.transition_logits = nn.Parameter(transition_probs.log())
        self.means, self.log_scales = nn.Parameter(means.clone()), nn.Parameter(scales.log())

    def initial(self) -> Law:
        """Return the law of the first state, a whole number in an axis of its own."""
        return Independent(Categorical(logits=self.initial_logits[None], validate_args=False), 1)

    def transition(self, t: int, x: Tensor) -> Law:
        """Return the row of the transition matrix."""
        return Independent(Categorical(logits=self.transition_logits[x], validate_args=False), 1)

    def observation(self, t: int, x: Tensor) -> Law:
        """Return the normal law of the state."""
        return Independent(Normal(self.means[x], self.log_scales[x].exp(), validate_args=False), 1)


@dataclass(frozen=True)
class FiniteSmoothing:
    """Exact smoothing laws of a finite model; a leading axis for several series.

    Attributes:
        loglik: log p(y).
        marginals: P(X_t = i | y), (n_steps, K).
        pairs: P(X_t = i, X_{t+1} = j | y), (n_steps - 1, K, K).

    Example:
        >>> half = torch.full((2, 2), 0.5)
        >>> model = FiniteHMM(half[0], half, torch.tensor([-1.0, 1.0]), torch.ones(2))
        >>> found: FiniteSmoothing = forward_backward(model, torch.tensor([[0.0], [3.0]]))
        >>> [round(p, 3) for p in found.marginals[:, 1].tolist()]
        [0.5, 0.998]
    """

    loglik: Tensor
    marginals: Tensor
    pairs: Tensor


def forward_backward(model: FiniteHMM, y: Float[Tensor, "..."]) -> FiniteSmoothing:
    """Return the exact smoothing laws of a finite model; differentiable in its parameters.

    Args:
        model: The model.
        y: Observations (n_steps, 1), or several series in front; NaN where missing.

    Raises:
        ValueError: `y` is no series.

    Example:
        >>> half = torch.full((2, 2), 0.5)
        >>> model = FiniteHMM(half[0], half, torch.tensor([-1.0, 1.0]), torch.ones(2))
        >>> found = forward_backward(model, torch.tensor([[0.0], [3.0]]))
        >>> found.pairs.shape, bool(torch.isclose(found.pairs.sum(), torch.tensor(1.0)))
        (torch.Size([1, 2, 2]), True)
    """
    series, single = check_series("forward_backward", y)
    k = len(model.means)
    states = torch.arange(k, device=series.device)[:, None]
    step = model.transition_logits.log_softmax(-1)
    log_g = torch.stack([log_observation(model, t, states, series[:, t, None]) for t in range(series.shape[1])], 1)
    forward = [model.initial_logits.log_softmax(-1) + log_g[:, 0]]
    for t in range(1, series.shape[1]):
        forward.append((forward[-1][..., None] + step).logsumexp(-2) + log_g[:, t])
    loglik = forward[-1].logsumexp(-1)
    backward = [torch.zeros_like(forward[0])]
    for t in range(series.shape[1] - 1, 0, -1):
        backward.append((step + (log_g[:, t] + backward[-1])[:, None]).logsumexp(-1))
    alpha, beta = torch.stack(forward, 1), torch.stack(backward[::-1], 1)
    marginals = (alpha + beta - loglik[:, None, None]).exp()
    ahead = (log_g + beta)[:, 1:, None]
    pairs = (alpha[:, :-1, :, None] + step + ahead - loglik[:, None, None, None]).exp()
    parts = (loglik, marginals, pairs)
    return FiniteSmoothing(*(part[0] for part in parts) if single else parts)
