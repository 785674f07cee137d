"""How far a quantized denoiser's outputs are from the float one's at every call of a run, and what that asks for.

Legend: m the float output, q the quantized one, at the same input; C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad


@dataclass(frozen=True)
class OutputErrors:
    """Regressions of q on m and of m on q, one a call.

    Attributes:
        gain: <m, q> / <q, q>: what q is to be multiplied by, by least squares; a start for `tune_schedule`.
        slope: k of PTQD: q = (1 + k) m + b + r.
        shift: b: mean of q - (1 + k) m, for each channel.
        residual: Variance of r, which does not correlate with m.

    Example:
        >>> OutputErrors([1.0], [0.25], [[0.5]], [0.0]).ptqd()
        {'model_coeff': [0.8], 'model_shift': [[0.5]]}
    """

    gain: list[float]
    slope: list[float]
    shift: list[list[float]]
    residual: list[float]

    def closed_form(self) -> dict[str, Any]:
        """Return the gains as an argument of `wrap_scheduler`."""
        return {"model_coeff": self.gain}

    def ptqd(self) -> dict[str, Any]:
        """Return PTQD's correction (q - b) / (1 + k) as arguments of `wrap_scheduler`.

        Its third part, less noise where the sampler draws some, is not done: a deterministic sampler draws none.
        """
        return {"model_coeff": [1 / (1 + k) for k in self.slope], "model_shift": self.shift}


@torch.no_grad()
def measure_output_errors(model: nn.Module, reference: nn.Module, run: Callable[[], object]) -> OutputErrors:
    """Run a quantized denoiser and ask the float one, at every call, what it would have said.

    Args:
        model: Quantized; called by `run`.
        reference: In float.
        run: Draws one batch of samples with `model`.

    Returns:
        The regressions, a call each.

    Raises:
        ValueError: The run never calls the model, or its outputs vanish.

    Example:
        >>> good, small = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        >>> small.weight.data = good.weight.data * 0.8
        >>> found = measure_output_errors(small, good, lambda: small(torch.randn(4, 1, 3, 3)))
        >>> round(found.gain[0], 4), round(found.slope[0], 4)
        (1.25, -0.2)
    """
    found = OutputErrors([], [], [], [])

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ANN401
        q, m = _tensor(out).double(), _tensor(reference(*args, **kwargs)).double()
        power, spread = float((q * q).sum()), float(m.var(correction=0))
        if power == 0 or spread == 0:
            raise bad("measure_output_errors", "model", "one whose outputs vary", f"zeros at call {len(found.gain)}")
        k = float(((q - m) * (m - m.mean())).mean()) / spread
        rest = q - (1 + k) * m
        per_channel = rest.movedim(1, 0).flatten(1)
        found.gain.append(float((m * q).sum()) / power)
        found.slope.append(k)
        found.shift.append(per_channel.mean(1).tolist())
        found.residual.append(float((per_channel - per_channel.mean(1, keepdim=True)).square().mean()))

    hook = model.register_forward_hook(compare, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    if not found.gain:
        raise bad("measure_output_errors", "run", "a function that calls the model", "one that never did")
    return found


def _tensor(out: Any) -> Tensor:  # noqa: ANN401
    value = getattr(out, "sample", out) if not isinstance(out, Tensor) else out
    found: Tensor = value[0] if isinstance(value, tuple | list) else value
    return found
