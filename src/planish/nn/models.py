"""Whole models: put smooth units in, narrow them while training, take exact Leaky ReLUs out."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from planish._support import bad
from planish.nn.leaky import SAU
from planish.nn.parameters import SlopeAndWidth


def replace_activations(
    model: nn.Module,
    old: type[nn.Module] | tuple[type[nn.Module], ...],
    new: Callable[..., nn.Module],
    **options: Any,  # noqa: ANN401  (whatever `new` takes)
) -> int:
    """Replace all layers of a kind by new ones, in place.

    A layer that stands in several places is replaced by one that stands in all of them. New layers take the device and
    dtype of the model's first floating-point parameter. Calls of functions such as F.relu cannot be seen.

    Args:
        model: Any module that holds the layers; it cannot be such a layer itself.
        old: The class, or classes, to replace; subclasses are not.
        new: Called with `options` for each; a class such as SAU, or a function that returns a module.
        **options: Handed to `new`.

    Returns:
        The number of layers replaced, each counted once.

    Raises:
        ValueError: The model holds no such layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> replace_activations(net, nn.ReLU, SAU, sigma=0.5)
        1
        >>> type(net[1]).__name__
        'SAU'
    """
    kinds = old if isinstance(old, tuple) else (old,)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out repetitions
            if child is None or type(child) not in kinds:
                continue
            if child not in made:
                fresh = new(**options).train(child.training)
                made[child] = fresh if like is None else fresh.to(like.device, like.dtype)
            setattr(parent, name, made[child])
    if not made:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise bad("replace_activations", "model", f"a module that holds layers of {names}", type(model).__name__)
    return len(made)


def to_leaky_relu(model: nn.Module) -> dict[str, float]:
    """Replace every SAU by the exact Leaky ReLU that it smooths, in place.

    Args:
        model: Any module that holds SAU layers; it cannot be one itself.

    Returns:
        For each layer's name the largest distance, over all inputs, of the unit from what replaced it.

    Raises:
        ValueError: The model holds no SAU.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), SAU(init=0.25, sigma=0.01), nn.Linear(8, 1))
        >>> bounds = to_leaky_relu(net)
        >>> net[1], round(bounds["1"], 6)
        (LeakyReLU(negative_slope=0.25), 0.002992)
    """
    bounds: dict[str, float] = {}
    made: dict[nn.Module, nn.Module] = {}
    for path, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, SAU):
                made.setdefault(child, child.to_leaky_relu())
                bounds[f"{path}.{name}".lstrip(".")] = child.error_bound()
                setattr(parent, name, made[child])
    if not bounds:
        raise bad("to_leaky_relu", "model", "a module that holds layers of SAU", type(model).__name__)
    return bounds


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of parameters for an optimizer: what may decay, and the units' slopes and widths, which not.

    Args:
        model: Any module.
        weight_decay: The decay of all other parameters, >= 0.

    Returns:
        The groups, as optimizers take them; the second is left out where no unit is trained.

    Raises:
        ValueError: `weight_decay` is negative.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), SAU(), nn.Linear(8, 1))
        >>> [(len(g["params"]), g["weight_decay"]) for g in param_groups(net, 0.1)]
        [(4, 0.1), (1, 0.0)]
    """
    if not weight_decay >= 0:
        raise bad("param_groups", "weight_decay", "a float >= 0", weight_decay)
    units = {p for m in model.modules() if isinstance(m, SlopeAndWidth) for p in m.parameters(recurse=False)}
    rest = [p for p in model.parameters() if p not in units]
    groups = [{"params": rest, "weight_decay": weight_decay}]
    if units:
        groups.append({"params": [p for p in model.parameters() if p in units], "weight_decay": 0.0})
    return groups


class WidthSchedule:
    """Narrow the width of every SAU from one value to another while a model is trained: graduated smoothing.

    Train smooth, narrow, then call `to_leaky_relu`: what is deployed is exact, and the bound says what that changed.
    The widths must not be trained themselves.

    Args:
        model: Any module that holds SAU layers.
        start: First width, > 0.
        end: Last width, > 0.
        n_steps: Number of calls of `step` from first to last, >= 1; the width falls by the same factor at each.

    Raises:
        ValueError: An argument is out of its range, there is no SAU, or one trains its width.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), SAU(), nn.Linear(8, 1))
        >>> schedule = WidthSchedule(net, start=1.0, end=0.01, n_steps=2)
        >>> [round(schedule.step(), 3) for _ in range(3)]
        [0.1, 0.01, 0.01]
    """

    def __init__(self, model: nn.Module, start: float, end: float, n_steps: int) -> None:
        where = "WidthSchedule"
        for name, width in (("start", start), ("end", end)):
            if not 0 < width < math.inf:
                raise bad(where, name, "a finite float > 0", width)
        if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
            raise bad(where, "n_steps", "an int >= 1", n_steps)
        self.units = [m for m in model.modules() if isinstance(m, SAU)]
        if not self.units or any(isinstance(m.log_sigma, nn.Parameter) for m in self.units):
            raise bad(where, "model", "a module that holds layers of SAU with learn_sigma=False", type(model).__name__)
        self.start, self.end, self.n_steps = start, end, n_steps
        self.n_done = 0
        self._set()

    @property
    def sigma(self) -> float:
        """The width now."""
        return float(self.start * (self.end / self.start) ** (self.n_done / self.n_steps))

    def _set(self) -> None:
        for module in self.units:
            module.sigma = self.sigma

    def step(self) -> float:
        """Go one step on, or stay where the end is reached; return the width."""
        self.n_done = min(self.n_done + 1, self.n_steps)
        self._set()
        return self.sigma

    def state_dict(self) -> dict[str, float | int]:
        """Return what `load_state_dict` needs to go on."""
        return {"start": self.start, "end": self.end, "n_steps": self.n_steps, "n_done": self.n_done}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Go on where another schedule stood."""
        self.start, self.end = float(state["start"]), float(state["end"])
        self.n_steps, self.n_done = int(state["n_steps"]), int(state["n_done"])
        self._set()
