"""How much arithmetic a call takes, counted where it happens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from planish.quant import QLinear


@torch.no_grad()
def multiply_adds(model: nn.Module, run: Callable[[], object]) -> int:
    """Count the multiply-adds of linear layers and convolutions that run, quantized or not; not those of attention.

    Args:
        model: Any module.
        run: Calls it, once or many times.

    Returns:
        The count.

    Example:
        >>> layer = nn.Conv2d(2, 4, 3, padding=1)
        >>> multiply_adds(layer, lambda: layer(torch.zeros(1, 2, 5, 5)))
        1800
    """
    counted = 0

    def count(module: nn.Module, args: Any, out: Tensor) -> None:  # noqa: ANN401
        nonlocal counted
        if isinstance(module, QLinear):
            counted += out.numel() * module.in_features
        else:
            weight: Any = module.weight
            counted += out.numel() * weight[0].numel()

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, QLinear)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return counted
