"""planish's own methods behind the same driver as the rivals': same arguments, same tokens, same output."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.driver import Read, Settings, main

METHODS = ("rtn", "awq", "gptq", "smoothquant_plus", "smoothquant_plus_layer", "best")


def _preset(name: str) -> Callable[..., Any]:
    from planish import quant  # noqa: PLC0415

    if name == "smoothquant_plus_layer":
        return partial(quant.smoothquant_plus, granularity="layer")
    return getattr(quant, name)


def quantize(model: nn.Module, tokens: Tensor, settings: Settings) -> Read:
    """Quantize in place; what is read are the dense weights of the layers put in, and whatever else was folded into."""
    import planish  # noqa: PLC0415

    widths = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
    ragged = settings.group_size is not None and any(width % settings.group_size for width in widths)
    method = _preset(settings.method)(
        bits=settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric,
        **({"ragged": True} if ragged else {}),
    )
    batches = [{"input_ids": batch} for batch in tokens.split(settings.batch_size)]
    planish.quantize(model, batches, method)

    def read() -> dict[str, Tensor]:
        weights = dict(model.named_parameters())
        for name, module in model.named_modules():
            if isinstance(module, planish.quant.QLinear):
                dense = module.dequantize()
                weights[f"{name}.weight"] = dense.weight
                if dense.bias is not None:
                    weights[f"{name}.bias"] = dense.bias
        return weights

    return read


if __name__ == "__main__":
    main(quantize, ("planish",), METHODS)
