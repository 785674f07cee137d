"""planish: smooth it, then make it small.

Rooms load on first touch, so that `import planish` costs nothing:

    planish.quant      make a torch model 4-bit
    planish.kernels    run it fast
    planish.plugins    live inside other people's programs
    planish.metrics    is it calibrated?
    planish.nn         layers, smooth where ReLU has a corner
    planish.linalg     square roots of matrices
    planish.tune       choose hyper-parameters
    planish.regression predict a whole distribution
    planish.optim      minimize what is steep, or has a Hessian
    planish.complexity how hard is it, at the worst?
    planish.pde        fractional equations
    planish.graphs     fill the gaps of sensors
    planish.diffusion  diffusion models, fast and smooth
    planish.statespace smooth a time series
    planish.flows      densities with forces

The four verbs of the main job are here too: `quantize`, `evaluate`, `save`, `load`.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planish.quant import evaluate, load, quantize, save

_ROOMS = (
    *("complexity", "diffusion", "flows", "graphs", "kernels", "linalg", "metrics", "nn", "optim", "pde", "plugins"),
    *("quant", "regression", "statespace", "tune"),
)
_BASES = ("ModelMixin", "SchedulerMixin")  # a pipeline of diffusers that loads our schedulers asks for these by name
_VERBS = ("evaluate", "load", "quantize", "save")

__all__ = ["evaluate", "load", "quantize", "save"]  # the rooms are reached as attributes

try:
    __version__ = version("planish")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562: any public name)
    if name in _ROOMS:
        return importlib.import_module(f"planish.{name}")
    if name in _VERBS:
        return getattr(importlib.import_module("planish.quant"), name)
    if name in _BASES or name.startswith("QSched"):
        try:
            return getattr(importlib.import_module("planish.diffusion.schedulers"), name)
        except ImportError:
            raise AttributeError(f"planish.{name} needs `diffusers`: pip install 'planish[diffusers]'") from None
    raise AttributeError(f"module 'planish' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_VERBS})
