"""Walk a model block by block, holding one block and its inputs at a time.

The blocks are the heaviest `ModuleList` whose elements are of one class; a model without one is a single block. An
encoder-decoder has two such stacks, each walked by a stream of its own: the second while the first answers with what
left its last block. What a block receives beside its hidden states (masks, position embeddings) is found by running the
model once with its blocks replaced by recorders, so that nothing about any architecture needs to be known.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from planish._support import bad, logger
from planish.quant.calls import by_name, equal, first_parameter, moved_to, rows, token_mask
from planish.quant.heads import before_head
from planish.quant.precision import restore, widen
from planish.quant.stacks import find_blocks, find_stacks

if TYPE_CHECKING:
    from planish.quant.paused import PausedRuns


@runtime_checkable
class Weights(Protocol):
    """Where the parameters of a model on the meta device come from: read when a block's turn comes, then let go."""

    def load(self, module: nn.Module, name: str, *, recurse: bool = True) -> None:
        """Materialize the parameters and buffers of the submodule `name`; its children's too unless told otherwise."""

    def release(self, module: nn.Module, name: str) -> None:
        """Send them back to the meta device."""


@dataclass
class Block:
    """One block of a model, its inputs, and everything else it is called with.

    Attributes:
        name: Path in the model; "" when the block is the whole model.
        module: The block itself.
        inputs: Hidden states, one tensor a batch.
        context: The other arguments, by name, one dict a batch.
        keep: Which tokens count in statistics, one mask (rows, tokens) a batch, or None for all.
        first: Name of the argument that carries the hidden states; None when the block is the whole model.
        device: Where it runs.
        stored: Precision in which each parameter and buffer is kept; half precision computes in float32 meanwhile.
        finished: Quantized layers whose dense stand-ins are in the block.
        notes: What steps have to say of layers, by name, for the report (JSON-able).
        clean: What enters it in the float model, where `inputs` are those of the quantized one.
        clean_context: The other arguments in the float model: a decoder's hold what its encoder made.
        paused: Runs of a block that is a whole model, which wait at the layer being worked on; see `paused.py`.
        twin: The block as it was before anything was rounded, with the float model's inputs; None unless a rounding
            or refining step asks (`sees_clean`) what the float model would have seen.
    """

    name: str
    module: nn.Module
    inputs: list[Any]
    context: list[dict[str, Any]]
    keep: list[Tensor | None]
    first: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stored: dict[str, torch.dtype] = field(default_factory=dict)
    finished: dict[str, nn.Module] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    clean: list[Any] = field(default_factory=list)
    clean_context: list[dict[str, Any]] = field(default_factory=list)
    twin: "Block | None" = None
    paused: "PausedRuns | None" = None

    def run(self, inputs: list[Any] | None = None) -> Iterator[Tensor]:
        """Yield the block's output for each batch, on `inputs` instead of its own where they are given."""
        for hidden, context in zip(self.inputs if inputs is None else inputs, self.context, strict=True):
            yield self.call(hidden, context)

    def sample(self) -> tuple[Any, dict[str, Any]]:
        """Return one call of the block, on the row of the first batch that is padded least, for checks."""
        hidden, context, keep = self.inputs[0], self.context[0], self.keep[0]
        if self.first is None or not isinstance(hidden, Tensor) or hidden.shape[0] <= 1:
            return hidden, context
        rows = hidden.shape[0]
        i = int(keep.sum(-1).argmax()) if keep is not None and keep.shape[0] == rows else 0
        row = slice(i, i + 1)
        cut = {k: v[row] if isinstance(v, Tensor) and v.ndim and v.shape[0] == rows else v for k, v in context.items()}
        return hidden[row], cut

    @torch.no_grad()
    def call(self, hidden: Any, context: Mapping[str, Any]) -> Tensor:  # noqa: ANN401  (a whole batch for a whole model)
        """Return the block's output for one batch."""
        if self.first is None:
            return first_tensor(call_model(self.module, moved_to(hidden, self.device, torch.float32)))
        return first_tensor(
            self.module(**{self.first: moved_to(hidden, self.device)}, **moved_to(context, self.device))
        )


class Stream:
    """The blocks of a model and the batches that flow through them.

    Args:
        model: Any module.
        batches: What the model takes: tensors, tuples of positional or dicts of keyword arguments.
        device: Where blocks run; default the device of the model's parameters.
        weights: Source of parameters when the model is on the meta device.
        stack: Which of `find_stacks`' to walk; default the heaviest, whatever else there is being run as it stands.

    Raises:
        ValueError: There is no batch, or a batch has no values.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        device: torch.device | str | None = None,
        weights: Weights | None = None,
        stack: int | None = None,
    ) -> None:
        self.model, self.weights = model, weights
        self.batches = list(batches)
        if not self.batches:
            raise bad("quantize", "batches", "at least one batch of what the model takes", [])
        if not any(t.numel() for t in tensors_in(self.batches)):
            raise bad("quantize", "batches", "batches with at least one token", "only empty tensors")
        stacks = [find_blocks(model)] if stack is None else find_stacks(model)
        self.names, self.modules = stacks[stack or 0]
        self.inside = tuple(f"{name}." for names, _ in stacks for name in names)  # read from disk in their turn
        self.stops = len(stacks) > 1 + (stack or 0)  # what follows is walked by another stream
        self.before: list[tuple[Stream, list[Tensor]]] = []
        self.whole = self.names == [""]
        params = [p for p in model.parameters() if p.device.type != "meta"]
        self.device = torch.device(device) if device else (params[0].device if params else torch.device("cpu"))
        self.keep = [token_mask(batch) for batch in self.batches]
        self.contexts: list[list[dict[str, Any]]] = []
        self.first: str | None = None
        self._wrap: Callable[[Tensor], Any] = lambda hidden: hidden
        self._returns_more = False
        self._passed: Any = None  # what the recorder before returned
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}  # of the batch being recorded: as given, as kept

    @torch.no_grad()
    def start(self, before: "list[tuple[Stream, list[Tensor]]] | None" = None) -> list[Any]:
        """Record what every block is called with and return the hidden states that enter the first.

        Args:
            before: Streams of stacks that run before this one, and what leaves their last blocks.
        """
        self.before = before or []
        if not self.whole:
            self.load_rest()
            self.first = first_parameter(self.modules[0])
            self.contexts = [[] for _ in self.modules]
            try:
                return self._record_all()
            except _NotAChainError as found:
                logger.warning("%s of %s: the model is processed as one block", found, type(self.model).__name__)
                self.names, self.modules, self.whole, self.first = [""], [self.model], True, None
        if self.weights is not None:
            self.weights.load(self.model, "")
        self.contexts = [[{} for _ in self.batches]]
        return list(self.batches)

    def _record_all(self) -> list[Any]:
        """Run every batch with recorders in the blocks' place; the blocks must form a chain, each called once."""
        hidden: list[Any] = []
        for count, batch in enumerate(self.batches, 1):

            def record(index: int, bound: dict[str, Any], before: list[Any] = hidden) -> Any:  # noqa: ANN401
                return self._record(index, bound, before)

            # The head is not run: its answer is of no interest, and is often larger than all else.
            with self._answering(count - 1), self._replaced(record), before_head(self.model), suppress(_EnoughError):
                call_model(self.model, moved_to(batch, self.device))
            if any(len(calls) != count for calls in self.contexts):
                raise _NotAChainError(f"not every one of the blocks {self.names[0]} ... runs")
            self._moved.clear()
        return hidden

    def _record(self, index: int, bound: dict[str, Any], hidden: list[Any]) -> Any:  # noqa: ANN401
        state = bound.pop(self.first or "")
        if index and not (len(self.contexts[index]) < len(hidden) and equal(state, self._passed)):
            raise _NotAChainError(f"{self.names[index]} is not fed what {self.names[index - 1]} returns")
        if not index and len(hidden) > len(self.contexts[-1]):
            raise _NotAChainError(f"{self.names[index]} runs twice")
        self._passed = state
        bound = moved_to(bound, self.device, torch.float32, self._moved)  # all blocks share one mask, kept once
        if index == 0:
            if not hidden or self._returns_more:  # run a block for real, to learn how blocks wrap their hidden states
                self._learn_wrapping(state, bound)
            hidden.append(moved_to(state, self.device, torch.float32))
        self.contexts[index].append(bound)
        if self.stops and index == len(self.modules) - 1:
            raise _EnoughError
        return self._wrap(state)

    def _learn_wrapping(self, state: Tensor, context: dict[str, Any]) -> None:
        with self.looking(0, [state]) as block:
            hidden = moved_to(state, self.device, torch.float32)
            output = type(block.module).forward(block.module, **{self.first or "": hidden}, **context)
        if isinstance(output, tuple):
            rest = output[1:]
            self._wrap = lambda hidden: (hidden, *rest)
            self._returns_more = any(True for _ in tensors_in(rest))  # position biases: each batch has its own
        elif not isinstance(output, Tensor):
            raise bad("quantize", "model", "one whose blocks return a tensor or a tuple", type(output).__name__)

    def load_rest(self) -> None:
        """Materialize what is not in a block (embeddings, final norm, head): it stays for the whole walk."""
        if self.weights is None:
            return
        for name, module in self.model.named_modules():
            if not (name + ".").startswith(self.inside):
                for _, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                    if tensor.device.type == "meta":
                        self.weights.load(module, name, recurse=False)
                        break

    @contextmanager
    def _replaced(self, stand_in: Callable[[int, dict[str, Any]], Any]) -> Iterator[None]:
        """Let `stand_in(index, arguments by name)` answer for every block while inside."""
        try:
            for index, module in enumerate(self.modules):
                signature = inspect.signature(type(module).forward)

                def forward(*args: Any, _i: int = index, _s: inspect.Signature = signature, **kwargs: Any) -> Any:  # noqa: ANN401
                    return stand_in(_i, by_name(_s, args, kwargs))

                module.__dict__["forward"] = forward
            yield
        finally:
            for module in self.modules:
                module.__dict__.pop("forward", None)

    def block(self, index: int, inputs: list[Any]) -> Block:
        """Return block `index` with these inputs; its weights are read when they are on disk."""
        module = self.modules[index]
        if self.weights is not None and not self.whole:
            self.weights.load(module, self.names[index])
        block = Block(self.names[index], module, inputs, self.contexts[index], self.keep, self.first, self.device)
        block.stored = widen(module)
        return block

    @contextmanager
    def looking(self, index: int, inputs: list[Any]) -> Iterator[Block]:
        """Lend block `index`, which is only looked at; it is given back whatever happens meanwhile."""
        block = self.block(index, inputs)
        try:
            yield block
        finally:
            restore(block.module, block.stored)
            self.release(index)

    def release(self, index: int) -> None:
        """Let go of a block's weights, once they are written, when they came from disk."""
        if self.weights is not None and not self.whole:
            self.weights.release(self.modules[index], self.names[index])

    @torch.no_grad()
    def outputs(self, hidden: list[Tensor]) -> Iterator[Any]:
        """Yield the model's output for each batch, given what leaves the last block."""
        for number, (batch, state) in enumerate(zip(self.batches, hidden, strict=True)):
            yield self.output(number, batch, state)

    @torch.no_grad()
    def output(self, number: int, batch: Any, state: Any) -> Any:  # noqa: ANN401
        """Return the model's output for batch `number`, or for some of its rows, given what leaves the last block."""
        if self.whole:
            return state
        with self._answering(number), self._replaced(self._answer(state)):
            return call_model(self.model, moved_to(batch, self.device))

    def pieces(self, number: int, *states: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:  # noqa: ANN401
        """Yield the rows of a batch with their rows of `states`, where it can be cut; else all of it at once.

        Logits of a few thousand tokens take more memory than all else: nobody needs more than a row's at a time.
        """
        batch = self.batches[number]
        cut = [] if self.whole or self.before or self._returns_more else list(rows(batch))
        if len(cut) > 1 and all(state.ndim > 2 and len(state) == len(cut) for state in states):
            yield from ((row, tuple(state[i : i + 1] for state in states)) for i, row in enumerate(cut))
        else:
            yield batch, states

    @contextmanager
    def _answering(self, number: int) -> Iterator[None]:
        """Let the stacks before this one answer for batch `number` with what left their last blocks."""
        with ExitStack() as stack:
            for stream, hidden in self.before:
                stack.enter_context(stream._replaced(stream._answer(hidden[number])))
            yield

    def _answer(self, state: Tensor) -> Callable[[int, dict[str, Any]], Any]:
        last = len(self.modules) - 1

        def answer(index: int, bound: dict[str, Any]) -> Any:  # noqa: ANN401
            given = bound[self.first or ""]
            return self._wrap(state.to(given.device, given.dtype) if index == last else given)

        return answer


class _EnoughError(Exception):
    """Raised by the last recorder of a stack: what follows it is of no interest now."""


class _NotAChainError(Exception):
    """Raised while recording, where blocks do not feed one another in order: experts, heads, layers that are shared."""


def call_model(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
    """Call a model on a batch: a dict by name, a tuple or list by position, anything else as it is."""
    args, kwargs = call_arguments(model, batch)
    return model(*args, **kwargs)


def call_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    """Return the arguments, by position and by name, with which a model is called on a batch."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if isinstance(batch, Mapping):
        return (), {**batch, **extra}
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,), extra


def first_tensor(output: Any) -> Tensor:  # noqa: ANN401
    """Return the main tensor of what a module returns: itself, the first of a tuple, or the first of a dict."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if values is not None and not isinstance(values, str):
        for value in values:
            if isinstance(value, Tensor):
                return value
    allowed = "one that returns a tensor, or a tuple or dict that holds one"
    raise bad("quantize", "model", allowed, type(output).__name__)


def tensors_in(value: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Yield the tensors in nested dicts, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the values of tokens that count, (tokens, channels): all but the padded ones."""
    rows = values.reshape(-1, values.shape[-1])
    return rows if mask is None or mask.numel() != rows.shape[0] else rows[mask.reshape(-1).to(rows.device)]
