"""What the units share: checks of their arguments, and a layer that holds a slope and a positive width."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.nn.unit import upcast


def check_input(where: str, x: Tensor) -> None:
    """Refuse what is not of a floating-point dtype."""
    if not x.is_floating_point():
        raise TypeError(f"{where}: `x` must be a floating-point tensor; got {x.dtype}.")


def as_parameter(
    where: str, name: str, value: float | Tensor, x: Tensor, channel_dim: int, least: float | None = None
) -> Tensor:
    """Return a slope or width as a tensor, one number or one a channel of x; refuse what fits neither."""
    if not isinstance(value, Tensor):
        if not math.isfinite(value) or (least is not None and value < least):
            raise bad(where, name, "a finite float" + ("" if least is None else f" >= {least:g}"), value)
        return torch.tensor(float(value), dtype=upcast(x), device=x.device)
    if value.numel() == 1:
        return value
    channels = x.shape[channel_dim] if -x.dim() <= channel_dim < x.dim() else "none"
    if value.dim() != 1 or value.numel() != channels:
        raise bad(
            where,
            name,
            f"one number, or one for each of the channels of x ({channels} in dim {channel_dim})",
            value.shape,
        )
    return value


def _count(where: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise bad(where, name, "an int >= 1", value)
    return value


class SlopeAndWidth(nn.Module):
    """Hold `raw_slope` and the logarithm of a width, as parameters where they are trained, as buffers where not."""

    width_name: ClassVar[str]
    raw_slope: Tensor

    def __init__(
        self,
        num_parameters: int,
        init: float,
        width: float,
        learn_slope: bool,
        learn_width: bool,
        slope_constraint: tuple[float, float] | None,
        channel_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        low, high = (-1.0, 1.0) if slope_constraint is None else slope_constraint
        if not -math.inf < low < high < math.inf:
            raise bad(name, "slope_constraint", "None or two finite floats, the lower one first", slope_constraint)
        if not low < init < high:
            raise bad(name, "init", f"a float in ({low:g}, {high:g})", init)
        self.num_parameters = _count(name, "num_parameters", num_parameters)
        self.channel_dim = channel_dim
        self.slope_constraint = slope_constraint
        raw = init if slope_constraint is None else math.log((init - low) / (high - init))
        log = self._log(width, trained=learn_width)
        for key, first, learnt in (("raw_slope", raw, learn_slope), (f"log_{self.width_name}", log, learn_width)):
            tensor = torch.full((num_parameters,), first, device=device, dtype=dtype)
            if learnt:
                self.register_parameter(key, nn.Parameter(tensor))
            else:
                self.register_buffer(key, tensor)

    def _log(self, width: float, *, trained: bool) -> float:
        least = "> 0" if trained else ">= 0"
        if not (math.isfinite(width) and (width > 0 or (width == 0 and not trained))):
            raise bad(type(self).__name__, self.width_name, f"a finite float {least}", width)
        return math.log(width) if width > 0 else -math.inf

    @property
    def slope(self) -> Tensor:
        """The slope for x < 0: differentiable where it is trained."""
        if self.slope_constraint is None:
            return self.raw_slope
        low, high = self.slope_constraint
        return low + (high - low) * torch.sigmoid(self.raw_slope)

    @property
    def width(self) -> Tensor:
        """The width, in float32 at the least."""
        log: Tensor = getattr(self, f"log_{self.width_name}")
        return log.to(upcast(log)).exp()

    @width.setter
    def width(self, width: float | Tensor) -> None:
        log: Tensor = getattr(self, f"log_{self.width_name}")
        trained = isinstance(log, nn.Parameter)
        values = [self._log(w, trained=trained) for w in torch.as_tensor(width).reshape(-1).tolist()]
        if len(values) not in (1, log.numel()):
            raise bad(type(self).__name__, self.width_name, f"1 or {log.numel()} numbers", len(values))
        with torch.no_grad():
            log.copy_(torch.tensor(values, dtype=log.dtype))

    def extra_repr(self) -> str:
        """Return what the repr shows."""
        slope, width = (float(t.detach().float().mean()) for t in (self.slope, self.width))
        return f"{self.num_parameters}, slope={slope:.4g}, {self.width_name}={width:.4g}"
