"""The compiled module: whether it is there, why not, and with which instruction set it runs.

It stands below every room, and knows none: it takes addresses and numbers alone.
"""

import importlib
import os
from types import ModuleType

from planish._support import bad


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("planish._native"), ""
    except ImportError as error:
        return None, str(error)


def _choose(module: ModuleType, wanted: str | None) -> str:
    """Use the instruction set that the environment names, or the best."""
    if wanted is not None:
        runnable = module.runnable()
        if wanted not in runnable:
            raise bad("planish.kernels", "PLANISH_ISA", f"one of {', '.join(runnable)} on this processor", wanted)
        module.use(wanted)
    return str(module.active_isa())


native, absence = _load()
isa: str = "none" if native is None else _choose(native, os.environ.get("PLANISH_ISA"))
