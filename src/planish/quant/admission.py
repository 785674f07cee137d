"""What is looked at before a block is touched: whether its weights can be rounded at all."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from planish.quant.conv import check_pixels, is_conv
from planish.quant.sites import is_linear, stays_float, weight_of
from planish.quant.stream import Block

if TYPE_CHECKING:
    from planish.quant.engine import Method


def check_layers(block: Block, skipped: Callable[[str], bool], method: "Method") -> None:
    """Refuse, by name, weights that cannot be rounded: not finite, or not divisible into groups."""
    where = f"quantize, block {block.name or 'model'}"
    for name, module in block.module.named_modules():
        rounded = is_linear(module) or (method.convolutions and is_conv(module))
        if not rounded or stays_float(module) or skipped(name):
            continue
        weight = weight_of(module)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{where}, `{name}`: its weight holds NaN or Inf.")
        own = method.of(is_conv(module))
        try:
            own.weight.n_groups(weight.shape[1])
        except ValueError as error:
            raise ValueError(
                f"{where}, `{name}`: {str(error).removeprefix('Affine: ').removeprefix('FP4: ')}"
            ) from None
        if is_conv(module):
            check_pixels(f"{where}, `{name}`", own.act, module)
