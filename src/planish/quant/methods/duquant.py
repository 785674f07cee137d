r"""DuQuant: four bits for weights and activations, after two block rotations with a permutation between them.

A few channels of an activation are large for every token, and single tokens hold entries a thousand times larger than
the rest. With one scale a token, either of them leaves all other channels a code or two. Smoothing moves part of the
first kind into the weights. A rotation of a block of channels that sends the largest channel to a constant row spreads
its outlier evenly over the block; doing so again and again for what is largest then, and keeping the best of these
products, flattens the block. A zigzag permutation deals the channels out so that all blocks hold the same, and a second
rotation flattens them once more. The weight takes the same rotations, so that the layer computes what it did:

    Y = (X S^-1 R1 P R2) (W S R1 P R2)^T,     R = E_d1 R^ E_d1 E_d2 R^ E_d2 ...                    (1) to (4)

================  =================================  =================================================
paper             here                               shape, range
================  =================================  =================================================
Lambda            ``Scale``, by ``Smooth(alpha)``    (channels,), > 0
R1, R2            ``Rotate.blocks``                  (1 or blocks, B, B), orthogonal
P                 ``Permute.index``                  (channels,)
2^n               ``block_size``                     128
N                 ``steps``                          256
R^                ``spreading``                      first row constant, otherwise random
================  =================================  =================================================

Differs from the paper: R^ has the random factor on the left, so that its first row is indeed constant; it is a
reflection times a random rotation, which is the same distribution as the published product of plane rotations, for any
block size. Searched on tokens, not on their mean over samples, which hides what is large in single tokens. The channel
of the largest entry is what is spread, where the authors' code takes the number of its row (``pivot="row"``). Blocks
may have matrices of their own (``shared=False``). ``order="permute"`` needs one rotation and lets the permutation fold
into the layer before, where there is one. Zero points are clamped to what their bits hold.

When to use: activations in four bits. Rotations run in every forward, so stock engines do not read such checkpoints.

Reference:
    Lin et al., DuQuant: Distributing Outliers via Dual Transformation Makes Stronger Quantized LLMs, 2024.
    https://arxiv.org/abs/2406.01721
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad
from planish.quant.engine import Method, no_refine
from planish.quant.formats import Affine
from planish.quant.methods.learned_clip import LearnClip
from planish.quant.methods.smoothquant_plus import Smooth
from planish.quant.moments import entering
from planish.quant.rotations import PIVOTS, block_size_for, greedy, hadamard, random_orthogonal, spreading, zigzag
from planish.quant.sites import Site
from planish.quant.transforms import Chain, Permute, Rotate, Scale, Transform

ORDERS = ("rotate", "permute")


@dataclass(frozen=True)
class Hadamard:
    """Rotate blocks of channels by one fixed matrix: what a searched rotation is to be compared with.

    Args:
        block_size: Channels a block; None (default) for the largest power of two that divides them. Where it does not
            divide, the largest power of two below it that does.
        smooth: Scales that come first; None (default) for none.
        random: A matrix drawn at random in place of Hadamard's. Default False.
        seed: Of the draw.

    Raises:
        ValueError: `block_size` is below 2.

    Example:
        >>> Hadamard(64).block_size
        64
    """

    block_size: int | None = None
    smooth: Smooth | None = None
    random: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_size("Hadamard", self.block_size)

    def __call__(self, site: Site, method: Method) -> Transform | None:
        """Return the rotation of a site, after its scales."""
        first = _scales(self.smooth, site, method)
        size = block_size_for(_channels(site), self.block_size)
        if self.random:
            matrix = random_orthogonal(size, torch.Generator().manual_seed(self.seed))
        else:
            matrix = hadamard(size, torch.float64)  # a size that divides and is no power of two is refused here
        like = next(iter(site.weights.values()))
        turn = Rotate(matrix[None].to(like.device, torch.promote_types(like.dtype, torch.float32)))
        return Chain(*first, turn)


@dataclass(frozen=True)
class DuRotate:
    """Smooth, rotate blocks of channels, deal the channels to blocks anew, and rotate again.

    Args:
        smooth: Scales that come first; None for none. Default `Smooth(0.6)`, as published.
        block_size: Channels a block, at least 2; where it does not divide, the largest power of two below it that does.
            Default 128, as published.
        steps: How many outliers a search spreads at the most; 0 leaves the blocks as they are. Default 256.
        permutations: How often a rotation and a permutation come before the last rotation. Default 1.
        shared: One matrix for all blocks of a layer. Default False: each block has its own.
        pivot: See `planish.quant.rotations.greedy`.
        order: "rotate" (default, as published) ends with a rotation more; "permute" starts with the permutation.
        tokens: How many calibration tokens the search looks at, from the first on. Default 2048.
        rows: How many rows of a block it keeps of these, those with the largest norms. Default 512.
        seed: Of the random factor.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> DuRotate(block_size=64).order
        'rotate'
    """

    smooth: Smooth | None = field(default_factory=lambda: Smooth(0.6))
    block_size: int = 128
    steps: int = 256
    permutations: int = 1
    shared: bool = False
    pivot: str = "column"
    order: str = "rotate"
    tokens: int = 2048
    rows: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_size("DuRotate", self.block_size)
        if self.pivot not in PIVOTS:
            raise bad("DuRotate", "pivot", f"one of {', '.join(PIVOTS)}", self.pivot)
        if self.order not in ORDERS:
            raise bad("DuRotate", "order", f"one of {', '.join(ORDERS)}", self.order)
        for name, least in (("steps", 0), ("permutations", 0), ("tokens", 1), ("rows", 1)):
            if getattr(self, name) < least:
                raise bad("DuRotate", name, f"at least {least}", getattr(self, name))

    @torch.no_grad()
    def __call__(self, site: Site, method: Method) -> Transform | None:
        """Return the site's transforms, searched on what enters it now."""
        parts: list[Transform] = list(_scales(self.smooth, site, method))
        x = first_tokens(site, self.tokens)
        for part in parts:
            x = part(x)
        size = block_size_for(x.shape[-1], self.block_size)
        generator = torch.Generator().manual_seed(self.seed)
        rounds = self.permutations if x.shape[-1] > size else 0  # one block: nothing to deal out
        for number in range(rounds):
            if self.order == "rotate" or number:
                x = _add(parts, self._rotation(x, size, generator), x)
            x = _add(parts, Permute(zigzag(x.abs().amax(0), size)), x)
        _add(parts, self._rotation(x, size, generator), x)
        return Chain(*parts)

    def _rotation(self, x: Float[Tensor, "tokens channels"], size: int, generator: torch.Generator) -> Rotate:
        """Search a rotation of every block, or of all alike."""
        rows = x.unflatten(-1, (-1, size)).transpose(0, 1)  # (blocks, tokens, size)
        if self.shared:
            rows = rows.flatten(0, 1)[None]
        if rows.shape[1] > self.rows:
            largest = rows.square().sum(-1).topk(self.rows, dim=1).indices
            rows = rows.gather(1, largest[..., None].expand(-1, -1, size))
        turn, _ = greedy(rows, spreading(size, generator), steps=self.steps, pivot=self.pivot)
        return Rotate(turn.to(x.dtype))


def first_tokens(site: Site, tokens: int) -> Float[Tensor, "tokens channels"]:
    """Return what enters a site for the first tokens of the calibration data, with the block as it stands now."""
    seen, count = [], 0
    for rows in entering(site.block, site):
        seen.append(rows[: tokens - count])
        count += len(seen[-1])
        if count == tokens:
            break
    return torch.cat(seen)


def _add(parts: list[Transform], part: Transform, x: Tensor) -> Tensor:
    parts.append(part)
    moved: Tensor = part(x)
    return moved


def _scales(smooth: Smooth | None, site: Site, method: Method) -> list[Scale]:
    if smooth is None:
        return []
    found = smooth(site, method)
    return [found] if isinstance(found, Scale) else []


def _channels(site: Site) -> int:
    return next(iter(site.weights.values())).shape[1]


def _check_size(where: str, size: int | None) -> None:
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 2):
        raise bad(where, "block_size", "an integer of at least 2", size)


def duquant(
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = False,
    ragged: bool = False,
    scale_dtype: str = "float16",
    act_bits: int = 4,
    alpha: float | str | None = "published",
    block_size: int = 128,
    shared: bool = False,
    order: str = "rotate",
    act_clip: float = 0.9,
    weight_clip: float | None = None,
    lwc: bool = False,
    seed: int = 0,
) -> Method:
    """Smooth, rotate, permute, rotate; then weights and activations to nearest in four bits.

    Args:
        bits: Bits of a weight; default 4.
        group_size: Input channels that share a weight's scale; None (default, as published) for one scale a row.
        symmetric: No zero points, in weights and activations. Default False, as published.
        ragged: Allow a shorter last group.
        scale_dtype: Of the weights' scales, see `planish.quant.Affine`.
        act_bits: Bits of an activation, one scale a token; default 4.
        alpha: Strength of smoothing in [0, 1], None for none; default "published": 0.6, or 0.5 with `lwc`.
        block_size: See `DuRotate`.
        shared: See `DuRotate`.
        order: See `DuRotate`.
        act_clip: Share of a token's range that its codes span, in (0, 1]; default 0.9, as published.
        weight_clip: The same for a group of weights; default 0.8, as published, or 1 with `lwc`.
        lwc: Learn the ranges of the weights, see `planish.quant.methods.learned_clip.LearnClip`. Default False.
        seed: Of the random factor.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> duquant().act
        Affine(bits=4, group_size=None, symmetric=False, ragged=False, scale_dtype='float32', clip=0.9)
    """
    if alpha == "published":
        alpha = 0.5 if lwc else 0.6
    elif isinstance(alpha, str):
        raise bad("duquant", "alpha", "a float in [0, 1], None or 'published'", alpha)
    if weight_clip is None:
        weight_clip = 1.0 if lwc else 0.8
    return Method(
        "duquant",
        Affine(bits, group_size, symmetric, ragged, scale_dtype, weight_clip),
        Affine(act_bits, None, symmetric, scale_dtype="float32", clip=act_clip),
        transform=DuRotate(None if alpha is None else Smooth(alpha), block_size, shared=shared, order=order, seed=seed),
        refine=LearnClip() if lwc else no_refine,
        online=True,
    )
