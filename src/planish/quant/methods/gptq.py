r"""GPTQ: round column after column, and let the columns still free make up for the error.

The loss is what the layer's output loses on the calibration data, a quadratic with the inputs' second moments. After a
column is rounded, the optimal change of all later columns is known in closed form; the Cholesky factor of the inverse
gives it for every column at once.

    w_F <- w_F - (w_q - quant(w_q)) / [H^-1]_qq * (H^-1)_q,F                                     (3)

================  =================================  ===========================================
paper             here                               shape, range
================  =================================  ===========================================
H                 ``gram``                           (channels, channels), mean of x x'
lambda            ``damping``                        > 0, times the mean of H's diagonal
actorder          ``order``                          columns with the largest H first
================  =================================  ===========================================

Differs from the paper: scales are fixed before the first column, so that visiting columns in another order leaves the
checkpoint's layout as it is; layers of a block are rounded in order of execution and each sees inputs that the rounded
ones before it make. Beyond it, and used by `best`: a second kind of pass that moves single codes to their optimum,
scales solved for the codes, and the quadratic's target moved to what the float model's inputs would have given.

When to use: as the rounding step after smoothing, with 8,192 tokens of data (as it is measured) or more.

Reference:
    Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022.
    https://arxiv.org/abs/2210.17323
"""

from dataclasses import dataclass

import torch
from torch import nn

from planish._support import bad
from planish.quant import compensate
from planish.quant.engine import Method
from planish.quant.formats import Affine, affine
from planish.quant.moments import cross_gram
from planish.quant.moments import gram as collect
from planish.quant.precision import linear
from planish.quant.rounding import best_limits, layer_of
from planish.quant.sites import Site, rebind


@dataclass(frozen=True)
class Compensate:
    """Round so that a layer's output, not its weight, loses least.

    Args:
        damping: Added to the quadratic's diagonal, as a share of its mean, above 0. Default 0.01, as in the paper.
        ordered: Visit the columns with the largest activations first. Default True.
        clip: Start from ranges shrunk to the least weighted error instead of the groups' extremes. Default False.
        rounds: How often codes are improved one by one and scales solved for them, after the first pass. Default 0,
            which is GPTQ.
        sweeps: Passes over the columns in each of these rounds. Default 2.
        correct: How much of the error that comes in with the inputs the layer makes up for, in [0, 1]: 0 (default) aims
            at the layer's output on the inputs it gets, 1 at the float model's.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> Compensate().damping
        0.01
    """

    damping: float = 0.01
    ordered: bool = True
    clip: bool = False
    rounds: int = 0
    sweeps: int = 2
    correct: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not self.damping > 0:
            raise bad("Compensate", "damping", "above 0", self.damping)
        if self.rounds < 0 or self.sweeps < 1:
            raise bad("Compensate", "rounds", "at least 0, with at least one sweep", (self.rounds, self.sweeps))
        if not 0 <= self.correct <= 1:
            raise bad("Compensate", "correct", "a float in [0, 1]", self.correct)

    @property
    def sees_clean(self) -> bool:
        """Whether the step wants to see the float model's inputs beside the quantized model's."""
        return self.correct > 0

    def __call__(self, site: Site, method: Method) -> dict[str, nn.Module]:
        """Round the site's weights; layers that share an input are rounded as one matrix."""
        format = affine("Compensate", method.weight)
        names = list(site.consumers)
        sizes = [site.weights[n].shape[0] for n in names]
        weight = torch.cat([site.weights[n] for n in names])
        if self.correct and site.block.twin is not None and not site.split:
            raw, mixed = cross_gram(site.block, site, site.block.twin, rebind(site, site.block.twin))
            gram = compensate.damped(raw, self.damping)
            # what the quantized inputs would need to give the float output: a ridge regression towards the weight
            shift = torch.cholesky_solve((mixed - raw).T, torch.linalg.cholesky(gram)).T
            weight = weight + self.correct * linear(weight, shift.T)
        else:
            gram = compensate.damped(collect(site.block, site), self.damping)
        order = gram.diagonal().argsort(descending=True, stable=True) if self.ordered else None
        if self.clip:
            limits = best_limits(weight, format, gram.diagonal(), ends=True)
        else:
            limits = format.ranges(weight)
        grid = compensate.Grid(format, limits, weight.shape[1])
        codes = compensate.greedy(weight, gram, grid, order)
        for _ in range(self.rounds):
            compensate.refit(weight, gram, grid, codes)
            codes = compensate.descend(weight, gram, grid, codes, self.sweeps)
        layers: dict[str, nn.Module] = {}
        rounded = grid.quantized(codes)
        start = 0
        for name, size in zip(names, sizes, strict=True):
            part = slice(start, start + size)
            layers[name] = layer_of(site, name, rounded.rows(part), method)
            start += size
        return layers


def gptq(
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    ragged: bool = False,
    scale_dtype: str = "float16",
    damping: float = 0.01,
    ordered: bool = True,
) -> Method:
    """Round with compensation, without smoothing: the published baseline.

    Args:
        bits: Bits of a weight; default 4.
        group_size: Input channels that share a scale; None for one scale a row. Default 128.
        symmetric: No zero points. Default False.
        ragged: Allow a shorter last group.
        scale_dtype: See `planish.quant.Affine`.
        damping: See `Compensate`.
        ordered: See `Compensate`.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> gptq(group_size=64).round.ordered
        True
    """
    grid = Affine(bits, group_size, symmetric, ragged, scale_dtype)
    return Method("gptq", grid, round=Compensate(damping, ordered))
