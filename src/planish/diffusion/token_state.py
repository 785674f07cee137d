"""A noisy state over the whole vocabulary, kept as what it is made of.

The state of a position has a number for each of V tokens: gigabytes for real vocabularies. Squared distances are affine
in the embedding that they are measured from, up to a constant, so any sum of them needs one vector; noise can be drawn
again from its seed. Numbers are made for a part of the vocabulary at a time and are used up in a running softmax.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from planish.diffusion.embeddings import EmbeddingSpace


@dataclass(frozen=True)
class TokenState:
    r"""Keep sum_k a_k D(e_k) + sum_l c_l eps_l, D(e)_j = -|e - E_j|^2 / (2 s^2), without its V numbers a position.

    Coefficients are tensors of shape () or (B, 1, 1). The same generator's state and chunk size give the same noise.

    Args:
        space: The embeddings E.
        shape: (B, m).
        sharpness: 1 / s^2.
        vector: sum_k a_k e_k, (B, m, D); None for none.
        weight: sum_k a_k.
        offset: sum_k a_k |e_k|^2 / 2, (B, m, 1).
        hits: Pairs (a, ids): a is added at the tokens' own places and subtracted at all others.
        noise: Pairs (c, seed).
        chunk_size: Tokens at a time; memory grows with it and not with V.

    Example:
        >>> space = EmbeddingSpace(torch.eye(4))
        >>> state = TokenState.of(space, space.encode(torch.tensor([[2, 0]])), sharpness=9.0)
        >>> state.probability(torch.tensor([[2, 0]])).min().item() > 0.99
        True
    """

    space: EmbeddingSpace
    shape: tuple[int, int]
    sharpness: float = 1.0
    vector: Float[Tensor, "B m D"] | None = None
    weight: Tensor | float = 0.0
    offset: Tensor | float = 0.0
    hits: tuple[tuple[Tensor | float, Tensor], ...] = ()
    noise: tuple[tuple[Tensor | float, int], ...] = ()
    chunk_size: int = 1024

    @classmethod
    def of(
        cls,
        space: EmbeddingSpace,
        embeddings: Float[Tensor, "B m D"],
        *,
        sharpness: int | float,
        chunk_size: int = 1024,
    ) -> "TokenState":
        """Return D(e), the clean state of embeddings.

        Args:
            space: The vocabulary.
            embeddings: e.
            sharpness: 1 / s^2.
            chunk_size: Tokens at a time.
        """
        e = embeddings.to(space.weight.dtype)
        offset = 0.5 * e.square().sum(-1, keepdim=True)
        return cls(space, (e.shape[0], e.shape[1]), sharpness, e, 1.0, offset, chunk_size=chunk_size)

    def times(self, factor: Tensor | int | float) -> "TokenState":
        """Return the state times a number, one for all or one a sample."""
        if not isinstance(factor, Tensor) and factor == 0:
            return TokenState(self.space, self.shape, self.sharpness, chunk_size=self.chunk_size)
        return replace(
            self,
            vector=None if self.vector is None else factor * self.vector,
            weight=factor * self.weight,
            offset=factor * self.offset,
            hits=tuple((factor * a, ids) for a, ids in self.hits),
            noise=tuple((factor * c, seed) for c, seed in self.noise),
        )

    def plus(self, other: "TokenState") -> "TokenState":
        """Return the sum of two states of the same space."""
        vectors = [state.vector for state in (self, other) if state.vector is not None]
        return replace(
            self,
            vector=sum(vectors[1:], vectors[0]) if vectors else None,
            weight=self.weight + other.weight,
            offset=self.offset + other.offset,
            hits=self.hits + other.hits,
            noise=self.noise + other.noise,
        )

    def plus_noise(self, factor: Tensor | int | float, seed: int) -> "TokenState":
        """Return the state plus a number times the standard Gaussian noise of a seed."""
        if not isinstance(factor, Tensor) and factor == 0:
            return self
        return replace(self, noise=(*self.noise, (factor, seed)))

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the state's numbers for one part of the vocabulary after the other."""
        E, half_norms = self.space.weight, self.space.half_norms
        sources = [(c, torch.Generator(E.device).manual_seed(seed)) for c, seed in self.noise]
        for start in range(0, len(E), self.chunk_size):
            part = slice(start, min(start + self.chunk_size, len(E)))
            width = part.stop - start
            numbers = torch.zeros(*self.shape, width, dtype=E.dtype, device=E.device)
            if self.vector is not None:
                signal = self.vector @ E[part].mT - self.weight * half_norms[part] - self.offset
                numbers = numbers + self.sharpness * signal
            for a, ids in self.hits:
                there = ids[..., None] == torch.arange(start, part.stop, device=E.device)
                numbers = numbers + a * (2.0 * there.to(E.dtype) - 1.0)
            for c, generator in sources:
                eps = torch.randn(numbers.shape, generator=generator, dtype=E.dtype, device=E.device)
                numbers = numbers + c * eps
            yield part, numbers

    def dense(self) -> Float[Tensor, "B m V"]:
        """Return all V numbers a position."""
        return torch.cat([numbers for _, numbers in self._chunks()], dim=-1)

    def mix(self) -> Float[Tensor, "B m D"]:
        """Return softmax(state) E, the expected embedding, over the tokens in use."""
        E, ignored = self.space.weight, self.space.ignored
        high = torch.full((*self.shape, 1), torch.finfo(E.dtype).min, dtype=E.dtype, device=E.device)
        total, mixed = torch.zeros_like(high), torch.zeros(*self.shape, E.shape[1], dtype=E.dtype, device=E.device)
        for part, numbers in self._chunks():
            masked = numbers.masked_fill(ignored[part], -torch.inf)
            top = torch.maximum(high, masked.amax(-1, keepdim=True))
            p, shrink = (masked - top).exp(), (high - top).exp()
            total, mixed, high = total * shrink + p.sum(-1, keepdim=True), mixed * shrink + p @ E[part], top
        return mixed / total

    def probability(self, ids: Int[Tensor, "B m"]) -> Float[Tensor, "B m"]:
        """Return softmax(state) at one token a position.

        Args:
            ids: The tokens.
        """
        logs, own = [], torch.full(self.shape, -torch.inf, dtype=self.space.weight.dtype, device=ids.device)
        for part, numbers in self._chunks():
            masked = numbers.masked_fill(self.space.ignored[part], -torch.inf)
            logs.append(masked.logsumexp(-1))
            inside = (ids >= part.start) & (ids < part.stop)
            at = (ids - part.start).clamp(0, part.stop - part.start - 1)[..., None]
            own = torch.where(inside, masked.gather(-1, at)[..., 0], own)
        return (own - torch.stack(logs).logsumexp(0)).exp()
