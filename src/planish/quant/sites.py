"""Who shares an input, and who makes it: found by running a block, not by a table of architectures.

Linears that receive the same activation form a site. The layer whose output that activation is can absorb a transform:
a norm, or a linear. If nothing's output is that very tensor, earlier linears are probed: doubling an output row doubles
exactly (bit for bit, a power of two commutes with every rounding) those input channels that are proportional to it, and
nothing else does. One run finds whether all channels doubled; log2(rows) more read off, bit by bit, which row each
came from.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from planish.quant.calls import alike, memory, row_set
from planish.quant.conv import is_conv
from planish.quant.experts import Experts, visiting_all
from planish.quant.moments import Moments, SeenError
from planish.quant.stream import Block
from planish.quant.transforms import Transform

_FEWEST_OUTPUTS = 16


@dataclass
class Site:
    """Layers that receive one activation, and the layer that makes it.

    Attributes:
        kind: The consumers' names joined by "+": the same for the same place in every block.
        consumers: Linears that read the activation and may be rounded, by name in the block.
        readers: Modules that read it too and stay in float (a router); a fold must compensate them as well.
        producer: Norm or linear that can absorb a transform; None where there is none and transforms stay online.
        channels: Which output of the producer each input channel comes from; None for one to one.
        partners: Linears beside the producer that read what it reads and have as many outputs, by name (a gate): a
            permutation of the producer's outputs may need theirs permuted too.
        block: The block it is in.
        split: Whether each consumer sees only some of the tokens (experts).
        whole: Name of a consumer or reader that sees all of them; None where there is none or `split` is False.
        tokens: Tokens that each consumer saw, by name; empty unless `split`.
        measured: Statistics of the activation in the float model.
        online: Transform that found no layer to fold into.
        one_sided: Whether its activation hardly goes below zero, and is to be rounded with zero points.
        verdict: Which way of folding a scale the block's output accepted, -1 for none, None before any was tried.
    """

    kind: str
    consumers: dict[str, nn.Module]
    readers: dict[str, nn.Module]
    producer: nn.Module | None
    producer_name: str | None
    channels: Int[Tensor, "channels"] | None
    block: Block
    partners: dict[str, nn.Module] = field(default_factory=dict)
    split: bool = False
    whole: str | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    measured: Moments | None = None
    online: Transform | None = None
    one_sided: bool = False
    verdict: int | None = None

    @property
    def convolution(self) -> bool:
        """Whether it is a convolution's, whose activation is the patch under the kernel."""
        return any(is_conv(module) for module in self.consumers.values())

    @property
    def unseen(self) -> bool:
        """Whether no token reached the site: nothing is known of its activation."""
        return self.split and self.measured is None

    @property
    def moments(self) -> Moments:
        """Statistics of the activation in the float model; they exist once the block has been run."""
        if self.measured is None:
            raise RuntimeError(f"site {self.kind}: statistics are read before they were collected")
        return self.measured

    @property
    def name(self) -> str:
        """The site's name in the model: the block's name and the kind."""
        return f"{self.block.name}.{self.kind}" if self.block.name else self.kind

    def tied(self, values: Float[Tensor, "channels"]) -> Float[Tensor, "channels"]:
        """Take the maximum over channels that come from one producer channel (heads that share a key-value head)."""
        if self.channels is None:
            return values
        size = int(self.channels.max()) + 1
        top = values.new_zeros(size).scatter_reduce_(0, self.channels, values, "amax", include_self=False)
        return top[self.channels]

    @property
    def weights(self) -> dict[str, Float[Tensor, "out channels"]]:
        """The consumers' weights, (O, C), as float views."""
        return {name: weight_of(module) for name, module in self.consumers.items()}


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a dense layer: `nn.Linear`, or GPT-2's Conv1D, which stores its weight transposed."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def stays_float(module: nn.Module) -> bool:
    """Tell whether a dense layer is too small to be worth rounding: fewer than 16 outputs, as gates have."""
    return weight_of(module).shape[0] < _FEWEST_OUTPUTS


def weight_of(module: nn.Module) -> Float[Tensor, "out in"]:
    """Return a layer's weight as (O, I), whatever way it is stored; a view where memory allows."""
    weight = module.get_parameter("weight").detach()
    if is_conv(module):
        return weight.flatten(1)
    return weight if isinstance(module, nn.Linear) or not is_linear(module) else weight.T


def set_weight(module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Write a weight given as (O, I) into a layer."""
    with torch.no_grad():
        there = module.get_parameter("weight") if is_conv(module) else weight_of(module)
        there.copy_(weight.reshape(there.shape))


def find_sites(
    block: Block, skip: Callable[[str], bool], known: dict[Any, list[Site]] | None = None, *,
    convolutions: bool = False, probe: bool = True,
) -> list[Site]:  # fmt: skip
    """Find who shares an input in a block and who makes it.

    Args:
        block: The block, in float, with at least one batch of inputs.
        skip: Says which layers (by name in the block) stay in float.
        known: Findings by shape of block, read and extended: blocks alike are probed once.
        convolutions: Whether convolutions make sites as well, each its own.
        probe: Whether to look for the layers that can absorb a transform.

    Returns:
        The sites in order of execution.
    """
    signature = tuple((n, type(m).__name__, tuple(p.shape), skip(n)) for n, m in block.module.named_modules()
                      for p in m.parameters(recurse=False))  # fmt: skip
    if known is not None and signature in known:
        return [rebind(site, block) for site in known[signature]]
    trace = _Trace(block)
    sites = trace.sites(skip, convolutions=convolutions, probe=probe)
    if known is not None:
        known[signature] = [_outline(site) for site in sites]
    return sites


def _outline(site: Site) -> Site:
    """Return a site's names and maps without its layers, which would keep a whole block in memory."""
    blank = nn.Module()
    return replace(
        site, measured=None, verdict=None, tokens={}, producer=None, block=Block("", blank, [], [], []),
        consumers=dict.fromkeys(site.consumers, blank), readers=dict.fromkeys(site.readers, blank),
        partners=dict.fromkeys(site.partners, blank),
    )  # fmt: skip


def rebind(site: Site, block: Block) -> Site:
    """Return the same site in another block of the same shape; statistics come along."""
    get = block.module.get_submodule
    producer = None if site.producer_name is None else get(site.producer_name)
    return Site(
        kind=site.kind, consumers={n: get(n) for n in site.consumers},
        readers={n: get(n) for n in site.readers},
        producer=producer, producer_name=site.producer_name, channels=site.channels,
        partners={n: get(n) for n in site.partners},
        block=block, split=site.split, whole=site.whole, tokens=site.tokens, measured=site.measured,
        verdict=site.verdict,
    )  # fmt: skip


class _Trace:
    """One run of a block with everything its layers received and returned."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.received: dict[str, Tensor] = {}
        self.row_sets: dict[str, set[bytes]] = {}
        self.returned: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self.small = block.sample()
        with self._recording():
            output = self._run()
        again = self._run()  # else nothing is folded on luck
        self.deterministic = output.shape == again.shape and bool(alike(output, again).all())

    def _run(self) -> Tensor:
        with visiting_all(self.block.module):
            return self.block.call(*self.small)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        handles = []
        for name, module in self.block.module.named_modules():
            weight = getattr(module, "weight", None)
            if not name or not isinstance(weight, Tensor) or isinstance(module, nn.Embedding):
                continue
            if weight.ndim not in (1, 2) and not is_conv(module):
                continue
            self.modules[name] = module

            def record(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, _n: str = name) -> None:  # noqa: ANN401
                given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
                if given and _n not in self.received:  # in order of execution; a layer run twice keeps its first call
                    self.received[_n] = given[0]
                    if isinstance(out, Tensor):
                        self.returned[_n] = out

            handles.append(module.register_forward_hook(record, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sites(self, skip: Callable[[str], bool], *, convolutions: bool, probe: bool) -> list[Site]:
        groups: dict[Any, list[str]] = {}
        order = list(self.received)
        found = []
        for name in order:
            if self.modules[name].weight.ndim == 2:
                groups.setdefault(self._source(name, groups), []).append(name)
        for names in groups.values():
            partial = self._partial(names)
            counts = {len(container._modules) for container in partial.values()}  # as many outputs has a plain router
            linears = [
                n for n in names
                if is_linear(self.modules[n]) and not stays_float(self.modules[n]) and not skip(n)
                and (n in partial or weight_of(self.modules[n]).shape[0] not in counts)
            ]  # fmt: skip
            if not linears:
                continue
            consumers = {n: self.modules[n] for n in linears}
            width = weight_of(consumers[linears[0]]).shape[1]
            readers = {n: self.modules[n] for n in names if n not in consumers and _reads(self.modules[n], width)}
            site = Site("+".join(linears), consumers, readers, None, None, None, self.block)
            site.split = any(n in partial for n in linears)
            if site.split:
                site.whole = next((n for n in names if n not in partial and n in (consumers | readers)), None)
            if self.deterministic and probe:
                self._find_producer(site, names, order)
                site.partners = self._partners(site, groups)
            found.append(site)
        for name in order if convolutions else []:
            conv = self.modules[name]
            if is_conv(conv) and not stays_float(conv) and not skip(name):
                found.append(Site(name, {name: conv}, {}, None, None, None, self.block))
        return sorted(found, key=lambda site: order.index(next(iter(site.consumers))))

    def _partners(self, site: Site, groups: dict[Any, list[str]]) -> dict[str, nn.Module]:
        """Linears in the producer's own module that read its input and have as many outputs."""
        made, layer = site.producer_name, site.producer
        if made is None or layer is None or not is_linear(layer) or site.channels is not None:
            return {}
        home, rows = made.rpartition(".")[0], weight_of(layer).shape[0]
        beside = [n for names in groups.values() if made in names for n in names if n.rpartition(".")[0] == home]
        alike = [n for n in beside if is_linear(self.modules[n]) and weight_of(self.modules[n]).shape[0] == rows]
        return {n: self.modules[n] for n in alike if n != made}

    def _partial(self, names: list[str]) -> dict[str, nn.Module]:
        """Layers of experts among the readers of one input, each with the list of experts that it belongs to."""
        found = {}
        for name in names:
            parts = name.split(".")
            path = next((".".join(parts[:i]) for i, part in enumerate(parts) if part.isdigit()), None)
            if path is not None:
                container = self.block.module.get_submodule(path)
                if isinstance(container, Experts) or memory(self.received[name]) != memory(self.received[names[0]]):
                    found[name] = container
        return found

    def _rows(self, name: str) -> set[bytes]:
        if name not in self.row_sets:
            self.row_sets[name] = row_set(self.received[name])
        return self.row_sets[name]

    def _source(self, name: str, groups: dict[Any, list[str]]) -> Any:  # noqa: ANN401
        """What identifies a layer's input: its memory, or the earlier input whose rows these are (experts' tokens)."""
        x = self.received[name]
        key = memory(x)
        if key in groups or x.ndim != 2:
            return key
        for other, members in groups.items():
            earlier = self.received[members[0]]
            if earlier.shape[-1] == x.shape[-1] and earlier.numel() >= x.numel():
                if self._rows(name) <= self._rows(members[0]):
                    return other
        return key

    def _find_producer(self, site: Site, names: list[str], order: list[str]) -> None:
        x = self.received[names[0]]
        for name in order:
            y = self.returned.get(name)
            if y is not None and name not in names and y.shape[-1] == x.shape[-1] and memory(y) == memory(x):
                site.producer, site.producer_name = self.modules[name], name
                return
        before = order[: order.index(names[0])]
        for name in reversed(before):
            producer = self.modules[name]
            if is_linear(producer) and name in self.returned:
                channels = self._probe(name, names[0])
                if channels is not None:
                    site.producer, site.producer_name = producer, name
                    rows = torch.arange(weight_of(producer).shape[0], device=channels.device)
                    one_to_one = torch.equal(channels, rows)
                    site.channels = None if one_to_one else channels
                    return

    def _probe(self, producer: str, consumer: str) -> Tensor | None:
        """Find which output of `producer` each input channel of `consumer` is proportional to; None if not all are."""
        outputs = self.returned[producer].shape[-1]
        reference = self.received[consumer].reshape(-1, self.received[consumer].shape[-1])
        index = torch.arange(outputs, device=reference.device)
        alive = ((reference != 0) & ~reference.isnan()).any(0)
        rows = self._clean_rows(producer, consumer, reference, outputs, alive)
        if rows is None:
            return None
        channels = torch.zeros(reference.shape[-1], dtype=torch.int64, device=reference.device)
        for bit in range(max(1, math.ceil(math.log2(outputs)))):
            doubled = self._doubled(producer, consumer, reference, rows & (index >> bit & 1).bool())
            if doubled is None:
                return None
            channels |= doubled.long() << bit
        if not bool(alive.all()):  # channels that never fire cannot be followed: only a plain one-to-one map is safe
            if outputs != channels.numel() or not torch.equal(channels[alive], index[alive]):
                return None
            channels = index
        return channels

    def _clean_rows(
        self, producer: str, consumer: str, reference: Tensor, outputs: int, alive: Tensor
    ) -> Tensor | None:
        """Find output rows which, doubled together, double every live channel of the consumer's input."""
        index = torch.arange(outputs, device=reference.device)
        everything = self._doubled(producer, consumer, reference, index >= 0)
        if everything is not None:
            return index >= 0 if bool(everything[alive].all()) else None
        # a fused layer (a slice of qkv, the upper half of gate_up): some single rows must pass, or none will
        step = max(1, outputs // 32)
        singles = (self._doubled(producer, consumer, reference, index == i) for i in range(step // 2, outputs, step))
        if not any(d is not None and bool((d & alive).any()) for d in singles):
            return None
        clean = torch.zeros_like(index, dtype=torch.bool)
        covered = torch.zeros_like(alive)
        level = [(0, outputs // 2), (outputs // 2, outputs)]
        while level and not bool(covered[alive].all()):
            following = []
            for low, high in level:
                doubled = self._doubled(producer, consumer, reference, (index >= low) & (index < high))
                if doubled is not None:
                    clean |= (index >= low) & (index < high) & bool(doubled.any())
                    covered |= doubled
                elif high - low > 1:
                    following += [(low, (low + high) // 2), ((low + high) // 2, high)]
            level = following
        return clean if bool(covered[alive].all()) else None

    def _doubled(self, producer: str, consumer: str, reference: Tensor, rows: Tensor) -> Tensor | None:
        """Double some output rows of a layer; return which input channels doubled, or None if any did neither."""
        factor = torch.where(rows, 2.0, 1.0)
        seen: list[Tensor] = []

        def scale(_m: nn.Module, _a: Any, out: Tensor) -> Tensor:  # noqa: ANN401
            return out * factor.to(out.dtype)

        def catch(_m: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise SeenError

        handles = [
            self.modules[producer].register_forward_hook(scale),
            self.modules[consumer].register_forward_pre_hook(catch),
        ]
        try:
            with suppress(SeenError):  # the rest of the block is of no interest
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        if not seen or seen[0].numel() != reference.numel():
            return None
        now = seen[0].reshape(reference.shape)
        twice, same = alike(now, 2 * reference).all(0), alike(now, reference).all(0)
        return twice & ~same if bool((twice | same).all()) else None


def _reads(module: nn.Module, width: int) -> bool:
    """Whether a module multiplies its input's channels by a matrix, so that a fold can be compensated in it."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight_of(module).shape[1] == width
