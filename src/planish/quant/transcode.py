"""Transcode a checkpoint to another engine's layout without quantizing again.

Codes, scales and zero points go over as they are; what the other layout cannot hold exactly is refused with the
reason. The one exception is asked for by name: GGUF's Q4_1 stores -scale * zero in half precision.
"""

from pathlib import Path
from typing import Any

import torch

from planish._support import CheckpointError, bad
from planish.quant import checkpoint, directory, files, gguf_file, layouts, naming
from planish.quant.directory import Checkpoint
from planish.quant.formats import SCALE_DTYPES

LAYOUTS = ("compressed-tensors", "awq", "gptq", "gguf", "planish")


def export(path_in: str | Path, path_out: str | Path, layout: str, *, allow_rounding: bool = False) -> dict[str, Any]:
    """Write a checkpoint in another layout, weights unchanged.

    Args:
        path_in: A checkpoint directory that `load` reads.
        path_out: A name that does not exist yet: a directory, or a file for "gguf".
        layout: "compressed-tensors" (any width of 2 to 8 bits), "awq" (4 bits), "gptq" (version 1: symmetric, or no
            zero point of 0), "gguf" (4 bits in groups of a multiple of 32, or 8 bits symmetric; Llama, Mistral and
            Qwen2), or "planish".
        allow_rounding: For "gguf": write asymmetric weights as Q4_1 though -scale * zero is rounded to float16.
            Default False, which refuses unless nothing changes.

    Returns:
        `layout`, `layers` (how many were written by type) and `largest_change`: the largest change of any weight
        relative to its scale; 0.0 means bit for bit the same.

    Raises:
        ValueError: `layout` is unknown.
        CheckpointError: The source is faulty, the target exists or cannot be written, or a layer would lose something
            (reason "lossy").

    Example:
        >>> export("a", "b", "zip")
        Traceback (most recent call last):
        ...
        ValueError: export: `layout` must be one of compressed-tensors, awq, gptq, gguf, planish; got 'zip'.
    """
    if layout not in LAYOUTS:
        raise bad("export", "layout", f"one of {', '.join(LAYOUTS)}", layout)
    source = Path(path_in)
    found = directory.read(source)
    if not found.layers:
        raise CheckpointError(f"`{source}` holds no quantized layer to transcode.", "missing")
    if layout == "gguf":
        with files.writing(Path(path_out), directory=False) as place:
            return {"layout": layout, **gguf_file.write(found, source, place, allow_rounding=allow_rounding)}
    if any("experts" in name.split(".") for name in found.layers) and found.config.get("model_type") != "planish":
        shape, found = naming.fitted(checkpoint.skeleton(found), found)  # each layout has its names of experts
        if layout != "planish":
            found = naming.renamed(found, naming.stock_names(shape))
    if layout == "compressed-tensors":
        dtype = _dtype(found)
        for name, layer in found.layers.items():
            if (why := layouts.not_compressed(layer, dtype)) is not None:
                raise layouts.lossy(name, layout, why)
    with files.writing(Path(path_out)) as place:
        files.copy_side_files(source, place, directory.REBUILT)
        directory.write(found, layout, place)
    return {"layout": layout, "layers": {layout: len(found.layers)}, "largest_change": 0.0}


def _dtype(found: Checkpoint) -> torch.dtype:
    """Return the dtype in which readers will run the model."""
    said = found.config.get("dtype") or found.config.get("torch_dtype")
    if isinstance(said, str) and said in SCALE_DTYPES:
        return SCALE_DTYPES[said]
    sizes: dict[torch.dtype, int] = {}
    for tensor in found.tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32
