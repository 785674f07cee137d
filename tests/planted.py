"""Outliers planted into a model without changing its function: the case that smoothing exists for.

Tests load this file by its path, since test folders are no packages:

    planted = runpy.run_path(str(Path(__file__).parents[n] / "planted.py"))
"""

import torch
from torch import nn

from planish.quant import fold
from planish.quant.moments import measure
from planish.quant.sites import find_sites
from planish.quant.stream import Stream
from planish.quant.transforms import Scale


@torch.no_grad()
def plant_outliers(model: nn.Module, batches: list, *, factor: float = 10.0, share: float = 0.02, seed: int = 0) -> int:
    """Multiply some channels that enter the linears of a model by `factor`, in place, and divide the weights that meet
    them by the same: what the model computes stays the same, and rounding it to nearest becomes harder.

    Args:
        model: A float model whose blocks `planish.quant` finds.
        batches: What the model takes; a little suffices.
        factor: How much larger the chosen channels become; 1 changes nothing.
        share: Which part of the channels is chosen, at least one a site; in (0, 1].
        seed: Of the choice.

    Returns:
        How many channels were scaled. Sites without a layer that can absorb the factor are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    stream = Stream(model, batches)
    hidden, known, planted = stream.start(), {}, 0
    for index in range(len(stream.modules)):
        block = stream.block(index, hidden)
        sites = find_sites(block, lambda name: False, known)
        hidden = measure(block, sites)
        for site in sites:
            if site.producer is None:
                continue
            channels = next(iter(site.weights.values())).shape[1]
            chosen = torch.randperm(channels, generator=generator)[: max(1, round(share * channels))]
            grow = torch.ones(channels, dtype=hidden[0].dtype)
            grow[chosen] = factor
            grow = site.tied(grow)
            saved = [(p, p.clone()) for m in (*site.consumers.values(), *site.readers.values()) for p in m.parameters()]
            if fold.apply(block, Scale(1 / grow), site):
                planted += int((grow != 1).sum())
            else:  # it would run online, as a hook: put everything back instead
                for parameter, value in saved:
                    parameter.copy_(value)
                for module in (*site.consumers.values(), *site.readers.values()):
                    module._forward_pre_hooks.clear()
                site.online = None
    return planted
