"""Keys and values in few bits, inside transformers' own cache class.

Every token of every head is rounded by itself when it comes in, keys after a Hadamard rotation of the head that is
undone when they are read, so that attention sees what it is used to. A head's row of codes and its scales lie in one
integer tensor of the shape that the host expects: reordering for beams, cropping and batch selection are the host's.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from planish._support import bad, require
from planish.quant.formats import SCALE_DTYPES, Affine, QTensor
from planish.quant.packing import n_words, pack, unpack
from planish.quant.rotations import block_size_for, hadamard
from planish.quant.transforms import Rotate

_cache = require("transformers.cache_utils", "transformers", "planish.plugins.transformers")


class QuantizedCache(_cache.Cache):  # type: ignore[misc, name-defined]
    """A cache of keys and values in few bits, to be passed to a model's `generate` as `past_key_values`.

    Args:
        format: Grid of a head's row; groups run within the head. Default 4 bits, one scale and zero point a token and
            head.
        values: Grid of the values; default that of the keys.
        rotate: Rotate the keys of a head before they are rounded, so that a few large channels share their size.
            Default True. Heads of odd size are left as they are.

    Raises:
        ValueError: A format is not `Affine`, or its scales are wider than 16 bits.

    Example:
        >>> cache = QuantizedCache()
        >>> keys, values = torch.ones(1, 2, 3, 64), torch.zeros(1, 2, 3, 64)
        >>> back, _ = cache.update(keys, values, layer_idx=0)
        >>> bool((back - keys).abs().max() < 0.1), cache.layers[0].keys.shape, cache.get_seq_length()
        (True, torch.Size([1, 2, 3, 9]), 3)
    """

    def __init__(self, format: Affine | None = None, values: Affine | None = None, *, rotate: bool = True) -> None:
        keys = Affine(4, None) if format is None else format
        values = keys if values is None else values
        for name, grid in (("format", keys), ("values", values)):
            if not isinstance(grid, Affine) or grid.scale_dtype not in ("float16", "bfloat16"):
                raise bad("QuantizedCache", name, "an Affine format with scales of float16 or bfloat16", grid)
        super().__init__(layer_class_to_replicate=partial(_QuantizedLayer, keys, values, rotate))


class _QuantizedLayer(_cache.DynamicLayer):  # type: ignore[misc, name-defined]
    """One layer's keys and values: int32 (batch, heads, tokens, words of codes and one word a group)."""

    def __init__(self, key_format: Affine, value_format: Affine, rotate: bool) -> None:
        super().__init__()
        self.key_format, self.value_format, self.rotate = key_format, value_format, rotate
        self.turn: Rotate | None = None
        self.widths = (0, 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and sizes from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.widths = key_states.shape[-1], value_states.shape[-1]
        if self.rotate and self.widths[0] % 2 == 0:
            self.turn = Rotate(hadamard(block_size_for(self.widths[0], None))[None].to(self.device))
        self.keys, self.values = (
            torch.zeros(*t.shape[:-2], 0, n_words(t.shape[-1], f.bits) + f.n_groups(t.shape[-1]),
                        dtype=torch.int32, device=self.device)
            for t, f in ((key_states, self.key_format), (value_states, self.value_format))
        )  # fmt: skip
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "batch heads tokens channels"],
        value_states: Float[Tensor, "batch heads tokens value_channels"],
        *args: Any,  # noqa: ANN401  (the host's contract)
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Take in new tokens; return all of them as attention reads them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        turned = key_states if self.turn is None else self.turn(key_states)
        self.keys = torch.cat([self.keys, _stored(self.key_format, turned)], dim=-2)
        self.values = torch.cat([self.values, _stored(self.value_format, value_states)], dim=-2)
        keys = _read(self.key_format, self.keys, self.widths[0])
        if self.turn is not None:
            keys = self.turn(keys)  # Hadamard's matrix is its own inverse
        return keys.to(self.dtype), _read(self.value_format, self.values, self.widths[1]).to(self.dtype)


def _stored(format: Affine, x: Float[Tensor, "*rows channels"]) -> Int32[Tensor, "*rows words"]:
    """Encode rows: words of codes, then for each group a word of its scale (low half) and zero point."""
    made = format.encode(x)
    words = pack(made.codes.flatten(0, -2), format.bits).unflatten(0, x.shape[:-1])
    ends = made.scale.view(torch.int16).to(torch.int32) & 0xFFFF
    if made.zero is not None:
        ends = ends | made.zero.to(torch.int32) << 16
    return torch.cat([words, ends], dim=-1)


def _read(format: Affine, stored: Int32[Tensor, "*rows words"], channels: int) -> Float[Tensor, "*rows channels"]:
    """Decode what `_stored` made."""
    words, ends = stored.split([n_words(channels, format.bits), format.n_groups(channels)], dim=-1)
    codes = unpack(words.flatten(0, -2).contiguous(), format.bits, channels).unflatten(0, stored.shape[:-1])
    scale = (ends << 16 >> 16).to(torch.int16).view(SCALE_DTYPES[format.scale_dtype])
    zero = None if format.symmetric else (ends >> 16).to(torch.uint8)
    return QTensor(codes, scale, zero, format).decode()
