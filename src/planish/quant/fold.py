"""Make a transform part of the weights, and keep that only if the block still computes the same.

The rule of acceptance is single: the block's float output stays put. It refuses what no table lists: a norm that the
residual reads too, a router, a nonlinearity between the two layers.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from planish.quant.conv import channel_scale, column_scale, is_conv
from planish.quant.sites import Site, is_linear, set_weight, weight_of
from planish.quant.stream import Block
from planish.quant.transforms import Chain, Permute, Transform

if TYPE_CHECKING:
    from planish.quant.engine import Method

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative, per token; norms compute in float32 even in float64


@torch.no_grad()
def apply(block: Block, transform: Transform, site: Site, *, online: bool = False) -> bool:
    """Apply a transform to a site, in place: into the layer before if that is exact, else online or not at all.

    Of a chain, parts are folded from the left for as long as that is exact; the rest stays online, or is left out.

    Args:
        block: The block, in float; it computes the same afterwards.
        transform: What the activation is to go through.
        site: Its consumers' weights change, and its producer's if the fold is accepted. A site that carries a verdict
            from another transform of the same kind is taken at its word; else the block's output decides.
        online: Whether a transform that cannot be folded is applied to the input in every forward.

    Returns:
        True if the transform was folded, all of it.
    """
    parts = _flat(transform)
    while parts and _fold(block, parts[0], site):
        parts.pop(0)
    if parts and online:
        rest = transform if len(parts) == len(_flat(transform)) else parts[0] if len(parts) == 1 else Chain(*parts)
        for module in (*site.consumers.values(), *site.readers.values()):
            _change_basis(module, rest)
        keep_online(site, rest)
    return not parts


def _flat(transform: Transform) -> list[Transform]:
    """Return the links of a chain of chains; of anything else, itself."""
    if not isinstance(transform, Chain):
        return [transform]
    return [link for part in transform.parts for link in _flat(part)]  # type: ignore[arg-type]


def _fold(block: Block, transform: Transform, site: Site) -> bool:
    """Fold one transform if the block's output stays put; else leave everything as it was."""
    readers = (*site.consumers.values(), *site.readers.values())
    producers = [] if site.producer is None else [site.producer, *site.partners.values()]
    verdict = site.verdict if transform.diagonal else None
    ways = list(_ways(transform, site)) if transform.linear else []
    if verdict is not None:
        ways = ways[verdict : verdict + 1] if verdict >= 0 else []
    if ways:
        saved = [(p, p.detach().clone()) for m in (*readers, *producers) for p in m.parameters(recurse=False)]
        made = sum(len(list(m.parameters(recurse=False))) for m in producers)
        before = block.call(*block.sample()) if verdict is None else None
        for module in readers:
            _change_basis(module, transform)
        for number, attempt in enumerate(ways):
            if attempt() and (before is None or _same(before, block.call(*block.sample()))):
                if before is not None and transform.diagonal:
                    site.verdict = number
                return True
            for parameter, value in saved[-made:]:
                parameter.copy_(value)
        for parameter, value in saved:
            parameter.copy_(value)
    if transform.diagonal and site.producer is not None:
        site.verdict = -1
    return False


def wanted(site: Site, method: "Method") -> Transform | None:
    """Return the transform that a method wants for a site; for a convolution only from a step that knows of them."""
    own = method.of(site.convolution)
    if site.unseen or (site.convolution and not getattr(own.transform, "spatial", False)):
        return None
    return own.transform(site, own)


def keep_online(site: Site, transform: Transform) -> None:
    """Let the consumers and readers of a site apply the transform to their input themselves."""
    site.online = transform
    if site.convolution:
        (conv,) = site.consumers.values()
        scale = channel_scale("keep_online", transform)[:, None, None]
        conv.register_forward_pre_hook(lambda _m, args: (args[0] / scale.to(args[0].dtype), *args[1:]))
        return
    for module in (*site.consumers.values(), *site.readers.values()):
        module.register_forward_pre_hook(lambda _m, args: (transform(args[0]), *args[1:]))


def _change_basis(module: nn.Module, transform: Transform) -> None:
    """Rewrite a dense layer, or a convolution whose channels are scaled, for the transformed input."""
    weight = weight_of(module)
    if is_conv(module):
        return set_weight(module, weight * column_scale(module, channel_scale("fold", transform)).to(weight.dtype))
    if not transform.linear:
        bias: Tensor | None = getattr(module, "bias", None)
        moved = transform.bias(weight, None if bias is None else bias.detach())
        if bias is not None and moved is not None:
            bias.copy_(moved)
        elif moved is not None:
            module.bias = nn.Parameter(moved, requires_grad=False)
    return set_weight(module, transform.weight(weight))


def _ways(transform: Transform, site: Site) -> Iterator[Callable[[], bool]]:
    """The ways in which the producer might absorb the transform, each to be tried and judged by the block's output."""
    producer = site.producer
    if producer is None:
        return
    if is_linear(producer):
        yield lambda: _absorb_in_linear(transform, producer, site)
        if isinstance(transform, Permute):  # what multiplies it, channel by channel, may follow suit: gates
            if site.partners:
                yield lambda: all(_absorb_in_linear(transform, m, site) for m in (producer, *site.partners.values()))
            if site.channels is not None:
                yield lambda: _permute_slices(transform, producer, site)
    elif transform.diagonal and producer.get_parameter("weight").shape[-1:] == site_width(site):
        yield lambda: _absorb_in_norm(transform, producer, 0.0)
        yield lambda: _absorb_in_norm(transform, producer, 1.0)  # norms that multiply by 1 + w


def site_width(site: Site) -> tuple[int]:
    """Return the number of channels that enter a site, as a shape."""
    return (next(iter(site.weights.values())).shape[1],)


def _absorb_in_norm(transform: Transform, norm: nn.Module, offset: float) -> bool:
    weight = norm.get_parameter("weight")
    bias = getattr(norm, "bias", None)
    weight.copy_(transform(weight + offset) - offset)
    if isinstance(bias, Tensor):
        bias.copy_(transform(bias))
    return True


def _absorb_in_linear(transform: Transform, linear: nn.Module, site: Site) -> bool:
    """Transform the output rows (and bias) of a layer; with a channel map, only the rows it names."""
    weight = weight_of(linear)
    bias = getattr(linear, "bias", None)
    columns = [weight.T] if bias is None else [weight.T, bias.detach()[None]]  # (inputs or 1, outputs)
    table = torch.cat(columns)
    channels = site.channels
    if channels is None:
        table = transform(table)
    elif transform.diagonal:
        width = (channels.numel(),)
        factor = table.new_ones(table.shape[1])
        factor[channels] = transform(table.new_ones(width))  # tied: all channels of one row agree
        table = table * factor
    else:
        moved = transform(table[:, channels])
        table[:, channels] = moved
        if not torch.allclose(table[:, channels], moved, rtol=1e-5, atol=1e-6 * float(moved.abs().max())):
            return False  # channels that come from one output went different ways
    set_weight(linear, table[: weight.shape[1]].T)
    if bias is not None:
        bias.copy_(table[-1])
    return True


def _permute_slices(transform: Transform, linear: nn.Module, site: Site) -> bool:
    """Reorder every slice of a fused layer alike, if the site reads one of them: the halves of gate_up."""
    weight, channels = weight_of(linear), site.channels
    width = 0 if channels is None else channels.numel()
    if channels is None or weight.shape[0] % width or int(channels[0]) % width:
        return False
    if not torch.equal(channels, channels[0] + torch.arange(width, device=channels.device)):
        return False
    set_weight(linear, transform(weight.T.unflatten(-1, (-1, width))).flatten(-2).T)
    bias = getattr(linear, "bias", None)
    if bias is not None:
        bias.copy_(transform(bias.unflatten(0, (-1, width))).flatten())
    return True


def _same(before: Tensor, after: Tensor) -> bool:
    """Whether two outputs agree for every token, relative to the token's size."""
    before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
    real = torch.isfinite(before).all(-1)  # some models answer NaN where a padded token may look at nothing
    if not bool(real.any()):
        return False
    before, after = before[real], after[real]
    gap = (after - before).norm(dim=-1)
    size = before.norm(dim=-1).clamp(min=torch.finfo(before.dtype).tiny)
    return bool((gap / size).max() <= _TOLERANCE.get(before.dtype, 5e-2))
