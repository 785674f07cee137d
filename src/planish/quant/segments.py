"""Where a layer may be cut: found in the model's own graph, not in a table of architectures.

A dense layer (or convolution) whose output is taken apart has rows that mean different things; one that reads what was
put together has columns that do. Their ranges differ, so each part may want scales of its own. The graph proposes; the
data decide (`planish.quant.methods.segquant`).

    output   layer -> chunk, split                     rows
    input    cat, stack, merged heads -> layer         columns

Between the two only what leaves the channels alone is stepped over: casts, dropout, copies, new axes of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from planish._support import bad, warn_once
from planish.quant.conv import is_conv
from planish.quant.graph import Op, Shape, follow
from planish.quant.parts import MODES
from planish.quant.sites import is_linear, weight_of

PATTERNS = ("chunk", "split", "cat", "stack", "heads")
ONE_SIDED = ("silu", "gelu", "mish", "hardswish")
"""Functions that go far above zero and never far below."""
_TRANSPARENT = frozenset(
    ("to", "dropout", "clone", "contiguous", "detach", "alias", "identity", "float", "half", "bfloat16", "type",
     "type_as", "feature_dropout", "alpha_dropout", "lift_fresh")
)  # fmt: skip
_VIEWS = frozenset(("reshape", "unsqueeze", "squeeze", "getitem", "slice", "view_as", "expand"))
_TURNS = frozenset(("transpose", "permute", "movedim", "swapaxes"))
_ATTENTION = frozenset(("scaled_dot_product_attention", "bmm", "matmul", "baddbmm", "einsum"))


@dataclass(frozen=True)
class Segment:
    """One layer and how it may be cut.

    Attributes:
        layer: Its name in the model.
        mode: "output": rows of the weight; "input": columns.
        sizes: Outputs, or input channels, of each part.
        reason: What in the graph says so.

    Example:
        >>> print(Segment("norm1.linear", "output", (16, 16), "chunk"))
        norm1.linear: output in 16 + 16 (chunk)
    """

    layer: str
    mode: str
    sizes: tuple[int, ...]
    reason: str = "given"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.mode not in MODES:
            raise bad("Segment", "mode", "'output' or 'input'", self.mode)
        if not self.sizes or not all(type(n) is int and n > 0 for n in self.sizes):
            raise bad("Segment", "sizes", "integers above 0", self.sizes)

    def __str__(self) -> str:
        """Return the cut in a line."""
        same = len(self.sizes) > 3 and len(set(self.sizes)) == 1
        sizes = f"{len(self.sizes)} x {self.sizes[0]}" if same else " + ".join(map(str, self.sizes))
        return f"{self.layer}: {self.mode} in {sizes} ({self.reason})"


@dataclass(frozen=True)
class Cuts:
    """What a model's graph says of its layers.

    Attributes:
        segments: Layers that may be cut.
        activations: Layers that read a function with two very different sides, by name: "silu", "gelu" and so on;
            "gated silu" where something multiplies it first.
        how: "export" (torch.export), "run" (one run was followed), or "nothing" (neither was possible).
        unseen: Dense layers and convolutions that the graph does not call.

    Example:
        >>> print(Cuts((Segment("a", "input", (2, 3), "cat"),), {"b": "gelu"}, "export", ()))
        a: input in 2 + 3 (cat)
        b: reads gelu
    """

    segments: tuple[Segment, ...]
    activations: dict[str, str] = field(default_factory=dict)
    how: str = "export"
    unseen: tuple[str, ...] = ()

    def of(self, layer: str) -> list[Segment]:
        """Return the cuts of one layer."""
        return [segment for segment in self.segments if segment.layer == layer]

    def to_json(self) -> dict[str, Any]:
        """Return the findings as JSON-able values."""
        return {**asdict(self), "segments": [{**asdict(s), "sizes": list(s.sizes)} for s in self.segments],
                "unseen": list(self.unseen)}  # fmt: skip

    def __str__(self) -> str:
        """Return a line for each finding."""
        return "\n".join([*map(str, self.segments), *(f"{n}: reads {a}" for n, a in self.activations.items())])


def detect_segments(
    model: nn.Module,
    example_inputs: Any,  # noqa: ANN401  (a batch of what the model takes)
    *,
    patterns: Sequence[str] = PATTERNS,
) -> Cuts:
    """Find the layers of a model that may be cut into segments; the model stays as it is.

    The graph comes from `torch.export`, which looks at no values. Where a model cannot be exported, one run on the
    example is followed instead, which sees only the path that these data take; a warning says so.

    Args:
        model: Any module.
        example_inputs: One batch of what it takes: a tensor, a tuple, or a dict of arguments.
        patterns: Which of "chunk", "split" (outputs), "cat", "stack", "heads" (inputs; the merge of attention heads
            before a projection) to look for. Default all.

    Returns:
        The cuts. A layer that is called more than once is cut only where all calls agree.

    Raises:
        ValueError: A pattern is unknown.

    Example:
        >>> import torch
        >>> class Gate(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.proj, self.out = nn.Linear(4, 6), nn.Linear(3, 4)
        ...     def forward(self, x):
        ...         a, b = self.proj(x).chunk(2, -1)
        ...         return self.out(nn.functional.gelu(a)) * b.mean()
        >>> print(detect_segments(Gate(), torch.ones(2, 4)))
        proj: output in 3 + 3 (chunk)
        out: reads gelu
    """
    unknown = [p for p in patterns if p not in PATTERNS]
    if unknown:
        raise bad("detect_segments", "patterns", f"of {', '.join(PATTERNS)}", unknown[0])
    ops, how, why = follow(model, example_inputs)
    layers = {name: m for name, m in model.named_modules() if is_linear(m) or is_conv(m)}
    calls: dict[str, list[int]] = {}
    for number, op in enumerate(ops):
        if op.layer is not None:
            calls.setdefault(op.layer, []).append(number)
    unseen = tuple(name for name in layers if name not in calls)
    if how != "export":
        seen = "one run of it is followed instead" if how == "run" else "it is not cut anywhere"
        rest = f"; nothing is known of {', '.join(unseen[:6])}{' ...' if len(unseen) > 6 else ''}" if unseen else ""
        warn_once(f"detect_segments: {type(model).__name__} cannot be exported ({why}); {seen}{rest}.")
    found: list[Segment] = []
    activations: dict[str, str] = {}
    for name, numbers in calls.items():
        if is_conv(layers[name]) and getattr(layers[name], "groups", 1) != 1:
            continue
        for mode, look in (("output", _output), ("input", _input)):
            cut = _agreed(ops, numbers, look)
            if cut is not None and cut[0] in patterns and sum(cut[1]) == _total(layers[name], mode):
                found.append(Segment(name, mode, cut[1], cut[0]))
        activation = _agreed(ops, numbers, _activation)
        if activation is not None:
            activations[name] = activation
    return Cuts(tuple(found), activations, how, unseen)


def _total(layer: nn.Module, mode: str) -> int:
    if mode == "output":
        return len(weight_of(layer))
    return int(layer.in_channels) if is_conv(layer) else weight_of(layer).shape[1]  # type: ignore[arg-type]


def _agreed(ops: list[Op], numbers: list[int], look: Callable[[list[Op], int], Any]) -> Any:  # noqa: ANN401
    """Return what all calls of a layer show, or None."""
    seen = [look(ops, number) for number in numbers]
    return seen[0] if all(s == seen[0] for s in seen) else None


def _axis(op: Op, shape: Shape) -> int:
    return len(shape) - (3 if op.kind in ("conv2d", "convolution") else 1)


def _sizes(parts: Sequence[Shape], whole: Shape, axis: int) -> tuple[int, ...] | None:
    """Return the extents of parts along an axis, where they make up the whole and agree elsewhere."""
    if len(parts) < 2 or any(len(p) != len(whole) for p in parts):
        return None
    alike = all(n == whole[i] for p in parts for i, n in enumerate(p) if i != axis)
    sizes = tuple(p[axis] for p in parts)
    return sizes if alike and sum(sizes) == whole[axis] and min(sizes) > 0 else None


def moved_axis(axis: int, old: Shape, new: Shape) -> int | None:
    """Return where an axis is after a view that only adds or drops axes of one, or changes those before the last.

    Example:
        >>> moved_axis(1, (2, 12), (2, 12, 1, 1)), moved_axis(1, (6, 8), (2, 3, 8)), moved_axis(1, (2, 12), (2, 3, 4))
        (1, 2, None)
    """
    kept = [i for i, n in enumerate(old) if n != 1]
    after = [i for i, n in enumerate(new) if n != 1]
    if axis in kept and [old[i] for i in kept] == [new[i] for i in after]:
        return after[kept.index(axis)]
    last = axis == len(old) - 1 and new and old[-1] == new[-1]
    return len(new) - 1 if last else None


def _output(ops: list[Op], number: int) -> tuple[str, tuple[int, ...]] | None:
    """Follow a layer's output to where it is taken apart."""
    shape = ops[number].shapes[0]
    waiting = [(number, shape, _axis(ops[number], shape))]
    for source, whole, axis in waiting:
        for reader in ops[source].readers:
            op = ops[reader]
            if op.kind in ("chunk", "split"):
                sizes = _sizes(op.shapes, whole, axis)
                if sizes is not None:
                    return op.kind, sizes
            elif op.kind in _TRANSPARENT:
                waiting.append((reader, op.shapes[0], axis))
            elif op.kind in _VIEWS and len(op.shapes) == 1:
                there = moved_axis(axis, whole, op.shapes[0])
                if there is not None:
                    waiting.append((reader, op.shapes[0], there))
    return None


def _input(ops: list[Op], number: int) -> tuple[str, tuple[int, ...]] | None:
    """Follow a layer's input back to where it was put together."""
    op = ops[number]
    which = 1 if op.kind == "addmm" and len(op.given) > 2 else 0  # the bias comes first
    source, whole = op.given[which], op.given_shapes[which]
    axis = _axis(op, whole)
    while source >= 0:
        op = ops[source]
        if op.kind == "cat" and len(op.given) > 1:
            sizes = _sizes(op.given_shapes, whole, axis)
            return None if sizes is None else ("cat", sizes)
        if op.kind == "stack":
            flat = whole[:axis] + whole[axis + 1 :]
            fits = len(op.given) == whole[axis] > 1 and all(s == flat for s in op.given_shapes)
            return ("stack", (1,) * len(op.given)) if fits else None
        if not op.given or op.kind not in _TRANSPARENT | _VIEWS | {"cat"}:
            return None
        before = op.given_shapes[0]
        there = axis if op.kind in _TRANSPARENT else moved_axis(axis, whole, before)
        if there is None:
            heads = len(before) > 2 and axis == len(whole) - 1 and before[-2] * before[-1] == whole[-1]
            heads = heads and op.kind == "reshape" and before[-2] > 1 and _is_attention(ops, op.given[0])
            return ("heads", (before[-1],) * before[-2]) if heads else None
        source, whole, axis = op.given[0], before, there
    return None


def _is_attention(ops: list[Op], source: int) -> bool:
    """Whether a tensor is what attention made, turned and reshaped."""
    while source >= 0:
        op = ops[source]
        if op.kind in _ATTENTION:
            return True
        if not op.given or op.kind not in _TRANSPARENT | _VIEWS | _TURNS:
            return False
        source = op.given[0]
    return False


def _activation(ops: list[Op], number: int) -> str | None:
    """Return the one-sided function whose values a layer reads."""
    op = ops[number]
    source = _through(ops, op.given[1 if op.kind == "addmm" and len(op.given) > 2 else 0])
    if source < 0:
        return None
    if ops[source].kind in ONE_SIDED:
        return ops[source].kind
    if ops[source].kind == "mul":
        for factor in ops[source].given:
            made = _through(ops, factor)
            if made >= 0 and ops[made].kind in ONE_SIDED:
                return f"gated {ops[made].kind}"
    return None


def _through(ops: list[Op], source: int) -> int:
    """Step back over what leaves values alone."""
    while source >= 0 and ops[source].kind in _TRANSPARENT and ops[source].given:
        source = ops[source].given[0]
    return source
