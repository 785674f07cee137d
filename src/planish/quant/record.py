"""What the engine asks of a place where finished blocks and decisions are kept."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from planish.quant.report import BlockReport
from planish.quant.stream import Block

if TYPE_CHECKING:
    from planish.quant.engine import Method, Walk


@runtime_checkable
class Record(Protocol):
    """Where finished blocks and decisions are kept, so that an interrupted run goes on and ends with the same bytes.

    `planish.quant.Journal` is one: a directory.
    """

    def opened(self, walk: "Walk", method: "Method") -> AbstractContextManager[None]:
        """Hold the record for one run, and refuse what an earlier run of something else left in it."""

    def restore(self, index: int, block: Block) -> BlockReport | None:
        """Put a finished block's layers in place (see `place`) and return its report; None if it is not finished.

        The block comes in float: what it makes of its inputs goes into the report's `clean` first.
        """

    def store(self, index: int, block: Block, entry: BlockReport) -> None:
        """Keep a finished block."""

    def recall(self, key: str) -> Any | None:  # noqa: ANN401  (JSON)
        """Return what was remembered under a key, or None."""

    def remember(self, key: str, value: Any) -> None:  # noqa: ANN401
        """Keep a decision (JSON-able) under a key."""

    def pause(self, key: str, index: int, states: Mapping[int, list[Tensor]]) -> None:
        """Keep where a search stands: the hidden states of its candidates after block `index`."""

    def resume(self, key: str) -> tuple[int, dict[int, list[Tensor]]] | None:
        """Return what was last paused under a key, or None."""

    def drop(self, key: str) -> None:
        """Forget what was paused under a key: it is decided."""
