"""Mixed precision: layers with widths of their own, under a budget for the whole model.

The error of rounding falls with the square of the step, so what a layer costs the model at one width tells what it
costs at another; and with costs that are convex in the width, giving the next bit to whoever gains most for it is the
best that can be done.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.quant.candidates import OBJECTIVES, compare, losses
from planish.quant.engine import Method, Walk, trial
from planish.quant.formats import Affine, QTensor, affine
from planish.quant.moments import measure
from planish.quant.rounding import Nearest, layer_of
from planish.quant.sites import Site

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Widths of the common checkpoint layout that differ enough to choose among."""


def check_widths(where: str, widths: Sequence[int]) -> tuple[int, ...]:
    """Return widths in ascending order, or refuse them."""
    found = tuple(sorted(widths))
    if not found or len(set(found)) < len(found) or any(type(w) is not int or not 2 <= w <= 8 for w in found):
        raise bad(where, "widths", "different integers from 2 to 8", tuple(widths))
    return found


def allocate(
    sensitivity: Sequence[float | int],
    amount: Sequence[float | int],
    target: float | int,
    widths: Sequence[int] = WIDTHS,
    *,
    cost: Callable[[Sequence[int]], float | int] | None = None,
) -> list[int]:
    """Choose the widths that lose least among those that stay within a budget.

    What part i loses at b bits is sensitivity[i] * 4^-b. Starting from the least width, the step up that gains most for
    its price is taken until none fits. Then a step up is exchanged for steps down elsewhere as long as that gains.

    Args:
        sensitivity: Loss of every part at 0 bits, at least 0.
        amount: Price of a bit of every part, above 0: its number of weights, say.
        target: Budget for the sum of amount * width, or for `cost`.
        widths: What a part may have, integers from 2 to 8. Default 2, 3, 4, 5, 6, 8.
        cost: What widths cost together, where it is not the sum of amount * width.

    Returns:
        A width for every part.

    Raises:
        ValueError: The least widths exceed the budget, or an argument is out of range.

    Example:
        >>> allocate([1.0, 4096.0, 1.0], [10, 10, 10], 120, (2, 4, 8))
        [2, 8, 2]
    """
    menu = check_widths("allocate", widths)
    if len(sensitivity) != len(amount) or min(amount, default=0) <= 0 or min(sensitivity, default=-1) < 0:
        raise bad("allocate", "sensitivity", "numbers of at least 0, one for every amount above 0", list(sensitivity))
    budget = target * (1 + 1e-9)
    level = [0] * len(amount)
    spent = sum(a * menu[0] for a in amount) if cost is None else cost([menu[0]] * len(amount))
    if spent > budget:
        raise bad("allocate", "target", f"at least {spent:g}, the price of {menu[0]} bits everywhere", target)

    def move(at: list[int], i: int, to: int) -> tuple[float | int, float]:
        """Return what moving part i to another level costs, and what it gains."""
        gain = sensitivity[i] * (4.0 ** -menu[at[i]] - 4.0 ** -menu[to])
        if cost is None:
            return amount[i] * (menu[to] - menu[at[i]]), gain
        now = [menu[k] for k in at]
        return cost([*now[:i], menu[to], *now[i + 1 :]]) - cost(now), gain

    def climb(at: list[int], spent: float | int) -> float | int:
        while True:
            best, best_paid, best_rate = None, 0.0, -1.0
            for i, k in enumerate(at):
                if k + 1 == len(menu):
                    continue
                paid, gain = move(at, i, k + 1)
                if spent + paid <= budget and gain / paid > best_rate:
                    best, best_paid, best_rate = i, paid, gain / paid
            if best is None:
                return spent
            at[best] += 1
            spent += best_paid

    spent = climb(level, spent)
    improved = True
    while improved:
        improved = False
        for i in range(len(level)):
            if level[i] + 1 == len(menu):
                continue
            trial, (paid, gain) = list(level), move(level, i, level[i] + 1)
            trial[i] += 1
            then = spent + paid
            while then > budget:
                downs = [(move(trial, j, k - 1), j) for j, k in enumerate(trial) if j != i and k > 0]
                if not downs:
                    break
                (saved, lost), j = max(downs, key=lambda d: d[0][1] / -d[0][0])  # the least loss for what it saves
                trial[j], then, gain = trial[j] - 1, then + saved, gain + lost
            if then <= budget:
                before = [menu[k] for k in trial]
                then = climb(trial, then)
                gain += sum(s * (4.0**-b - 4.0 ** -menu[k]) for s, b, k in zip(sensitivity, before, trial, strict=True))
                if gain > 1e-12 * sum(sensitivity):
                    level, spent, improved = trial, then, True
    return [menu[at] for at in level]


@dataclass(frozen=True)
class Mixed:
    """Round every site at its own width.

    Args:
        widths: Pairs of a site's full name and its bits; sites that are not named keep the method's width.
        step: How a site is rounded; default to nearest.

    Raises:
        ValueError: A width is not an integer from 1 to 8.

    Example:
        >>> Mixed((("0", 2),)).width_of("0", 4), Mixed((("0", 2),)).width_of("2", 4)
        (2, 4)
    """

    widths: tuple[tuple[str, int], ...] = ()
    step: Callable[[Site, Method], dict[str, nn.Module]] = field(default_factory=Nearest)

    def __post_init__(self) -> None:
        """Check the arguments."""
        for _, bits in self.widths:
            Affine(bits)

    @property
    def sees_clean(self) -> bool:
        """Whether the inner step wants to see the float model's inputs."""
        return bool(getattr(self.step, "sees_clean", False))

    def width_of(self, name: str, default: int) -> int:
        """Return the width of a site."""
        return dict(self.widths).get(name, default)

    def __call__(self, site: Site, method: Method) -> dict[str, nn.Module]:
        """Round the site's weights."""
        bits = self.width_of(site.name, method.weight.bits)
        return self.step(site, replace(method, weight=replace(affine("Mixed", method.weight), bits=bits)))


@dataclass(frozen=True)
class Learned:
    """Round every layer on the grid that was learned for it; layers without one stay in float.

    Args:
        widths: Pairs of a layer's full name and its bits.
        acts: Pairs of a layer's full name and its input's bits; default none.
        digest: What the scales are, for the provenance.
        scales: The steps of every layer, (outputs, groups).

    Example:
        >>> Learned((("0", 3),), scales={"0": torch.ones(1, 1)}).widths
        (('0', 3),)
    """

    widths: tuple[tuple[str, int], ...]
    acts: tuple[tuple[str, int], ...] = ()
    digest: str = ""
    scales: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, site: Site, method: Method) -> dict[str, nn.Module]:
        """Round the site's weights."""
        bits, acts, layers = dict(self.widths), dict(self.acts), {}
        for name, weight in site.weights.items():
            full = f"{site.block.name}.{name}" if site.block.name else name
            if full not in bits:
                continue
            grid = replace(affine("Learned", method.weight), bits=bits[full])
            scale = self.scales[full].to(weight.device)
            n = grid.middle - 1
            step = scale.to(torch.promote_types(weight.dtype, torch.float32))[..., None]
            codes = torch.clamp(weight.reshape(*scale.shape, -1) / step, -n, n).round() + grid.middle
            made = QTensor(codes.to(torch.uint8).reshape(weight.shape), scale, None, grid)
            act = Affine(acts[full], None, scale_dtype=grid.scale_dtype) if full in acts else method.act
            layers[name] = layer_of(site, name, made, replace(method, act=act))
        return dict(layers)


@dataclass(frozen=True)
class SearchBits:
    """Give every site the width that serves the whole model best, at the same average as one width for all.

    Each site is rounded by itself at the method's width, and the whole model's loss is what it costs. Layers that share
    an input (queries with keys and values, gate with up) share a width, as engines that fuse them require. At the end
    the mixture is compared with the one width for all, and taken if the model loses less with it.

    Args:
        bits: Average bits of a weight; None for the method's width, whose budget it then keeps. Default None.
        widths: What a site may have. Default 2, 3, 4, 5, 6, 8.
        objective: See `planish.quant.search`; None stands for "kl" where the model has an output head, else
            "hidden_mse". Default None.
        tokens: How many of the calibration tokens each site is judged on, at the least; default 1024. The comparison at
            the end takes four times as many.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> SearchBits(widths=(4, 8), bits=4.5).widths
        (4, 8)
    """

    bits: float | int | None = None
    widths: tuple[int, ...] = WIDTHS
    objective: str | None = None
    tokens: int = 1024

    def __post_init__(self) -> None:
        """Check the arguments."""
        menu = check_widths("SearchBits", self.widths)
        if self.bits is not None and not menu[0] <= self.bits <= menu[-1]:
            raise bad("SearchBits", "bits", f"from {menu[0]} to {menu[-1]}, the widths allowed, or None", self.bits)
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise bad("SearchBits", "objective", f"None or one of {', '.join(OBJECTIVES)}", self.objective)
        if self.tokens < 1:
            raise bad("SearchBits", "tokens", "at least 1", self.tokens)

    def __call__(self, walk: Walk, method: Method) -> Method:
        """Return the method with a width for every site."""
        average = method.weight.bits if self.bits is None else self.bits
        found = self._measure(walk.first(self.tokens), method)
        if not found["names"]:
            return method
        target = average * sum(found["amounts"])
        sensitivity = [x * 4.0**method.weight.bits for x in found["losses"]]
        widths = allocate(sensitivity, found["amounts"], target, self.widths)
        spent = sum(a * w for a, w in zip(found["amounts"], widths, strict=True)) / sum(found["amounts"])
        mixed = replace(method, round=Mixed(tuple(zip(found["names"], widths, strict=True)), method.round))
        findings: dict[str, Any] = {
            "objective": self._judge(walk), "costs": dict(zip(found["names"], found["losses"], strict=True)),
            "widths": dict(zip(found["names"], widths, strict=True)), "average": spent, "budget": average,
        }  # fmt: skip
        if average == method.weight.bits:  # one width for all is within the budget too
            judge = walk.first(4 * self.tokens)
            choice = compare(judge, [mixed, method], objective=self._judge(walk), stage="search bits, together")
            findings |= {"together": choice.losses[0], "one width": choice.losses[1]}
            mixed = mixed if choice.best == 0 else method
        return replace(mixed, findings=findings)

    def _judge(self, walk: Walk) -> str:
        if self.objective is not None:
            return self.objective
        find: Callable[[], Any] | None = getattr(walk.stream.model, "get_output_embeddings", None)
        return "hidden_mse" if find is None or find() is None else "kl"

    @torch.no_grad()
    def _measure(self, walk: Walk, method: Method) -> Mapping[str, Any]:
        """Return names and sizes of the sites, and what the whole model loses by rounding each of them alone."""
        key = f"search bits, {self._judge(walk)}, {self.tokens}: {method!r}"
        if walk.journal and (kept := walk.journal.recall(key)) is not None:
            return dict(kept)
        stream, names, amounts = walk.stream, [], []
        clean = stream.start()
        states: list[list[Any]] = []
        for index in range(len(stream.modules)):
            with stream.looking(index, clean) as block:
                sites = walk.sites(block)
                after = measure(block, sites)
                states = [list(block.run(hidden)) for hidden in states]
                for site in sites:
                    if site.unseen:
                        continue
                    alone = replace(method, round=_Only(site.kind, method.round))
                    states.append(trial(block, sites, clean, alone))
                    names.append(site.name)
                    amounts.append(sum(w.numel() for w in site.weights.values()))
                clean = after
            walk.progress("search bits", index + 1, len(stream.modules))
        lost = losses(stream, clean, states, self._judge(walk))
        found = {"names": names, "amounts": amounts, "losses": [max(x, 0.0) for x in lost]}
        if walk.journal:
            walk.journal.remember(key, copy.deepcopy(found))
        return found


@dataclass(frozen=True)
class _Only:
    """Round one site of a block and leave the others in float."""

    kind: str
    step: Callable[[Site, Method], dict[str, nn.Module]]

    @property
    def sees_clean(self) -> bool:
        return bool(getattr(self.step, "sees_clean", False))

    def __call__(self, site: Site, method: Method) -> dict[str, nn.Module]:
        return self.step(site, method) if site.kind == self.kind else {}
