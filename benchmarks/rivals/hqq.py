"""HQQ: half-quadratic zero points, no data. They are floats, so its grid is not the integer one."""

import torch
from torch import Tensor, nn

from benchmarks.driver import Read, Settings, main, targets


def quantize(model: nn.Module, tokens: Tensor, settings: Settings) -> Read:
    """Quantize every target with `HQQLinear` at its defaults ; the tokens are not used."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # noqa: PLC0415

    if settings.symmetric:
        raise ValueError("hqq: `symmetric` must be False; HQQ has no symmetric grid.")
    config = BaseQuantizeConfig(nbits=settings.bits, group_size=settings.group_size, axis=1)
    floats = dict(model.named_parameters())
    layers = {
        name: HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        for name, linear in targets(model).items()
    }
    return lambda: floats | {f"{name}.weight": layer.dequantize() for name, layer in layers.items()}


if __name__ == "__main__":
    main(quantize, ("hqq",), ("hqq",))
