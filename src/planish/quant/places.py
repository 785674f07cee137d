"""What a convolution's weight meets, at some places of its kernel: few rows that stand for many images.

Images are long and their patches overlap, so that statistics over a sample of places are as good as over all. A place
keeps the pixels under the kernel with all their channels, and the range of the image that it is of: so whatever is done
to a channel (scaling), to a pixel or to an image (rounding) can be done to the sample alone.

Legend: T places, K pixels under the kernel, C channels.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish.quant.act_formats import Static
from planish.quant.conv import by_pixel, padded
from planish.quant.formats import Format
from planish.quant.moments import SeenError

if TYPE_CHECKING:
    from planish.quant.sites import Site


@dataclass(frozen=True)
class Places:
    """Some places of a convolution's kernel on its input.

    Attributes:
        pixels: What lies under the kernel, zero where it is beyond the image, (T, K, C).
        low: Least value of each channel in the image that a place is of, (T, C).
        high: Greatest value.
        groups: Of the convolution's channels.
    """

    pixels: Float[Tensor, "t k c"]
    low: Float[Tensor, "t c"]
    high: Float[Tensor, "t c"]
    groups: int

    @classmethod
    def of(
        cls, conv: nn.Conv2d, x: Tensor, count: int | None = None, generator: torch.Generator | None = None
    ) -> "Places":
        """Take places from a batch of images.

        Args:
            conv: The convolution.
            x: Its input, (N, C, H, W) or (C, H, W).
            count: How many places, drawn without replacement; all if None or if there are fewer.
            generator: Source of randomness.

        Returns:
            The places, in the order of images and positions.

        Example:
            >>> conv = nn.Conv2d(2, 4, 3)
            >>> Places.of(conv, torch.ones(1, 2, 5, 5)).rows().shape
            torch.Size([9, 18])
        """
        images = x if x.ndim == 4 else x[None]
        spread = padded(conv, images).movedim(1, -1)
        (tall, wide), steps, apart = conv.kernel_size, conv.stride, conv.dilation
        sizes = [
            (spread.shape[axis + 1] - apart[axis] * (conv.kernel_size[axis] - 1) - 1) // steps[axis] + 1
            for axis in (0, 1)
        ]
        total = len(images) * sizes[0] * sizes[1]
        chosen = torch.arange(total)
        if count is not None and count < total:
            chosen = torch.randperm(total, generator=generator)[:count].sort().values
        image, place = chosen // (sizes[0] * sizes[1]), chosen % (sizes[0] * sizes[1])
        down = (place // sizes[1] * steps[0])[:, None] + (torch.arange(tall) * apart[0]).repeat_interleave(wide)
        right = (place % sizes[1] * steps[1])[:, None] + (torch.arange(wide) * apart[1]).repeat(tall)
        pixels = spread[tuple(index.to(x.device) for index in (image[:, None], down, right))]
        image = image.to(x.device)
        return cls(pixels, images.amin((2, 3))[image], images.amax((2, 3))[image], conv.groups)

    def rows(self) -> Float[Tensor, "rows columns"]:
        """Return what meets the rows of the weight: for each place one row for every group of channels."""
        grouped: Tensor = self.pixels.unflatten(2, (self.groups, -1))  # (T, K, groups, C of each)
        return grouped.permute(0, 2, 3, 1).flatten(2).flatten(0, 1)

    def scaled(self, scale: Float[Tensor, "c"]) -> "Places":
        """Return the same places of images whose channels were divided by `scale`."""
        return Places(self.pixels / scale, self.low / scale, self.high / scale, self.groups)

    def rounded(self, act: Format) -> "Places":
        """Return the same places of images that were rounded as `planish.quant.QConv` does it."""
        if by_pixel(act) or isinstance(act, Static):
            made = act.fake(self.pixels)
        else:  # an image has one scale, whatever part of it is under the kernel
            share = getattr(act, "clip", 1.0)
            ends = self.low.amin(1, keepdim=True) * share, self.high.amax(1, keepdim=True) * share
            made = act.fake(self.pixels.flatten(1), limits=ends).view_as(self.pixels)
        return Places(made, self.low, self.high, self.groups)

    def noise(self, act: Format) -> Float[Tensor, "rows columns"]:
        """Return what rounding adds to the rows."""
        return self.rounded(act).rows() - self.rows()

    def __len__(self) -> int:
        """Return how many places there are."""
        return len(self.pixels)


def joined(parts: list[Places]) -> Places:
    """Return the places of several batches as one."""
    each = ([getattr(part, name) for part in parts] for name in ("pixels", "low", "high"))
    pixels, low, high = (torch.cat(tensors) for tensors in each)
    return Places(pixels, low, high, parts[0].groups)


def images(site: "Site") -> Iterator[Float[Tensor, "n c h w"]]:
    """Yield what enters a convolution, batch by batch, with the block as it stands now."""
    if site.block.paused is not None:
        yield from map(_batch, site.block.paused.entering(next(iter(site.consumers))))
        return
    seen: list[Tensor] = []

    def take(_m: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(_batch(args[0]))
        raise SeenError

    handle = next(iter(site.consumers.values())).register_forward_pre_hook(take)
    try:
        for hidden, context in zip(site.block.inputs, site.block.context, strict=True):
            with suppress(SeenError):
                site.block.call(hidden, context)
            if seen:
                yield seen.pop()
    finally:
        handle.remove()


def _batch(x: Tensor) -> Float[Tensor, "n c h w"]:
    """Return pictures as a batch, in at least float32."""
    x = x if x.ndim == 4 else x[None]
    return x if x.dtype == torch.float64 else x.float()


def places_in(site: "Site", count: int) -> Iterator[Places]:
    """Yield, batch by batch, places of a convolution: together about `count` of them, the same at every call."""
    (conv,) = site.consumers.values()
    each = -(-count // max(len(site.block.inputs), 1))
    generator = torch.Generator().manual_seed(0)
    for batch in images(site):
        yield Places.of(cast(nn.Conv2d, conv), batch, each, generator)


def column_tops(site: "Site") -> Float[Tensor, "channels"]:
    """Return the greatest magnitude of the weights that meet each channel."""
    if site.convolution:
        (conv,) = site.consumers.values()
        weight: Tensor = conv.get_parameter("weight").detach()  # (O, C of a group, height, width)
        grouped: Tensor = weight.unflatten(0, (cast(int, conv.groups), -1))
        return grouped.abs().amax((1, 3, 4)).flatten()
    return torch.stack([w.abs().amax(0) for w in site.weights.values()]).amax(0)
