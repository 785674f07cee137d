"""What a module is called with: arguments by name, moved and compared, whatever containers they come in."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.quant.precision import HALF


def moved_to(
    value: Any,  # noqa: ANN401
    device: torch.device,
    half: torch.dtype | None = None,
    moved: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Any:  # noqa: ANN401
    """Move the tensors of nested containers to a device; those in half precision also to the dtype `half`.

    One tensor that is met many times is copied once where `moved` remembers it.
    """
    if isinstance(value, Tensor):
        if moved is not None and id(value) in moved:
            return moved[id(value)][1]
        made = value.to(device, half if half is not None and value.dtype in HALF else value.dtype)
        if moved is not None:
            moved[id(value)] = value, made  # the key stays taken while the tensor lives
        return made
    if isinstance(value, Mapping):  # a tokenizer's batch is one, and no dict
        return {k: moved_to(v, device, half, moved) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved_to(v, device, half, moved) for v in value)
    return value


def token_mask(batch: Any) -> Tensor | None:  # noqa: ANN401
    """The padding mask of a tokenized batch: padded tokens count in no statistic.

    With two sequences in a batch (encoder and decoder) the mask speaks of one of them, and every token counts.
    """
    single = isinstance(batch, Mapping) and "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch
    mask = batch.get("attention_mask") if single else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()) else None


def first_parameter(module: nn.Module) -> str:
    """Return the name of the first argument of a module's forward."""
    return next(n for n in inspect.signature(type(module).forward).parameters if n != "self")


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the positional arguments of a call to a module's forward."""
    bound = signature.bind(None, *args, **kwargs).arguments
    bound.pop("self", None)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and bound.pop(name, ()):
            raise bad("quantize", "model", "one whose blocks take named arguments", f"*{name}")
    return dict(bound)


def equal(a: Any, b: Any) -> bool:  # noqa: ANN401
    """Whether two values are tensors with the same values; NaN equals NaN."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape:
        return False
    return a is b or bool(alike(a, b).all())


def memory(x: Tensor) -> tuple[int, int, int]:
    """What tells one tensor from another, whatever shape it is viewed in."""
    return x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel()


def alike(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors are equal, bit for bit; NaN (padded tokens of some models) equals NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def row_set(x: Tensor) -> set[bytes]:
    """Return the rows of a tensor as bytes."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous().cpu().view(torch.uint8).numpy()
    return {row.tobytes() for row in rows}


def rows(batch: Any) -> Iterator[Any]:  # noqa: ANN401  (whatever the model takes)
    """Yield the rows of a batch as batches of one: the windows."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    lengths = {len(v) for v in values if isinstance(v, Tensor) and v.ndim}
    if len(lengths) != 1:
        yield batch
        return

    def part(value: Any, i: int) -> Any:  # noqa: ANN401
        return value[i : i + 1] if isinstance(value, Tensor) and value.ndim else value

    for i in range(lengths.pop()):
        if isinstance(batch, Mapping):
            yield {name: part(value, i) for name, value in batch.items()}
        elif isinstance(batch, tuple | list):
            yield tuple(part(value, i) for value in batch)
        else:
            yield part(batch, i)
