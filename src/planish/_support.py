"""What every room needs: the one sentence of a bad argument, optional packages, own exceptions, warnings.

Nothing here knows about any room.
"""

import ctypes
import importlib
import logging
import sys
import warnings
from types import ModuleType
from typing import Literal

logger = logging.getLogger("planish")


class PlanishWarning(UserWarning):
    """A degraded path was taken: slower, larger or less accurate than asked, and why."""


Reason = Literal[
    "missing",
    "unreadable",
    "name",
    "shape",
    "dtype",
    "range",
    "checksum",
    "unsupported",
    "lossy",
    "exists",
    "unwritable",
]
"""Why a checkpoint was refused: the closed list.

missing: a file or tensor is absent. unreadable: a file is truncated or not what its name says. name: a tensor or layer
nobody asked for. shape, dtype: not what the description says. range: a value that cannot be (a scale of zero).
checksum: the content is not what was written. unsupported: a layout or option planish does not read or write.
lossy: it cannot be written without changing a weight. exists: the target is there already. unwritable: the disk is
full or may not be written.
"""


class CheckpointError(ValueError):
    """A checkpoint on disk cannot be read or written faithfully; the sentence names the tensor or file.

    Attributes:
        reason: Which of the closed list `Reason` it is.
    """

    def __init__(self, message: str, reason: Reason = "unreadable") -> None:
        super().__init__(message)
        self.reason: Reason = reason


class MissingExtra(ImportError):
    """An optional package is absent; the sentence holds the `pip install` line that adds it."""


class NotConverged(RuntimeError):
    """An iteration stopped before its tolerance; `best` carries the best iterate."""

    def __init__(self, message: str, best: object = None) -> None:
        super().__init__(message)
        self.best = best


def bad(where: str, name: str, allowed: str, got: object) -> ValueError:
    """Build the ValueError of a bad argument in the house's fixed sentence.

    Args:
        where: Whose argument it is: the public callable's name, with the block or layer where known.
        name: The argument's name.
        allowed: What it must be, as in "must be ...".
        got: What came.

    Returns:
        The exception, to be raised by the caller.

    Example:
        >>> str(bad("smoothquant_plus", "alpha", "a float in [0, 1]", 1.5))
        'smoothquant_plus: `alpha` must be a float in [0, 1]; got 1.5.'
    """
    return ValueError(f"{where}: `{name}` must be {allowed}; got {got!r}.")


def require(package: str, extra: str, why: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        package: Dotted module name, e.g. "matplotlib.pyplot".
        extra: The extra of planish that installs it.
        why: What needs it, as the subject of the sentence.

    Returns:
        The imported module.

    Raises:
        MissingExtra: The package is not installed.

    Example:
        >>> require("json", "demo", "this example").loads("1")
        1
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        if getattr(error, "name", None) not in {None, top, package}:
            raise  # the package is there but broken: its own message says more
        raise MissingExtra(f"{why} needs `{top}`: pip install 'planish[{extra}]'") from None


def keep_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones, for the whole process.

    By default glibc gives every large block back and has the kernel zero new pages for the next: on virtual machines
    that can cost ten times what the operation itself does. For programs of our own; a library leaves its host alone.

    Returns:
        Whether the C library took the setting.

    Example:
        >>> keep_memory() in (True, False)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc's takes these
    if mallopt is None:
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    return all(mallopt(*pair) == 1 for pair in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)))


def release_memory() -> bool:
    """Let the C library give freed memory back to the system now, holes in the middle of its heap included.

    glibc takes a large block straight from the system only up to a threshold, and raises that to the size of whatever
    such block is freed (up to 32 MB), and with it the size of the free end that it keeps (up to 64 MB). From then on
    tensors of that size lie in the heap, and what is freed there stays with the process.

    Returns:
        Whether anything was given back.

    Example:
        >>> release_memory() in (True, False)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    return trim is not None and trim(0) == 1


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Emit a PlanishWarning, once per message and process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, PlanishWarning, stacklevel=3)
