"""Choose among methods by what they do to the whole model, in one pass over its weights.

Each candidate has its own stream of hidden states; a block is read once, quantized by every candidate in turn, and let
go. The result is the same as quantizing and running the whole model once a candidate.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.quant.engine import Method, Walk, trial
from planish.quant.moments import measure
from planish.quant.stream import Stream, first_tensor

OBJECTIVES = ("hidden_mse", "kl", "nll")


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        losses: Loss of every candidate, in their order; infinite for one that was dropped on the way.
        best: Index of the least.
        objective: What the loss is.
    """

    losses: tuple[float, ...]
    best: int
    objective: str


def search(
    model: nn.Module,
    batches: Iterable[Any],
    methods: Sequence[Method],
    *,
    objective: str = "hidden_mse",
    drop: float | None = None,
    **where: Any,  # noqa: ANN401  (passed on to Walk)
) -> Choice:
    """Find which method hurts the whole model least; the model stays as it is.

    Args:
        model: See `quantize`.
        batches: See `quantize`.
        methods: The candidates.
        objective: "hidden_mse" (default): mean squared difference of what enters the output head, or of the output
            where there is no head. "kl": mean divergence from the float model's predictions, in nats a token. "nll":
            mean negative log likelihood of the data's next tokens, in nats.
        drop: Give up a candidate once its error at a block is this many times the least of all; None follows every
            one to the end. Must be above 1.
        **where: `skip`, `device`, `weights`, `progress` as for `quantize`.

    Returns:
        The choice.

    Raises:
        ValueError: There are no candidates, or an argument is out of range.

    Example:
        >>> import torch
        >>> from planish.quant import rtn
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 16))
        >>> search(model, [torch.randn(32, 64)], [rtn(bits=2, group_size=32), rtn(bits=8, group_size=32)]).best
        1
    """
    where["convolutions"] = any(bool(method.convolutions) for method in methods)
    return compare(Walk(model, batches, **where), methods, objective=objective, drop=drop)


@torch.no_grad()
def compare(
    walk: Walk,
    methods: Sequence[Method],
    *,
    objective: str = "hidden_mse",
    drop: float | None = None,
    stage: str = "search",
) -> Choice:
    """Do what `search` does on a walk that exists already."""
    if not methods:
        raise bad("search", "methods", "at least one method", [])
    if objective not in OBJECTIVES:
        raise bad("search", "objective", f"one of {', '.join(OBJECTIVES)}", objective)
    if drop is not None and not drop > 1:
        raise bad("search", "drop", "above 1 or None", drop)
    stream, journal = walk.stream, walk.journal
    key = f"{stage}, {objective}, drop={drop}: {list(methods)!r}"
    if journal and (found := journal.recall(key)) is not None:
        return Choice(tuple(found), min(range(len(found)), key=found.__getitem__), objective)
    clean = stream.start()
    states: dict[int, list[Any]] = dict.fromkeys(range(len(methods)), clean)
    before = journal.resume(key) if journal and not stream.whole else None
    done, states = before or (-1, states)  # a search that was interrupted goes on after its last block
    for index in range(len(stream.modules)):
        with stream.looking(index, clean) as block:
            sites = walk.sites(block)
            clean = measure(block, sites)
            for candidate, hidden in list(states.items()) if index > done else []:
                states[candidate] = trial(block, sites, hidden, methods[candidate])
        if index <= done:
            continue
        if drop is not None and index < len(stream.modules) - 1:
            errors = {c: _squared(hidden, clean) for c, hidden in states.items()}
            least = min(errors.values())
            states = {c: h for c, h in states.items() if errors[c] <= drop * least}
        if journal and not stream.whole:
            journal.pause(key, index, states)
        walk.progress(stage, index + 1, len(stream.modules))
    losses = [math.inf] * len(methods)
    for candidate, hidden in states.items():
        losses[candidate] = loss(stream, clean, hidden, objective)
    if journal:
        journal.remember(key, losses)
        journal.drop(key)
    return Choice(tuple(losses), min(range(len(losses)), key=losses.__getitem__), objective)


def loss(stream: Stream, clean: list[Any], hidden: list[Any], objective: str) -> float:
    """Return how far the model is from its float self, given what leaves the last block in both.

    Args:
        stream: The model and its batches.
        clean: Hidden states of the float model after the last block, one a batch.
        hidden: Those of the quantized model.
        objective: See `search`.

    Returns:
        The loss, a mean over tokens (and channels for "hidden_mse").
    """
    total, count = 0.0, 0
    if objective == "hidden_mse":
        for p, q in zip(_features(stream, clean), _features(stream, hidden), strict=True):
            total, count = total + (q.float() - p.float()).square().sum().item(), count + p.numel()
        return total / count
    for number, (p, q) in enumerate(zip(stream.outputs(clean), stream.outputs(hidden), strict=True)):
        new, rows = _token_loss(first_tensor(p), first_tensor(q), stream.batches[number], objective)
        total, count = total + new, count + rows
    return total / count


def _token_loss(clean: Tensor, hidden: Tensor, batch: Any, objective: str) -> tuple[float, int]:  # noqa: ANN401
    """Sum over tokens, and their number, of one batch's logits; a few hundred rows at a time."""
    if clean.ndim != 3:
        raise bad("search", "objective", "'hidden_mse' for a model that returns no logits", objective)
    if objective == "kl":
        total = 0.0
        for p, q in zip(clean.flatten(0, 1).split(256), hidden.flatten(0, 1).split(256), strict=True):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            total += nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        return total, clean.shape[0] * clean.shape[1]
    ids = batch["input_ids"] if isinstance(batch, dict) else batch if isinstance(batch, Tensor) else batch[0]
    targets = ids[:, 1:].reshape(-1).to(hidden.device)
    logits = hidden[:, :-1].flatten(0, 1)
    total = 0.0
    for rows, wanted in zip(logits.split(256), targets.split(256), strict=True):
        total += nn.functional.cross_entropy(rows.float(), wanted, reduction="sum").item()
    return total, targets.numel()


class _HeadReachedError(Exception):
    """Raised before the output head runs: what enters it is all that is wanted."""


def _features(stream: Stream, hidden: list[Any]) -> Iterator[Tensor]:
    """Yield, for each batch, what enters the output head; the output where there is no head."""
    find: Callable[[], nn.Module | None] | None = getattr(stream.model, "get_output_embeddings", None)
    head = find() if find else None
    if head is None or stream.whole:
        for output in stream.outputs(hidden):
            yield first_tensor(output)
        return
    seen: list[Tensor] = []

    def catch(_m: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _HeadReachedError

    for number in range(len(hidden)):
        handle = head.register_forward_pre_hook(catch)  # for this call only: two of these generators run side by side
        try:
            with suppress(_HeadReachedError):
                next(stream.outputs(hidden, only=number))
        finally:
            handle.remove()
        yield seen.pop()


def _squared(hidden: list[Any], clean: list[Any]) -> float:
    return float(sum((h.float() - c.float()).square().sum().item() for h, c in zip(hidden, clean, strict=True)))
