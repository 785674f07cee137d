"""vLLM serves 4-bit models with our kernels and from our own layout; it finds this plugin by its entry point.

Three things come with `pip install planish` beside vLLM, and nothing has to be imported or configured:

- stock compressed-tensors, AWQ and GPTQ checkpoints run on our kernels on a CPU (on a GPU vLLM's own stay);
- checkpoints with `quant_method: planish`, which no stock layout can express, are served;
- `quantization="planish"` rounds a float checkpoint while it is read, each worker its own part of it.
"""

import importlib
import importlib.util
import logging
from typing import Any

__all__ = ["register"]

TRIED = "0.32 for CPUs"  # 0.33, for GPUs, has every name of these; no GPU was at hand
_NEEDED = {
    "vllm.model_executor.kernels.linear": (
        "MPLinearKernel",
        "MPLinearLayerConfig",
        "_POSSIBLE_KERNELS",
        "choose_mp_linear_kernel",
        "register_linear_kernel",
    ),
    "vllm.model_executor.layers.linear": ("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod"),
    "vllm.model_executor.layers.quantization": ("register_quantization_config",),
    "vllm.model_executor.layers.quantization.base_config": ("QuantizationConfig",),
    "vllm.model_executor.layers.vocab_parallel_embedding": ("VocabParallelEmbedding",),
    "vllm.model_executor.parameter": ("GroupQuantScaleParameter", "PackedvLLMParameter"),
    "vllm.platforms": ("PlatformEnum", "current_platform"),
    "vllm.scalar_type": ("scalar_types",),
}
logger = logging.getLogger("planish")


def register() -> None:
    """Register our kernel and the quantization method `planish`; vLLM calls this in each of its processes.

    A vLLM that lacks what the plugin needs is left as it is, with one warning in the log.

    Example:
        >>> register()
    """
    if importlib.util.find_spec("vllm") is None:
        return
    if lacks := missing():
        version = getattr(importlib.import_module("vllm"), "__version__", "of an unknown version")
        logger.warning(
            "planish: vLLM %s has no %s, so planish's kernels and its quantization method are not available in it; "
            "the plugin was tried with vLLM %s.", version, lacks[0], TRIED,
        )  # fmt: skip
        return
    from planish.plugins.vllm.config import PlanishConfig  # noqa: PLC0415
    from planish.plugins.vllm.kernel import PlanishLinearKernel  # noqa: PLC0415

    quantization: Any = importlib.import_module("vllm.model_executor.layers.quantization")
    kernels: Any = importlib.import_module("vllm.model_executor.kernels.linear")
    cpu = importlib.import_module("vllm.platforms").PlatformEnum.CPU
    quantization.register_quantization_config("planish")(PlanishConfig)
    known = kernels._POSSIBLE_KERNELS.get(cpu, [])
    if PlanishLinearKernel not in known:
        kernels.register_linear_kernel(PlanishLinearKernel, cpu, "mp")
        known = kernels._POSSIBLE_KERNELS[cpu]
        known.insert(0, known.pop())  # the first that can is taken, and vLLM's own claims to be able to everywhere


def missing() -> list[str]:
    """Return what the installed vLLM lacks of the names that the plugin uses, as dotted names."""
    lacks = []
    for module, names in _NEEDED.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            lacks.append(module)
            continue
        lacks += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    return lacks
