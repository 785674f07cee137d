"""Models written for the package `particles`, as models of ours."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor
from torch.distributions import Distribution, constraints

from planish.statespace.models import Law, StateSpaceModel


@runtime_checkable
class ParticlesModel(Protocol):
    """What `particles` calls a state-space model: laws by NumPy.

    Example:
        >>> isinstance(object(), ParticlesModel)
        False
    """

    def PX0(self) -> Any:  # noqa: ANN401, N802
        """Return the law of X_0."""

    def PX(self, t: int, xp: Any) -> Any:  # noqa: ANN401, N802
        """Return the law of X_t given X_{t-1} = xp."""

    def PY(self, t: int, xp: Any, x: Any) -> Any:  # noqa: ANN401, N802
        """Return the law of Y_t given X_{t-1} = xp and X_t = x."""


class _NumpyLaw(Distribution):
    """A law of NumPy for states of any leading shape; `make` takes flat states and returns it."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (torch's own declaration)
    support = constraints.real_vector

    def __init__(self, make: Any, given: Tensor | None, batch: torch.Size, d: int, like: torch.dtype) -> None:  # noqa: ANN401
        self.make, self.given, self.like = make, given, like
        super().__init__(batch, torch.Size([d]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_NumpyLaw":  # noqa: ANN401
        shape = torch.Size(batch_shape)
        given = None if self.given is None else self.given.expand(*shape, self.given.shape[-1])
        return _NumpyLaw(self.make, given, shape, self.event_shape[0], self.like)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: ANN401, B008
        shape = torch.Size(sample_shape) + self.batch_shape
        state = np.random.get_state()  # the laws draw from NumPy's global state: it is put back
        try:
            np.random.seed(int(torch.randint(2**32, ())))
            given = None if self.given is None else _numpy(self.given.expand(*shape, self.given.shape[-1]))
            drawn = self.make(given).rvs(size=shape.numel())
        finally:
            np.random.set_state(state)
        return torch.as_tensor(drawn, dtype=self.like).reshape(*shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        given = None if self.given is None else _numpy(self.given.expand(*shape, self.given.shape[-1]))
        found = self.make(given).logpdf(_numpy(value.expand(*shape, value.shape[-1])))
        return torch.as_tensor(np.broadcast_to(found, shape.numel()).copy(), dtype=self.like).reshape(shape)


def _numpy(x: Tensor) -> Any:  # noqa: ANN401
    """Flatten leading axes; single coordinates lose theirs, as `particles` has it."""
    flat = x.detach().cpu().reshape(-1, x.shape[-1]).numpy()
    return flat[:, 0] if flat.shape[-1] == 1 else flat


class FromParticles(StateSpaceModel):
    """Run a model of the package `particles` here: filters, PaRIS, PPG; no gradients, and on the CPU only.

    Observations may depend on the present state alone: PY is called with `xp=None`.

    Args:
        model: The model, with PX0, PX and PY; `upper_bound_log_pt` is used where it is defined.
        dtype: Of states and densities. Default float64.

    Example:
        >>> class Normal:  # as particles.distributions.Normal
        ...     dim = 1
        ...     def __init__(self, loc=0.0):
        ...         self.loc = loc
        ...     def rvs(self, size):
        ...         return self.loc + np.random.standard_normal(size)
        ...     def logpdf(self, x):
        ...         return -0.5 * (x - self.loc) ** 2 - 0.5 * np.log(2 * np.pi)
        >>> class Walk:
        ...     PX0 = lambda self: Normal()
        ...     PX = lambda self, t, xp: Normal(xp)
        ...     PY = lambda self, t, xp, x: Normal(x)
        >>> FromParticles(Walk()).transition(1, torch.zeros(4, 1)).sample().shape
        torch.Size([4, 1])
    """

    def __init__(self, model: ParticlesModel, *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.model, self.dtype, self.d = model, dtype, int(model.PX0().dim)

    def initial(self) -> Law:
        """Return PX0."""
        return _NumpyLaw(lambda _: self.model.PX0(), None, torch.Size(), self.d, self.dtype)

    def transition(self, t: int, x: Num[Tensor, "*batch d"]) -> Law:
        """Return PX."""
        return _NumpyLaw(lambda xp: self.model.PX(t, xp), x, x.shape[:-1], self.d, self.dtype)

    def observation(self, t: int, x: Num[Tensor, "*batch d"]) -> Law:
        """Return PY."""
        return _NumpyLaw(lambda now: self.model.PY(t, None, now), x, x.shape[:-1], self._dy(t, x), self.dtype)

    def _dy(self, t: int, x: Tensor) -> int:
        return int(self.model.PY(t, None, _numpy(x.reshape(-1, self.d)[:1])).dim)

    def log_transition_bound(self, t: int, x: Num[Tensor, "clouds n d"]) -> Tensor:
        """Return `upper_bound_log_pt` of the model."""
        bound = getattr(self.model, "upper_bound_log_pt", None)
        if bound is None:
            return super().log_transition_bound(t, x)
        return torch.as_tensor(bound(t), dtype=self.dtype)
