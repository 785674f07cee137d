"""The output head of a language model: where it is, and how to stop in front of it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the module that turns the last hidden states into logits, where the model names one.

    Example:
        >>> head_of(nn.Linear(2, 2)) is None
        True
    """
    found = {}
    for name in ("get_output_embeddings", "get_input_embeddings"):
        try:
            found[name] = getattr(model, name, lambda: None)()
        except NotImplementedError:  # what transformers says of models without embeddings
            found[name] = None
    head, first = found["get_output_embeddings"], found["get_input_embeddings"]
    return head if isinstance(head, nn.Module) and head is not first else None


class _HeadReachedError(Exception):
    """Raised before the output head runs."""


@contextmanager
def before_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """Let a call of a model end in front of its output head; a model without one runs to its end.

    Yields:
        A list that will hold what entered the head.

    Example:
        >>> with before_head(nn.Linear(2, 2)) as seen:
        ...     pass
        >>> seen
        []
    """
    head, seen = head_of(model), list[Tensor]()

    def catch(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _HeadReachedError

    if head is None:
        yield seen
        return
    handle = head.register_forward_pre_hook(catch)
    try:
        with suppress(_HeadReachedError):
            yield seen
    finally:
        handle.remove()
