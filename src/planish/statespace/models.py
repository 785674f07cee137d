"""State-space models: a hidden Markov chain and what is seen of it."""

import abc
import math

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from planish._support import bad
from planish.statespace.draws import draw

Law = Distribution
"""What the methods of a model return: batch of x without its last axis, event (d,) for states, (dy,) for data."""


class StateSpaceModel(nn.Module, abc.ABC):
    """A hidden Markov chain X_0, X_1, ... with densities, seen through Y_t given X_t.

    States `x` have any leading axes and the coordinates last; a law's batch is the leading axes and its event the
    coordinates (`Independent(Normal(...), 1)`). Parameters of the module are what `fit_mle` learns.

    Example:
        >>> class Walk(StateSpaceModel):
        ...     def initial(self):
        ...         return Independent(Normal(torch.zeros(1), 1.0), 1)
        ...     def transition(self, t, x):
        ...         return Independent(Normal(x, 0.1), 1)
        ...     def observation(self, t, x):
        ...         return Independent(Normal(x, 1.0), 1)
        >>> x, y = simulate(Walk(), 20, generator=torch.Generator().manual_seed(0))
        >>> x.shape, y.shape
        (torch.Size([20, 1]), torch.Size([20, 1]))
    """

    @abc.abstractmethod
    def initial(self) -> Law:
        """Return the law of X_0: no batch, event (d,)."""

    @abc.abstractmethod
    def transition(self, t: int, x: Tensor) -> Law:
        """Return the law of X_t, t >= 1, given X_{t-1} = x."""

    @abc.abstractmethod
    def observation(self, t: int, x: Tensor) -> Law:
        """Return the law of Y_t given X_t = x."""

    def proposal(self, t: int, x: Tensor | None, y: Tensor) -> Law | None:
        """Return the law that X_t is drawn from, given X_{t-1} = x (None at t = 0) and y_t; None for the model's own.

        Batch (clouds, particles), or (clouds, 1) at t = 0; `y` is (clouds, 1, dy).
        """
        return None

    def log_transition_bound(self, t: int, x: Tensor) -> Tensor:
        """Return an upper bound of log m_t(x_l, .) over the particles x_l, for each cloud.

        By default the density at the law's mode, the largest over particles; override it where the bound is known,
        or where the law knows no mode.

        Args:
            t: Time of arrival, >= 1.
            x: Where from, (clouds, particles, d).
        """
        law = self.transition(t, x)
        try:
            bound: Tensor = law.log_prob(law.mode).amax(-1)
        except NotImplementedError:
            bound = x.new_tensor(math.nan, dtype=torch.get_default_dtype())
        if not bound.isfinite().all():  # no mode, or none of its own, as with uniform laws
            allowed = "defined for rejection, or backward='exact' chosen"
            raise bad(type(self).__name__, "log_transition_bound", allowed, "no mode")
        return bound


@torch.no_grad()
def simulate(
    model: StateSpaceModel, n_steps: int, n_series: int | None = None, *, generator: torch.Generator | None = None
) -> tuple[Num[Tensor, "..."], Num[Tensor, "..."]]:
    """Draw hidden states and observations from a model.

    Args:
        model: What to draw from.
        n_steps: Length of a series, >= 1.
        n_series: How many; None for one without that axis.
        generator: Source of randomness; None for torch's own.

    Returns:
        States (n_series, n_steps, d) and observations (n_series, n_steps, dy).

    Raises:
        ValueError: A number is below 1.

    Example:
        >>> x, y = simulate(StochasticVolatility(), 50, 3, generator=torch.Generator().manual_seed(0))
        >>> y.shape
        torch.Size([3, 50, 1])
    """
    if n_steps < 1:
        raise bad("simulate", "n_steps", "at least 1", n_steps)
    if n_series is not None and n_series < 1:
        raise bad("simulate", "n_series", "at least 1", n_series)
    states, seen = [], []
    law = model.initial().expand((n_series or 1,))
    for t in range(n_steps):
        states.append(draw(law, (), generator))
        seen.append(draw(model.observation(t, states[-1]), (), generator))
        law = model.transition(t + 1, states[-1])
    x, y = torch.stack(states, 1), torch.stack(seen, 1)
    return (x, y) if n_series is not None else (x[0], y[0])


def _square(value: Tensor | int | float) -> Tensor:
    made = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.get_default_dtype())
    return made.reshape(1, 1).clone() if made.ndim == 0 else made.detach().clone()


def factor(cov: Tensor, where: str, name: str) -> Tensor:
    """Return the Cholesky factor with the logarithm of its diagonal: any such matrix is a covariance."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    if failed or not torch.allclose(cov, cov.mT):
        raise bad(where, name, "symmetric and positive definite", cov.tolist())
    raw: Tensor = lower.tril(-1) + lower.diagonal().log().diag()
    return raw


def unfactor(raw: Tensor) -> Tensor:
    """Return the lower Cholesky factor that `factor` made unconstrained."""
    return raw.tril(-1) + raw.diagonal().exp().diag()


class LinearGaussian(StateSpaceModel):
    """X_t = A X_{t-1} + N(0, Q), Y_t = B X_t + N(0, R): the model of which everything is known exactly.

    All four are parameters; covariances are kept as Cholesky factors with logarithmic diagonals.

    Args:
        transition_matrix: A, (d, d), or a number for d = 1.
        transition_cov: Q, positive definite.
        observation_matrix: B, (dy, d). Default 1.
        observation_cov: R, positive definite. Default 1.
        initial_mean: Of X_0, (d,). Default 0.
        initial_cov: Of X_0; None for the stationary one of A and Q, which follows them in training. Default None.

    Raises:
        ValueError: Shapes do not fit, a covariance is none, or A has no stationary law and `initial_cov` is None.

    Example:
        >>> model = LinearGaussian(0.9, 0.25, observation_cov=1.0)
        >>> round(model.transition(1, torch.ones(1)).mean.item(), 3), round(model.initial_cov.item(), 3)
        (0.9, 1.316)
    """

    def __init__(
        self,
        transition_matrix: Tensor | int | float,
        transition_cov: Tensor | int | float,
        observation_matrix: Tensor | int | float = 1.0,
        observation_cov: Tensor | int | float = 1.0,
        *,
        initial_mean: Tensor | None = None,
        initial_cov: Tensor | int | float | None = None,
    ) -> None:
        super().__init__()
        A, Q, B, R = map(_square, (transition_matrix, transition_cov, observation_matrix, observation_cov))
        A, Q, B, R = (part.to(torch.promote_types(A.dtype, Q.dtype)) for part in (A, Q, B, R))
        d, dy = A.shape[-1], B.shape[0]
        for name, part, shape in (("transition_matrix", A, (d, d)), ("transition_cov", Q, (d, d)),
                                  ("observation_matrix", B, (dy, d)), ("observation_cov", R, (dy, dy))):  # fmt: skip
            if tuple(part.shape) != shape:
                raise bad("LinearGaussian", name, f"of shape {shape}", tuple(part.shape))
        if initial_cov is None and float(torch.linalg.eigvals(A).abs().max()) >= 1:
            raise bad("LinearGaussian", "initial_cov", "given: A has no stationary law", None)
        self.transition_matrix, self.observation_matrix = nn.Parameter(A), nn.Parameter(B)
        self.transition_factor = nn.Parameter(factor(Q, "LinearGaussian", "transition_cov"))
        self.observation_factor = nn.Parameter(factor(R, "LinearGaussian", "observation_cov"))
        self.register_buffer("initial_mean", A.new_zeros(d) if initial_mean is None else initial_mean.to(A))
        given = None if initial_cov is None else factor(_square(initial_cov).to(A), "LinearGaussian", "initial_cov")
        self.register_buffer("initial_factor", given)

    initial_mean: Tensor
    initial_factor: Tensor | None

    @property
    def transition_cov(self) -> Tensor:
        """Q."""
        lower = unfactor(self.transition_factor)
        return lower @ lower.mT

    @property
    def observation_cov(self) -> Tensor:
        """R."""
        lower = unfactor(self.observation_factor)
        return lower @ lower.mT

    @property
    def initial_cov(self) -> Tensor:
        """Covariance of X_0; the stationary one solves P = A P A' + Q."""
        if self.initial_factor is not None:
            lower = unfactor(self.initial_factor)
            return lower @ lower.mT
        A, d = self.transition_matrix, len(self.transition_matrix)
        eye = torch.eye(d * d, dtype=A.dtype, device=A.device)
        P = torch.linalg.solve(eye - torch.kron(A, A), self.transition_cov.flatten()).reshape(d, d)
        even: Tensor = (P + P.mT) / 2
        return even

    def initial(self) -> Law:
        """Return N(initial_mean, initial_cov)."""
        return _gaussian(self.initial_mean, torch.linalg.cholesky(self.initial_cov))

    def transition(self, t: int, x: Tensor) -> Law:
        """Return N(A x, Q)."""
        return _gaussian(_times(self.transition_matrix, x), unfactor(self.transition_factor))

    def observation(self, t: int, x: Tensor) -> Law:
        """Return N(B x, R)."""
        return _gaussian(_times(self.observation_matrix, x), unfactor(self.observation_factor))

    def log_transition_bound(self, t: int, x: Tensor) -> Tensor:
        """Return the density's logarithm at its mode."""
        scale: Tensor = self.transition_factor.diagonal().sum()
        return -scale - len(self.transition_matrix) / 2 * math.log(2 * math.pi)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix[0] * x if matrix.numel() == 1 else x @ matrix.mT


def _gaussian(mean: Tensor, lower: Tensor) -> Law:
    if len(lower) == 1:  # several times as fast as the general law
        return Independent(Normal(mean, lower[0], validate_args=False), 1, validate_args=False)
    return MultivariateNormal(mean, scale_tril=lower, validate_args=False)


class StochasticVolatility(StateSpaceModel):
    """Log-volatility as an autoregression: X_t = mu + rho (X_{t-1} - mu) + sigma N(0, 1), Y_t = exp(X_t / 2) N(0, 1).

    Parameters are mu, artanh(rho) and log(sigma); X_0 has the stationary law.

    Args:
        mu: Mean of the log-volatility. Default -1.
        rho: Persistence, in (-1, 1). Default 0.95.
        sigma: Volatility of volatility, > 0. Default 0.3.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> model = StochasticVolatility(mu=0.0, rho=0.9, sigma=0.2)
        >>> round(model.initial().variance.item(), 4)
        0.2105
    """

    def __init__(self, mu: int | float = -1.0, rho: int | float = 0.95, sigma: int | float = 0.3) -> None:
        super().__init__()
        if not -1 < rho < 1:
            raise bad("StochasticVolatility", "rho", "in (-1, 1)", rho)
        if not sigma > 0:
            raise bad("StochasticVolatility", "sigma", "above 0", sigma)
        self.mu = nn.Parameter(torch.tensor(float(mu)))
        self.atanh_rho = nn.Parameter(torch.tensor(math.atanh(rho)))
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)))

    def initial(self) -> Law:
        """Return the stationary law."""
        rho = self.atanh_rho.tanh()
        return _normal(self.mu.reshape(1), self.log_sigma.exp() / (1 - rho * rho).sqrt())

    def transition(self, t: int, x: Tensor) -> Law:
        """Return N(mu + rho (x - mu), sigma^2)."""
        return _normal(self.mu + self.atanh_rho.tanh() * (x - self.mu), self.log_sigma.exp())

    def observation(self, t: int, x: Tensor) -> Law:
        """Return N(0, exp(x))."""
        return _normal(torch.zeros_like(x), (x / 2).exp())

    def log_transition_bound(self, t: int, x: Float[Tensor, "*b n d"]) -> Tensor:
        """Return the density's logarithm at its mode."""
        return -self.log_sigma - math.log(2 * math.pi) / 2


def _normal(mean: Tensor, scale: Tensor) -> Law:
    return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)
