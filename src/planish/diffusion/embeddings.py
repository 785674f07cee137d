"""Token embeddings as a metric space: standardized once, used for inputs, targets and decoding alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from planish._support import bad, require, warn_once

Standardize = Literal["total", "features"]
_PROBES = 256  # rows whose distances to all others stand for all pairs


class EmbeddingSpace(nn.Module):
    """Hold the fixed embeddings of a vocabulary: look up, measure, decode.

    Args:
        weight: One row a token, at least two rows; half precision is widened to float32.
        standardize: "total" for one mean and one standard deviation, "features" for those of each feature, None to
            take the rows as they are. Default "total".
        ignore_ids: Tokens that no text uses: they are left out of the statistics, of mixtures and of decoding.

    Raises:
        ValueError: `weight` is no matrix of finite floats or does not vary, or an id is outside the vocabulary.

    Attributes:
        weight: The standardized rows, (V, D).
        ignored: Which tokens are left out, (V,).

    Example:
        >>> space = EmbeddingSpace(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        >>> ids = torch.tensor([[2, 0]])
        >>> space.nearest(space.encode(ids) + 0.1).tolist()
        [[2, 0]]
    """

    weight: Tensor
    ignored: Tensor
    half_norms: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "V D"],
        *,
        standardize: Standardize | None = "total",
        ignore_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        where = "EmbeddingSpace"
        if weight.ndim != 2 or not weight.is_floating_point() or len(weight) < 2 or weight.shape[1] < 1:
            raise bad(where, "weight", "floats of shape (V >= 2, D >= 1)", f"{weight.dtype} {tuple(weight.shape)}")
        if not torch.isfinite(weight).all():
            raise bad(where, "weight", "finite", f"token {int((~torch.isfinite(weight)).any(1).nonzero()[0])}")
        if standardize is not None and standardize not in get_args(Standardize):
            raise bad(where, "standardize", "'total', 'features' or None", standardize)
        outside = [i for i in ignore_ids if not 0 <= i < len(weight)]
        if outside:
            raise bad(where, "ignore_ids", f"in [0, {len(weight)})", outside[0])
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        ignored = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        ignored[torch.tensor(list(ignore_ids), dtype=torch.long)] = True
        used = weight[~ignored]
        if len(used) < 2:
            raise bad(where, "ignore_ids", "such that two tokens remain", f"{len(used)} left")
        spread = used.std(unbiased=False) if standardize != "features" else used.std(0, unbiased=False)
        if not (spread > 1e-7 * used.abs().max()).all():
            raise bad(where, "weight", "of rows that vary, in every feature that is standardized", "constant rows")
        if standardize is not None:
            weight = (weight - (used.mean() if standardize == "total" else used.mean(0))) / spread
        same = len(used) - len(torch.unique(used, dim=0))
        if same:
            warn_once(
                f"{where}: {same} tokens share the embedding of another, so that decoding cannot tell them apart."
            )
        self.register_buffer("weight", weight)
        self.register_buffer("ignored", ignored)
        self.register_buffer("half_norms", 0.5 * weight.square().sum(1), persistent=False)

    @classmethod
    def from_pretrained(cls, model: nn.Module | str | Path, **options: Any) -> "EmbeddingSpace":  # noqa: ANN401
        """Take the input embeddings of a model of transformers.

        Args:
            model: The model, or where to load it from.
            **options: `standardize` and `ignore_ids`.

        Raises:
            MissingExtra: `model` is a path and transformers is absent.
        """
        if not isinstance(model, nn.Module):
            auto = require("transformers", "transformers", "EmbeddingSpace.from_pretrained").AutoModel
            model = auto.from_pretrained(model)
        get: Any = getattr(model, "get_input_embeddings", None)
        if get is None:
            raise bad(
                "EmbeddingSpace.from_pretrained", "model", "one with `get_input_embeddings`", type(model).__name__
            )
        return cls(get().weight.detach(), **options)

    @classmethod
    def from_cooccurrence(
        cls,
        sequences: Int[Tensor, "n m"],
        vocab_size: int,
        dim: int,
        *,
        window: int = 2,
        **options: Any,  # noqa: ANN401
    ) -> "EmbeddingSpace":
        """Make embeddings of token sequences: what stands left and right of a token, by positive pointwise information.

        The matrix of max(0, log p(token, neighbour) / (p(token) p(neighbour))), left and right neighbours apart, is
        factored by its singular values; a token's row is its left factor, scaled by their roots.

        Args:
            sequences: Ids, padded or not.
            vocab_size: Number of tokens, V.
            dim: Features, in [1, V].
            window: How far neighbours may be, >= 1. Default 2.
            **options: `standardize` and `ignore_ids`.
        """
        where = "EmbeddingSpace.from_cooccurrence"
        if not 1 <= dim <= vocab_size:
            raise bad(where, "dim", f"in [1, {vocab_size}]", dim)
        if window < 1:
            raise bad(where, "window", "at least 1", window)
        _check_ids(where, sequences, vocab_size)
        counts = torch.zeros(2, vocab_size * vocab_size, dtype=torch.float64)
        for distance in range(1, min(window, sequences.shape[1] - 1) + 1):
            left, right = sequences[:, :-distance].flatten().long(), sequences[:, distance:].flatten().long()
            for side, pairs in enumerate((left * vocab_size + right, right * vocab_size + left)):
                counts[side] += torch.bincount(pairs, minlength=vocab_size**2)
        table = counts.view(2, vocab_size, vocab_size).transpose(0, 1).reshape(vocab_size, -1)
        joint = table / table.sum().clamp_min(1)
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        information = torch.where(joint > 0, (joint / independent.clamp_min(1e-300)).log(), 0.0).clamp_min(0)
        u, s, _ = torch.linalg.svd(information, full_matrices=False)
        u, s = u[:, :dim], s[:dim]
        largest = u.gather(0, u.abs().argmax(0, keepdim=True))
        return cls((u * largest.sign() * s.sqrt()).float(), **options)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, those left out included."""
        return len(self.weight)

    @property
    def dim(self) -> int:
        """Features of a token."""
        return self.weight.shape[1]

    def encode(self, ids: Int[Tensor, "*positions"]) -> Float[Tensor, "*positions D"]:
        """Return the embeddings of tokens.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        _check_ids("EmbeddingSpace.encode", ids, self.vocab_size)
        return self.weight[ids]

    def distances(self, embeddings: Float[Tensor, "*positions D"]) -> Float[Tensor, "*positions V"]:
        """Return squared distances to every token: V numbers a position."""
        e = embeddings.to(self.weight.dtype)
        products = e @ self.weight.mT
        return (e.square().sum(-1, keepdim=True) + 2 * (self.half_norms - products)).clamp_min(0)

    def nearest(self, embeddings: Float[Tensor, "*positions D"], chunk_size: int = 4096) -> Int[Tensor, "*positions"]:
        """Return the nearest token of each embedding; a part of the vocabulary at a time."""
        e = embeddings.to(self.weight.dtype)
        best = torch.full(e.shape[:-1], -torch.inf, dtype=e.dtype, device=e.device)
        found = torch.zeros(e.shape[:-1], dtype=torch.long, device=e.device)
        for start in range(0, self.vocab_size, chunk_size):
            part = slice(start, start + chunk_size)
            scores = e @ self.weight[part].mT - self.half_norms[part]
            top, index = scores.masked_fill(self.ignored[part], -torch.inf).max(-1)
            found = torch.where(top > best, start + index, found)
            best = torch.maximum(top, best)
        return found

    def neighbour_distances(self) -> Float[Tensor, "probes others"]:
        """Return squared distances from at most 256 tokens in use to all others in use."""
        rows = self.weight[~self.ignored]
        probes = torch.linspace(0, len(rows) - 1, min(_PROBES, len(rows)), device=rows.device).long()
        squares = rows.square().sum(1)
        gaps = (squares[probes, None] + squares - 2 * rows[probes] @ rows.mT).clamp_min(0)
        others = torch.ones_like(gaps, dtype=torch.bool)
        others[torch.arange(len(probes), device=rows.device), probes] = False
        return gaps[others].view(len(probes), -1)


def _check_ids(where: str, ids: Tensor, vocab_size: int) -> None:
    """Refuse ids that are no tokens.

    Raises:
        ValueError: They are no integers, or one is outside the vocabulary.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise bad(where, "ids", "integers", ids.dtype)
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < vocab_size):
        worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise bad(where, "ids", f"in [0, {vocab_size})", worst)
