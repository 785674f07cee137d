r"""A float branch of low rank beside rounded weights: a rounding step that any method can put around its own.

    y = Q(W - C) q(x) + C x,      C = up @ down

What the branch carries need not be rounded, and what it carries is chosen for what rounding hurts. Branch and codes are
found in turn: the residual W - C is rounded, then C is fitted to what the rounding left. Both halves are judged by
one number, the mean squared error of the layer's output on the tokens seen, the rounding of the activations included.
With x the input, d = q(x) - x what its own rounding adds, and A = W - C - Q,

    E|y - W x|^2 = tr A [xx'] A' - 2 tr A [xd'] Q' + tr Q [dd'] Q'

so that three matrices of moments say all about the data, over every token, and no token is kept. Of a convolution,
whose tokens are the patches under its kernel, they are taken over a sample of places: patches overlap.

All layers of a site share one down-projection: they read the same input, and are fitted as one tall matrix.

Legend: O outputs (of all layers of the site), C channels, r rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import NotConverged, bad
from planish.linalg.low_rank import low_rank_correction
from planish.quant.compensate import damped
from planish.quant.formats import SCALE_DTYPES, Format
from planish.quant.layers import QLinear
from planish.quant.moments import cross_gram, entering
from planish.quant.places import places_in
from planish.quant.precision import HALF, linear
from planish.quant.rounding import Nearest, act_of
from planish.quant.sites import Site, rebind, set_weight

if TYPE_CHECKING:
    from planish.quant.engine import Method

WEIGHINGS = ("output", "weight")
_DAMPING = 1e-4  # of the mean square of a channel, where moments are inverted
_SPARE, _ROUNDS = 8, 3  # of the quick fit within the alternation
_PLACES = 16  # of a convolution that are looked at, for each column of its weight


@dataclass(frozen=True)
class Branch:
    """A product of two thin matrices, in the values that will be stored.

    Attributes:
        up: (O, r).
        down: (r, C).
    """

    up: Float[Tensor, "out rank"]
    down: Float[Tensor, "rank channels"]

    @property
    def values(self) -> Float[Tensor, "out channels"]:
        """The product, in at least float32."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        return self.up.to(wide) @ self.down.to(wide)

    @classmethod
    def stored(cls, up: Tensor, down: Tensor, dtype: torch.dtype, where: str) -> "Branch":
        """Round both factors to `dtype`, after sharing each direction's size between them by a power of two.

        Raises:
            ValueError: A value does not fit.
        """
        ratio = down.abs().amax(1) / up.abs().amax(0)
        share = torch.where((ratio > 0) & torch.isfinite(ratio), torch.exp2((torch.log2(ratio) / 2).round()), 1.0)
        made = cls((up * share).to(dtype), (down / share[:, None]).to(dtype))
        if not (torch.isfinite(made.up).all() and torch.isfinite(made.down).all()):
            raise bad("LowRank", "dtype", f"one that holds the branch of `{where}` (float32)", str(dtype)[6:])
        return made


class Problem:
    """What a site's layers are to compute, and how far a branch and rounded weights are from it.

    Args:
        weight: W, the layers of the site one below the other.
        gram: Mean of x x'.
        cross: Mean of x d' with d = q(x) - x; None where activations stay in float.
        noise: Mean of d d', or None.
        weigh: "output" fits the branch to the outputs' error, "weight" to the weights' own.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out channels"],
        gram: Float[Tensor, "channels channels"],
        cross: Float[Tensor, "channels channels"] | None = None,
        noise: Float[Tensor, "channels channels"] | None = None,
        weigh: str = "output",
    ) -> None:
        self.weight, self.gram, self.cross, self.noise = weight, gram, cross, noise
        self.metric = gram if weigh == "output" else torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.seen: Tensor | None = None  # what of Q q(x) can be told from x: Q times this
        if cross is not None and weigh == "output":
            factor = torch.linalg.cholesky(damped(gram, _DAMPING))
            self.seen = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            self.seen = self.seen + torch.cholesky_solve(cross, factor).T

    def target(self, rounded: Float[Tensor, "out channels"] | None) -> Float[Tensor, "out channels"]:
        """Return the matrix that a branch of any rank would be, given the rounded weights (None for none)."""
        if rounded is None:
            return self.weight
        return self.weight - (rounded if self.seen is None else linear(rounded, self.seen.T.contiguous()))

    def error(self, branch: Branch | None, rounded: Float[Tensor, "out channels"]) -> float:
        """Return the mean squared error of the outputs, summed over them."""
        gap = self.weight - rounded if branch is None else self.weight - branch.values.to(rounded.dtype) - rounded
        total = (linear(gap, self.gram) * gap).sum(dtype=torch.float64)
        if self.cross is not None and self.noise is not None:
            total -= 2 * (linear(gap, self.cross.T.contiguous()) * rounded).sum(dtype=torch.float64)
            total += (linear(rounded, self.noise) * rounded).sum(dtype=torch.float64)
        return float(total)

    def fit(self, rounded: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
        """Return (up, down) of the branch that leaves least, given the rounded weights."""
        try:
            return low_rank_correction(self.target(rounded), self.metric, rank)
        except NotConverged as found:  # what it leaves has all but settled, and that is all that counts here
            return found.best  # type: ignore[return-value]

    def approach(self, rounded: Tensor | None, rank: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return nearly that, quickly, from a subspace near the sought one (the last iteration's)."""
        target = self.target(rounded)
        columns = min(rank + _SPARE, *target.shape)
        if start is None or start.shape[1] != columns:
            made = torch.randn(len(target), columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            start = made.to(target)
        back = target.T.contiguous()
        for _ in range(_ROUNDS):
            moved = linear(linear(start.T.contiguous(), back), self.metric)
            start = torch.linalg.qr(linear(target, moved)).Q
        down = linear(start.T.contiguous(), back)
        _, order = torch.linalg.eigh(linear(down, self.metric) @ down.T)
        turn = order.flip(-1)
        return start @ turn, turn.T @ down


def moments(site: Site, act: Format | None) -> tuple[Float[Tensor, "channels channels"], Tensor | None, Tensor | None]:
    """Return the means of x x', x d' and d d' over the tokens that enter a site; None for the last two without `act`.

    Of a convolution a token is what lies under the kernel at one place.

    Raises:
        RuntimeError: No token enters the site.
    """
    sums: list[Tensor] = []
    count = 0
    for x, d in _tokens(site, act):
        parts = [(x, x)] if d is None else [(x, x), (x, d), (d, d)]
        sums = sums or [x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float64) for _ in range(3 if act else 1)]
        for total, (a, b) in zip(sums, parts, strict=False):
            if len(x):
                total.add_(linear(a.T.contiguous(), b.T.contiguous()))
        count += len(x)
    if not count:
        raise RuntimeError(f"site {site.kind}: no token enters it")
    dtype = next(iter(site.weights.values())).dtype
    means = [(total / count).to(dtype) for total in sums]
    return (means[0], means[1], means[2]) if act is not None else (means[0], None, None)


def _tokens(site: Site, act: Format | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield, batch by batch, the tokens that enter a site and what rounding adds to them."""
    if not site.convolution:
        for x in entering(site.block, site):
            yield x, None if act is None else act.fake(x) - x if len(x) else x
        return
    columns = next(iter(site.weights.values())).shape[1]
    for places in places_in(site, _PLACES * columns):
        yield places.rows(), None if act is None else places.noise(act)


@dataclass(frozen=True)
class Pair:
    """A branch and the rounded weights beside it.

    Attributes:
        branch: The branch.
        before: The branch whose residual was rounded: W minus this gives the codes again.
        rounded: Q, as values.
        error: Mean squared error of the outputs.
        next: (up, down) of the branch that would be best beside the rounded weights, in full precision.
    """

    branch: Branch
    before: Branch
    rounded: Float[Tensor, "out channels"]
    error: float
    next: tuple[Tensor, Tensor]


def solve(
    problem: Problem,
    rank: int,
    rounder: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    iterations: int = 100,
    early_stop: bool = True,
    exact: bool = True,
    where: str = "",
) -> tuple[Pair, list[float]]:
    """Alternate between rounding the residual and fitting the branch; the best pair that was met is kept.

    Args:
        problem: What is to be matched.
        rank: Of the branch, above 0.
        rounder: W - C -> Q(W - C), the same for the same argument.
        dtype: In which the branch is stored; residuals and errors are those of the stored values.
        iterations: The most roundings.
        early_stop: Stop at the first that is no improvement.
        exact: Fit exactly at the beginning and the end, not only nearly.
        where: The site's name, for complaints.

    Returns:
        The best pair, and the least error after every iteration.
    """
    mends = problem.metric is problem.gram  # the branch is fitted to what the codes leave, not the codes to the branch

    def stored(pair: tuple[Tensor, Tensor]) -> Branch:
        return Branch.stored(pair[0][:, :rank], pair[1][:rank], dtype, where)

    def tried(before: Branch, start: Tensor | None = None) -> Pair:
        rounded = rounder(problem.weight - before.values.to(problem.weight.dtype))
        following = problem.approach(rounded, rank, start) if mends else problem.fit(rounded, rank)
        branch = stored(following) if mends else before
        return Pair(branch, before, rounded, problem.error(branch, rounded), following)

    # the paper starts by taking the weight's own largest directions away; where the weight has no outliers, starting
    # from nothing and mending what rounding breaks is better: whichever begins better goes on
    starts = [stored(problem.fit(None, rank) if exact else problem.approach(None, rank, None))]
    if mends:
        zero = problem.weight.new_zeros
        starts.append(Branch(zero(len(problem.weight), rank).to(dtype), zero(rank, problem.weight.shape[1]).to(dtype)))
    best = last = min((tried(start) for start in starts), key=lambda pair: pair.error)
    trail = [best.error]
    for _ in range(1, iterations):
        last = tried(stored(last.next), last.next[0])
        better = last.error < best.error
        best = last if better else best
        trail.append(best.error)
        if early_stop and not better:
            break
    if mends and exact:
        branch = stored(problem.fit(best.rounded, rank))
        error = problem.error(branch, best.rounded)
        if error < best.error:
            best = replace(best, branch=branch, error=error)
    return best, trail


@dataclass(frozen=True)
class LowRank:
    """Round a site's weights with a float branch of low rank beside them, one down-projection for all its layers.

    Args:
        rank: Of the branch; 0 for none. Default 32, as published.
        inner: The rounding step that the residual goes through; default `Nearest()`.
        weigh: "output" (default) fits the branch to what the layer's outputs lose, "weight" to the weight itself, as
            published.
        iterations: The most times that residual and branch are found in turn, at least 1. Default 100, as published.
        early_stop: Stop at the first turn that is no improvement. Default True, as published.
        dtype: In which the branch is stored: "float16", "bfloat16", "float32", or "auto", the default: as the model
            is, and float16 where it is wider.
        ranks: Pairs (site or kind of site, rank) that override `rank`.
        correct: How much of the error that comes in with the inputs the site makes up for, in [0, 1]; as in
            `planish.quant.methods.gptq.Compensate`, whose own must then be 0. Default 0.
        last: Another rounding step for the last residual, beside the branch that was found with `inner`; the published
            option is `planish.quant.methods.gptq.Compensate()`. Default None: `inner`'s codes stay.

    Raises:
        ValueError: An argument is out of range; on use, a rank is above the smaller side of the site's weights.

    Source: SVDQuant (arXiv 2411.05007); "output" after QERA (arXiv 2410.06040).

    Example:
        >>> LowRank(16, ranks=(("mlp.down_proj", 0),)).rank_of("model.layers.0.mlp.down_proj", "mlp.down_proj")
        0
    """

    rank: int = 32
    inner: Callable[[Site, "Method"], dict[str, nn.Module]] = Nearest()  # noqa: RUF009  (frozen)
    weigh: str = "output"
    iterations: int = 100
    early_stop: bool = True
    dtype: str = "auto"
    ranks: tuple[tuple[str, int], ...] = ()
    correct: float = 0.0
    last: Callable[[Site, "Method"], dict[str, nn.Module]] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        for rank in (self.rank, *(r for _, r in self.ranks)):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
                raise bad("LowRank", "rank", "an int >= 0", rank)
        if self.weigh not in WEIGHINGS:
            raise bad("LowRank", "weigh", f"one of {', '.join(WEIGHINGS)}", self.weigh)
        if self.iterations < 1:
            raise bad("LowRank", "iterations", "at least 1", self.iterations)
        if self.dtype not in ("auto", "float16", "bfloat16", "float32"):
            raise bad("LowRank", "dtype", "auto, float16, bfloat16 or float32", self.dtype)
        if not 0 <= self.correct <= 1:
            raise bad("LowRank", "correct", "a float in [0, 1]", self.correct)
        for name, step in (("inner", self.inner), ("last", self.last)):
            if self.correct and getattr(step, "correct", 0):
                raise bad("LowRank", name, "a step without a `correct` of its own", step)

    @property
    def sees_clean(self) -> bool:
        """Whether the step wants to see the float model's inputs beside the quantized model's."""
        return self.correct > 0 or any(getattr(step, "sees_clean", False) for step in (self.inner, self.last))

    def rank_of(self, name: str, kind: str) -> int:
        """Return the rank of a site."""
        special = dict(self.ranks)
        return special.get(name, special.get(kind, self.rank))

    def stored(self, site: Site) -> torch.dtype:
        """Return the dtype in which a site's branch is kept."""
        if self.dtype != "auto":
            return SCALE_DTYPES[self.dtype]
        kept = site.block.stored.get(f"{next(iter(site.consumers))}.weight", torch.float32)
        return kept if kept in HALF else torch.float16

    def __call__(self, site: Site, method: "Method") -> dict[str, nn.Module]:
        """Round the site's weights."""
        rank = checked_rank(self.rank_of(site.name, site.kind), site)
        if not rank:
            return (self.last or self.inner)(site, method)
        float_weights = {n: w.clone() for n, w in site.weights.items()}
        weight = torch.cat(list(float_weights.values()))
        gram, cross, noise = moments(site, act_of(site, method))
        if self.correct and site.block.twin is not None and not site.split:
            own, mixed = cross_gram(site.block, site, site.block.twin, rebind(site, site.block.twin))
            shift = torch.cholesky_solve((mixed - own).T, torch.linalg.cholesky(damped(own, 0.01))).T
            weight = weight + self.correct * linear(weight, shift.T.contiguous())
        sizes = [len(w) for w in float_weights.values()]

        def set_residual(residual: Tensor) -> None:
            for module, part in zip(site.consumers.values(), residual.split(sizes), strict=True):
                set_weight(module, part)

        def rounder(residual: Tensor) -> Tensor:
            set_residual(residual)
            return torch.cat([values.to(residual.dtype) for values in rounded_values(self.inner, site, method)])

        try:
            found, _ = solve(
                Problem(weight, gram, cross, noise, self.weigh), rank, rounder, dtype=self.stored(site),
                iterations=self.iterations, early_stop=self.early_stop, where=site.name,
            )  # fmt: skip
            before = found.before if self.last is None else found.branch
            set_residual(weight - before.values.to(weight.dtype))
            layers = (self.last or self.inner)(site, method)
        finally:
            for name, original in float_weights.items():
                set_weight(site.consumers[name], original)
        down = found.branch.down.clone()
        for name, up in zip(float_weights, found.branch.up.split(sizes), strict=True):
            layer = layers[name]
            if not isinstance(layer, QLinear):
                raise bad("LowRank", "inner", "a step that makes QLinear layers", type(layer).__name__)
            layer.down, layer.up = down, up.clone()
        return layers


def rounded_values(step: Any, site: Site, method: "Method") -> list[Tensor]:  # noqa: ANN401
    """Return what a rounding step makes of a site's weights, in the order of its layers."""
    if isinstance(step, Nearest):
        return list(step.values(site, method).values())
    made = step(site, method)
    for layer in made.values():
        if not isinstance(layer, QLinear):
            raise bad("LowRank", "inner", "a step that makes QLinear layers", type(layer).__name__)
    return [made[name].weight.decode() for name in site.consumers]


def checked_rank(rank: int, site: Site) -> int:
    """Return a rank, or refuse one that is above the smaller side of a site's weights taken together."""
    rows, channels = sum(len(w) for w in site.weights.values()), next(iter(site.weights.values())).shape[1]
    if rank > min(rows, channels):
        raise bad("LowRank", "rank", f"at most {min(rows, channels)} at `{site.name}` (see `ranks`)", rank)
    return rank
