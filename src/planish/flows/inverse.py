"""Roots of monotone functions, element by element, with derivatives of the order one asks for.

Multi-bin bisection narrows a bracket: f is evaluated on a grid of it in one batched call, and the bin that holds the
root is the next bracket. Newton steps kept inside the bracket finish. Derivatives come from steps of Newton's method
taken once more from the root found, this time in sight of autograd: x <- x - (f(x; theta) - y) / f'(x; theta). One such
step makes first derivatives exact, and k of them those up to order 2^k - 1, in y and in whatever theta f closes over.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import NotConverged, bad

Monotone = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
_COARSE = 1e-3  # the part of the bracket at which bisection gives way to Newton's method
_MOST = 200  # steps: each halves the step before it, or the bracket


class ImplicitInverse:
    """Invert a monotone elementwise function numerically, and differentiate the inverse implicitly.

    Args:
        f: The function; returns values, or values and slopes (else slopes come from autograd). What it is given may
            have one more leading axis than `y`; parameters it closes over must broadcast from the right.
        bracket: Two ends, numbers or tensors, between which the root lies.
        bins: Parts into which a bracket is cut, >= 2; default 8. Fewer are cheaper for large batches on a processor,
            more take fewer rounds where a batch leaves a device idle.
        tol: Width, in units of x, at which the search ends; default 4 eps of the dtype times the larger end.
        newton_steps: Steps taken in sight of autograd, >= 0: k of them make derivatives up to order 2^k - 1 exact.
            Default 2, which force matching needs.
        validate: Check bracket, monotony and input; default True.
        steps: Take this many Newton steps and look at nothing, for `torch.compile` and `torch.func.vmap` (with
            `validate=False` and an f that returns slopes); default None, which stops by `tol`.

    Raises:
        ValueError: An argument is out of range; the root is not in the bracket; f is not monotone.
        NotConverged: The search did not end, as where f is NaN.

    Example:
        >>> cube_root = ImplicitInverse(lambda x: x**3, (0.0, 2.0))
        >>> y = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> x = cube_root(y)
        >>> (slope,) = torch.autograd.grad(x, y, create_graph=True)
        >>> (second,) = torch.autograd.grad(slope, y)
        >>> round(x.item(), 12), round(slope.item(), 12), round(second.item(), 12)
        (1.0, 0.333333333333, -0.222222222222)
    """

    def __init__(
        self,
        f: Monotone,
        bracket: tuple[int | float | Tensor, int | float | Tensor],
        *,
        bins: int = 8,
        tol: int | float | None = None,
        newton_steps: int = 2,
        validate: bool = True,
        steps: int | None = None,
    ) -> None:
        if bins < 2:
            raise bad("ImplicitInverse", "bins", "at least 2", bins)
        if newton_steps < 0:
            raise bad("ImplicitInverse", "newton_steps", "at least 0", newton_steps)
        if steps is not None and steps < 0:
            raise bad("ImplicitInverse", "steps", "at least 0", steps)
        self.f, self.bracket, self.bins, self.tol = f, bracket, bins, tol
        self.newton_steps, self.validate, self.steps = newton_steps, validate, steps
        self._gives_slopes: bool | None = None  # not known before the first call

    def __call__(self, y: Float[Tensor, "*b"]) -> Float[Tensor, "*c"]:
        """Return x with f(x) = y."""
        return self._attached(y)[0]

    def call_and_ladj(self, y: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*c"], Float[Tensor, "*c"]]:
        """Return x with f(x) = y, and log |dx/dy|."""
        x, differentiable = self._attached(y)
        with torch.set_grad_enabled(differentiable):
            return x, -self._slope(x).abs().log()

    def _attached(self, y: Tensor) -> tuple[Tensor, bool]:
        with torch.no_grad():
            x = self._search(y.detach())
        if not torch.is_grad_enabled() or not (y.requires_grad or _first(self.f(x)).requires_grad):
            return x, False
        for _ in range(self.newton_steps):
            value, slope = self._value_and_slope(x)
            x = x - (value - y) / slope
        return x, True

    def _value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._gives_slopes is not False:
            made = self.f(x)
            self._gives_slopes = isinstance(made, tuple)
            if isinstance(made, tuple):
                return made
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            value = _first(self.f(x))
            (slope,) = torch.autograd.grad(value.sum(), x, create_graph=keep)
        return (value, slope) if keep else (value.detach(), slope)

    def _slope(self, x: Tensor) -> Tensor:
        return self._value_and_slope(x)[1]

    def _search(self, y: Tensor) -> Tensor:
        ends = [torch.as_tensor(end, dtype=y.dtype, device=y.device).detach() for end in self.bracket]
        at = [_first(self.f(end.expand(torch.broadcast_shapes(end.shape, y.shape)))) for end in ends]
        shape = torch.broadcast_shapes(at[0].shape, at[1].shape)
        y, low, high = y.expand(shape), ends[0].expand(shape), ends[1].expand(shape)
        sign = torch.where(at[1] > at[0], 1.0, -1.0).to(y.dtype)
        slack = 1e3 * torch.finfo(y.dtype).eps * (at[1] - at[0]).abs()
        if self.validate:
            self._check(y, at, sign, slack, ends)
        inner = torch.arange(1, self.bins, dtype=y.dtype, device=y.device).reshape(-1, *[1] * len(shape)) / self.bins
        for _ in range(math.ceil(math.log(1 / _COARSE) / math.log(self.bins))):
            part = high - low
            above = sign * (_first(self.f(low + part * inner)) - y)
            if self.validate and bool((above.diff(dim=0) < -slack).any()):
                raise bad("ImplicitInverse", "f", "monotone between the ends of the bracket", "values that turn back")
            found = (above < 0).sum(0)
            low, high = low + part * found / self.bins, low + part * (found + 1) / self.bins
        rounding = 2 * torch.finfo(y.dtype).eps * torch.maximum(at[0].abs(), at[1].abs())
        return self._polish(y, low, high, sign, self._tolerance(ends, y.dtype), rounding)

    def _polish(self, y: Tensor, low: Tensor, high: Tensor, sign: Tensor, tol: Tensor, rounding: Tensor) -> Tensor:
        """Take Newton steps that stay in the bracket and are half the last at most; else halve the bracket."""
        x, last = (low + high) / 2, high - low
        for _ in range(_MOST if self.steps is None else self.steps):
            value, slope = self._value_and_slope(x)
            above = sign * (value - y)
            low, high = torch.where(above <= 0, x, low), torch.where(above >= 0, x, high)
            there = x - (value - y) / slope
            good = (there >= low) & (there <= high) & ((there - x).abs() <= last / 2)
            there = torch.where(good, there, (low + high) / 2)
            # an element that has arrived stays: the other elements' steps are none of its business
            moved = torch.where((last <= tol) | (above.abs() <= rounding), x, there)
            last, x = (moved - x).abs(), moved
            if self.steps is None and bool(((last <= tol) & torch.isfinite(value)).all()):
                return x
        if self.steps is None:
            raise NotConverged(f"ImplicitInverse: the search did not end in {_MOST} steps.", best=x)
        return x

    def _tolerance(self, ends: list[Tensor], dtype: torch.dtype) -> Tensor:
        finest = torch.finfo(dtype).eps * torch.maximum(ends[0].abs(), ends[1].abs())
        if self.tol is None:
            return 4 * finest
        if not bool((finest <= self.tol).all()):
            least = f"at least {float(finest.max()):.1e}, what {dtype} resolves"
            raise bad("ImplicitInverse", "tol", least, self.tol)
        return torch.as_tensor(self.tol, dtype=dtype, device=finest.device)

    def _check(self, y: Tensor, at: list[Tensor], sign: Tensor, slack: Tensor, ends: list[Tensor]) -> None:
        if not bool(torch.isfinite(y).all()):
            raise bad("ImplicitInverse", "y", "finite", "NaN or infinity")
        if not all(bool(torch.isfinite(value).all()) for value in at):
            raise bad("ImplicitInverse", "f", "finite at the ends of the bracket", "NaN or infinity")
        if not bool((ends[0] < ends[1]).all()) or not bool((at[0] != at[1]).all()):
            raise bad("ImplicitInverse", "bracket", "two different ends in order, with two values of f", self.bracket)
        missed = (sign * (y - at[0]) < -slack) | (sign * (at[1] - y) < -slack)
        if bool(missed.any()):
            raise bad("ImplicitInverse", "y", "between the values of f at the ends of the bracket", y[missed][0].item())


def _first(made: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return made[0] if isinstance(made, tuple) else made
