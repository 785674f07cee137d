"""Schedulers of diffusers for text: what Smoothie shares with its siblings, and the two siblings.

All have the form x_t = mu(t) x_0 + nu(t) eps with t from 0 (clean) to 1 (noise) and a network that predicts embeddings,
so that one network can be trained and sampled under each of them. They differ in what x_0 is.

=============================  =====================================  =======================================
scheduler                      x_0                                    what the network sees
=============================  =====================================  =======================================
`SmoothieScheduler`            -|e - E_j|^2 / (2 s^2), every token j  softmax(x_t) E
`EmbeddingGaussianScheduler`   the embedding e                        x_t
`SimplexScheduler`             +k at the token, -k at all others      softmax(x_t) E
=============================  =====================================  =======================================
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from planish._support import bad, require
from planish.diffusion.embeddings import EmbeddingSpace
from planish.diffusion.token_state import TokenState

_configuration = require("diffusers.configuration_utils", "diffusers", "A scheduler of planish.diffusion")
_scheduling = require("diffusers.schedulers.scheduling_utils", "diffusers", "A scheduler of planish.diffusion")
_outputs = require("diffusers.utils", "diffusers", "A scheduler of planish.diffusion")
register_to_config: Any = _configuration.register_to_config

Solver = Literal["fresh", "ddpm", "ddim"]
State = Tensor | TokenState


@dataclass
class TextSchedulerOutput(_outputs.BaseOutput):  # type: ignore[misc, name-defined]
    """What a step gives.

    Attributes:
        prev_sample: The state at the next, earlier time, of the kind that the sample was.
        pred_original_sample: The network's prediction: embeddings, for all schedulers.
    """

    prev_sample: Any
    pred_original_sample: Tensor


class TextScheduler(_scheduling.SchedulerMixin, _configuration.ConfigMixin):  # type: ignore[misc, name-defined]
    """Walk from noise at t = 1 to tokens at t = 0; subclasses say what is clean and how noisy a time is.

    States are tensors, or `TokenState`s where they would have a number for each token; both give the same.
    """

    order = 1
    _space: EmbeddingSpace | None
    timesteps: Tensor

    def _begin(self, solver: str) -> None:
        """Set what every scheduler has.

        Raises:
            ValueError: There is no such solver.
        """
        if solver not in get_args(Solver):
            raise bad(type(self).__name__, "solver", f"one of {', '.join(map(repr, get_args(Solver)))}", solver)
        self._space, self.timesteps = None, torch.zeros(0)

    @property
    def space(self) -> EmbeddingSpace:
        """The embeddings that the scheduler works in.

        Raises:
            ValueError: None were set.
        """
        if self._space is None:
            raise bad(type(self).__name__, "space", "set first, by `set_space`", None)
        return self._space

    def set_space(self, space: EmbeddingSpace) -> "TextScheduler":
        """Work in these embeddings; return itself.

        Args:
            space: The embeddings: they are no part of the configuration, which holds numbers only.
        """
        self._space = space
        return self

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the state at t = 1."""
        return float(self.level(1.0)[1])

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _clean(self, embeddings: Tensor) -> TokenState | Tensor:
        raise NotImplementedError

    def original(self, embeddings: Float[Tensor, "B m D"]) -> Tensor:
        """Return x_0 of embeddings, as a tensor."""
        clean = self._clean(embeddings)
        return clean.dense() if isinstance(clean, TokenState) else clean

    def level(self, t: Float[Tensor, "*B"] | int | float) -> tuple[Tensor, Tensor]:
        """Return mu(t) and nu(t), in float64 for a number.

        Args:
            t: Times, in [0, 1].

        Raises:
            ValueError: A time is outside [0, 1].
        """
        times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        if times.numel() and not (0 <= float(times.min()) and float(times.max()) <= 1):
            raise bad(type(self).__name__, "t", "in [0, 1]", t if not isinstance(t, Tensor) else float(times.max()))
        return self._level(times)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Plan equal steps from 1 to 0.

        Args:
            num_inference_steps: At least 1, which is a prediction in one go; the paper takes 200.
            device: Where `timesteps` shall be.

        Raises:
            ValueError: There are no steps.
        """
        if num_inference_steps < 1:
            raise bad(f"{type(self).__name__}.set_timesteps", "num_inference_steps", "at least 1", num_inference_steps)
        self.num_inference_steps = num_inference_steps
        times = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        self.timesteps = times[:-1].to(device=device)

    def prior(self, shape: tuple[int, int], generator: torch.Generator | None = None) -> State:
        """Return a state at t = 1 for (B, m) positions, of noise alone.

        Args:
            shape: (B, m).
            generator: Source of the noise; default torch's own.
        """
        empty = self._clean(self.space.weight.new_zeros(*shape, self.space.dim))
        nothing = empty.times(0) if isinstance(empty, TokenState) else torch.zeros_like(empty)
        return self._plus_noise(nothing, self.init_noise_sigma, generator)

    def corrupt(
        self, ids: Int[Tensor, "B m"], t: Float[Tensor, " B"] | int | float, generator: torch.Generator | None = None
    ) -> State:
        """Return noisy states of tokens, one time a sample: what the network is trained on.

        Args:
            ids: The tokens.
            t: Times, in [0, 1].
            generator: Source of the noise; default torch's own.
        """
        mu, nu = (self._spread(x) for x in self.level(t))
        clean = self._clean(self.space.encode(ids))
        return self._plus_noise(clean.times(mu) if isinstance(clean, TokenState) else mu * clean, nu, generator)

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: Float[Tensor, " B"] | int | float
    ) -> Tensor:
        """Return mu(t) x_0 + nu(t) noise, as tensors; see `original`.

        Args:
            original_samples: x_0.
            noise: Standard Gaussian, of the same shape.
            timesteps: Times, in [0, 1]: one, or one a sample.
        """
        mu, nu = (self._spread(x).to(original_samples.dtype) for x in self.level(timesteps))
        return mu * original_samples + nu * noise

    def scale_model_input(self, sample: State, timestep: Tensor | int | float | None = None) -> Float[Tensor, "B m D"]:
        """Return what the network sees of a state.

        Args:
            sample: The state.
            timestep: Not used; diffusers passes it.
        """
        if isinstance(sample, TokenState):
            return sample.mix()
        masked = sample.masked_fill(self.space.ignored, -torch.inf)
        return masked.softmax(-1).to(self.space.weight.dtype) @ self.space.weight

    def step(
        self,
        model_output: Float[Tensor, "B m D"],
        timestep: Tensor | int | float,
        sample: State,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> TextSchedulerOutput | tuple[State, Tensor]:
        """Go from a time to the next earlier one of the plan.

        Args:
            model_output: Predicted embeddings.
            timestep: The time of `sample`, one of `timesteps`.
            sample: The state there.
            generator: Source of fresh noise; default torch's own.
            return_dict: Return an output object, not a tuple.

        Raises:
            ValueError: `set_timesteps` was not called.
        """
        if not len(self.timesteps):
            raise bad(f"{type(self).__name__}.step", "timesteps", "set first, by `set_timesteps`", None)
        now = float(timestep)
        later = now - 1 / self.num_inference_steps
        keep, clean, fresh = self.coefficients(now, later if later > 1e-9 else 0.0)
        target = self._clean(model_output)
        if isinstance(sample, TokenState) and isinstance(target, TokenState):
            previous: State = sample.times(keep).plus(target.times(clean))
        else:
            dense = target.dense() if isinstance(target, TokenState) else target
            previous = keep * sample + clean * dense  # type: ignore[operator]
        previous = self._plus_noise(previous, fresh, generator)
        return TextSchedulerOutput(previous, model_output) if return_dict else (previous, model_output)

    def coefficients(self, now: int | float, later: int | float) -> tuple[float, float, float]:
        """Return (a, b, c) of the step x <- a x + b x_0 + c eps between two times.

        "fresh" forgets x; "ddim" keeps the noise that x implies; "ddpm" draws from q(x_later | x_now, x_0).

        Args:
            now: Time of x.
            later: Time to go to, nearer to 0.
        """
        (mu, nu), (mu_, nu_) = ([float(v) for v in self.level(t)] for t in (now, later))
        solver = self.config.solver
        if solver == "fresh" or nu == 0:
            return 0.0, mu_, nu_
        if solver == "ddim":
            return nu_ / nu, mu_ - mu * nu_ / nu, 0.0
        ratio = mu / mu_
        added = max(nu**2 - ratio**2 * nu_**2, 0.0)  # variance that x gets between the two times
        return ratio * nu_**2 / nu**2, mu_ * added / nu**2, nu_ * math.sqrt(added) / nu

    def _spread(self, values: Tensor) -> Tensor:
        """Give times a shape that multiplies states."""
        return (values if values.ndim == 0 else values[:, None, None]).to(self.space.weight)

    def _plus_noise(self, state: State, factor: Tensor | float, generator: torch.Generator | None) -> State:
        if not isinstance(factor, Tensor) and factor == 0:
            return state
        device = generator.device if generator is not None else torch.device("cpu")
        if isinstance(state, TokenState):
            seed = int(torch.randint(2**62, (), generator=generator, device=device))
            return state.plus_noise(factor, seed)
        eps = torch.randn(state.shape, generator=generator, dtype=state.dtype, device=device)
        return state + factor * eps.to(state.device)


class EmbeddingGaussianScheduler(TextScheduler):
    """Add Gaussian noise to the embeddings themselves: the first sibling of `SmoothieScheduler`.

    mu(t) = 1 / sqrt(1 + d^2 tan^2(pi t / 2)), nu = sqrt(1 - mu^2). Embeddings should be standardized.

    Args:
        d: How fast noise comes, > 0. Default 3.
        solver: As for `SmoothieScheduler`. Default "fresh".

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> scheduler = EmbeddingGaussianScheduler()
        >>> [round(float(x), 3) for x in scheduler.level(0.5)]
        [0.316, 0.949]
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, d: int | float = 3.0, solver: Solver = "fresh") -> None:
        if not 0 < d < math.inf:
            raise bad("EmbeddingGaussianScheduler", "d", "a finite number > 0", d)
        self._begin(solver)

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = 0.5 * math.pi * t
        noise = self.config.d * angle.sin()
        length = (angle.cos().square() + noise.square()).sqrt()
        return (angle.cos() / length).clamp_min(0), noise / length

    def _clean(self, embeddings: Tensor) -> Tensor:
        return embeddings.to(self.space.weight.dtype)

    def scale_model_input(self, sample: State, timestep: Tensor | int | float | None = None) -> Float[Tensor, "B m D"]:
        """Return the state itself.

        Args:
            sample: The state.
            timestep: Not used; diffusers passes it.
        """
        return sample if isinstance(sample, Tensor) else sample.mix()


class SimplexScheduler(TextScheduler):
    """Add Gaussian noise to one-hot logits, as TESS does: the second sibling of `SmoothieScheduler`.

    x_0 is +k at the token and -k elsewhere; mu is the cosine schedule, nu = k sqrt(1 - mu^2). A prediction counts as
    its nearest token.

    Args:
        k: Height of the logits and scale of the noise, > 0. Default 5.
        solver: As for `SmoothieScheduler`. Default "fresh".
        chunk_size: As for `SmoothieScheduler`. Default 1024.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> space = EmbeddingSpace(torch.eye(3))
        >>> scheduler = SimplexScheduler().set_space(space)
        >>> scheduler.original(space.encode(torch.tensor([[1]]))).tolist()
        [[[-5.0, 5.0, -5.0]]]
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, k: int | float = 5.0, solver: Solver = "fresh", chunk_size: int = 1024) -> None:
        if not 0 < k < math.inf:
            raise bad("SimplexScheduler", "k", "a finite number > 0", k)
        check_chunk("SimplexScheduler", chunk_size)
        self._begin(solver)

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start = math.cos(0.008 / 1.008 * math.pi / 2)
        mu = (((t + 0.008) / 1.008 * (math.pi / 2)).cos() / start).clamp(0, 1)
        return mu, self.config.k * (1 - mu.square()).sqrt()

    def _clean(self, embeddings: Tensor) -> TokenState:
        ids = self.space.nearest(embeddings, self.config.chunk_size)
        shape = (ids.shape[0], ids.shape[1])
        return TokenState(self.space, shape, hits=((self.config.k, ids),), chunk_size=self.config.chunk_size)


def check_chunk(where: str, chunk_size: int) -> None:
    """Refuse a chunk of no tokens.

    Raises:
        ValueError: It is one.
    """
    if chunk_size < 1:
        raise bad(where, "chunk_size", "at least 1", chunk_size)
