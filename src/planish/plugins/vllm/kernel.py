"""Our kernels under vLLM's own loaders: compressed-tensors, AWQ and GPTQ checkpoints on a CPU.

vLLM reads these layouts itself and asks a list of kernels, in order, which of them can multiply. Ours stands first on a
CPU: vLLM's build for processors without AVX-512 lacks the operator that its own kernel calls, and elsewhere ours is
compared with it by `python -m benchmarks serve`. `VLLM_DISABLED_KERNELS=PlanishLinearKernel` takes it out again.
"""

from typing import Any

import torch
from torch import Tensor, nn

from planish._support import require
from planish.kernels import cpu
from planish.plugins.vllm import parts
from planish.quant.formats import SCALE_DTYPES, Affine
from planish.quant.layers import QLinear

__all__ = ["PlanishLinearKernel", "stock_operator"]

_why = "planish.plugins.vllm"
_kernels = require("vllm.model_executor.kernels.linear", "vllm", _why)
_platforms = require("vllm.platforms", "vllm", _why)


def stock_operator() -> bool:
    """Return whether the build of vLLM in use holds the operator that its own kernel for CPUs calls."""
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


class PlanishLinearKernel(_kernels.MPLinearKernel):  # type: ignore[misc, name-defined]
    """The product with a weight of 2 to 8 bits, in groups or rows, with or without zero points, on a CPU."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least capability of a GPU; a CPU has none."""
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:  # noqa: ANN401
        """Say whether this kernel takes a layer, or why not."""
        if not _platforms.current_platform.is_cpu():
            return False, "planish's kernels inside vLLM are for CPUs"
        bits = c.weight_type.size_bits
        if not c.weight_type.is_integer() or not 2 <= bits <= 8:
            return False, f"weights must be integers of 2 to 8 bits, not {c.weight_type}"
        stock = stock_operator() and bits == 4
        if cpu.absence and stock:
            return False, "planish's compiled module is absent, and vLLM has an operator of its own"
        if stock and c.act_type is torch.bfloat16 and torch.cpu._is_amx_tile_supported():
            return False, "vLLM has a kernel of its own for this processor's matrix unit (AMX)"
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put a `QLinear` in the place of the tensors that vLLM has loaded."""
        config = self.config
        inp, out = config.partition_weight_shape
        words, scale = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        if words.input_dim != words.packed_dim:
            raise ValueError(f"{type(self).__name__}: codes must be packed along the inputs.")
        packed = _rows_first(words, words.input_dim)
        steps = _rows_first(scale, 1 - scale.output_dim)
        dtype = next(name for name, dtype in SCALE_DTYPES.items() if dtype == steps.dtype)
        size = None if config.group_size == -1 else config.group_size
        made = Affine(config.weight_type.size_bits, size, symmetric=not config.zero_points, scale_dtype=dtype)
        quantized = QLinear(inp, out, made, bias=False, device="meta")
        quantized.weight_shape = torch.tensor([out, inp])
        quantized.weight_packed, quantized.weight_scale = packed, steps
        if config.zero_points:
            zero = getattr(layer, self.w_zp_name)
            quantized.weight_zero_point = _rows_first(zero, 1 - zero.output_dim)
        parts.set_activation_bits(quantized)
        layer.quantized = quantized
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name is not None and getattr(layer, name, None) is not None:
                getattr(layer, name).data = torch.empty(0)  # held once, by the QLinear

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W' + b."""
        y = parts.run(layer.quantized, x)  # type: ignore[arg-type]
        return y if bias is None else y + bias


def _rows_first(param: nn.Parameter, input_dim: int) -> Tensor:
    return (param.data if input_dim == 1 else param.data.t()).contiguous()
