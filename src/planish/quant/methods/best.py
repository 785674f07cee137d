r"""The strongest recipe without training: compensated rounding that aims at the float model's output.

Three things make it, in the order of what they gain on a small language model at 4 bits:

1. Columns with the largest activations are rounded first, and those still free make up for the error (`Compensate`,
   GPTQ's recursion).
2. The ranges of groups are shrunk beforehand, either end by itself, to where the error, weighted by the activations'
   mean squares, is least.
3. The inputs of a layer already carry the error of everything before it. The layer is rounded towards weights that undo
   half of that error: with c the float model's inputs, x the real ones, and H the mean of x x',

    W' = W + correct * W (mean of c x' - H) (H + damping)^-1

   All of it overfits the calibration data (it is a regression), none of it leaves errors to build up; one half is the
   compromise that did best on text that calibration never saw.

Smoothing is not part of it by default: on real language models it gained nothing after compensation with clipped
ranges. It does where a few channels carry activations far larger, and weights far smaller, than the rest, because no
range serves both; `alpha` puts it first. Where data is scarce (below some 4,000 tokens) or time is, `smoothquant_plus`
is the better choice: it fits one number a layer, not a matrix.

Where activations are rounded too (`act_bits`), their outliers matter more than anything that the weights' rounding can
do. Down to 6 bits a scale a token serves them as they are. Below, DuQuant's smoothing and rotations come first, and the
third idea is left out: what comes in with activations of 4 bits is mostly noise, which is not worth fitting.

Reference:
    Li et al., GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration, 2025, for the third idea, in
    another form. https://arxiv.org/abs/2504.02692
"""

from dataclasses import replace

from planish._support import bad
from planish.quant.engine import Method
from planish.quant.formats import Affine
from planish.quant.methods.duquant import DuRotate
from planish.quant.methods.gptq import Compensate
from planish.quant.methods.smoothquant_plus import Smooth


def best(
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    ragged: bool = False,
    scale_dtype: str = "float16",
    act_bits: int | None = None,
    correct: float | None = None,
    alpha: float | None = None,
) -> Method:
    """Round with compensation, clipped ranges, and half of the incoming error undone.

    Args:
        bits: Bits of a weight; default 4.
        group_size: Input channels that share a scale; None for one scale a row. Default 128.
        symmetric: No zero points. Default False.
        ragged: Allow a shorter last group.
        scale_dtype: See `planish.quant.Affine`.
        act_bits: Bits of an activation, from 2 to 8, one scale a token; default None, activations stay in float. Below
            6, rotations run in every forward.
        correct: See `planish.quant.methods.gptq.Compensate`; default 0.5, and 0 with `act_bits` below 6.
        alpha: Smooth first, with this strength in [0, 1] and by mean squares; default not at all, and 0.6, by maxima,
            before rotations.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> best(bits=4, group_size=64).round.clip
        True
    """
    grid = Affine(bits, group_size, symmetric, ragged, scale_dtype)
    if act_bits is not None and not 2 <= act_bits <= 8:
        raise bad("best", "act_bits", "None or an integer from 2 to 8", act_bits)
    turned = act_bits is not None and act_bits < 6
    share = correct if correct is not None else 0.0 if turned else 0.5
    method = Method("best", grid, round=Compensate(clip=True, correct=share))
    if act_bits is not None:
        act = Affine(act_bits, None, scale_dtype="float32", clip=0.9 if turned else 1.0)
        method = replace(method, act=act, online=turned)
    if turned:
        return replace(method, transform=DuRotate(Smooth(0.6 if alpha is None else alpha)))
    if alpha is None:
        return method
    return replace(method, transform=Smooth(alpha, act_stat="rms", weight_stat="group_normalized"))
