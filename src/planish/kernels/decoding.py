"""The compiled decoder: every check, then plain addresses (csrc/decoder.h says what is computed).

`NativeDecoder` holds the tensors that the compiled side points into; nothing it was given may be moved or freed before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from planish._support import bad
from planish.kernels import cpu
from planish.kernels.placing import SCALES, TILE, Arena, Matrix, Slice, check_matrix, reserve, rows_of
from planish.kernels.prepared import aligned

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
GATES = ("silu", "gelu_tanh", "gelu")
_GATE_UP = 2  # place of gate and up among the layers of a block
_WHERE = "planish.kernels.NativeDecoder"

Norm = tuple[Tensor, float] | None


@dataclass(frozen=True)
class Block:
    """One block; see `quant.anatomy.Parts`. `norms`: before and after attention, before and after the MLP, q and k."""

    norms: Sequence[Norm]
    matrices: Sequence[Sequence[Matrix]]
    window: int
    rope: int


@dataclass(frozen=True)
class Shape:
    """What all blocks share; `scale` multiplies scores, `softcap` 0 for none, `gate` one of `GATES`."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    scale: float
    softcap: float
    embed_scale: float
    gate: str


@dataclass(frozen=True)
class Head:
    """The output layer: exact rows, and the codes that stand in for them where only the largest logits matter.

    `codes` (vocab, hidden) int8 with one `scale` a row; `lost` bounds, per unit of the hidden state's norm, by how much
    a logit of the codes differs from the exact one.
    """

    exact: Tensor
    bias: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    lost: Tensor | None = None
    softcap: float = 0.0


@dataclass
class _Cache:
    keys: Tensor
    values: Tensor
    slots: int
    capacity: int
    kept: list[Tensor] = field(default_factory=list)


def encode_rows(weight: Float[Tensor, "rows channels"]) -> tuple[Tensor, Tensor, Tensor]:
    """Round the rows of a matrix to int8 with one scale each.

    Args:
        weight: The matrix, in any float dtype.

    Returns:
        Codes, scales (float32) and `lost` of `Head`: the norm of each row's rounding error, and some for the order of
        summation.

    Example:
        >>> codes, scale, lost = encode_rows(torch.tensor([[127.0, -3.0]]))
        >>> codes.tolist(), scale.tolist(), bool(lost < 1e-2)
        ([[127, -3]], [1.0], True)
    """
    codes = aligned(weight.numel()).view(torch.int8).view(weight.shape)  # read as a whole for every token
    scale, lost = torch.empty(len(weight)), torch.empty(len(weight))
    for part in torch.arange(len(weight)).split(4096):  # so that no float32 copy of the whole is made
        rows = weight[part].detach().float()
        scale[part] = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        codes[part] = (rows / scale[part, None]).round().to(torch.int8)
        left = rows - codes[part].float() * scale[part, None]
        lost[part] = left.norm(dim=1) * 1.0001 + rows.norm(dim=1) * 4e-6
    return codes, scale, lost


class NativeDecoder:
    """A decoder in the compiled module.

    Args:
        shape: What all blocks share.
        blocks: The blocks in order.
        ropes: Tables (cos, sin) that blocks turn positions by, each (positions, half).
        embedding: Rows of the vocabulary.
        last: The norm before the head.
        head: The output layer.
        parts: Into how many parts weights are divided, one a thread; as many threads run.

    Raises:
        ImportError: The compiled module is absent.
        ValueError: A shape, dtype or range does not fit.
    """

    def __init__(
        self,
        shape: Shape,
        blocks: Sequence[Block],
        ropes: Sequence[tuple[Tensor, Tensor]],
        embedding: Tensor,
        last: Norm,
        head: Head,
        parts: int = 1,
    ) -> None:
        native = cpu.module()
        self.shape = shape
        self.kept: list[Tensor] = []
        self.cache: _Cache | None = None
        self.parts = max(1, min(parts, 64))
        self.padded = -(-shape.head_dim // 16) * 16
        if shape.gate not in GATES:
            raise bad(_WHERE, "gate", f"one of {', '.join(GATES)}", shape.gate)
        if shape.heads % shape.kv_heads or min(shape.heads, shape.head_dim, shape.hidden, shape.inner) < 1:
            raise bad(_WHERE, "shape", "whole groups of heads", shape)
        self.native = native.Decoder(
            shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.inner, shape.vocab,
            shape.scale, shape.softcap, shape.embed_scale, GATES.index(shape.gate), self.parts,
        )  # fmt: skip
        self.positions = min([cos.shape[0] for cos, _ in ropes], default=1 << 30)
        for cos, sin in ropes:
            if cos.shape != sin.shape or 2 * cos.shape[1] > shape.head_dim:
                raise bad(_WHERE, "ropes", f"tables of at most {shape.head_dim // 2} columns", tuple(cos.shape))
            self.native.add_rope(self._at(cos, "ropes"), self._at(sin, "ropes"), cos.shape[1])
        self.layers = len(blocks)
        self.arenas = [Arena() for _ in range(self.parts)]
        places = [self._place(block, len(ropes)) for block in blocks]
        for arena in self.arenas:
            arena.open()
        for block, placed in zip(blocks, places, strict=True):
            self._add(block, placed)
        if tuple(embedding.shape) != (shape.vocab, shape.hidden) or tuple(head.exact.shape) != tuple(embedding.shape):
            raise bad(_WHERE, "embedding", f"rows ({shape.vocab}, {shape.hidden})", tuple(embedding.shape))
        codes = head.codes
        if codes is not None and (codes.shape != head.exact.shape or codes.dtype != torch.int8):
            raise bad(_WHERE, "codes", "int8 in the head's shape", (tuple(codes.shape), codes.dtype))
        self.native.set_ends(
            self._rows(embedding), KINDS[embedding.dtype], self._norm(last, shape.hidden),
            self._rows(head.exact), KINDS[head.exact.dtype], self._vector(head.bias, shape.vocab),
            0 if codes is None else self._keep(codes), self._vector(head.scale, shape.vocab),
            self._vector(head.lost, shape.vocab), head.softcap,
        )  # fmt: skip

    def _keep(self, tensor: Tensor) -> int:
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise bad(_WHERE, "tensors", "contiguous and on the CPU", (tuple(tensor.shape), str(tensor.device)))
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _at(self, tensor: Tensor, name: str) -> int:
        if tensor.dtype is not torch.float32:
            raise bad(_WHERE, name, "float32", tensor.dtype)
        return self._keep(tensor.contiguous())

    def _vector(self, tensor: Tensor | None, width: int) -> int:
        if tensor is None:
            return 0
        if tuple(tensor.shape) != (width,):
            raise bad(_WHERE, "vectors", f"of {width} channels", tuple(tensor.shape))
        return self._at(tensor, "vectors")

    def _rows(self, tensor: Tensor) -> int:
        if tensor.dtype not in KINDS or tensor.dtype is torch.int8:
            raise bad(_WHERE, "rows", "float32, float16 or bfloat16", tensor.dtype)
        return self._keep(tensor)

    def _norm(self, norm: Norm, width: int) -> tuple[int, float]:
        return (0, 0.0) if norm is None else (self._vector(norm[0], width), norm[1])

    def _place(self, block: Block, ropes: int) -> list[list[list[Slice]]]:
        """Check a block, divide its layers' rows among the parts, and reserve memory for them in streaming order."""
        s = self.shape
        if not -1 <= block.rope < ropes or block.window < 0:
            raise bad(_WHERE, "blocks", "of a known rope and a window >= 0", (block.rope, block.window))
        queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
        wanted = (s.hidden, queries + 2 * keys), (queries, s.hidden), (s.hidden, 2 * s.inner), (s.inner, s.hidden)
        for matrices, (channels, out) in zip(block.matrices, wanted, strict=True):
            if sum(m.out for m in matrices) != out:
                raise bad(_WHERE, "matrices", f"of {out} outputs together", [m.out for m in matrices])
            for m in matrices:
                check_matrix(m, channels)
        placed: list[list[list[Slice]]] = [[[] for _ in range(self.parts)] for _ in wanted]
        for part, arena in enumerate(self.arenas):
            for layer, (matrices, (_, out)) in enumerate(zip(block.matrices, wanted, strict=True)):
                if layer == _GATE_UP:  # gate and up of the same channels, so that a part can join them by itself
                    first, last = self._share(s.inner, part)
                    ranges = [(first, last), (s.inner + first, s.inner + last)]
                else:
                    ranges = [self._share(out, part)]
                for start, stop in ranges:
                    placed[layer][part] += [reserve(arena, *piece) for piece in rows_of(matrices, start, stop)]
        return placed

    def _share(self, total: int, part: int) -> tuple[int, int]:
        tiles = -(-total // TILE)
        first, last = (min(total, tiles * p // self.parts * TILE) for p in (part, part + 1))
        return first, last

    def _add(self, block: Block, placed: list[list[list[Slice]]]) -> None:
        s = self.shape
        fields = [[[self._slice(x, arena) for x in part] for part, arena in zip(layer, self.arenas, strict=True)]
                  for layer in placed]  # fmt: skip
        widths = (s.hidden,) * 4 + (s.head_dim,) * 2
        norms = [self._norm(norm, width) for norm, width in zip(block.norms, widths, strict=True)]
        inner = [self._share(s.inner, part)[0] for part in range(self.parts)] + [s.inner]
        self.native.add_block(norms, fields, inner, block.window, block.rope)

    def _slice(self, x: Slice, arena: Arena) -> tuple[int, int, int, int, int, int, int, int]:
        m, kind, prepared, dense = x.matrix, 0, 0, 0
        if m.packed is not None and m.scale is not None and arena.memory is not None:
            packed, scale = m.packed[x.first : x.last].contiguous(), m.scale[x.first : x.last]
            scale = (scale if scale.dtype in SCALES else scale.float()).contiguous()
            zero = None if m.zero is None else m.zero[x.first : x.last].contiguous()
            prepared = arena.memory.data_ptr() + x.offset
            cpu.module().prepare(
                packed.data_ptr(), scale.data_ptr(), SCALES[scale.dtype], 0 if zero is None else zero.data_ptr(),
                x.last - x.first, m.channels, m.group_size, prepared, torch.get_num_threads(),
            )  # fmt: skip
        elif m.dense is not None:
            dense = self._rows(m.dense) + x.first * m.channels * m.dense.element_size()
            kind = KINDS[m.dense.dtype]
        bias = self._vector(m.bias, m.out)
        return x.last - x.first, m.channels, m.group_size, prepared, dense, kind, bias and bias + 4 * x.first, x.column

    def reserve(self, slots: int, positions: int, dtype: torch.dtype = torch.float32) -> None:
        """Make room for keys and values; what the cache held is lost, unless it is large enough as it is.

        Args:
            slots: Sequences, >= 1.
            positions: Tokens of the longest, >= 1.
            dtype: float32 or float16, in which keys and values are kept.
        """
        if dtype not in (torch.float32, torch.float16):
            raise bad(_WHERE, "dtype", "float32 or float16", dtype)
        if not 1 <= positions <= self.positions or slots < 1:
            raise bad(_WHERE, "positions", f"between 1 and {self.positions}", positions)
        now = self.cache
        if now is not None and now.slots == slots and now.capacity >= positions and now.keys.dtype is dtype:
            return
        capacity = -(-positions // 64) * 64
        self.cache = None  # the old memory goes before the new comes
        count = self.layers * slots * self.shape.kv_heads * capacity * self.padded
        keys, values = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
        self.cache = _Cache(keys, values, slots, capacity)
        self.native.set_cache(keys.data_ptr(), values.data_ptr(), slots, capacity, dtype is torch.float16)

    def step(
        self,
        tokens: Int[Tensor, " rows"],
        slots: Int[Tensor, " rows"],
        positions: Int[Tensor, " rows"],
        kept: Int[Tensor, " kept"],
        *,
        activation_bits: int = 16,
    ) -> Float[Tensor, "kept hidden"]:
        """Run rows of tokens through all blocks; what they attend to must have been run before, or be earlier rows.

        Args:
            tokens: Token ids.
            slots: Which sequence each belongs to.
            positions: Its position there.
            kept: Rows whose hidden state after the last norm is returned.
            activation_bits: 16 or 8.

        Returns:
            The hidden states.

        Raises:
            ValueError: A value is out of range.
        """
        cache, rows = self.cache, tokens.numel()
        hidden = torch.empty(kept.numel(), self.shape.hidden)
        if not rows:
            return hidden
        wide = [t.to(torch.int64).contiguous() for t in (tokens, slots, positions, kept)]
        limits = (self.shape.vocab, cache.slots if cache else 0, cache.capacity if cache else 0, rows)
        for name, tensor, limit in zip(("tokens", "slots", "positions", "kept"), wide, limits, strict=True):
            if tensor.numel() and not (0 <= int(tensor.min()) and int(tensor.max()) < limit):
                raise bad(_WHERE, name, f"in [0, {limit})", [int(tensor.min()), int(tensor.max())])
        if len({t.numel() for t in wide[:3]}) != 1:
            raise bad(_WHERE, "rows", "as many tokens as slots and positions", [t.numel() for t in wide[:3]])
        if int(wide[2].max()) >= self.positions:
            raise bad(_WHERE, "positions", f"below {self.positions}", int(wide[2].max()))
        a, b, c, d = (t.data_ptr() for t in wide)
        self.native.step(a, b, c, rows, d, wide[3].numel(), hidden.data_ptr(), activation_bits, self.parts)
        return hidden

    def next(self, token: int, position: int, hidden: Float[Tensor, "1 hidden"], *, activation_bits: int = 16) -> int:
        """Run one token of slot 0 and return the most probable next one; -1 where a logit is not a number."""
        cache = self.cache
        if (
            cache is None
            or not 0 <= token < self.shape.vocab
            or not 0 <= position < min(cache.capacity, self.positions)
        ):
            raise bad(_WHERE, "token", "in the vocabulary, and its position in the cache", (token, position))
        return int(self.native.next(token, 0, position, hidden.data_ptr(), activation_bits, self.parts))

    def best(self, hidden: Float[Tensor, " hidden"]) -> int:
        """Return the most probable token, as the exact head has it; -1 where a logit is not a number."""
        hidden = hidden.to(torch.float32).contiguous()
        if hidden.numel() != self.shape.hidden:
            raise bad(_WHERE, "hidden", f"of {self.shape.hidden} channels", tuple(hidden.shape))
        return int(self.native.best(hidden.data_ptr(), self.parts))

    def logits(self, hidden: Float[Tensor, "rows hidden"], *, span: float) -> Float[Tensor, "rows vocab"]:
        """Return logits: those within `span` of the largest exact, the rest as the codes have them."""
        hidden = hidden.to(torch.float32).contiguous()
        if hidden.ndim != 2 or hidden.shape[1] != self.shape.hidden:
            raise bad(_WHERE, "hidden", f"(rows, {self.shape.hidden})", tuple(hidden.shape))
        out = torch.empty(len(hidden), self.shape.vocab)
        for given, made in zip(hidden, out, strict=True):
            self.native.logits(given.data_ptr(), span, made.data_ptr(), self.parts)
        return out
