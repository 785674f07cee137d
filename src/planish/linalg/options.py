"""The options that the square roots share, checked and resolved in one place."""

from dataclasses import dataclass
from typing import Literal, TypedDict

from torch import Tensor

from planish._support import bad
from planish.linalg.lyapunov import Steps, check_steps

Method = Literal["auto", "eigh", "mpa", "mtp", "newton_schulz", "pade_iter"]
Scale = Literal["auto", "trace", "fro", "spectral"]
Backward = Literal["auto", "eigh", "lyapunov", "autograd"]
_METHODS = ("auto", "eigh", "mpa", "mtp", "newton_schulz", "pade_iter")
_STEPS = {"pade_iter": 3, "newton_schulz": 15}


@dataclass(frozen=True)
class Options:
    """What the three functions take besides the matrix, resolved."""

    method: Method
    order: int
    scale: Scale | float | Tensor
    steps: int
    backward: Backward
    backward_steps: Steps
    tolerance: float | None
    eps: float
    check: bool
    paper: bool
    whole: bool = False  # one quotient of polynomials, where the spectrum is known to be narrow enough


def options(
    where: str,
    *,
    method: Method = "auto",
    tolerance: float | None = None,
    order: int = 5,
    scale: Scale | float = "auto",
    steps: int | None = None,
    backward: Backward = "auto",
    backward_steps: Steps | None = None,
    eps: float = 0.0,
    check: bool = True,
    paper: bool = False,
) -> Options:
    """Check and resolve the options."""
    if method not in _METHODS:
        raise bad(where, "method", "one of " + ", ".join(f'"{m}"' for m in _METHODS), method)
    if paper and method not in ("auto", "mpa", "mtp"):
        raise bad(where, "method", 'one of "auto", "mpa", "mtp" with `paper`', method)
    if paper:
        method = "mpa" if method == "auto" else method
    series = method in ("mtp", "newton_schulz")
    if scale == "auto":
        scale = "fro" if paper or series else "trace"
    if isinstance(scale, str):
        if scale not in ("trace", "fro", "spectral"):
            raise bad(where, "scale", 'one of "auto", "trace", "fro", "spectral", or a float', scale)
        if series and scale == "trace":
            raise bad(where, "scale", f'an upper bound of the spectrum for "{method}", which diverges above 2', scale)
    elif isinstance(scale, bool) or not 0 < scale < float("inf"):
        raise bad(where, "scale", "above 0 and finite", scale)
    for name, value in (("order", order), ("steps", steps if steps is not None else 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise bad(where, name, "an int >= 1", value)
    if backward not in ("auto", "eigh", "lyapunov", "autograd"):
        raise bad(where, "backward", 'one of "auto", "eigh", "lyapunov", "autograd"', backward)
    if backward_steps is None:
        backward_steps = 8 if paper else "auto"
    check_steps(where, "backward_steps", backward_steps)
    if tolerance is not None and not 0 < tolerance < 1:
        raise bad(where, "tolerance", "in (0, 1)", tolerance)
    if not 0 <= eps < float("inf"):
        raise bad(where, "eps", "a float >= 0", eps)
    return Options(
        method, order, scale, steps or _STEPS.get(method, 1), backward, backward_steps, tolerance, eps, check, paper
    )


class RootOptions(TypedDict, total=False):
    """The options of `matrix_sqrth`, which its siblings share."""

    method: Method
    tolerance: float | None
    order: int
    scale: Scale | float
    steps: int | None
    backward: Backward
    backward_steps: Steps | None
    eps: float
    check: bool
    paper: bool
