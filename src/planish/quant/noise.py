r"""Noise in the place of rounding: what a network is trained with, so that it can be rounded afterwards.

The gradient of a rounded value is zero almost everywhere. Instead of pretending that it is one (the straight-through
estimator, under which weights swing about the thresholds of rounding), training adds a random error of the size of
rounding's: its expectation is a smooth function of the value, of the range and of the width, and all three can be
learned by plain gradients.

    x + epsilon * step  where |x| < alpha,  else  +-alpha;    step = alpha / n

    n = 2^(bits - 1) - 1  (signed)   or   2^bits - 1  (unsigned)

Legend: O outputs, G groups of a row.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.formats import SCALE_DTYPES

KINDS = ("empirical", "uniform", "shuffle")
LEAST, MOST = 2, 8
"""Widths that can be learned: below 2 bits a symmetric grid has one level, above 8 there is no format."""


def top_code(bits: Tensor, *, signed: bool = True) -> Tensor:
    """Return n, the highest code of a grid: 2^(bits - 1) - 1, or 2^bits - 1 where values are never negative.

    Example:
        >>> top_code(torch.tensor(4.0)).item(), top_code(torch.tensor(4.0), signed=False).item()
        (7.0, 15.0)
    """
    return torch.exp2(bits - 1 if signed else bits) - 1


def noised(x: Tensor, alpha: Tensor, bits: Tensor, epsilon: Tensor, *, signed: bool = True) -> Tensor:
    """Return the proxy of the rounded x: noise inside the range, the range's end outside.

    Every gradient is that of the formula: none is made up.

    Args:
        x: Values, of any shape.
        alpha: End of the range, above 0; broadcast to `x`.
        bits: Width; need not be whole.
        epsilon: Error in steps, in [-1/2, 1/2], like `x`.
        signed: Whether the range is [-alpha, alpha] or [0, alpha]. Default True.

    Returns:
        A tensor like `x`.

    Example:
        >>> one = torch.tensor(1.0)
        >>> noised(torch.tensor([0.5, 2.0, -3.0]), one, 2 * one, torch.tensor([0.25, 0.25, 0.25])).tolist()
        [0.75, 1.0, -1.0]
    """
    low = -alpha if signed else torch.zeros_like(alpha)
    step = alpha / top_code(bits, signed=signed)
    return torch.where(x >= alpha, alpha, torch.where(x <= low, low, x + epsilon * step))


def rounded(
    x: Tensor, alpha: Tensor, bits: Tensor, *, signed: bool = True, stored: torch.dtype | None = None
) -> Tensor:
    """Return x on its grid, with the straight-through gradient.

    Args:
        x: Values, of any shape.
        alpha: End of the range, above 0; broadcast to `x`.
        bits: Width, a whole number.
        signed: Whether the range is [-alpha, alpha] or [0, alpha]. Default True.
        stored: Precision to which the step is rounded first, as it will be in a checkpoint; None leaves it.

    Returns:
        A tensor like `x`.

    Example:
        >>> rounded(torch.tensor([0.3, 0.6, 5.0]), torch.tensor(1.0), torch.tensor(2.0)).tolist()
        [0.0, 1.0, 1.0]
    """
    step = step_of(alpha, bits, signed=signed, stored=stored)
    n = top_code(bits, signed=signed)
    value = torch.clamp(x / step, -n if signed else torch.zeros_like(n), n)
    return step * (value + (value.round() - value).detach())


def step_of(alpha: Tensor, bits: Tensor, *, signed: bool = True, stored: torch.dtype | None = None) -> Tensor:
    """Return alpha / n as it will be stored, with the gradient of alpha / n.

    Example:
        >>> round(step_of(torch.tensor(0.7), torch.tensor(4.0), stored=torch.float16).item(), 7)
        0.0999756
    """
    step = alpha / top_code(bits, signed=signed)
    if stored is None:
        return step
    kept = step.detach().to(stored).clamp(min=torch.finfo(stored).smallest_normal).to(step.dtype)
    return kept + (step - step.detach())


def errors(x: Tensor, alpha: Tensor, bits: Tensor, *, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Return the error of rounding every value, in steps, and which values lie inside the range.

    Example:
        >>> errors(torch.tensor([0.25, 4.0]), torch.tensor(1.0), torch.tensor(2.0))
        (tensor([-0.2500,  0.0000]), tensor([ True, False]))
    """
    value = x / (alpha / top_code(bits, signed=signed))
    inside = (x < alpha) & ((x > -alpha) if signed else (x > 0))
    return value.round() - value, inside


@torch.no_grad()
def draw(
    kind: str,
    x: Tensor,
    alpha: Tensor,
    bits: Tensor,
    *,
    signed: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the errors that stand in for rounding's, independent of the values that they are added to.

    Args:
        kind: "empirical": independent draws from the errors that rounding `x` makes inside the range. "shuffle": these
            very errors in a random order. "uniform": evenly from [-1/2, 1/2].
        x: Values.
        alpha: See `noised`.
        bits: See `noised`.
        signed: See `noised`.
        generator: Source of randomness; torch's own by default, which gradient checkpointing replays.

    Returns:
        Errors in steps, like `x`.

    Raises:
        ValueError: `kind` is unknown.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> draw("uniform", torch.zeros(3), torch.tensor(1.0), torch.tensor(4.0), generator=g).abs().max().item() <= 0.5
        True
    """
    if kind not in KINDS:
        raise bad("draw", "kind", f"one of {', '.join(KINDS)}", kind)
    if kind == "uniform":
        return torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 0.5
    error, inside = errors(x, alpha, bits, signed=signed)
    pool = error[inside]
    if not pool.numel():  # everything is clipped: nothing is noised
        return torch.zeros_like(x)
    if kind == "empirical":
        return pool[torch.randint(pool.numel(), x.shape, generator=generator, device=x.device)]
    made = torch.zeros_like(x)
    made[inside] = pool[torch.randperm(pool.numel(), generator=generator, device=x.device)]
    return made


@torch.no_grad()
def best_alpha(x: Float[Tensor, "*rows size"], bits: Tensor, *, signed: bool = True, steps: int = 40) -> Tensor:
    """Return the range of every row that minimises its squared error of rounding, of shape (*rows, 1).

    Args:
        x: Rows that have a range each.
        bits: Width.
        signed: See `noised`.
        steps: How many shares of the largest magnitude are tried. Default 40.

    Returns:
        The ranges, above 0: an empty row gets 1.

    Example:
        >>> best_alpha(torch.tensor([[0.1] * 63 + [9.0]]), torch.tensor(8.0)).item()
        9.0
    """
    top = (x.abs() if signed else x.clamp(min=0)).amax(-1, keepdim=True)
    best, least = top.clone(), torch.full_like(top, math.inf)
    for share in range(steps, 0, -1):
        alpha = torch.where(top > 0, top * (share / steps), 1.0)
        error = (rounded(x, alpha, bits, signed=signed) - x).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, alpha, best), torch.minimum(error, least)
    return torch.where(top > 0, best, 1.0)


class Width(nn.Module):
    """A number of bits: learned, or fixed.

    Args:
        bits: Where it starts (or stays): strictly between 2 and 8 when it is learned.
        learn: Whether it is learned. Default False.

    Raises:
        ValueError: `bits` is out of range.

    Example:
        >>> round(Width(3.5, learn=True).value.item(), 6), Width(2).value.item()
        (3.5, 2.0)
    """

    raw: Tensor | None
    fixed: Tensor

    def __init__(self, bits: float | int, *, learn: bool = False) -> None:
        super().__init__()
        self.register_parameter("raw", nn.Parameter(torch.zeros(())) if learn else None)
        self.register_buffer("fixed", torch.zeros(()))  # 0 while it is learned
        self.start(bits)

    def start(self, bits: float | int) -> None:
        """Begin at a width, or stay there if it is not learned.

        Raises:
            ValueError: `bits` is out of range.
        """
        if self.raw is None:
            if bits != int(bits) or not LEAST <= bits <= MOST:
                raise bad("Width", "bits", f"a whole number from {LEAST} to {MOST}", bits)
            self.fixed.fill_(float(bits))
            return
        if not LEAST < bits < MOST:
            raise bad("Width", "bits", f"above {LEAST} and below {MOST} to be learned", bits)
        share = (bits - LEAST) / (MOST - LEAST)
        with torch.no_grad():
            self.raw.fill_(math.log(share / (1 - share)))

    @property
    def learning(self) -> bool:
        """Whether the width is still being learned."""
        return self.raw is not None and not float(self.fixed)

    @property
    def value(self) -> Tensor:
        """The width as it stands; its gradient reaches the parameter."""
        if self.raw is None or not self.learning:
            return self.fixed
        return LEAST + (MOST - LEAST) * torch.sigmoid(self.raw)

    @property
    def whole(self) -> Tensor:
        """The width rounded, without gradient."""
        return self.value.detach().round()

    def sampled(self, generator: torch.Generator | None = None) -> Tensor:
        """Return a whole width whose expectation is the width itself, with the gradient of the width.

        Example:
            >>> Width(2.5, learn=True).sampled(torch.Generator().manual_seed(0)).item() in (2.0, 3.0)
            True
        """
        bits = self.value
        if not self.learning:
            return bits
        spread = torch.rand((), generator=generator, device=bits.device) - 0.5
        return bits + ((bits + spread).detach().round().clamp(LEAST, MOST) - bits.detach())

    def fix(self, bits: int) -> None:
        """Stop learning, at this width."""
        self.fixed.fill_(float(bits))
        if self.raw is not None:
            self.raw.requires_grad_(False)


class NoiseProxy(nn.Module):
    """A quantizer that trains by noise and judges by rounding: a parametrization of a weight, or a layer's input.

    In training mode, while `noisy`, it adds noise; else it rounds, with the straight-through gradient.

    Args:
        alpha: First ranges: a scalar for one range of the whole tensor, or (O, G).
        width: The width, which proxies may share.
        signed: See `noised`.
        noise: See `draw`; default "empirical".
        scale_dtype: Precision in which steps will be stored; None for no rounding of them. Default "float16".
        generator: See `draw`.

    Raises:
        ValueError: A range is not above 0, or `noise` is unknown.

    Example:
        >>> proxy = NoiseProxy(torch.tensor(1.0), Width(2)).eval()
        >>> proxy(torch.tensor([[0.2, 0.9]])).tolist()
        [[0.0, 1.0]]
    """

    def __init__(
        self,
        alpha: Tensor,
        width: Width,
        *,
        signed: bool = True,
        noise: str = "empirical",
        scale_dtype: str | None = "float16",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if noise not in KINDS:
            raise bad("NoiseProxy", "noise", f"one of {', '.join(KINDS)}", noise)
        if not bool((alpha > 0).all()):
            raise bad("NoiseProxy", "alpha", "above 0", alpha.min().item())
        self.log_alpha = nn.Parameter(alpha.detach().float().log())
        self.width, self.signed, self.noise = width, signed, noise
        self.stored = None if scale_dtype is None else SCALE_DTYPES[scale_dtype]
        self.generator = generator
        self.noisy = True

    @property
    def alpha(self) -> Tensor:
        """The ranges, above 0."""
        return self.log_alpha.exp()

    @property
    def step(self) -> Tensor:
        """The steps as they are stored, (O, G) or a scalar, without gradient."""
        return step_of(self.alpha, self.width.whole, signed=self.signed, stored=self.stored).detach()

    def steps(self, rows: int) -> Tensor:
        """Return the steps of a weight of so many rows, (O, G), in the precision in which they are stored.

        Example:
            >>> NoiseProxy(torch.tensor(3.0), Width(3)).steps(2).tolist()
            [[1.0], [1.0]]
        """
        step = self.step if self.log_alpha.ndim else self.step.expand(rows, 1)
        return step.to(self.stored or step.dtype).contiguous()

    def grouped(self, x: Tensor) -> Tensor:
        """Return the values so that the ranges broadcast to them, in at least float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.log_alpha.ndim:
            return wide
        return wide.reshape(*self.log_alpha.shape, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the noised or rounded values, like `x`."""
        values, alpha = self.grouped(x), self.alpha[..., None] if self.log_alpha.ndim else self.alpha
        if self.training and self.noisy:
            bits = self.width.sampled(self.generator)
            epsilon = draw(self.noise, values, alpha, bits.detach(), signed=self.signed, generator=self.generator)
            made = noised(values, alpha, bits, epsilon, signed=self.signed)
        else:
            made = rounded(values, alpha, self.width.whole, signed=self.signed, stored=self.stored)
        return made.reshape(x.shape).to(x.dtype)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the signed whole codes of the values, like `x`.

        Example:
            >>> NoiseProxy(torch.tensor(1.0), Width(2)).codes(torch.tensor([[0.2, 0.9, -3.0]])).tolist()
            [[0.0, 1.0, -1.0]]
        """
        step = self.step[..., None] if self.log_alpha.ndim else self.step
        n = float(top_code(self.width.whole, signed=self.signed))
        value = torch.clamp(self.grouped(x) / step, -n if self.signed else 0.0, n)
        return value.round().reshape(x.shape)

    def extra_repr(self) -> str:
        """Return the facts for `print(model)`."""
        return f"bits={self.width.value.item():.2f}, ranges={tuple(self.log_alpha.shape)}, noise={self.noise!r}"
