"""Draws from a generator of one's own: torch's distributions know only the global one."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MultivariateNormal, Normal


def draw(law: Distribution, shape: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
    """Draw from a law; with a generator the same state gives the same bits.

    Normal, multivariate normal and categorical laws draw from the generator itself. Any other kind is seeded by a
    number from it, in a fork of torch's global state that is put back.

    Args:
        law: What to draw from.
        shape: How many, in front of the batch.
        generator: Source of randomness; None for torch's own.

    Returns:
        As `law.sample(shape)`.
    """
    if generator is None:
        return law.sample(shape)
    if type(law) is Independent:
        return draw(law.base_dist, shape, generator)
    size = shape + law.batch_shape + law.event_shape
    if type(law) is Normal:
        return law.loc + law.scale * _noise(size, law.loc, generator)
    if type(law) is MultivariateNormal:
        turned = law._unbroadcasted_scale_tril @ _noise(size, law.loc, generator)[..., None]
        return law.loc + turned[..., 0]
    if type(law) is Categorical:
        return inverse_cdf(law.probs, (*shape, *law.batch_shape), generator)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[] if generator.device.type == "cpu" else [generator.device]):
        torch.random.manual_seed(seed)
        return law.sample(shape)


def _noise(size: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)


def inverse_cdf(probs: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw classes of given probabilities (last axis), one for each element of `shape`."""
    u = torch.rand(shape, generator=generator, dtype=probs.dtype, device=probs.device)
    steps = probs.cumsum(-1)
    return (u[..., None] * steps[..., -1:] >= steps).sum(-1).clamp_(max=probs.shape[-1] - 1)


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from [0, 1) in float64, whatever the precision of `like`, on its device."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=like.device)


class Ladder:
    """Weights of several clouds as one rising line, so that any of them draws by one binary search.

    Args:
        weights: Non-negative; one cloud a row, not all zero.
    """

    def __init__(self, weights: Float[Tensor, "batch n"]) -> None:
        self.batch, self.n = weights.shape
        steps = weights.double().cumsum(-1)
        self.rows = steps / steps[:, -1:]
        self.offset = torch.arange(self.batch, device=weights.device)[:, None]
        self._line: Tensor | None = None

    def draw_each(
        self, count: int, generator: torch.Generator | None, u: Float[Tensor, "batch count"] | None = None
    ) -> Int[Tensor, "batch count"]:
        """Draw as many from every cloud; positions count through all clouds. `u` in [0, 1) decides if it is given."""
        u = uniform((self.batch, count), self.rows, generator) if u is None else u
        return torch.searchsorted(self.rows, u, right=True).clamp_(max=self.n - 1) + self.offset * self.n

    def draw(self, rows: Int[Tensor, "*shape"], generator: torch.Generator | None) -> Int[Tensor, "*shape"]:
        """Draw one from cloud `rows`, for each entry; positions count through all clouds."""
        if self._line is None:
            self._line = (self.rows + self.offset).flatten()
        found = torch.searchsorted(self._line, rows + uniform(tuple(rows.shape), self._line, generator), right=True)
        return found.clamp_(max=self._line.numel() - 1).clamp_(rows * self.n, rows * self.n + self.n - 1)
