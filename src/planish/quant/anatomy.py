"""What a decoder is made of, found by running it once.

A short prompt goes through the model while every layer of its blocks notes what it receives and returns. The memory
that passes from one to the next says what each is: layers that read one input are query, key and value, or gate and up;
a norm is before or after attention by whose output it reads; the function a gate passes through is compared with the
known ones. Nothing is looked up by architecture, and `decoder.Decoder` believes none of it before the logits agree.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.quant.layers import QLinear
from planish.quant.stacks import find_blocks

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


class UnfitError(Exception):
    """A model is not of the kind that the native decoder runs; the text says what was met instead."""


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * weight."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Parts:
    """One block: its norms (None where there is none), its layers in order, what its attention sees."""

    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    qkv: list[nn.Module]
    out: list[nn.Module]
    gate_up: list[nn.Module]
    down: list[nn.Module]
    window: int
    rope: int


@dataclass(frozen=True)
class Anatomy:
    """A whole decoder; `ropes` are (cos, sin) of every position, half of the turned dimensions wide."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    positions: int
    scale: float
    softcap: float
    embed_scale: float
    gate: str
    embedding: Tensor
    head: nn.Module
    head_softcap: float
    last: Norm | None
    blocks: list[Parts]
    ropes: list[tuple[Tensor, Tensor]]


@dataclass
class _Event:
    module: nn.Module
    name: str
    given: Tensor
    made: Tensor


def is_layer(module: nn.Module) -> bool:
    """Say whether a module multiplies its input by a matrix in a way that the native decoder can."""
    return isinstance(module, QLinear) or type(module) is nn.Linear


@contextmanager
def _listening(module: nn.Module, events: list[_Event]) -> Iterator[None]:
    handles = []
    for name, leaf in module.named_modules():
        if not is_layer(leaf) and next(leaf.children(), None) is not None:
            continue

        def note(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, n: str = name) -> None:  # noqa: ANN401
            given = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            if given is not None and isinstance(out, Tensor) and out is not given:  # dropout passes its input on
                events.append(_Event(m, n, given, out))

        handles.append(leaf.register_forward_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def examine(model: Any, prompt: Tensor) -> Anatomy:  # noqa: ANN401  (a transformers model)
    """Find the parts of a decoder by one run.

    Args:
        model: A causal language model of transformers, in evaluation mode, on the CPU.
        prompt: Token ids (1, tokens).

    Returns:
        The parts.

    Raises:
        UnfitError: Something is not as in a decoder of the Llama kind.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    names, blocks = find_blocks(model)
    if head is None or not isinstance(table, nn.Embedding) or names == [""]:
        raise UnfitError("it is not a list of blocks between an embedding and a head")
    if not is_layer(head):
        raise UnfitError(f"its head is a {type(head).__name__}")
    events: list[list[_Event]] = [[] for _ in blocks]
    rest: list[_Event] = []
    calls: list[dict[str, Any]] = []

    def call(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        calls.append({**kwargs, "hidden_states": hidden})

    with torch.no_grad(), _all(blocks, events, call), _listening(model, rest):
        model(input_ids=prompt, use_cache=False)
    if len(calls) != len(blocks):
        raise UnfitError("its blocks do not run once each")

    ropes = _Ropes(model, config, calls)
    found = [
        _block(blocks[i], events[i], calls[i]["hidden_states"], config, ropes.index(i, blocks[i]))
        for i in range(len(blocks))
    ]
    kinds = {f.gate for f in found} | {f.scale for f in found} | {f.softcap for f in found} | {f.shape for f in found}
    if len(kinds) != 4:
        raise UnfitError("its blocks differ in heads, scale or activation")
    first = found[0]
    into_head = next((e.given for e in reversed(rest) if e.module is head), None)
    last = next((e for e in rest if into_head is not None and _same(e.made, into_head) and e.module is not head), None)
    heads, kv_heads, head_dim, inner = first.shape
    return Anatomy(
        hidden=table.embedding_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=inner,
        vocab=int(head.out_features),
        positions=ropes.positions,
        scale=first.scale,
        softcap=first.softcap,
        embed_scale=_ratio(calls[0]["hidden_states"], table.weight[prompt]),
        gate=first.gate,
        embedding=table.weight.detach(),
        head=head,
        head_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        last=None if last is None else _norm(last),
        blocks=[f.parts for f in found],
        ropes=ropes.tables,
    )


@contextmanager
def _all(blocks: list[nn.Module], events: list[list[_Event]], call: Callable[..., None]) -> Iterator[None]:
    handles = [block.register_forward_pre_hook(call, with_kwargs=True) for block in blocks]
    open_ = [_listening(block, each) for block, each in zip(blocks, events, strict=True)]
    for one in open_:
        one.__enter__()
    try:
        yield
    finally:
        for one in open_:
            one.__exit__(None, None, None)
        for handle in handles:
            handle.remove()


def _ratio(hidden: Tensor, rows: Tensor) -> float:
    """Return the number by which embeddings are multiplied on their way into the first block."""
    rows = rows.float()
    ratio = float((hidden.float() * rows).sum() / rows.square().sum())
    error = (hidden.float() - ratio * rows).abs().max() / rows.abs().max().clamp(min=1e-30)
    if not float(error) <= 1e-2 * max(1.0, abs(ratio)):
        raise UnfitError("what enters its first block is not a multiple of its embeddings")
    return ratio if abs(ratio - 1) > 1e-6 else 1.0


def _norm(event: _Event | None, width: int | None = None) -> Norm | None:
    """Check by a random input that a module is a root-mean-square norm, and return what it multiplies by."""
    if event is None:
        return None
    module = event.module
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        raise UnfitError(f"`{event.name}` is no norm with a weight and an eps")
    if width is not None and len(weight) != width:
        raise UnfitError(f"`{event.name}` norms {len(weight)} channels together instead of {width}")
    z = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.no_grad():
        y = module(z).float()
    wide = z.float()
    plain = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    near = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    for effective in (weight.detach().float(), 1 + weight.detach().float()):
        if torch.allclose(y, plain * effective, rtol=near, atol=near):
            return Norm(effective.contiguous(), eps)
    raise UnfitError(f"`{event.name}` ({type(module).__name__}) is no root-mean-square norm")


@dataclass(frozen=True)
class _Found:
    parts: Parts
    gate: str
    scale: float
    softcap: float
    shape: tuple[int, int, int, int]


def _block(block: nn.Module, events: list[_Event], hidden: Tensor, config: Any, rope: int) -> _Found:  # noqa: ANN401
    layers = [e for e in events if is_layer(e.module)]
    groups: list[list[_Event]] = []
    for event in layers:
        if groups and _same(groups[-1][0].given, event.given):
            groups[-1].append(event)
        else:
            groups.append([event])
    if [len(g) for g in groups] not in ([3, 1, 2, 1], [1, 1, 1, 1], [3, 1, 1, 1], [1, 1, 2, 1]):
        told = " then ".join(str(len(g)) for g in groups[:6]) or "none"
        told += " and so on" if len(groups) > 6 else ""
        raise UnfitError(f"the linear layers of a block run as {told} on one input, not as 3, 1, 2 and 1")
    qkv, out, gate_up, down = groups
    others = [e for e in events if not is_layer(e.module)]

    attention = block.get_submodule(out[0].name.rpartition(".")[0])
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    head_dim = int(head_dim or config.hidden_size // config.num_attention_heads)
    heads = out[0].given.shape[-1] // head_dim
    total = sum(e.made.shape[-1] for e in qkv)
    kv_heads = (total // head_dim - heads) // 2
    inner = down[0].given.shape[-1]
    fits = (heads + 2 * kv_heads) * head_dim == total and kv_heads and heads % kv_heads == 0
    if len(qkv) == 3:
        fits = fits and [e.made.shape[-1] for e in qkv] == [heads * head_dim, *[kv_heads * head_dim] * 2]
    if not fits or sum(e.made.shape[-1] for e in gate_up) != 2 * inner:
        raise UnfitError("the widths of a block's layers are not those of heads, gate and up")

    def makes(x: Tensor) -> _Event | None:
        return next((e for e in others if _same(e.made, x)), None)

    def reads(x: Tensor) -> _Event | None:
        return next((e for e in others if _same(e.given, x)), None)

    q_norm = reads(qkv[0].made) if len(qkv) == 3 else None
    k_norm = reads(qkv[1].made) if len(qkv) == 3 else None
    gate = reads(gate_up[0].made)
    if gate is None:
        raise UnfitError("no module is the activation of its gate")
    before = makes(qkv[0].given)
    if before is None and not _same(qkv[0].given, hidden):
        raise UnfitError("something between a block's input and its attention is no module")
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    softcap = getattr(attention, "attn_logit_softcapping", getattr(config, "attn_logit_softcapping", None))
    parts = Parts(
        before_attention=_norm(before),
        after_attention=_norm(reads(out[0].made)),
        before_mlp=_norm(makes(gate_up[0].given)),
        after_mlp=_norm(reads(down[0].made)),
        q_norm=_norm(q_norm, head_dim),
        k_norm=_norm(k_norm, head_dim),
        qkv=[e.module for e in qkv],
        out=[e.module for e in out],
        gate_up=[e.module for e in gate_up],
        down=[e.module for e in down],
        window=int(window or 0),
        rope=rope if getattr(attention, "use_rope", True) else -1,
    )
    scale = float(getattr(attention, "scaling", head_dim**-0.5))
    return _Found(parts, _gate(gate), scale, float(softcap or 0.0), (heads, kv_heads, head_dim, inner))


def _gate(event: _Event) -> str:
    z = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        y = event.module(z)
    for name, function in GATES.items():
        if torch.allclose(y, function(z), rtol=1e-6, atol=1e-6):
            return name
    raise UnfitError(f"its activation `{event.name}` ({type(event.module).__name__}) is none of {', '.join(GATES)}")


class _Ropes:
    """The tables by which positions turn queries and keys, asked of the model's own module."""

    def __init__(self, model: nn.Module, config: Any, calls: list[dict[str, Any]]) -> None:  # noqa: ANN401
        self.config, self.calls = config, calls
        self.positions = int(getattr(config, "max_position_embeddings", 0) or 2048)
        self.tables: list[tuple[Tensor, Tensor]] = []
        self.known: dict[str | None, int] = {}
        modules = [m for m in model.modules() if any("inv_freq" in n for n, _ in m.named_buffers(recurse=False))]
        if len(modules) != 1:
            raise UnfitError(f"it turns positions in {len(modules)} modules, not in one")
        self.module = modules[0]
        kind = str(getattr(self.module, "rope_type", "default"))
        if "dynamic" in kind or "longrope" in kind:
            raise UnfitError(f"its position embeddings ({kind}) depend on the length of the text")

    def index(self, i: int, block: nn.Module) -> int:
        """Return which table block `i` uses, made if it is the first to."""
        given = self.calls[i].get("position_embeddings")
        if not isinstance(given, tuple) or len(given) != 2:
            raise UnfitError("its blocks receive no cosines and sines")
        kinds = getattr(self.config, "layer_types", None)
        wanted = "layer_type" in inspect.signature(self.module.forward).parameters
        kind = kinds[i] if wanted and kinds else None
        if kind not in self.known:
            self.known[kind] = len(self.tables)
            self.tables.append(self._table(kind))
        cos, sin = self.tables[self.known[kind]]
        half = cos.shape[1]
        for table, full in ((cos, given[0]), (sin, given[1])):
            part, near = full[0].float(), 1e-5 if full.dtype in (torch.float32, torch.float64) else 1e-2
            if part.shape[1] != 2 * half or not torch.allclose(table[: len(part)], part[:, :half], atol=near):
                raise UnfitError("its blocks receive other cosines and sines than its module makes")
        return self.known[kind]

    def _table(self, kind: str | None) -> tuple[Tensor, Tensor]:
        x, ids = torch.zeros(1, 1), torch.arange(self.positions)[None]
        with torch.no_grad():
            made = self.module(x, ids) if kind is None else self.module(x, ids, kind)
        cos, sin = (t[0].float() for t in made)
        half = cos.shape[1] // 2
        if not torch.equal(cos[:, :half], cos[:, half:]) or not torch.equal(sin[:, :half], sin[:, half:]):
            raise UnfitError("its position embeddings turn neighbouring channels, not halves")
        return cos[:, :half].contiguous(), sin[:, :half].contiguous()
