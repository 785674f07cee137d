"""Running statistics of the activations that enter a block's sites: nothing is kept but sums.

Legend: T tokens, C channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish.quant.conv import is_conv, patches
from planish.quant.precision import linear
from planish.quant.stream import Block, kept

if TYPE_CHECKING:
    from planish.quant.sites import Site


@dataclass
class Moments:
    """Statistics of a site's input over all tokens, in at least float32.

    Attributes:
        amax: Largest magnitude of each channel, (C,).
        mean_abs: Mean magnitude, (C,).
        second_moment: Mean square, (C,).
        rows: Tokens seen.
    """

    amax: Float[Tensor, "channels"]
    mean_abs: Float[Tensor, "channels"]
    second_moment: Float[Tensor, "channels"]
    rows: int

    @classmethod
    def empty(cls, like: Tensor) -> "Moments":
        """Start from nothing."""
        zero = like.new_zeros(like.shape[-1])
        return cls(zero.clone(), zero.clone(), zero.clone(), 0)

    def add(self, x: Float[Tensor, "tokens channels"]) -> None:
        """Take in more tokens."""
        if not len(x):
            return
        magnitude = x.abs()
        self.amax = torch.maximum(self.amax, magnitude.amax(0))
        total = self.rows + len(x)
        self.mean_abs += (magnitude.sum(0) - len(x) * self.mean_abs) / total
        self.second_moment += (x.square().sum(0) - len(x) * self.second_moment) / total
        self.rows = total


@contextmanager
def watching(site: "Site", take: Any, keep: list[Tensor | None]) -> Iterator[None]:  # noqa: ANN401
    """Call `take(tokens)` with what enters a site, every time its consumers run, padded tokens left out.

    Consumers that see one tensor are watched through the first; experts, which see only their own tokens, through a
    layer that sees all (the router), or each where there is none.
    """
    turn = {"batch": -1}
    modules = site.consumers | site.readers
    watched = [site.whole] if site.whole else list(site.consumers) if site.split else list(site.consumers)[:1]
    masked = not site.split or site.whole is not None

    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        turn["batch"] += 1
        take(_tokens(_module, args[0], keep[turn["batch"]] if masked and turn["batch"] < len(keep) else None))

    handles = [modules[name].register_forward_pre_hook(look) for name in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens(module: nn.Module, x: Tensor, mask: Tensor | None) -> Float[Tensor, "tokens channels"]:
    """Return the tokens in a layer's input, for a convolution what lies under its kernel, in at least float32."""
    rows = kept(patches(module, x) if is_conv(module) else x, mask)  # type: ignore[arg-type]
    return rows if rows.dtype == torch.float64 else rows.float()


@contextmanager
def _counting(site: "Site") -> Iterator[None]:
    """Count the tokens that reach each consumer of a site."""
    site.tokens = dict.fromkeys(site.consumers, 0)

    def count(name: str) -> Any:  # noqa: ANN401
        def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
            site.tokens[name] += args[0].numel() // args[0].shape[-1]

        return look

    handles = [module.register_forward_pre_hook(count(name)) for name, module in site.consumers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(block: Block, sites: Sequence["Site"]) -> list[Tensor]:
    """Run a block over its inputs, fill in the moments of its sites, and return its outputs.

    Raises:
        ValueError: A value is not finite; the sentence names the layer and the batch.
    """
    outputs: list[Tensor] = []

    def taker(site: "Site") -> Any:  # noqa: ANN401
        site.measured = None

        def take(x: Tensor) -> None:
            if not torch.isfinite(x).all():
                layer = next(iter(site.consumers))
                raise ValueError(
                    f"quantize, block {block.name or 'model'}, `{layer}`: its input holds NaN or Inf "
                    f"in batch {len(outputs)}."
                )
            site.measured = site.measured or Moments.empty(x)
            site.measured.add(x)

        return take

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(watching(site, taker(site), block.keep))
            if site.split:
                stack.enter_context(_counting(site))
        for output in block.run():
            outputs.append(output)
    return outputs


class SeenError(Exception):
    """Raised to leave a block once the wanted input has been seen."""


def gram(block: Block, site: "Site") -> Float[Tensor, "channels channels"]:
    """Return the mean of x x' over the tokens that enter a site, with the block as it stands now.

    Raises:
        RuntimeError: No token enters the site.
    """
    return _mean_outer(site, entering(block, site))[0]


def cross_gram(
    block: Block, site: "Site", clean: Block, clean_site: "Site"
) -> tuple[Float[Tensor, "channels channels"], Float[Tensor, "channels channels"]]:
    """Return the means of x x' and of c x', where x enters a site and c what enters it in the float model.

    Raises:
        RuntimeError: No token enters the site, or not the same tokens in both.
    """
    own, mixed = _mean_outer(site, entering(block, site), entering(clean, clean_site))
    return own, mixed


def _mean_outer(site: "Site", *streams: Iterator[Float[Tensor, "tokens channels"]]) -> list[Tensor]:
    """Return the means of a x' over all tokens, for every stream a; x is the first of them."""
    totals: list[Tensor] = []
    count = 0
    for parts in zip(*streams, strict=True):
        x = parts[0]
        if any(part.shape != x.shape for part in parts):
            raise RuntimeError(f"site {site.kind}: other tokens enter it than in the float model")
        totals = totals or [x.new_zeros(x.shape[-1], x.shape[-1]) for _ in parts]
        for total, part in zip(totals, parts, strict=True):
            if len(x):
                total.add_(_outer(part, x))
        count += len(x)
    if not count:
        raise RuntimeError(f"site {site.kind}: no token enters it")
    return [total / count for total in totals]


def _outer(a: Float[Tensor, "tokens channels"], b: Float[Tensor, "tokens channels"]) -> Tensor:
    """Return a' b."""
    return linear(a.T.contiguous(), b.T.contiguous())


def entering(block: Block, site: "Site") -> Iterator[Float[Tensor, "tokens channels"]]:
    """Yield, batch by batch, the tokens that enter a site; what follows the site is not run."""
    if block.paused is not None and not site.split:
        first = next(iter(site.consumers))
        for x, mask in zip(block.paused.entering(first), block.keep, strict=True):
            yield _tokens(site.consumers[first], x, mask)
        return
    seen: list[Tensor] = []

    def take(x: Tensor) -> None:
        seen.append(x)
        if not site.split:
            raise SeenError

    for number, (hidden, context) in enumerate(zip(block.inputs, block.context, strict=True)):
        with watching(site, take, block.keep[number : number + 1]), suppress(SeenError):
            block.call(hidden, context)
        yield torch.cat(seen) if len(seen) != 1 else seen[0]
        seen.clear()
