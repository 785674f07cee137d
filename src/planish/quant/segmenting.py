"""Round layers in segments, with activations coded by sign, where that lowers the calibrated error.

The graph proposes (`planish.quant.segments`), the data decide: every proposal is carried out on a sample of what enters
the layer, transform, rounding of inputs and all, and kept only if it takes away a stated share of the output's error on
another sample: ranges and factors that only fit what they were taken from are found out.

    output, shared   rows in segments, one smoothing: the scales of one layer, tied by segment; costs nothing
    output, own      rows in segments, each smoothed for itself: inputs are rounded once a segment
    input            columns in segments: each with its own range of inputs; products of the same size in all

Legend: T rows (tokens), C channels; for convolutions a row is an image.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant import fold
from planish.quant.act_formats import Dual, Static
from planish.quant.engine import Method
from planish.quant.formats import Affine, Format
from planish.quant.layers import QLinear
from planish.quant.low_rank import LowRank
from planish.quant.moments import entering
from planish.quant.parts import Quantized, Segments, in_place_of, starts
from planish.quant.places import images
from planish.quant.rounding import Nearest
from planish.quant.segments import Cuts, Segment
from planish.quant.sites import Site, weight_of
from planish.quant.stream import Block
from planish.quant.transforms import Transform

SIDES = ("unsigned", "signed", "asymmetric", "off")


def sided(act: Format, how: str) -> Format | None:
    """Return the grid for activations with two different sides, in place of a symmetric one; None for no other.

    Args:
        act: The grid of other activations.
        how: "signed" or "unsigned" for `Dual`, "asymmetric" for a zero point, "off".

    Example:
        >>> sided(Affine(8, None), "unsigned")
        Dual(bits=8, unsigned=True)
    """
    if how == "off" or not isinstance(act, Affine):
        return None
    if how == "asymmetric":
        return replace(act, symmetric=False)
    return Dual(act.bits, unsigned=how == "unsigned")


def fixed(act: Format | None, static: bool, low: Tensor, high: Tensor) -> Format | None:
    """Return a grid with the range from `low` to `high` (of channels, or numbers), if ranges are to be fixed."""
    if act is None or not static or not isinstance(act, Affine | Dual):
        return act
    return Static(act, min(low.amin().item(), 0.0), max(high.amax().item(), 0.0))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return two halves of a batch that share no image where guidance stacks it twice: quarters 1 and 3, 2 and 4.

    Fewer than four rows are given back twice.

    Example:
        >>> [part.tolist() for part in halves(torch.arange(8))]
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    if len(x) < 4:
        return x, x
    quarters = x.tensor_split(4)
    return torch.cat(quarters[::2]), torch.cat(quarters[1::2])


@dataclass
class Pool:
    """What enters a layer: the range of every channel over all rows, and a sample of the rows."""

    low: Float[Tensor, "channels"]
    high: Float[Tensor, "channels"]
    rows: list[Tensor]

    @classmethod
    def of(cls, site: Site, rows: int) -> tuple["Pool", "Pool", "Pool"]:
        """Run the block once and keep about `rows` rows of what enters a site, evenly from all batches.

        Returns:
            All of it; one half, to fit a layer to; the other, to judge it on.

        Raises:
            RuntimeError: Nothing enters the site.
        """
        ends: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
        kept: list[list[Tensor]] = [[], [], []]
        batches = len(site.block.inputs)
        for x in images(site) if site.convolution else entering(site.block, site):
            if not len(x):
                continue
            axes = (0, 2, 3) if site.convolution else (0,)
            size = x.shape[-1] * x.shape[-2] if site.convolution else 1
            each = max(1, -(-rows // (batches * size)))
            taken = x[:: max(1, len(x) // each)][:each].clone()
            for part, some, end, keep in zip((x, *halves(x)), (taken, *halves(taken)), ends, kept, strict=True):
                end.append((part.amin(axes), part.amax(axes)))
                keep.append(some)
        if not ends[0]:
            raise RuntimeError(f"site {site.kind}: no token enters it")
        made = []
        for end, keep in zip(ends, kept, strict=True):
            low, high = (torch.stack(side) for side in zip(*end, strict=True))
            made.append(cls(low.amin(0), high.amax(0), keep))
        return made[0], made[1], made[2]


@dataclass
class _Trial:
    """A layer as it might be, fitted to one half of the sample and judged on the other."""

    form: str
    layer: Quantized
    error: float
    cut: Segment
    act: Format | None


def cost(layer: Quantized) -> dict[str, int]:
    """Return how often a layer rounds its input, how many products it makes of that, and its bytes."""
    parts = [p for p in layer.modules() if isinstance(p, QLinear)]
    twice = sum(2 if isinstance(getattr(p.act, "grid", p.act), Dual) else 1 for p in parts)
    size = sum(b.numel() * b.element_size() for b in layer.buffers())
    return {"input_roundings": sum(p.act is not None for p in parts), "products": twice, "bytes": size}


@dataclass(frozen=True)
class Segmented:
    """Round a site's layers with `inner`, in segments and with inputs coded by sign where that pays.

    Args:
        inner: The rounding step of each part; default to nearest.
        smooth: Transform step for layers that have a choice, and for each of their segments; None for none.
        static: Fix the range of inputs from the calibration data, one for all tokens. Default False: a range a token.
        sides: How inputs behind SiLU, GELU and the like may be coded: "unsigned" (default) or "signed" for `Dual`,
            "asymmetric" for a zero point, "off".
        shared: Let segments of rows share one smoothing where that is as good. Default True.
        rows: How many rows of its input a layer is judged on; default 4096.
        pays: Least share of the error that a cut, or a second scale, must take away to be kept, in [0, 1). Default
            0.02.
        cuts: Where layers may be cut, and what they read; a plan fills it in.

    Raises:
        ValueError: An argument is out of range.

    Source: SegQuant (arXiv 2507.14811), SegLinear and DualScale; the choice by error is ours.

    Example:
        >>> Segmented(static=True).sides
        'unsigned'
    """

    inner: Callable[[Site, Method], dict[str, nn.Module]] = Nearest()  # noqa: RUF009  (frozen)
    smooth: Callable[[Site, Method], Transform | None] | None = None
    static: bool = False
    sides: str = "unsigned"
    shared: bool = True
    rows: int = 4096
    pays: float = 0.02
    cuts: Cuts = field(default_factory=lambda: Cuts(()), repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.sides not in SIDES:
            raise bad("Segmented", "sides", f"one of {', '.join(SIDES)}", self.sides)
        if self.rows < 1:
            raise bad("Segmented", "rows", "at least 1", self.rows)
        if not 0 <= self.pays < 1:
            raise bad("Segmented", "pays", "a float in [0, 1)", self.pays)

    @property
    def sees_clean(self) -> bool:
        """Whether the inner step wants to see the float model's inputs beside the quantized model's."""
        return bool(getattr(self.inner, "sees_clean", False))

    def has_choice(self, site: Site) -> bool:
        """Tell whether a layer of a site may be cut, or its inputs coded by sign."""
        names = [full_name(site, name) for name in site.consumers]
        return not site.split and any(self.cuts.of(n) or self._reads(n) for n in names)

    def _reads(self, layer: str) -> str | None:
        return None if self.sides == "off" else self.cuts.activations.get(layer)

    def __call__(self, site: Site, method: Method) -> dict[str, nn.Module]:
        """Round the site's weights."""
        if not self.has_choice(site):
            return self._plain(site, method)
        layers: dict[str, nn.Module] = {}
        for name, module in site.consumers.items():
            alone = replace(site, kind=name, consumers={name: module}, readers={}, producer=None, channels=None)
            layers[name] = self._best(alone, name, method)
        return layers

    def _plain(self, site: Site, method: Method) -> dict[str, nn.Module]:
        step = self.inner.inner if site.convolution and isinstance(self.inner, LowRank) else self.inner
        if self.static and method.act is not None:
            found = Pool.of(site, 1)[0]
            method = replace(method, act=fixed(method.act, True, found.low, found.high))
        return step(site, method)

    def _best(self, site: Site, name: str, method: Method) -> Quantized:
        """Return the cheapest form of a layer that no dearer one beats by enough."""
        everything, fit, held = Pool.of(site, self.rows)
        full, module = full_name(site, name), site.consumers[name]
        total = module.in_channels if site.convolution else weight_of(module).shape[1]
        whole = Segment(full, "input", (cast(int, total),), "whole")

        def tried(form: str, segment: Segment, act: Format | None) -> _Trial:
            layer = self._make(form, site, segment, fit, replace(method, act=act))
            return _Trial(form, layer, _error(layer, module, held), segment, act)

        trials = [tried("whole", whole, method.act)]
        reads, other = self._reads(full), None if method.act is None else sided(method.act, self.sides)
        if reads is not None and other is not None:
            trials.append(tried(f"{self.sides} inputs", whole, other))
        best = self._kept(trials)
        cut = [best]
        for segment in self.cuts.of(full):
            cut += [tried(form, segment, best.act) for form in self._forms(segment, site)]
        best = self._kept(cut)
        layer = self._make(best.form, site, best.cut, everything, replace(method, act=best.act))
        site.block.notes[name] = {
            "form": best.form, "reads": reads, "cuts": [str(s) for s in self.cuts.of(full)],
            "cut": None if best.cut is whole else str(best.cut),
            "errors": {t.form: t.error for t in (*trials, *cut[1:])},
            **cost(layer), "bytes_whole": cost(trials[0].layer)["bytes"],
        }  # fmt: skip
        stored = site.block.stored.get(f"{name}.bias")
        for part in layer.modules() if isinstance(layer, Segments) else ():
            if isinstance(part, QLinear) and part.bias is not None and stored is not None:
                part.bias = part.bias.to(stored)
        return layer

    def _kept(self, trials: list[_Trial]) -> _Trial:
        best = trials[0]
        for one in trials[1:]:
            if one.error < (1 - self.pays) * best.error:
                best = one
        return best

    def _forms(self, segment: Segment, site: Site) -> list[str]:
        """Return the ways in which a cut may be made, the cheapest first."""
        if len(segment.sizes) < 2:
            return []
        branch = isinstance(self.inner, LowRank) and self.inner.rank > 0 and not site.convolution
        if branch and segment.reason != "given" and min(segment.sizes) < cast(LowRank, self.inner).rank:
            return []  # a branch of the rank asked for does not fit into so small a part
        if segment.mode == "input":
            return ["input"]
        smooth = self.smooth is not None and not site.convolution
        if not smooth and not branch:
            return ["output, shared"]
        return ["output, shared", "output, own"] if self.shared and not branch else ["output, own"]

    def _make(self, form: str, site: Site, segment: Segment, pool: Pool, method: Method) -> Quantized:
        """Build a form of a layer from what enters it."""
        (module,) = site.consumers.values()
        bench = _bench(site, module, segment, pool)
        common = None
        if form == "output, shared" and self.smooth is not None and not site.convolution:
            one = replace(segment, sizes=(sum(segment.sizes),))
            common = self.smooth(_part_site(_bench(site, module, one, pool), 0), method)
        parts = []
        for number, (start, size) in enumerate(zip(starts(segment.sizes), segment.sizes, strict=True)):
            inside = slice(start, start + size) if segment.mode == "input" else slice(None)
            part = _part_site(bench, number)
            own = self.smooth is not None and not site.convolution and form != "output, shared"
            transform = cast(Any, self.smooth)(part, method) if own else common
            low, high = pool.low[inside], pool.high[inside]
            if transform is not None:
                fold.apply(bench, transform, part, online=True)
                low, high = _moved(transform, low, high, [x for x in pool.rows if len(x)], inside)
            step = self.inner.inner if site.convolution and isinstance(self.inner, LowRank) else self.inner
            made = step(part, replace(method, act=fixed(method.act, self.static, low, high)))
            parts.append(cast(QLinear, made[part.kind]))
        return joined(parts, segment.mode, module)


def _moved(transform: Transform, low: Tensor, high: Tensor, rows: list[Tensor], inside: slice) -> tuple[Tensor, Tensor]:
    """Return the ranges of channels behind a transform: exactly where it scales them, else those of the sample."""
    if transform.diagonal:
        return transform(low[None])[0], transform(high[None])[0]
    made = torch.cat([transform(x[..., inside]) for x in rows])
    return made.amin(0), made.amax(0)


def full_name(site: Site, name: str) -> str:
    """Return the name in the model of one of a site's layers."""
    return f"{site.block.name}.{name}" if site.block.name else name


def joined(parts: list[QLinear], mode: str, module: nn.Module) -> Quantized:
    """Return parts as one layer where they differ in nothing but scales of rows, else as segments."""
    first = parts[0]
    if len(parts) == 1:
        return first
    alike = mode == "output" and all(
        p.transform is first.transform and p.act == first.act and p.format == first.format and p.down is None
        for p in parts
    )
    if not alike:
        return Segments(parts, mode)
    weights = [p.weight for p in parts]
    zero = None if weights[0].zero is None else torch.cat([cast(Tensor, w.zero) for w in weights])
    whole = replace(
        weights[0], codes=torch.cat([w.codes for w in weights]), scale=torch.cat([w.scale for w in weights]), zero=zero
    )
    bias = None if first.bias is None else torch.cat([cast(Tensor, p.bias) for p in parts])
    return in_place_of(module, QLinear.of(whole, bias, transform=first.transform, act=first.act))


def _bench(site: Site, module: nn.Module, segment: Segment, pool: Pool) -> Block:
    """Return a block that holds one layer, cut in float, and reads the sample."""
    cut = Segments.split(module, segment.mode, segment.sizes)
    known = site.block.stored.get(f"{next(iter(site.consumers))}.weight", torch.float32)
    stored = {f"parts.{i}.weight": known for i in range(len(cut.parts))}
    empty: list[dict[str, Any]] = [{} for _ in pool.rows]
    return Block(segment.layer, cut, list(pool.rows), empty, [None] * len(empty), "x", site.block.device, stored)


def _part_site(bench: Block, number: int) -> Site:
    name = f"parts.{number}"
    return Site(name, {name: bench.module.get_submodule(name)}, {}, None, None, None, bench)


def _error(layer: nn.Module, module: nn.Module, pool: Pool) -> float:
    """Return the squared error of a layer's output on the sample, relative to the output's own square."""
    gap = size = 0.0
    forward = type(module).forward  # without the hooks of whoever watches the layer in its block
    for x in pool.rows:
        wanted = forward(module, x)
        gap += (layer(x) - wanted).double().square().sum().item()
        size += wanted.double().square().sum().item()
    return gap / size if size else 0.0
