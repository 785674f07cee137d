"""The smoothed Leaky ReLU as one differentiable operation: only its input and parameters are kept for the way back."""

from typing import Any

import torch
from torch import Tensor

from planish.nn import blocks, fused
from planish.nn.unit import along, slopes, total, upcast, value


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, slope, sigma = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    plain = type(grad) is Tensor and not fused.wrapped(grad)
    if plain and not torch.is_grad_enabled() and blocks.quick(x, slope, sigma):
        return (*blocks.backward(grad, x, slope, sigma, ctx.kernel, ctx.channel_dim, wanted[:3]), None, None)
    wide, g = x.to(upcast(x)), grad.to(upcast(x))
    a, s = along(slope, x, ctx.channel_dim), along(sigma, x, ctx.channel_dim)
    by_x, by_a, by_s = slopes(wide, a, s, ctx.kernel)
    return (
        (g * by_x).to(x.dtype) if wanted[0] else None,
        total(g * by_a, slope, ctx.channel_dim) if wanted[1] else None,
        total(g * by_s, sigma, ctx.channel_dim) if wanted[2] else None,
        None,
        None,
    )


class SmoothedLeakyReLU(torch.autograd.Function):
    """The unit with its own way back; differentiable again, under vmap, and in forward mode."""

    @staticmethod
    def forward(x: Tensor, slope: Tensor, sigma: Tensor, kernel: str, channel_dim: int) -> Tensor:
        """Return the unit."""
        if blocks.quick(x, slope, sigma):
            return blocks.forward(x, slope, sigma, kernel, channel_dim)
        wide = x.to(upcast(x))
        a, s = along(slope, x, channel_dim), along(sigma, x, channel_dim)
        return value(wide, a, s, kernel).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        """Keep the input and the two parameters, nothing else."""
        *tensors, ctx.kernel, ctx.channel_dim = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients: in one pass over blocks, or by operations that can be differentiated again."""
        return _gradients(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, da: Tensor | None, ds: Tensor | None, *_: None) -> Tensor:  # noqa: ANN401
        """Return the directional derivative."""
        x, slope, sigma = ctx.saved_tensors
        wide = x.to(upcast(x))
        a, s = along(slope, x, ctx.channel_dim), along(sigma, x, ctx.channel_dim)
        out = torch.zeros_like(wide)
        for by, d in zip(slopes(wide, a, s, ctx.kernel), (dx, da, ds), strict=True):
            if d is not None:
                out = out + by * (d.to(wide.dtype) if d is dx else along(d, x, ctx.channel_dim))
        return out.to(x.dtype)

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: tuple[int | None, ...],
        x: Tensor,
        slope: Tensor,
        sigma: Tensor,
        kernel: str,
        channel_dim: int,
    ) -> tuple[Tensor, int]:
        """Return the unit of a batch: one more call where parameters are shared, else plain operations."""
        x = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x.expand(info.batch_size, *x.shape)
        if in_dims[1] is None and in_dims[2] is None:
            return SmoothedLeakyReLU.apply(x, slope, sigma, kernel, channel_dim + 1), 0  # type: ignore[no-untyped-call]
        each = []
        for parameter, dim in ((slope, in_dims[1]), (sigma, in_dims[2])):
            rows = (parameter.movedim(dim, 0) if dim is not None else parameter[None]).to(upcast(x))
            rows = rows.reshape(len(rows), -1)
            shape = [len(rows), *[1] * (x.dim() - 1)]
            if rows.shape[1] > 1:
                shape[channel_dim + 1] = rows.shape[1]
            each.append(rows.reshape(shape))
        return value(x.to(upcast(x)), each[0], each[1], kernel).to(x.dtype), 0


class FusedLeakyReLU(torch.autograd.Function):
    """The same in the compiled module, for what `fused.fits` allows; what cannot be done there is done as above.

    In the older form of an autograd function, which costs a third of a call less; functorch does not take it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, sigma: Tensor, kernel: str, channel_dim: int) -> Tensor:  # noqa: ANN401
        """Return the unit, and keep the input and the two parameters."""
        ctx.kernel, ctx.channel_dim = kernel, channel_dim
        ctx.save_for_backward(x, slope, sigma)
        ctx.save_for_forward(x, slope, sigma)
        return fused.forward(x, slope, sigma, kernel, channel_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients: in one pass, or by operations that can be differentiated again."""
        if torch.is_grad_enabled() or not fused.fits(grad):
            return _gradients(ctx, grad)
        x, slope, sigma = ctx.saved_tensors
        found = fused.backward(grad, x, slope, sigma, ctx.kernel, ctx.channel_dim, ctx.needs_input_grad)
        return (*found, None, None)

    jvp = SmoothedLeakyReLU.jvp


def smoothed(x: Tensor, slope: Tensor, sigma: Tensor, kernel: str, channel_dim: int) -> Tensor:
    """Return the unit, differentiable: in the compiled module where that takes it, else by operations of torch."""
    way = FusedLeakyReLU if fused.fits(x, slope, sigma) else SmoothedLeakyReLU
    made: Tensor = way.apply(x, slope, sigma, kernel, channel_dim)  # type: ignore[no-untyped-call]
    return made
