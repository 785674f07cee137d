r"""SmoothQuant+: 4-bit weight-only quantization after channel smoothing.

A weight's rounding error is multiplied by the activation that it meets, and a few channels of the activation are far
larger than the rest. Dividing every channel of the activation by s and multiplying the matching weight column by s
leaves the layer's output as it is and evens out what rounding does to it. The division goes into the layer before, so
that nothing is left to do at run time. Then weights are rounded to nearest, in groups.

    s_j = max_t |X_tj|^alpha / max_o |W_oj|^(1 - alpha)                                           (step 2)

alpha is searched for the whole model: every grid point smooths and rounds all of it, and the one whose output stays
closest to the float model's wins, so that the build-up of errors from block to block counts. "No smoothing" is always
among the candidates: on the calibration data the result is never worse than plain rounding.

================  =================================  ===========================================
paper             here                               shape, range
================  =================================  ===========================================
max |X|           ``site.moments.amax``              (channels,), maximum over all tokens
max |W|           maximum over the site's layers     (channels,)
s                 ``Scale.scale``                    (channels,), > 0
alpha             ``alpha``                          [0, 1]; grid step 0.05
================  =================================  ===========================================

Differs from the paper: channels that never fire or meet no weight get s = 1 (the formula is 0/0 there). Under
grouped-query attention the statistics are tied over the heads that share a key-value head, so that the value
projection can absorb s there too. Beyond the paper: `granularity` refines one alpha into one for each kind of layer,
then one for each layer, where the whole model's loss falls; statistics other than the maximum; see `best` for
what goes well with it.

When to use: first. Weight-only, no training, any model whose blocks are found.

Reference:
    Pan et al., SmoothQuant+: Accurate and Efficient 4-bit Post-Training Weight Quantization for LLM, 2023.
    https://arxiv.org/abs/2312.03788
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.engine import Method
from planish.quant.formats import Affine, Weight
from planish.quant.plans import SearchAlpha
from planish.quant.rounding import Clip, ClipOutput, Nearest
from planish.quant.sites import Site
from planish.quant.transforms import Scale, Transform

ACT_STATS = ("absmax", "mean", "rms")
WEIGHT_STATS = ("absmax", "group_normalized")


@dataclass(frozen=True)
class Smooth:
    """Scale the channels of a site so that activation and weight share the difficulty.

    Args:
        alpha: How much of it moves into the weights, in [0, 1]: 0 levels the weight's columns, 1 the activation's
            channels. Default 0.5.
        act_stat: Size of an activation channel: "absmax" (the paper), "mean" magnitude, or "rms".
        weight_stat: Size of a weight column: "absmax" (the paper), or "group_normalized", the mean over rows of the
            magnitude relative to the largest of its group, which rows of any scale enter alike.
        exceptions: Pairs (site or kind of site, alpha) that override `alpha`; None leaves that site alone.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> Smooth(0.55).alpha_of("model.layers.0.mlp.down_proj", "mlp.down_proj")
        0.55
    """

    alpha: float | None = 0.5
    act_stat: str = "absmax"
    weight_stat: str = "absmax"
    exceptions: tuple[tuple[str, float | None], ...] = ()

    def __post_init__(self) -> None:
        """Check the arguments."""
        for alpha in (self.alpha, *(a for _, a in self.exceptions)):
            if alpha is not None and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
                raise bad("Smooth", "alpha", "a float in [0, 1]", alpha)
        if self.act_stat not in ACT_STATS:
            raise bad("Smooth", "act_stat", f"one of {', '.join(ACT_STATS)}", self.act_stat)
        if self.weight_stat not in WEIGHT_STATS:
            raise bad("Smooth", "weight_stat", f"one of {', '.join(WEIGHT_STATS)}", self.weight_stat)

    def alpha_of(self, name: str, kind: str) -> float | None:
        """Return the alpha of a site, None if it is left alone."""
        special = dict(self.exceptions)
        return special.get(name, special.get(kind, self.alpha))

    def __call__(self, site: Site, method: Method) -> Transform | None:
        """Return the site's scales, or None where nothing could absorb them."""
        alpha = self.alpha_of(site.name, site.kind)
        if alpha is None or (site.producer is None and not method.online):
            return None
        return Scale(self.scales(site, method, alpha))

    def scales(self, site: Site, method: Method, alpha: float) -> Float[Tensor, "channels"]:
        """Return s for one alpha."""
        moments = site.moments
        act = {"absmax": moments.amax, "mean": moments.mean_abs, "rms": moments.second_moment.sqrt()}[self.act_stat]
        weight = column_size(site, method.weight, self.weight_stat)
        act, weight = site.tied(act), site.tied(weight)
        alive = (act > 0) & (weight > 0)
        scale = act.clamp(min=1e-5) ** alpha / weight.clamp(min=1e-5) ** (1 - alpha)  # step 2
        scale = torch.where(alive, scale.clamp(min=1e-5), 1.0)
        if (
            self.act_stat != "absmax" or self.weight_stat != "absmax"
        ):  # keep the folded weights in the middle of their range
            scale = torch.where(alive, scale / (scale[alive].amax() * scale[alive].amin()).sqrt(), 1.0)
        return scale


def column_size(site: Site, grid: Weight, stat: str) -> Float[Tensor, "channels"]:
    """Return the size of each weight column over all layers of a site."""
    weights = [w.float() for w in site.weights.values()]
    if stat == "absmax":
        return torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    total = torch.cat(weights)
    size = grid.group_size or total.shape[1]
    padded = nn.functional.pad(total, (0, -total.shape[1] % size)).unflatten(1, (-1, size)).abs()
    relative = padded / padded.amax(-1, keepdim=True).clamp(min=1e-12)
    size_of: Tensor = relative.flatten(1)[:, : total.shape[1]].mean(0)
    return size_of


def smoothquant_plus(
    alpha: float | str = "search",
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    ragged: bool = False,
    scale_dtype: str = "float16",
    granularity: str = "model",
    objective: str | None = None,
    act_stat: str | None = None,
    weight_stat: str | None = None,
    clip: bool | None = None,
) -> Method:
    """Smooth, then round to nearest: the paper's method.

    Args:
        alpha: The strength of smoothing for the whole model, in [0, 1], or "search" (default) for the 21-point grid
            (11 points where finer levels follow).
        bits: Bits of a weight; default 4.
        group_size: Input channels that share a scale; None for one scale a row. Default 128.
        symmetric: No zero points. Default False, as in the paper.
        ragged: Allow a shorter last group.
        scale_dtype: See `planish.quant.Affine`.
        granularity: What has its own alpha: "model" (the paper), "kind" of layer, or "layer". Each finer level starts
            from the one above and is kept only where the whole model's loss falls.
        objective: Loss of the search, "hidden_mse", "kl" or "nll"; see `planish.quant.search`. Default "hidden_mse"
            with one alpha for the model, as published, else "kl" where the model has an output head.
        act_stat: See `Smooth`; default "absmax" with one alpha for the model, as published, else "mean".
        weight_stat: See `Smooth`; default "absmax" with one alpha for the model, as published, else
            "group_normalized".
        clip: Shrink the ranges of groups to the least weighted error, of weights or of outputs, whichever the whole
            model likes better; default only with a finer granularity.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> smoothquant_plus(0.5).transform.alpha
        0.5
    """
    grid = Affine(bits, group_size, symmetric, ragged, scale_dtype)
    published = granularity == "model"
    smooth = Smooth(
        0.5,
        act_stat=act_stat or ("absmax" if published else "mean"),
        weight_stat=weight_stat or ("absmax" if published else "group_normalized"),
    )
    clip = not published if clip is None else clip
    step = Clip() if clip else Nearest()
    if alpha == "search":
        plan = SearchAlpha(
            granularity=granularity,
            objective=objective or ("hidden_mse" if published else None),
            steps=21 if published else 11,
            rounds=(ClipOutput(),) if clip else (),
        )
        return Method("smoothquant+", grid, plan=plan, transform=smooth, round=step)
    if isinstance(alpha, str) or not 0 <= alpha <= 1:
        raise bad("smoothquant_plus", "alpha", "a float in [0, 1] or 'search'", alpha)
    return Method("smoothquant+", grid, transform=replace(smooth, alpha=float(alpha)), round=step)
