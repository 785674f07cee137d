"""`decode` on a Llama of 1.1 billion random weights: what of the speed is left when no cache holds any of them."""

from collections.abc import Iterator

from benchmarks import random_model
from benchmarks.decode import llamacpp, ours, race, running
from benchmarks.harness import Row


def rows(quick: bool, *, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield speeds, their ratios and parts of the floor.

    Args:
        quick: One round of few tokens.
        skipped: Filled with what could not run, and why.
    """
    named = random_model.commands(llamacpp, ours)
    with running(named, random_model.NAME, {} if skipped is None else skipped) as subjects:
        rounds, new = (1, 8) if quick else (3, 32)
        yield from race(random_model.NAME, list(subjects.values()), random_model.VOCAB, rounds=rounds, new=new)
