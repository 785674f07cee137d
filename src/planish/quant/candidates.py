"""Choose among methods by what they do to the whole model, in one pass over its weights.

Each candidate has its own stream of hidden states; a block is read once, quantized by every candidate in turn, and let
go. The result is the same as quantizing and running the whole model once a candidate.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.quant.engine import Method, Walk, trial
from planish.quant.heads import before_head
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
            for candidate in list(states) if index > done else []:
                states[candidate] = trial(block, sites, states[candidate], methods[candidate])
        if index <= done:
            continue
        if drop is not None and index < len(stream.modules) - 1:
            errors = {c: _squared(hidden, clean) for c, hidden in states.items()}
            least = min(errors.values())
            states = {c: h for c, h in states.items() if errors[c] <= drop * least}
        if journal and not stream.whole:
            journal.pause(key, index, states)
        walk.progress(stage, index + 1, len(stream.modules))
    found = [math.inf] * len(methods)
    for candidate, value in zip(states, losses(stream, clean, list(states.values()), objective), strict=True):
        found[candidate] = value
    if journal:
        journal.remember(key, found)
        journal.drop(key)
    return Choice(tuple(found), min(range(len(found)), key=found.__getitem__), objective)


def loss(stream: Stream, clean: list[Any], hidden: list[Any], objective: str) -> float:
    """Return how far one quantized model is from its float self; see `losses`."""
    return losses(stream, clean, [hidden], objective)[0]


def losses(stream: Stream, clean: list[Any], hidden: Sequence[list[Any]], objective: str) -> list[float]:
    """Return how far models are from their float self, given what leaves the last block in each.

    Args:
        stream: The model and its batches.
        clean: Hidden states of the float model after the last block, one a batch.
        hidden: For each quantized model the same.
        objective: See `search`.

    Returns:
        Each one's loss, a mean over tokens (and channels for "hidden_mse").
    """
    totals, count = [0.0] * len(hidden), 0
    for number, state in enumerate(clean):
        states = (state, *(each[number] for each in hidden))
        whole = [(stream.batches[number], states)]
        for batch, (p, *others) in whole if objective == "hidden_mse" else stream.pieces(number, *states):
            aim = None if objective == "nll" else _answer(stream, number, batch, p, objective)
            amount = 0
            for i, q in enumerate(others):
                new, amount = _token_loss(aim, _answer(stream, number, batch, q, objective), batch, objective)
                totals[i] += new
            count += amount
    return [total / count for total in totals]


def _answer(stream: Stream, number: int, batch: Any, state: Any, objective: str) -> Tensor:  # noqa: ANN401
    """Return what a loss looks at: logits, or for "hidden_mse" what enters the head, the output where there is none."""
    if objective != "hidden_mse" or stream.whole:
        return first_tensor(stream.output(number, batch, state))
    output = None
    with before_head(stream.model) as seen:
        output = stream.output(number, batch, state)
    return seen[0] if seen else first_tensor(output)


def _token_loss(aim: Tensor | None, found: Tensor, batch: Any, objective: str) -> tuple[float, int]:  # noqa: ANN401
    """Sum over tokens, and their number (of numbers for "hidden_mse"); logits a few hundred rows at a time."""
    if objective == "hidden_mse" and aim is not None:
        return (found.float() - aim.float()).square().sum().item(), found.numel()
    if found.ndim != 3:
        raise bad("search", "objective", "'hidden_mse' for a model that returns no logits", objective)
    total = 0.0
    if aim is not None:
        for p, q in zip(aim.flatten(0, 1).split(256), found.flatten(0, 1).split(256), strict=True):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            total += nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        return total, found.shape[0] * found.shape[1]
    ids = batch["input_ids"] if isinstance(batch, Mapping) else batch if isinstance(batch, Tensor) else batch[0]
    targets = ids[:, 1:].reshape(-1).to(found.device)
    logits = found[:, :-1].flatten(0, 1)
    for rows, wanted in zip(logits.split(256), targets.split(256), strict=True):
        total += nn.functional.cross_entropy(rows.float(), wanted, reduction="sum").item()
    return total, targets.numel()


def _squared(hidden: list[Any], clean: list[Any]) -> float:
    return float(sum((h.float() - c.float()).square().sum().item() for h, c in zip(hidden, clean, strict=True)))
