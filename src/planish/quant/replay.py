"""Run a model again from where some of its layers begin: what came before them is remembered, not computed.

A trial that changes late layers repeats everything before them. Which calls had returned before the first of these
layers was called is read off one traced run; the outermost of them answer from memory afterwards. What is computed
between modules (a residual sum) is computed again, from the same values, and so is the same bit for bit.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class _Call:
    """One call of a module in a traced run: when it began and ended, and the call it was made in."""

    module: nn.Module
    turn: int
    start: int
    parent: "_Call | None"
    end: int = -1


@dataclass
class Trace:
    """The calls of one run of a model.

    Attributes:
        calls: In order of their beginnings.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> trace = Trace.of(net, lambda: net(torch.ones(1, 2)))
        >>> len(trace.calls), trace.begins([net[1]])
        (3, 3)
    """

    calls: list[_Call] = field(default_factory=list)

    @classmethod
    def of(cls, root: nn.Module, run: Callable[[], Any]) -> "Trace":
        """Run a model once and note every call of its modules."""
        trace = cls()
        clock, turns = iter(range(1 << 62)), dict.fromkeys(root.modules(), 0)
        running: list[_Call] = []

        def enter(module: nn.Module, _args: tuple[Any, ...]) -> None:
            running.append(_Call(module, turns[module], next(clock), running[-1] if running else None))
            turns[module] += 1
            trace.calls.append(running[-1])

        def leave(_module: nn.Module, _args: tuple[Any, ...], _out: Any) -> None:  # noqa: ANN401
            running.pop().end = next(clock)

        handles = [m.register_forward_pre_hook(enter, prepend=True) for m in turns]
        handles += [m.register_forward_hook(leave) for m in turns]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        return trace

    def begins(self, layers: Collection[nn.Module]) -> int | None:
        """Return when the first of some modules is called; None if none of them is."""
        return next((call.start for call in self.calls if call.module in layers), None)

    def before(self, layers: Collection[nn.Module]) -> list[_Call]:
        """Return the outermost calls that had returned when the first of some modules was called."""
        start = self.begins(layers)
        if start is None:
            return []
        return [c for c in self.calls if c.end < start and (c.parent is None or c.parent.end > start)]


class Replay:
    """What came before some layers, for every batch.

    Args:
        trace: Of the model.
        layers: The layers that are going to change.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> x = torch.ones(1, 2)
        >>> replay = Replay(Trace.of(net, lambda: net(x)), [net[2]])
        >>> with replay.recording(0):
        ...     y = net(x)
        >>> with replay.replaying(0):
        ...     bool((net(x) == y).all())
        True
    """

    def __init__(self, trace: Trace, layers: Collection[nn.Module]) -> None:
        self._turns: dict[nn.Module, list[int]] = {}
        for call in trace.before(layers):
            self._turns.setdefault(call.module, []).append(call.turn)
        self._kept: dict[int, dict[nn.Module, list[Any]]] = {}

    def forget(self) -> None:
        """Remember nothing from now on: every run is a whole one."""
        self._turns.clear()
        self._kept.clear()

    @contextmanager
    def recording(self, batch: int) -> Iterator[None]:
        """Remember what the run inside makes of a batch, up to the layers."""
        kept: dict[nn.Module, list[Any]] = {}
        turns = dict.fromkeys(self._turns, 0)

        def note(module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:  # noqa: ANN401
            if turns[module] in self._turns[module]:
                kept.setdefault(module, []).append(_copied(out))  # what follows may write into it
            turns[module] += 1

        handles = [module.register_forward_hook(note) for module in self._turns]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._kept[batch] = {m: outs for m, outs in kept.items() if not any(o is _Unknown for o in outs)}

    @contextmanager
    def replaying(self, batch: int) -> Iterator[None]:
        """Let a run of the same batch inside begin at the layers."""
        kept = self._kept.get(batch, {})
        try:
            for module, outs in kept.items():
                module.__dict__["forward"] = _answering(iter(outs), module.forward)
            yield
        finally:
            for module in kept:
                module.__dict__.pop("forward", None)


def _answering(answers: Iterator[Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that gives the answers in turn, and computes once there are no more."""

    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        answer = next(answers, _Unknown)
        return compute(*args, **kwargs) if answer is _Unknown else _copied(answer)

    return forward


class _Unknown:
    """Stands for what cannot be copied: the call is made again."""


def _copied(value: Any) -> Any:  # noqa: ANN401
    """Copy the tensors of plain containers; `_Unknown` for anything else."""
    if isinstance(value, Tensor):
        return value.clone()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) in (tuple, list):
        parts = [_copied(part) for part in value]
        return _Unknown if any(part is _Unknown for part in parts) else type(value)(parts)
    if type(value) is dict:
        named: Mapping[Any, Any] = {key: _copied(part) for key, part in value.items()}
        return _Unknown if any(part is _Unknown for part in named.values()) else dict(named)
    return _Unknown
