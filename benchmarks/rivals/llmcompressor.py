"""llm-compressor: its AWQ, GPTQ and plain rounding, on the tokens given, with its own defaults where none is stated."""

import torch
from torch import Tensor, nn

from benchmarks.driver import Read, Settings, main


def _recipe(settings: Settings) -> list[object]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: PLC0415
    from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: PLC0415
    from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: PLC0415
    from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: PLC0415

    weights = QuantizationArgs(
        num_bits=settings.bits,
        type="int",
        symmetric=settings.symmetric,
        strategy="group" if settings.group_size else "channel",
        group_size=settings.group_size,
    )
    scheme = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if settings.method == "gptq":
        return [GPTQModifier(**scheme)]
    rounding = QuantizationModifier(**scheme)
    return [AWQModifier(), rounding] if settings.method == "awq" else [rounding]


def quantize(model: nn.Module, tokens: Tensor, settings: Settings) -> Read:
    """Run `oneshot` on the tokens ; what is read is what its checkpoint would decode to."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize  # noqa: PLC0415
    from llmcompressor import oneshot  # noqa: PLC0415
    from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: PLC0415
    from torch.utils.data import DataLoader  # noqa: PLC0415

    if not torch.accelerator.is_available():
        # 0.14.0.1 pins its cached activations without asking whether anything could read pinned memory, and torch
        # refuses on a machine with no accelerator. Pinning changes no number.
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    rows = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens]
    loader = DataLoader(rows, batch_size=settings.batch_size, shuffle=False)
    oneshot(model=model, dataset=loader, recipe=_recipe(settings), num_calibration_samples=len(rows))

    def read() -> dict[str, Tensor]:
        weights = dict(model.named_parameters())
        for name, module in model.named_modules():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is not None and scheme.weights is not None:
                weights[f"{name}.weight"] = forward_quantize(module, module.weight, "weight", scheme.weights)
        return weights

    return read


if __name__ == "__main__":
    main(quantize, ("llmcompressor", "compressed-tensors"), ("awq", "gptq", "rtn"))
