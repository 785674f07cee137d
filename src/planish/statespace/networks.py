"""A recurrent network of chaotic rates, seen through heavy-tailed noise."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Independent, Normal, StudentT

from planish._support import bad
from planish.statespace.models import Law, StateSpaceModel


class ChaoticRNN(StateSpaceModel):
    """X_t = X_{t-1} + (step / tau) (-X_{t-1} + gain W tanh X_{t-1}) + noise, every unit seen with Student-t noise.

    The connections W and the logarithm of the noise are parameters; X_0 is standard normal. With a gain above 1 the
    noiseless network is chaotic when it is large.

    Args:
        weights: W, (d, d); see `ChaoticRNN.random`.
        gain: Default 2.5.
        tau: Time constant of a unit in seconds, > 0. Default 0.025.
        step: Seconds between two observations, > 0. Default 0.001.
        noise: Standard deviation of the states' noise, > 0. Default 0.1.
        observation_scale: Scale of the observations' noise, > 0. Default 0.1.
        df: Degrees of freedom of the observations' noise, > 0. Default 2.

    Raises:
        ValueError: W is not square, or a number is out of range.

    Example:
        >>> model = ChaoticRNN.random(5, generator=torch.Generator().manual_seed(0))
        >>> model.transition(1, torch.zeros(7, 5)).mean.shape
        torch.Size([7, 5])
    """

    def __init__(
        self,
        weights: Float[Tensor, "d d"],
        *,
        gain: int | float = 2.5,
        tau: int | float = 0.025,
        step: int | float = 0.001,
        noise: int | float = 0.1,
        observation_scale: int | float = 0.1,
        df: int | float = 2.0,
    ) -> None:
        super().__init__()
        if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
            raise bad("ChaoticRNN", "weights", "a square matrix", tuple(weights.shape))
        for name, value in (("tau", tau), ("step", step), ("noise", noise), ("observation_scale", observation_scale),
                            ("df", df)):  # fmt: skip
            if not value > 0:
                raise bad("ChaoticRNN", name, "above 0", value)
        self.weights = nn.Parameter(weights.detach().clone())
        self.log_noise = nn.Parameter(weights.new_tensor(math.log(noise)))
        self.gain, self.rate, self.observation_scale, self.df = gain, step / tau, observation_scale, df

    @classmethod
    def random(cls, n_units: int, *, generator: torch.Generator | None = None, **options: int | float) -> "ChaoticRNN":
        """Return a network whose connections are N(0, 1 / n_units).

        Args:
            n_units: d, >= 1.
            generator: Source of randomness.
            **options: As for the class.
        """
        if n_units < 1:
            raise bad("ChaoticRNN.random", "n_units", "at least 1", n_units)
        return cls(torch.randn(n_units, n_units, generator=generator) / math.sqrt(n_units), **options)

    def initial(self) -> Law:
        """Return the standard normal law."""
        zero = self.weights.new_zeros(len(self.weights))
        return Independent(Normal(zero, 1.0, validate_args=False), 1, validate_args=False)

    def transition(self, t: int, x: Tensor) -> Law:
        """Return the normal law around one Euler step."""
        mean = x + self.rate * (self.gain * x.tanh() @ self.weights.mT - x)
        return Independent(Normal(mean, self.log_noise.exp(), validate_args=False), 1, validate_args=False)

    def observation(self, t: int, x: Tensor) -> Law:
        """Return x plus Student-t noise."""
        law = StudentT(self.df, x, self.observation_scale, validate_args=False)
        return Independent(law, 1, validate_args=False)

    def log_transition_bound(self, t: int, x: Tensor) -> Tensor:
        """Return the density's logarithm at its mode."""
        return -len(self.weights) * (self.log_noise + math.log(2 * math.pi) / 2)
