"""Spread the ranks of low-rank branches over a model, under a budget of bytes.

What another rank takes from a site's error is known before any is spent: the next eigenvalue of E H E', with E what
rounding does to the site's weights and H the moments of its inputs. Eigenvalues only fall, so buying the largest gain
for its price again and again is the best that a budget can do (but for what is left at the end, less than one rank).
Sites are compared by the share of their output's energy: an error of 1 % counts alike everywhere.
"""

import copy
import heapq
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.quant import fold
from planish.quant.engine import Method, Walk
from planish.quant.low_rank import LowRank, Problem, moments, rounded_values
from planish.quant.moments import measure
from planish.quant.paused import pausing
from planish.quant.precision import linear
from planish.quant.rounding import act_of
from planish.quant.sites import Site, rebind
from planish.quant.stream import Block


@dataclass(frozen=True)
class SpreadRanks:
    """Give every site of a model its own rank, so that all branches together fit a budget.

    Args:
        budget: Bytes that all branches may take together, at least 0.
        tokens: How many of the calibration tokens are looked at, at the least; default 4096.
        step: Ranks are multiples of it; default 1.

    Raises:
        ValueError: An argument is out of range; on use, the method's rounding step is no `LowRank`.

    Example:
        >>> SpreadRanks(1_000_000).step
        1
    """

    budget: int
    tokens: int = 4096
    step: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.budget, int) or isinstance(self.budget, bool) or self.budget < 0:
            raise bad("SpreadRanks", "budget", "an int >= 0, in bytes", self.budget)
        if self.step < 1 or self.tokens < 1:
            raise bad("SpreadRanks", "step", "at least 1, with at least 1 token", (self.step, self.tokens))

    def __call__(self, walk: Walk, method: Method) -> Method:
        """Return the method with the ranks that were found."""
        step = method.round
        if not isinstance(step, LowRank):
            raise bad("SpreadRanks", "method", "one that rounds with LowRank", step)
        key = f"{self!r}: {method!r}"
        found = walk.journal.recall(key) if walk.journal else None
        if found is None:
            names, gains, prices = zip(*self._sites(walk.first(self.tokens), method, step), strict=True)
            ranks = spread(list(gains), list(prices), self.budget, self.step)
            bought = sum(rank * price for rank, price in zip(ranks, prices, strict=True))
            found = {"ranks": dict(zip(names, ranks, strict=True)), "branch bytes": bought, "budget": self.budget}
            if walk.journal:
                walk.journal.remember(key, found)
        ranks_by_site = tuple(sorted(found["ranks"].items()))
        findings = {**method.findings, **found}
        return replace(_ranked(method, step, ranks_by_site), findings=findings)

    def _sites(self, walk: Walk, method: Method, step: LowRank) -> list[tuple[str, Tensor, int]]:
        """Return every site's name, what each rank takes from its error, and the bytes of one rank."""
        found = []
        plain = _ranked(method, step, ())
        done: list[tuple[object, list[Tensor]]] = []
        for stream in walk.streams():
            hidden = stream.start(list(done))  # type: ignore[arg-type]
            for index in range(len(stream.modules)):
                with stream.looking(index, hidden) as block:
                    sites = walk.sites(block)
                    hidden = measure(block, sites)
                    twin = Block(
                        block.name, copy.deepcopy(block.module), block.inputs, block.context, block.keep, block.first,
                        block.device, stored=block.stored,
                    )  # fmt: skip
                    with pausing(twin):
                        found += self._of_block(twin, [rebind(s, twin) for s in sites], plain, step)
                walk.progress("ranks", index + 1, len(stream.modules))
            done.append((stream, hidden))
            if stream.whole:
                break
        return found

    @staticmethod
    def _of_block(twin: Block, sites: list[Site], plain: Method, step: LowRank) -> list[tuple[str, Tensor, int]]:
        """Return the same of one block, whose transforms are applied."""
        found = []
        for site in sites:
            own = plain.of(site.convolution)
            if site.unseen or not isinstance(own.round, LowRank):
                continue
            transform = fold.wanted(site, plain)
            if transform is not None:
                fold.apply(twin, transform, site, online=plain.online)
            weights = list(site.weights.values())
            # every layer's file holds the site's one down-projection
            price = step.stored(site).itemsize * sum(w.shape[0] + w.shape[1] for w in weights)
            found.append((site.name, _gains(site, own, step), price))
        return found


def _ranked(method: Method, step: LowRank, ranks: tuple[tuple[str, int], ...]) -> Method:
    """Return a method, and that of its convolutions, with given ranks and 0 elsewhere."""
    own = method.convolutions
    if isinstance(own, Method) and isinstance(own.round, LowRank):
        own = _ranked(own, own.round, ranks)
    return replace(method, round=replace(step, rank=0, ranks=ranks), convolutions=own)


def _gains(site: Site, method: Method, step: LowRank) -> Float[Tensor, "rank"]:
    """Return what each rank of a site's branch takes from its error, as a share of its output's energy."""
    weight = torch.cat(list(site.weights.values()))
    problem = Problem(weight, *moments(site, act_of(site, method)))
    target = problem.target(torch.cat([v.to(weight.dtype) for v in rounded_values(step.inner, site, method)]))
    energy = (linear(weight, problem.gram) * weight).sum(dtype=torch.float64)
    gram, target = problem.gram.double(), target.double()
    if len(target) <= target.shape[1]:
        values = torch.linalg.eigvalsh(target @ gram @ target.mT)
    else:  # the same eigenvalues, of the smaller matrix
        sizes, basis = torch.linalg.eigh(gram)
        root = basis * sizes.clamp(min=0).sqrt()
        values = torch.linalg.eigvalsh(root.mT @ (target.mT @ target) @ root)
    gains: Tensor = values.flip(0).clamp(min=0) / energy.clamp(min=torch.finfo(torch.float64).tiny)
    return gains


def spread(gains: list[Float[Tensor, "rank"]], prices: list[int], budget: int, step: int = 1) -> list[int]:
    """Return how many ranks each site gets, so that the most is gained for the bytes.

    Args:
        gains: For every site, what its first, second, ... rank gains; never rising.
        prices: For every site, the bytes of one rank.
        budget: Bytes for all.
        step: Ranks bought at a time.

    Returns:
        The ranks; together they cost no more than `budget`.

    Example:
        >>> import torch
        >>> spread([torch.tensor([9.0, 1.0]), torch.tensor([5.0, 4.0])], [10, 10], 30)
        [1, 2]
    """
    ranks = [0] * len(gains)
    left = budget

    def offer(site: int) -> tuple[float, int] | None:
        start = ranks[site]
        part = gains[site][start : start + step]
        return (-float(part.sum()) / prices[site], site) if len(part) == step else None

    queue = [item for item in map(offer, range(len(gains))) if item is not None]
    heapq.heapify(queue)
    while queue:
        gain, site = heapq.heappop(queue)
        if prices[site] * step > left or not gain:
            continue  # a cheaper site may still fit
        left -= prices[site] * step
        ranks[site] += step
        if (item := offer(site)) is not None:
            heapq.heappush(queue, item)
    return ranks
