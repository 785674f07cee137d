r"""SVDQuant: a thin float branch takes what four bits cannot hold, in weights and activations alike.

Smoothing moves the outliers of activations into the weights; a branch of low rank then takes them out of the weights,
and only the flat remainder is rounded. So both sides of the product fit four bits.

    x^ = x / s,   W^ = W s,   y = C x^ + Q(W^ - C) Q(x^),   C = up @ down of rank r

    s_j = max_t |X_tj|^alpha / max_o |W_oj|^beta,   (alpha, beta) in {(0, 0), (a, 0), (a, 1 - a)}

Every candidate for s is judged by the layer's output, branch and rounded activations included (`SearchSmooth`). Branch
and codes are then found in turn (`planish.quant.low_rank.LowRank`). Inputs that are never far below zero, as after
GELU, are shifted up to be rounded without a sign.

================  =================================  ===========================================
paper             here                               shape, range
================  =================================  ===========================================
lambda            ``Scale.scale``                    (channels,), > 0
L1, L2            ``up``, ``down``                   (out, r), (r, channels), 16 bits
r                 ``rank``                           32; 0 to the smaller side of the weights
alpha, beta       candidates of ``SearchSmooth``     39 of them with ``grid=20``
================  =================================  ===========================================

A convolution is a linear layer over patches (`convolutions=True`): factors belong to its input channels, activations
are rounded a pixel at a time (or an image), and the branch is a convolution to r channels, then one of one pixel.

Differs from the paper: the branch is fitted to the error of the outputs instead of to the weight (`weigh="weight"` is
the published fit), given the codes in closed form, and starts from nothing as well as from the weight's own largest
directions. The step of symmetric integers is max / 7.5, not max / 7. Ranks can be spread over the layers under a
budget of bytes. SiLU is shifted by more than its least value; the published code shifts it by less. Any linear of any
model is served, weights alone (`act_bits=None`) as well. The published code leaves convolutions in 16 bits. What enters
one behind SiLU is given zero points instead of a shift, as zeros are put around an image.

When to use: activations of four bits, and adapters on top of a quantized model (`QLinear.add_lora`). For weights alone
see what `docs/papers/svdquant.md` measured first.

Reference:
    Li et al., SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models, ICLR 2025.
    https://arxiv.org/abs/2411.05007
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.conv import column_scale
from planish.quant.engine import Method
from planish.quant.formats import FP4, Affine, Format, Weight
from planish.quant.local import home, record
from planish.quant.low_rank import LowRank, Pair, Problem, checked_rank, solve
from planish.quant.moments import entering
from planish.quant.places import column_tops, joined, places_in
from planish.quant.precision import linear
from planish.quant.rounding import Nearest, act_of, without_sign
from planish.quant.sites import Site, is_linear
from planish.quant.spread import SpreadRanks
from planish.quant.transforms import Chain, Scale, Shift, Transform

LEAST = {"gelu": 0.16997, "silu": 0.27846, "mish": 0.30884}
"""How far below zero each of these activations can go."""
SHIFTS = {"gelu": 0.171875, "silu": 0.28125, "mish": 0.31640625}
"""What is added to their values: no less than that, and exact in 16 bits."""
_WIDEST = 1e4  # of a smoothing factor from the middle: weights times it must fit 16 bits


@dataclass(frozen=True)
class SearchSmooth:
    """Smooth a site by the factors that lose least with the branch beside the rounded weights.

    Args:
        grid: Steps of alpha over [0, 1]; default 20, which makes 39 candidates. 1 leaves activations as they are.
        alpha: One strength in [0, 1] instead of a search (with beta = 1 - alpha); default None.
        tokens: How many tokens a candidate is judged on. Default 1024.
        judge: "module" (default): where several layers share an input, by the output of the smallest module that holds
            them (the attention); "layer": always by the layers' own outputs.
        unsigned: Shift inputs that lie just above the least value of GELU, SiLU or Mish; those of convolutions are
            given zero points. Default True.
        fold: Let the layer before absorb factors where it can. Default False, as published: then adapters trained on
            the float model fit without a change.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> len(list(SearchSmooth(grid=20).exponents()))
        39
    """

    grid: int = 20
    alpha: float | None = None
    tokens: int = 1024
    judge: str = "module"
    unsigned: bool = True
    fold: bool = False

    spatial = True  # of a convolution it returns the factors of channels

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.grid < 1:
            raise bad("SearchSmooth", "grid", "at least 1", self.grid)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise bad("SearchSmooth", "alpha", "None or a float in [0, 1]", self.alpha)
        if self.tokens < 1:
            raise bad("SearchSmooth", "tokens", "at least 1", self.tokens)
        if self.judge not in ("module", "layer"):
            raise bad("SearchSmooth", "judge", "'module' or 'layer'", self.judge)

    def exponents(self) -> Iterator[tuple[float, float]]:
        """Yield the candidates (alpha, beta)."""
        if self.alpha is not None:
            yield self.alpha, 1 - self.alpha
            return
        yield 0.0, 0.0
        for i in range(1, self.grid):
            yield i / self.grid, 0.0
            yield i / self.grid, 1 - i / self.grid

    def __call__(self, site: Site, method: Method) -> Transform | None:
        """Return the site's transform, or None where it is best left alone."""
        if site.convolution:
            return self._of_channels(site, method)
        if not self.fold:
            site.producer = None  # of this site alone: the transform stays at the layers' input
        x = sample(site, self.tokens)
        shift = self._shift(site, method)
        inputs = x if shift is None else shift(x)
        top = inputs.abs().amax(0) if shift is not None else site.moments.amax
        best = self._best(site, top, self._judge(site, method, inputs, shift))
        parts = ([] if shift is None else [shift]) + ([] if bool((best == 1).all()) else [Scale(best)])
        return None if not parts else parts[0] if len(parts) == 1 else Chain(*parts)

    def _best(self, site: Site, top: Tensor, judge: Callable[[Tensor], float]) -> Tensor:
        """Return the factors that leave the least error."""
        candidates = [scales(site, top, *pair) for pair in self.exponents()]
        return candidates[0] if len(candidates) == 1 else min(candidates, key=judge)

    def _of_channels(self, site: Site, method: Method) -> Scale | None:
        """Return the factors of a convolution's input channels, judged at a sample of places."""
        ((name, conv),) = site.consumers.items()
        seen = joined(list(places_in(site, self.tokens)))
        low, high = seen.low.amin().item(), seen.high.amax().item()
        site.one_sided = self._looks(method) and _reads(low, high) is not None
        act, weight = act_of(site, method), site.weights[name]
        loss, weigh = self._loss(site, method), self._step(method).weigh

        def product(a: Tensor, b: Tensor) -> Tensor:
            return linear(a.T.contiguous(), b.T.contiguous()) / len(a)

        def judge(scale: Tensor) -> float:
            moved = seen.scaled(scale)
            x, d = moved.rows(), None if act is None else moved.noise(act)
            cross, noise = (None, None) if d is None else (product(x, d), product(d, d))
            return loss(Problem(weight * column_scale(conv, scale), product(x, x), cross, noise, weigh))[1]

        best = self._best(site, torch.maximum(-seen.low, seen.high).amax(0), judge)
        return None if bool((best == 1).all()) else Scale(best)

    def _looks(self, method: Method) -> bool:
        """Return whether inputs that are hardly ever below zero are to be rounded as integers without a sign."""
        return self.unsigned and method.online and isinstance(method.act, Affine)

    def _shift(self, site: Site, method: Method) -> Shift | None:
        """Return the shift of a site whose inputs are never far below zero."""
        if not self._looks(method):
            return None
        low = high = 0.0
        for x in entering(site.block, site):
            if len(x):
                low, high = min(low, x.min().item()), max(high, x.max().item())
        like, name = next(iter(site.weights.values())), _reads(low, high)
        return None if name is None else Shift(torch.full_like(like[0], SHIFTS[name]))

    @staticmethod
    def _step(method: Method) -> LowRank:
        return method.round if isinstance(method.round, LowRank) else LowRank(0)

    def _loss(self, site: Site, method: Method) -> Callable[[Problem], tuple[Tensor, float, Pair | None]]:
        """Return the function from a site's problem to rounded weights, the error that they leave, and the branch."""
        step, grid = self._step(method), method.weight
        rank = checked_rank(step.rank_of(site.name, site.kind), site)

        def loss(problem: Problem) -> tuple[Tensor, float, Pair | None]:
            if not rank:
                rounded = grid.fake(problem.weight)
                return rounded, problem.error(None, rounded), None
            found, _ = solve(
                problem, rank, grid.fake, dtype=step.stored(site), iterations=1, exact=False, where=site.name
            )
            return found.rounded, found.error, found

        return loss

    def _judge(self, site: Site, method: Method, inputs: Tensor, shift: Shift | None) -> Callable[[Tensor], float]:
        """Return the function from factors to the error that they leave."""
        loss, weigh = self._loss(site, method), self._step(method).weigh
        weight = torch.cat(list(site.weights.values()))
        act = without_sign(method.act) if shift is not None else method.act
        module = home(site)[1]
        calls = None
        if self.judge == "module" and len(site.consumers) > 1 and not site.split and not is_linear(module):
            calls = record(site.block, module, self.tokens)

        def judge(scale: Tensor) -> float:
            rounded, error, found = loss(sampled(weight * scale, inputs / scale, act, weigh))
            if calls is None:
                return error
            pair = None if found is None else (found.branch.down, found.branch.up)
            parts: list[Transform] = [*([] if shift is None else [shift]), Scale(scale)]
            return _swapped(site, calls.error, rounded, pair, Chain(*parts), act)

        return judge


def _reads(low: float, high: float) -> str | None:
    """Return the activation that values of such a range come from, if it is one that ends just below zero."""
    for name, least in LEAST.items():  # the least value is met wherever some hundred numbers are looked at
        if 0.97 * least <= -low <= SHIFTS[name] and high > 4 * least:
            return name
    return None


def sampled(weight: Tensor, x: Tensor, act: Format | None, weigh: str) -> Problem:
    """Return the problem of a site as a few of its tokens pose it."""
    gram = x.T @ x / len(x)
    if act is None:
        return Problem(weight, gram, weigh=weigh)
    d = act.fake(x) - x
    return Problem(weight, gram, x.T @ d / len(x), d.T @ d / len(x), weigh)


def _swapped(
    site: Site, judge: Callable[[], float], rounded: Tensor, pair: tuple[Tensor, Tensor] | None, transform: Transform,
    act: Format | None,
) -> float:  # fmt: skip
    """Judge with stand-ins of the quantized layers in the block; the float ones come back."""
    sizes = [len(w) for w in site.weights.values()]
    ups = [None] * len(sizes) if pair is None else pair[1].split(sizes)
    try:
        for name, values, up in zip(site.consumers, rounded.split(sizes), ups, strict=True):
            low = None if pair is None or up is None else (pair[0], up)
            original = site.consumers[name]
            bias = getattr(original, "bias", None)
            if not transform.linear:
                bias = transform.bias(site.weights[name], bias)
            site.block.module.set_submodule(name, _StandIn(values, bias, low, transform, act))
        return judge()
    finally:
        for name, module in site.consumers.items():
            site.block.module.set_submodule(name, module)


class _StandIn(nn.Module):
    """What a quantized layer will compute, from values instead of codes."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, low: tuple[Tensor, Tensor] | None, transform: Transform,
        act: Format | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.bias, self.low, self.transform, self.act = weight, bias, low, transform, act

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Return the output."""
        x = self.transform(x)
        y = nn.functional.linear(x if self.act is None else self.act.fake(x), self.weight, self.bias)
        if self.low is None:
            return y
        return y + nn.functional.linear(nn.functional.linear(x, self.low[0].to(x.dtype)), self.low[1].to(x.dtype))


def scales(site: Site, top: Float[Tensor, "channels"], alpha: float, beta: float) -> Float[Tensor, "channels"]:
    """Return s = max|x|^alpha / max|W|^beta of a site, in the middle of its range; 1 where a channel is dead.

    Args:
        site: Its weights are looked at.
        top: max |x| of each channel; of a convolution's input channels, a column of whose weight is every place of one.
        alpha: Exponent of the activation.
        beta: Exponent of the weight.

    Returns:
        s: all 1 where both exponents are 0 or nothing is alive, and within 1e4 of 1 otherwise.
    """
    columns = column_tops(site).to(top.dtype)
    top, columns = (site.tied(v) for v in (top, columns)) if site.producer is not None else (top, columns)
    alive = (top > 0) & (columns > 0)
    if (alpha == 0 and beta == 0) or not bool(alive.any()):
        return torch.ones_like(top)
    s = top.clamp(min=1e-12) ** alpha / columns.clamp(min=1e-12) ** beta
    s = s / (s[alive].amax() * s[alive].amin()).sqrt()
    return torch.where(alive & torch.isfinite(s), s.clamp(1 / _WIDEST, _WIDEST), 1.0)


def sample(site: Site, tokens: int) -> Float[Tensor, "tokens channels"]:
    """Return some of the tokens that enter a site, taken evenly from all batches."""
    return torch.cat(sampled_rows(site, tokens))


def sampled_rows(site: Site, tokens: int) -> list[Float[Tensor, "tokens channels"]]:
    """Return the same, batch by batch."""
    batches = [x for x in entering(site.block, site) if len(x)]
    each = -(-tokens // max(len(batches), 1))
    return [x[:: max(1, len(x) // each)][:each] for x in batches]


def svdquant(
    *,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = True,
    ragged: bool = False,
    scale_dtype: str = "float16",
    precision: str = "int",
    act_bits: int | None = 4,
    rank: int = 32,
    budget: int | None = None,
    smooth: str | float | None = "search",
    grid: int = 20,
    iterations: int = 100,
    weigh: str = "output",
    unsigned: bool = True,
    fold: bool = False,
    inner: Any = None,  # noqa: ANN401  (any rounding step)
    last: Any = None,  # noqa: ANN401
    correct: float = 0.0,
    dtype: str = "auto",
    convolutions: bool | str = False,
) -> Method:
    """Round weights and activations to four bits, with a float branch of low rank beside them.

    Args:
        bits: Bits of a weight; default 4.
        group_size: Channels that share a scale, in weights and activations; None for one a row. Default 64.
        symmetric: No zero points in the weights (activations never have any unless they are shifted). Default True.
        ragged: Allow a shorter last group.
        scale_dtype: Of weights; see `planish.quant.Affine`.
        precision: "int" (default), or "fp4" for four-bit floats in weights and activations, with a scale of eight bits
            for every 16 channels; the arguments above are then not read, nor is the number in `act_bits`.
        act_bits: Bits of an activation; None keeps activations in float. Default 4.
        rank: Of the branch, the same everywhere; 0 for none. Default 32.
        budget: Bytes that all branches of the model may take together; their ranks then differ, and `rank` is not read.
            Default None.
        smooth: "search" (default), one strength in [0, 1], or None for no smoothing.
        grid: See `SearchSmooth`; default 20.
        iterations: See `LowRank`; default 100, which is seldom reached.
        weigh: See `LowRank`; "weight" is the published fit. Default "output".
        unsigned: See `SearchSmooth`. Default True.
        fold: See `SearchSmooth`. Default False.
        inner: Rounding step of the residual; default to nearest.
        last: Another for the last residual; `planish.quant.methods.gptq.Compensate()` is the published option.
        correct: See `LowRank`; default 0.
        dtype: In which the branch is stored, see `LowRank`.
        convolutions: Round convolutions in the same way, their activations in groups of a pixel's channels ("pixel", or
            True) or with one scale an image ("image"). Default False, as published: they stay in float.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> svdquant(rank=16, act_bits=None).round.rank
        16
    """
    if isinstance(smooth, str) and smooth != "search":
        raise bad("svdquant", "smooth", "'search', a float in [0, 1] or None", smooth)
    if precision not in ("int", "fp4"):
        raise bad("svdquant", "precision", "'int' or 'fp4'", precision)
    if convolutions not in (False, True, "pixel", "image"):
        raise bad("svdquant", "convolutions", "a bool, 'pixel' or 'image'", convolutions)
    if convolutions == "image" and precision == "fp4":
        raise bad("svdquant", "convolutions", "'pixel' with four-bit floats, whose groups are fixed", convolutions)
    weight: Weight = Affine(bits, group_size, symmetric, ragged, scale_dtype)
    # Scales of activations are never stored, and published U-Nets hold values that float16 scales do not reach.
    act: Format | None = None if act_bits is None else Affine(act_bits, group_size, True, ragged, "float32")
    if precision == "fp4":
        weight, act = FP4(), None if act_bits is None else FP4()
    step = LowRank(rank, inner or Nearest(), weigh, iterations, dtype=dtype, correct=correct, last=last)
    method = Method("svdquant", weight, act, round=step, online=True)
    if smooth is not None or (unsigned and act is not None):
        alpha = None if smooth is None or isinstance(smooth, str) else float(smooth)
        search = SearchSmooth(1 if smooth is None else grid, alpha, unsigned=unsigned, fold=fold)
        method = replace(method, transform=search)
    if convolutions:
        own: bool | Method = True
        if convolutions == "image" and isinstance(act, Affine):
            own = replace(method, act=replace(act, group_size=None))
        method = replace(method, convolutions=own)
    return method if budget is None else replace(method, plan=SpreadRanks(budget))
