"""Orthogonal matrices and permutations that spread outliers over blocks of channels.

Rows multiply from the left: x becomes x R, so that row d of R says where channel d goes.

Legend: N rows, K blocks of B channels, C = K B.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from planish._support import bad

PIVOTS = ("column", "row")


def hadamard(size: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "size size"]:
    """Return Sylvester's Hadamard matrix over sqrt(size): orthogonal, symmetric, every entry of one magnitude.

    Args:
        size: A power of two.
        dtype: Of the result. Default float32.

    Raises:
        ValueError: `size` is not a power of two.

    Example:
        >>> hadamard(4)[1].tolist()
        [0.5, -0.5, 0.5, -0.5]
    """
    if size < 1 or size & (size - 1):
        raise bad("hadamard", "size", "a power of two", size)
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return (made / math.sqrt(size)).to(dtype)


def random_orthogonal(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """Draw an orthogonal matrix from the uniform (Haar) distribution, in float64.

    Example:
        >>> q = random_orthogonal(3, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(q @ q.T, torch.eye(3, dtype=torch.float64)))
        True
    """
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    made: Tensor = q * r.diagonal().sign()  # the signs make the distribution uniform
    return made


def spreading(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """Draw an orthogonal matrix whose first row is constant, 1 / sqrt(size), and otherwise uniform, in float64.

    Example:
        >>> (spreading(4, torch.Generator())[0] * 2).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    flat = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
    axis = -flat  # Householder: swaps the first unit vector and the flat one
    axis[0] += 1
    reflection = torch.eye(size, dtype=torch.float64)
    if size > 1:
        reflection -= 2 / axis.square().sum() * torch.outer(axis, axis)
        reflection[1:] = random_orthogonal(size - 1, generator) @ reflection[1:]
    reflection[0] = flat
    return reflection


def block_size_for(channels: int, size: int | None) -> int:
    """Return the block size for a layer: `size`, or the largest power of two below it that divides the channels.

    Args:
        channels: C.
        size: The size wanted, at least 2; None for the largest power of two that divides C.

    Raises:
        ValueError: `size` is below 2, or no block of at least two channels divides them.

    Example:
        >>> block_size_for(4096, 128), block_size_for(576, 128), block_size_for(1536, None)
        (128, 64, 512)
    """
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 2):
        raise bad("block_size_for", "size", "an integer of at least 2 or None", size)
    if size is not None and channels % size == 0:
        return size
    power = channels & -channels
    while size is not None and power > size:
        power //= 2
    if power < 2:
        raise bad("block_size_for", "channels", "an even number, or a multiple of the block size", channels)
    return power


@torch.no_grad()
def greedy(
    x: Float[Tensor, "blocks rows size"],
    base: Float[Tensor, "size size"],
    *,
    steps: int = 256,
    patience: int = 16,
    pivot: str = "column",
) -> tuple[Float[Tensor, "blocks size size"], Float[Tensor, "blocks steps"]]:
    """Search rotations that flatten rows, block by block: spread the largest entry, look again, keep the best prefix.

    Args:
        x: Rows of every block; one block holding the rows of all for a matrix that they share.
        base: Orthogonal matrix with a constant first row, in float64.
        steps: How many times the largest entry is spread, at the most.
        patience: Stop after as many steps in which no block improved.
        pivot: "column" spreads the channel that holds the largest entry; "row" the one whose number is that of the
            entry's row modulo B, as the authors' code does.

    Returns:
        The rotations, in float64; and max - min of every block before each step and after the last.

    Raises:
        ValueError: `steps` is negative, or `pivot` is neither.

    Source: DuQuant (arXiv 2406.01721), section 3.2, eq. (2) to (4).

    Example:
        >>> x = torch.tensor([[[8.0, 0.0, 0.0, 0.0]]])
        >>> turn, peaks = greedy(x, spreading(4, torch.Generator()), steps=1)
        >>> (x @ turn.float()).tolist(), peaks.tolist()
        ([[[4.0, 4.0, 4.0, 4.0]]], [[8.0, 0.0]])
    """
    if steps < 0:
        raise bad("greedy", "steps", "at least 0", steps)
    if pivot not in PIVOTS:
        raise bad("greedy", "pivot", f"one of {', '.join(PIVOTS)}", pivot)
    size, blocks = x.shape[-1], torch.arange(len(x), device=x.device)
    base = base.to(x.device)
    fast, x = base.to(x.dtype), x.clone()
    turn = torch.eye(size, dtype=torch.float64, device=x.device).repeat(len(x), 1, 1)
    best, least = turn.clone(), _peak_to_peak(x)
    peaks, since = [least], 0
    for _ in range(steps):
        if since >= patience:
            break
        where = x.abs().flatten(1).argmax(1)
        spread = where % size if pivot == "column" else where // size % size
        x = _swap(_swap(x, spread, blocks) @ fast, spread, blocks)  # E_d R E_d
        turn = _swap(_swap(turn, spread, blocks) @ base, spread, blocks)
        peaks.append(_peak_to_peak(x))
        better = peaks[-1] < least
        best = torch.where(better[:, None, None], turn, best)
        least = torch.minimum(least, peaks[-1])
        since = 0 if bool(better.any()) else since + 1
    return best, torch.stack(peaks, 1)


def _peak_to_peak(x: Float[Tensor, "blocks rows size"]) -> Float[Tensor, "blocks"]:
    return x.amax((1, 2)) - x.amin((1, 2))


def _swap(x: Tensor, column: Int[Tensor, "blocks"], blocks: Int[Tensor, "blocks"]) -> Tensor:
    """Exchange the first column of every block and another, in place."""
    first, other = x[:, :, 0].clone(), x[blocks, :, column].clone()
    x[:, :, 0] = other
    x[blocks, :, column] = first
    return x


def zigzag(scores: Float[Tensor, "channels"], size: int) -> Int[Tensor, "channels"]:
    """Deal channels to blocks like cards, back and forth, so that every block gets its share of the large ones.

    For an even size, the means of two blocks differ by at most (K - 1) / 2 times the largest gap between neighbours
    in the sorted scores.

    Args:
        scores: Size of each channel.
        size: Channels a block; divides their number.

    Returns:
        The permutation: position j takes channel index[j]; within a block in descending order.

    Raises:
        ValueError: The channels do not divide.

    Source: DuQuant (arXiv 2406.01721), zigzag permutation.

    Example:
        >>> zigzag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), 4).tolist()
        [7, 4, 3, 0, 6, 5, 2, 1]
    """
    if size < 1 or len(scores) % size:
        raise bad("zigzag", "size", f"a divisor of {len(scores)}", size)
    rounds = scores.argsort(descending=True, stable=True).view(size, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()
