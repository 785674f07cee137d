r"""SegQuant: cut layers where the model's graph does, and give the two sides of an activation a scale each.

A dense layer whose output is taken apart (the six modulations of a DiT block) or whose input was put together (merged
heads, skip connections) has rows or columns that mean different things and differ in size. One scale for all of them
serves the largest. And behind SiLU or GELU the negative values end at -0.28 or -0.17 while the positive ones do not
end, so that one symmetric scale leaves ten codes for a half of the values.

    output:   Y = [X W_1', ..., X W_n']          each W_i with its scale
    input:    Y = X_1 W_1' + ... + X_n W_n'      each X_i and W_i with theirs
    sides:    Y = s+ (q+ Q') + s- (q- Q'),       q+ = round(max(X, 0) / s+), q- = round(min(X, 0) / s-)

Cuts and sides are read from the graph (`detect_segments`) and kept where they lower the layer's error on the
calibration data (`Segmented`); what they cost is in the report. Inputs are smoothed, each segment by itself, with the
strength that loses least (`SmoothAlpha`), and weights are rounded to nearest, with compensation, or beside a branch.

================  =================================  ===========================================
paper             here                               shape, range
================  =================================  ===========================================
SegLinear         ``Segments``, or tied scales       outputs or input channels of each part
DualScale         ``Dual``                           two steps a token, or fixed (``Static``)
s                 ``Scale.scale``                    (channels,), > 0, for each segment
alpha             ``alpha``                          [0, 1]; 0, 0.1, ... 1
SegQuant-A, -G    ``calibrator``                     "amax", "gptq"
================  =================================  ===========================================

Differs from the paper: the graph is that of `torch.export`, so that stock models are followed; `dim` may be given in
any way; convolutions are cut too; a cut must pay. Each side of an activation has all codes of an unsigned integer
(`sides="unsigned"`), which halves both steps. Segments of rows share a smoothing where each having its own gains
nothing: then they are one layer with scales tied by segment. Strengths are searched on a sample with matrices of
second moments. What is chosen is fitted to one half of the data and judged on the other. GPTQ is the one of
`planish.quant.gptq`. Symmetric steps are max / (2^(b-1) - 1/2).

When to use: weights and activations of eight bits with one scale a tensor, as integer kernels like them; diffusion
models, and any with fused layers. With a scale a row and no smoothing of their own, cuts of outputs change nothing.

Reference:
    SegQuant: A Semantics-Aware and Generalizable Quantization Framework for Diffusion Models, 2025.
    https://arxiv.org/abs/2507.14811
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.quant.conv import is_conv
from planish.quant.engine import Method, Walk
from planish.quant.formats import Affine
from planish.quant.low_rank import LowRank
from planish.quant.methods.gptq import Compensate
from planish.quant.methods.svdquant import sampled, sampled_rows, scales
from planish.quant.parts import Segments
from planish.quant.rounding import Nearest
from planish.quant.segmenting import SIDES, Segmented, fixed, full_name, halves
from planish.quant.segments import PATTERNS, Cuts, Segment, detect_segments
from planish.quant.sites import Site, is_linear
from planish.quant.transforms import Scale, Transform


@dataclass(frozen=True)
class SmoothAlpha:
    """Smooth a site with the strength that loses least of its output, or leave it alone if none gains.

    Args:
        alpha: One strength in [0, 1] instead of a search; default None.
        steps: Strengths tried, evenly from 0 to 1, at least 2. Default 11, as published.
        tokens: How many rows a strength is judged on; default 1024.
        static: Judge with one range for all tokens, as `Segmented(static=True)` fixes it. Default False.
        fold: Let the layer before absorb factors where it can. Default False, as published: then adapters trained on
            the float model fit without a change.
        leave: Layers whose sites are left alone: `Segmented` smooths them, part by part. A plan fills it in.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> SmoothAlpha(steps=3).strengths()
        [0.0, 0.5, 1.0]
    """

    alpha: float | None = None
    steps: int = 11
    tokens: int = 1024
    static: bool = False
    fold: bool = False
    leave: frozenset[str] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.alpha is not None and not (isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1):
            raise bad("SmoothAlpha", "alpha", "None or a float in [0, 1]", self.alpha)
        if self.steps < 2:
            raise bad("SmoothAlpha", "steps", "at least 2", self.steps)
        if self.tokens < 1:
            raise bad("SmoothAlpha", "tokens", "at least 1", self.tokens)

    def strengths(self) -> list[float]:
        """Return the candidates."""
        return [self.alpha] if self.alpha is not None else [i / (self.steps - 1) for i in range(self.steps)]

    def __call__(self, site: Site, method: Method) -> Transform | None:
        """Return the site's scales, or None where it is best left alone."""
        if any(full_name(site, name) in self.leave for name in site.consumers):
            return None
        if not self.fold:
            site.producer = None  # of this site alone: the transform stays at the layers' input
        fit, held = (torch.cat(part) for part in zip(*map(halves, sampled_rows(site, self.tokens)), strict=True))
        top = torch.cat([fit, held]).abs().amax(0) if site.measured is None else site.moments.amax
        if self.alpha is not None:
            best = scales(site, top, self.alpha, 1 - self.alpha)
            return None if bool((best == 1).all()) else Scale(best)
        weight, seen = torch.cat(list(site.weights.values())), fit.abs().amax(0)
        least, chosen = self._error(weight, fit, held, method), None
        for alpha in self.strengths():
            s = scales(site, seen, alpha, 1 - alpha)
            error = self._error(weight * s, fit / s, held / s, method)
            if error < least:
                least, chosen = error, alpha
        return None if chosen is None else Scale(scales(site, top, chosen, 1 - chosen))

    def _error(self, weight: Tensor, fit: Tensor, held: Tensor, method: Method) -> float:
        """Return what the output of one half loses with ranges from the other, from second moments."""
        problem = sampled(weight, held, fixed(method.act, self.static, fit, fit), "weight")
        return problem.error(None, method.weight.fake(weight))


@dataclass(frozen=True)
class FindCuts:
    """Read from the model's graph where layers may be cut and which inputs have two sides.

    Args:
        patterns: See `detect_segments`.
        given: Cuts of the user's own; they replace what is found of the same layers. One part alone forbids a cut.

    Example:
        >>> FindCuts(("chunk",)).given
        ()
    """

    patterns: tuple[str, ...] = PATTERNS
    given: tuple[Segment, ...] = ()

    folds = False  # what is found has no bearing on it

    def __post_init__(self) -> None:
        """Check the arguments."""
        unknown = [p for p in self.patterns if p not in PATTERNS]
        if unknown:
            raise bad("FindCuts", "patterns", f"of {', '.join(PATTERNS)}", unknown[0])

    def __call__(self, walk: Walk, method: Method) -> Method:
        """Return the method with the cuts in its steps."""
        cuts = detect_segments(walk.model, walk.stream.batches[0], patterns=self.patterns)
        for segment in self.given:
            self._check(walk.model, segment, cuts)
        own = {segment.layer for segment in self.given}
        rest = tuple(s for s in cuts.segments if s.layer not in own)
        cuts = replace(cuts, segments=(*rest, *(s for s in self.given if len(s.sizes) > 1)))
        step = replace(cast(Segmented, method.round), cuts=cuts)
        chosen = {s.layer for s in cuts.segments} | (set(cuts.activations) if step.sides != "off" else set())
        transform: Callable[[Site, Method], Transform | None] = method.transform
        if isinstance(transform, SmoothAlpha):
            transform = replace(transform, leave=frozenset(chosen))
        return replace(method, transform=transform, round=step, findings={**method.findings, "cuts": cuts.to_json()})

    @staticmethod
    def _check(model: nn.Module, segment: Segment, cuts: Cuts) -> None:
        """Refuse a cut that does not fit the model."""
        layer = dict(model.named_modules()).get(segment.layer)
        if layer is None or not (is_linear(layer) or is_conv(layer)):
            raise bad("segquant", "cuts", "of dense layers and convolutions of the model", segment.layer)
        if cuts.how != "nothing" and segment.layer in cuts.unseen:
            raise bad("segquant", "cuts", "of layers that the model calls", segment.layer)
        try:
            Segments.split(layer, segment.mode, segment.sizes)
        except ValueError as error:
            raise ValueError(f"segquant, `{segment.layer}`: {str(error).removeprefix('Segments: ')}") from None


def segquant(
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    ragged: bool = False,
    scale_dtype: str = "float32",
    act_bits: int | None = 8,
    granularity: str | None = None,
    optimizer: str = "smooth",
    calibrator: str = "gptq",
    alpha: str | float = "search",
    rank: int = 32,
    sides: str = "unsigned",
    patterns: Sequence[str] = PATTERNS,
    cuts: Sequence[Segment] = (),
    shared: bool = True,
    pays: float = 0.02,
    convolutions: bool = False,
) -> Method:
    """Round weights and activations in segments that the model's graph shows, with two scales behind SiLU and GELU.

    Args:
        bits: Bits of a weight; default 8.
        group_size: Input channels that share a scale of the weight; None (default) for one a row, or a tensor.
        symmetric: No zero points in the weights. Default True.
        ragged: Allow a shorter last group.
        scale_dtype: See `planish.quant.Affine`; default "float32".
        act_bits: Bits of an activation; None keeps activations in float. Default 8.
        granularity: "tensor": one scale for a weight or a segment of it, and one fixed range for its inputs; "row": a
            scale a row and a range a token. Default "tensor" with 8 bits in weights, else "row", as published.
        optimizer: "smooth" (default), "svd" (smooth, and a branch of low rank beside the weight), or "none".
        calibrator: "gptq" (default; the paper's SegQuant-G) or "amax" (to nearest; SegQuant-A).
        alpha: Strength of smoothing in [0, 1], or "search" (default) for the best of 0, 0.1, ... 1 in every segment.
        rank: Of the branch with `optimizer="svd"`; the paper takes 64 with weights of 4 bits. Default 32.
        sides: See `Segmented`; "signed" is the published form. Default "unsigned".
        patterns: See `detect_segments`; empty for no cuts. Default all.
        cuts: Cuts of the user's own, in place of what is found of these layers.
        shared: See `Segmented`; False is the published form. Default True.
        pays: See `Segmented`. Default 0.02.
        convolutions: Round convolutions as well. Default False, as published.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> segquant(bits=4).round.static, segquant().weight.per_tensor
        (False, True)
    """
    for name, value, known in (
        ("granularity", granularity, (None, "tensor", "row")), ("optimizer", optimizer, ("none", "smooth", "svd")),
        ("calibrator", calibrator, ("amax", "gptq")), ("sides", sides, SIDES),
    ):  # fmt: skip
        if value not in known:
            raise bad("segquant", name, f"one of {', '.join(map(repr, known))}", value)
    if isinstance(alpha, str) and alpha != "search":
        raise bad("segquant", "alpha", "'search' or a float in [0, 1]", alpha)
    whole = (granularity or ("tensor" if bits == 8 else "row")) == "tensor"
    weight = Affine(bits, group_size, symmetric, ragged, scale_dtype, per_tensor=whole)
    if whole and group_size is not None:
        raise bad("segquant", "group_size", "None with one scale a tensor", group_size)
    act = None if act_bits is None else Affine(act_bits, None, True, scale_dtype="float32")
    strength = None if isinstance(alpha, str) else float(alpha)
    smooth = None if optimizer == "none" else SmoothAlpha(strength, static=whole)
    inner: Nearest | Compensate | LowRank = Compensate() if calibrator == "gptq" else Nearest()
    if optimizer == "svd":
        inner = LowRank(rank, inner)
    step = Segmented(inner, smooth, static=whole, sides=sides, shared=shared, pays=pays)
    made = Method("segquant", weight, act, plan=FindCuts(tuple(patterns), tuple(cuts)), round=step, online=True,
                  convolutions=convolutions)  # fmt: skip
    return made if smooth is None else replace(made, transform=smooth)
