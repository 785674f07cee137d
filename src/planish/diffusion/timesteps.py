"""Statistics of a denoiser's activations, timestep by timestep: sums that grow as the model runs, and nothing else.

What enters a layer changes from noise to picture: its range at the first step may be many times that at the last. These
statistics say where, at the price of three numbers a channel and step.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.calls import by_name
from planish.quant.conv import is_conv
from planish.quant.moments import Moments
from planish.quant.sites import is_linear

TIME = ("timestep", "timesteps", "sigma", "t")
"""Names under which denoisers are told the time."""


@dataclass
class StepStatistics:
    """What entered each layer at each timestep.

    Attributes:
        layers: Moments of a layer's input channels, by the layer's name and the timestep.

    Example:
        >>> found = StepStatistics()
        >>> found.add("proj", 999.0, torch.tensor([[1.0, -3.0]]))
        >>> found.add("proj", 999.0, torch.tensor([[2.0, 0.0]]))
        >>> found.of("proj", 999.0).amax.tolist(), found.steps
        ([2.0, 3.0], [999.0])
    """

    layers: dict[str, dict[float, Moments]] = field(default_factory=dict)

    def add(self, layer: str, step: float, x: Float[Tensor, "tokens channels"]) -> None:
        """Take in what enters a layer.

        Args:
            layer: Its name.
            step: The timestep.
            x: A row for each token or pixel.

        Raises:
            ValueError: A value is not finite.
        """
        if not torch.isfinite(x).all():
            raise bad("StepStatistics", "x", f"finite at `{layer}`, timestep {step:g}", "NaN or infinity")
        steps = self.layers.setdefault(layer, {})
        if step not in steps:
            steps[step] = Moments.empty(x)
        steps[step].add(x)

    @property
    def steps(self) -> list[float]:
        """All timesteps, from noise to picture."""
        return sorted({step for steps in self.layers.values() for step in steps}, reverse=True)

    def of(self, layer: str, step: float) -> Moments:
        """Return the moments of a layer at a timestep.

        Raises:
            ValueError: Nothing is known of them.
        """
        if layer not in self.layers:
            raise bad("StepStatistics", "layer", f"one of {len(self.layers)} that were watched", layer)
        if step not in self.layers[layer]:
            raise bad("StepStatistics", "step", f"one of {sorted(self.layers[layer])}", step)
        return self.layers[layer][step]

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Return for each layer its least and its greatest range over the timesteps: largest magnitudes."""
        found = {}
        for name, steps in self.layers.items():
            tops = [moments.amax.max().item() for moments in steps.values()]
            found[name] = min(tops), max(tops)
        return found


@contextmanager
def watch_steps(
    model: nn.Module, *, layers: Callable[[str], bool] | None = None
) -> Iterator[tuple[StepStatistics, list[float]]]:
    """Watch every linear layer and convolution of a denoiser while it runs.

    Args:
        model: The denoiser. It is told the time by an argument of one of the names in `TIME`; a model that is not
            counts its calls instead.
        layers: Which layers, by name; default all.

    Yields:
        The statistics, which grow with every call, and the timestep of each call.

    Example:
        >>> from planish.diffusion import digits_unet, sample
        >>> model = digits_unet(channels=(8, 8))
        >>> with watch_steps(model, layers=lambda name: name == "conv_out") as (found, times):
        ...     _ = sample(model, torch.tensor([1]), steps=2)
        >>> len(found.steps), len(times), found.layers["conv_out"][999.0].rows
        (2, 2, 128)
    """
    found, times = StepStatistics(), list[float]()
    now = {"step": 0.0}

    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now["step"] = time_of(module, args, kwargs, len(times))
        times.append(now["step"])

    def look(name: str) -> Callable[..., None]:
        def take(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            rows = x.movedim(-3, -1) if is_conv(module) else x
            found.add(name, now["step"], rows.reshape(-1, rows.shape[-1]).float())

        return take

    handles = [model.register_forward_pre_hook(tell, with_kwargs=True)]
    for name, module in model.named_modules():
        if (is_linear(module) or is_conv(module)) and (layers is None or layers(name)):
            handles.append(module.register_forward_pre_hook(look(name)))
    try:
        yield found, times
    finally:
        for handle in handles:
            handle.remove()


def time_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> float:
    """Return the timestep that a denoiser is called with, or which call it is where it is told none."""
    named = by_name(inspect.signature(type(module).forward), args, kwargs)
    for name in TIME:
        value = named.get(name)
        if isinstance(value, Tensor) and value.numel():
            return float(value.flatten()[0])
        if isinstance(value, int | float):
            return float(value)
    return float(count)
