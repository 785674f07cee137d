"""How far a quantized model is from its float self, window by window, and what a difference between two is worth.

Every score is kept per window: windows are what the bootstrap draws, because tokens within one are not independent.
Logits never exist for more than `CHUNK` tokens; of the float model only last hidden states are kept, from which its
logits follow exactly, because no subject touches the head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.predictions import CHUNK, token_scores
from planish.quant.intervals import Estimate


def bootstrap(values: Tensor, resamples: int = 10_000) -> Estimate:
    """Resample windows with replacement, with a fixed generator.

    Args:
        values: One number a window, [windows]; for a paired comparison, the differences.
        resamples: How many resamples the percentiles are read from.

    Returns:
        The mean of `values` and its 95 % percentile interval.
    """
    values = values.double()
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[pick].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(values.mean().item(), low, high)


@torch.no_grad()
def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the last hidden states [windows, length, channels] of the body below the head, one window at a time."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), model)
    return torch.cat([body(input_ids=row[None]).last_hidden_state for row in ids])


@torch.no_grad()
def language_scores(model: nn.Module, ids: Tensor, float_hidden: Tensor) -> dict[str, Tensor]:
    """Score a language model on running text.

    Args:
        model: A causal model whose weights are those of the subject.
        ids: Evaluation windows [windows, length].
        float_hidden: `hidden_states` of the float model on the same windows.

    Returns:
        Per window: `nll` (nats a token, mean over predicted tokens), `kl` (from the float distribution to the
        subject's, nats a token), `top1` (share of tokens with the same first choice), `hidden` (squared error of the
        last hidden states over their squares).
    """
    head = model.get_output_embeddings()
    columns: dict[str, list[Tensor]] = {"nll": [], "kl": [], "top1": [], "hidden": []}
    for row, reference in zip(ids, float_hidden, strict=True):
        hidden = hidden_states(model, row[None])[0]
        chunks = zip(reference[:-1].split(CHUNK), hidden[:-1].split(CHUNK), row[1:].split(CHUNK), strict=True)
        parts = [token_scores(head(p), head(q), targets) for p, q, targets in chunks]
        for name in ("nll", "kl", "top1"):
            columns[name].append(torch.cat([part[name] for part in parts]).double().mean())
        columns["hidden"].append((hidden - reference).double().square().sum() / reference.double().square().sum())
    return {name: torch.stack(column) for name, column in columns.items()}


@torch.no_grad()
def embeddings(hidden: Tensor) -> Tensor:
    """Pool hidden states [windows, length, channels] as the sentence encoder does: mean over tokens, unit norm."""
    return F.normalize(hidden.mean(dim=1), dim=-1)


@torch.no_grad()
def encoder_scores(model: nn.Module, ids: Tensor, float_hidden: Tensor) -> dict[str, Tensor]:
    """Score a sentence encoder against its float self.

    Returns:
        Per window: `cosine` (1 - cosine of its embedding with the float one), `hidden` (relative squared error of the
        last hidden states), `similarity` (mean absolute error of its cosine similarities with all other windows), and
        `rank` (Spearman correlation of those similarities with the float ones: what a search would notice).
    """
    hidden = hidden_states(model, ids)
    ours, theirs = embeddings(hidden).double(), embeddings(float_hidden).double()
    off = ~torch.eye(len(ids), dtype=torch.bool)
    near, far = (ours @ ours.T)[off].reshape(len(ids), -1), (theirs @ theirs.T)[off].reshape(len(ids), -1)
    ranks = [table.argsort(dim=1).argsort(dim=1).double() for table in (near, far)]
    ranks = [F.normalize(table - table.mean(dim=1, keepdim=True), dim=1) for table in ranks]
    error = (hidden - float_hidden).double().square().sum(dim=(1, 2))
    return {
        "cosine": 1 - (ours * theirs).sum(dim=1),
        "hidden": error / float_hidden.double().square().sum(dim=(1, 2)),
        "similarity": (near - far).abs().mean(dim=1),
        "rank": (ranks[0] * ranks[1]).sum(dim=1),
    }


class DenseSwap:
    """Put a set of dense weights into the one float model for the length of a `with`, then put the float ones back."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._parameters = dict(model.named_parameters())
        unknown = set(weights) - set(self._parameters)
        if unknown:
            raise ValueError(f"DenseSwap: the float model has no parameter `{min(unknown)}`.")
        self._weights = weights
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        for name, new in self._weights.items():
            self._kept[name] = self._parameters[name].detach().clone()
            self._parameters[name].copy_(new)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, old in self._kept.items():
            self._parameters[name].copy_(old)
