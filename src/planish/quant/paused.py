"""Runs of a block that wait where a layer begins, so that layers quantized one after the other cost one run together.

What enters a layer depends on what became of the layers before it, and a block of many layers would be run from its
beginning for each. Here every batch has a run of its own, in a thread that stops at the layer asked for; when a later
one is asked for, the runs go on from there, through whatever stands at that layer by then. Never do two threads compute
at once. A run is begun anew where it would tell something old: a layer behind it has changed, or is asked for again.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from planish.quant.stream import Block

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _LeftError(BaseException):
    """Raised in a waiting run to end it; no handler of the model's may stop it."""


_HERE = threading.local()


class _Run:
    """One batch's run: a thread that is either waiting or computing while its owner waits."""

    def __init__(self, block: Block, number: int) -> None:
        self.at: nn.Module | None = None  # the layer it is to wait at
        self.given: Arguments | None = None  # what that layer was called with, before any hook
        self.passing = self.left = self.ended = False
        self._error: BaseException | None = None
        self._go, self._come = threading.Semaphore(0), threading.Semaphore(0)
        self._work = block, number
        self.thread = threading.Thread(target=self._body, daemon=True)

    def _body(self) -> None:
        block, number = self._work
        _HERE.run = self
        try:
            with suppress(_LeftError):
                block.call(block.inputs[number], block.context[number])
        except BaseException as error:  # the owner raises it
            self._error = error
        self.ended = True
        self._come.release()

    def resume(self) -> None:
        """Let it compute until it waits again, or ends."""
        if self.thread.ident is None:
            self.thread.start()
        else:
            self._go.release()
        self._come.acquire()
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Called in the thread: let the owner go on."""
        self._come.release()
        self._go.acquire()
        self.given = None
        if self.left:
            raise _LeftError

    def leave(self) -> None:
        """End it where it waits."""
        self.left = True
        if self.thread.ident is not None and not self.ended:
            self.resume()


class PausedRuns:
    """The runs of a block's batches. All that the model still needs of a batch stays in memory while its run waits.

    Args:
        block: The block; its layers may be replaced or changed between two questions.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> block = Block("", net, [torch.ones(3, 2)], [{}], [None])
        >>> runs = PausedRuns(block)
        >>> [tuple(x.shape) for x in runs.entering("1")]
        [(3, 2)]
        >>> runs.close()
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.starts = 0  # how often the runs were begun
        self._runs: list[_Run] = []
        self._behind: dict[nn.Module, Any] = {}  # layers that ran, as they were then
        self._parts: set[nn.Module] = set()  # of the block, at any time since the beginning
        self._hook: Any = None

    def entering(self, name: str) -> Iterator[Tensor]:
        """Yield, batch by batch, what a layer is called with; a batch that does not reach it is left out.

        Args:
            name: Of the layer in the block.
        """
        module = self.block.module.get_submodule(name)
        if not self._runs or module in self._behind or self._changed():
            self._begin()

        def catch(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run = self._here()
            if run is not None and not run.passing:
                run.given = args, kwargs

        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            run = self._here()
            if run is None or run.given is None:
                return type(module).forward(module, *args, **kwargs)
            given = run.given
            run.wait()
            there, run.passing = self.block.module.get_submodule(name), True
            try:  # the whole call again: its hooks may be others by now, or the layer another
                return there(*given[0], **given[1])
            finally:
                run.passing = False

        for run in list(self._runs):
            if run.at is not module and not run.ended:
                handle = module.register_forward_pre_hook(catch, prepend=True, with_kwargs=True)
                module.__dict__["forward"] = forward
                run.at = module
                try:
                    run.resume()
                finally:
                    handle.remove()
                    del module.__dict__["forward"]
            if run.given is not None:
                yield _hooked(module, run.given)

    def _here(self) -> _Run | None:
        """Return the run that this thread is, if it is one of these."""
        run: _Run | None = getattr(_HERE, "run", None)
        return run if run in self._runs else None

    def _begin(self) -> None:
        """Begin at the first layer again."""
        self.close()
        self.starts += 1
        self._runs = [_Run(self.block, number) for number in range(len(self.block.inputs))]
        self._parts = set(self.block.module.modules())
        self._hook = register_module_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Remember what a layer was when a run went through it."""
        run = self._here()
        if run is not None and (run.passing or module is not run.at):
            self._behind[module] = _state(module)

    def _changed(self) -> bool:
        """Return whether a layer that runs have gone through is another by now."""
        present = set(self.block.module.modules())
        gone, self._parts = self._parts - present, self._parts | present  # transforms in hooks were never parts
        return any(module in gone or _state(module) != then for module, then in self._behind.items())

    def close(self) -> None:
        """End all runs."""
        for run in self._runs:
            run.leave()
        self._runs = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._behind.clear()


@contextmanager
def pausing(block: Block) -> Iterator[None]:
    """Let what enters a block's layers be asked for in turn, where the block is a whole model and so has many."""
    if block.first is not None or block.paused is not None:
        yield
        return
    block.paused = PausedRuns(block)
    try:
        yield
    finally:
        block.paused.close()
        block.paused = None


def _state(module: nn.Module) -> tuple[Any, ...]:
    """Return what changes when a module's own tensors are written to or replaced, or its hooks are."""
    own = (*module._parameters.values(), *module._buffers.values())
    written = tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in own if t is not None)
    return written, tuple(module._forward_pre_hooks), tuple(module._forward_hooks)


def _hooked(module: nn.Module, given: Arguments) -> Tensor:
    """Return the first argument as the module's hooks of today leave it."""
    args, kwargs = given
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        else:
            changed = hook(module, args)
            args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
