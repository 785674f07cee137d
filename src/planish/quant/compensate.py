"""Rounding that minimises what a layer's output loses, not what its weights lose.

All of it works on one quadratic: for rows w of the weight and the mean H of x x' over the inputs,

    loss = (w - v) H (w - v)'        summed over rows,

where v lies on the grid. `greedy` visits the columns once and lets those not yet rounded make up for the error
(GPTQ); `descend` visits them again and moves one code at a time to its exact optimum (cyclic coordinate descent);
`refit` solves for the scales that suit the codes best, a small linear system a row.

Legend: O rows, C channels, G groups; everything is float32 or float64.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from planish._support import bad
from planish.quant.formats import SCALE_DTYPES, Affine, Limits, QTensor
from planish.quant.precision import linear


def damped(gram: Float[Tensor, "channels channels"], damping: float) -> Float[Tensor, "channels channels"]:
    """Return the quadratic with `damping` times its mean diagonal added; channels that never fire get that alone.

    Raises:
        ValueError: `damping` is not above zero.
    """
    if not damping > 0:
        raise bad("damped", "damping", "above zero", damping)
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    return gram + damping * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def output_loss(
    weight: Float[Tensor, "out channels"],
    rounded: Float[Tensor, "out channels"],
    gram: Float[Tensor, "channels channels"],
) -> Float[Tensor, "out"]:
    """Return each row's mean squared output error.

    Example:
        >>> import torch
        >>> output_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.eye(2)).item()
        2.0
    """
    gap = weight - rounded
    return (linear(gap, gram) * gap).sum(-1)


class Grid:
    """The scales and zero points that a rounding must use, spread over the columns.

    Args:
        format: The grid.
        limits: Range of each group, each (O, G).
        channels: C.
    """

    def __init__(self, format: Affine, limits: Limits, channels: int) -> None:
        self.format = format
        self.scale, self.zero = format.scales(limits)
        self.group = torch.arange(channels, device=self.scale.device) // (format.group_size or channels)
        self.top = 2**format.bits - 1

    def codes(self, w: Float[Tensor, "out"], column: int) -> Float[Tensor, "out"]:
        """Return the nearest codes for one column."""
        g = self.group[column]
        return torch.round(w / self.scale[:, g] + self.zero[:, g]).clamp_(0, self.top)

    def values(self, codes: Float[Tensor, "out channels"]) -> Float[Tensor, "out channels"]:
        """Return what codes stand for."""
        return (codes - self.zero[:, self.group]) * self.scale[:, self.group]

    def quantized(self, codes: Float[Tensor, "out channels"]) -> QTensor:
        """Return the codes as a tensor of the format."""
        return QTensor(
            codes=codes.to(torch.uint8),
            scale=self.scale.to(SCALE_DTYPES[self.format.scale_dtype]),
            zero=None if self.format.symmetric else self.zero.to(torch.uint8),
            format=self.format,
        )


@torch.no_grad()
def greedy(
    weight: Float[Tensor, "out channels"],
    gram: Float[Tensor, "channels channels"],
    grid: Grid,
    order: Int[Tensor, "channels"] | None = None,
    block: int = 128,
) -> Float[Tensor, "out channels"]:
    """Round column after column; the columns that are still free make up for the error so far.

    Args:
        weight: W.
        gram: H, positive definite.
        grid: Scales and zero points.
        order: Order in which columns are visited; default left to right.
        block: Columns between updates of the rest; affects speed alone.

    Returns:
        Codes, as floats.

    Source: GPTQ (arXiv 2210.17323), algorithm 1.
    """
    channels = weight.shape[1]
    order = torch.arange(channels, device=weight.device) if order is None else order
    work = weight[:, order].clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    columns = order.tolist()
    group = grid.group.tolist()
    codes = torch.empty_like(work)
    for start in range(0, channels, block):
        stop = min(start + block, channels)
        part, errors, corner = work[:, start:stop].T.contiguous(), [], upper[start:stop, start:stop]
        diagonal = corner.diagonal().tolist()
        for i in range(stop - start):
            g = group[columns[start + i]]
            scale, zero = grid.scale[:, g], grid.zero[:, g]
            code = torch.div(part[i], scale).add_(zero).round_().clamp_(0, grid.top)
            codes[:, start + i] = code
            error = (part[i] - (code - zero) * scale) / diagonal[i]
            if i + 1 < stop - start:
                part[i + 1 :].addr_(corner[i, i + 1 :], error, alpha=-1)
            errors.append(error)
        work[:, stop:] -= torch.stack(errors, 1) @ upper[start:stop, stop:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


@torch.no_grad()
def descend(
    weight: Float[Tensor, "out channels"],
    gram: Float[Tensor, "channels channels"],
    grid: Grid,
    codes: Float[Tensor, "out channels"],
    sweeps: int = 1,
    block: int = 128,
) -> Float[Tensor, "out channels"]:
    """Improve codes one column at a time, each to its exact optimum while the others stay.

    The loss never rises.

    Args:
        weight: W.
        gram: H, with a positive diagonal.
        grid: Scales and zero points.
        codes: Where to start.
        sweeps: Passes over the columns.
        block: Columns between updates of the rest; affects speed alone.

    Returns:
        Codes, as floats.

    Source: QuantEase (arXiv 2309.01885), cyclic coordinate descent.
    """
    channels = weight.shape[1]
    codes = codes.clone()
    pull = linear(weight - grid.values(codes), gram)  # (O, C): minus half the gradient
    group, diagonal = grid.group.tolist(), gram.diagonal().tolist()
    for _ in range(sweeps):
        for start in range(0, channels, block):
            stop = min(start + block, channels)
            part, corner, moves = pull[:, start:stop].T.contiguous(), gram[start:stop, start:stop], []
            for i in range(stop - start):
                g, column = group[start + i], start + i
                scale = grid.scale[:, g]
                old = codes[:, column]
                new = torch.div(part[i] / diagonal[column], scale).add_(old).round_().clamp_(0, grid.top)
                move = (new - old) * scale
                part.addr_(corner[i], move, alpha=-1)
                codes[:, column] = new
                moves.append(move)
            pull -= torch.stack(moves, 1) @ gram[start:stop]
    return codes


@torch.no_grad()
def refit(
    weight: Float[Tensor, "out channels"],
    gram: Float[Tensor, "channels channels"],
    grid: Grid,
    codes: Float[Tensor, "out channels"],
) -> None:
    """Set the grid's scales to those that suit the codes best, in place; rows that would lose are left alone.

    With the codes fixed the loss is quadratic in a row's scales: a G x G system for every row.

    Args:
        weight: W.
        gram: H.
        grid: Its scales are replaced, rounded to the precision in which they are stored.
        codes: The codes.
    """
    groups = grid.scale.shape[1]
    steps = codes - grid.zero[:, grid.group]  # (O, C)
    member = nn.functional.one_hot(grid.group, groups).to(steps.dtype)  # (C, G)
    split = torch.einsum("oc,cg->ogc", steps, member)  # each group's steps, zero elsewhere
    seen = linear(split, gram)  # (O, G, C); gram is symmetric
    system = seen @ split.mT
    wanted = torch.einsum("ogc,oc->og", seen, weight)
    ridge = system.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-30)[:, None, None] * 1e-6
    system = system + ridge * torch.eye(groups, dtype=system.dtype, device=system.device)
    wanted = wanted + ridge[:, :, 0] * grid.scale
    solved = torch.cholesky_solve(wanted[..., None], torch.linalg.cholesky(system))[..., 0]
    stored = SCALE_DTYPES[grid.format.scale_dtype]
    usable = (solved > torch.finfo(stored).smallest_normal) & (solved < torch.finfo(stored).max)
    scale = torch.where(usable, solved, grid.scale).to(stored).to(grid.scale.dtype)
    old = output_loss(weight, grid.values(codes), gram)
    before, grid.scale = grid.scale, scale
    worse = output_loss(weight, grid.values(codes), gram) > old
    grid.scale = torch.where(worse[:, None], before, scale)
