"""Convolutions in few bits: a linear layer over patches of the image.

The weight is seen as (outputs, columns), a column for each input channel of a group and each place of the kernel; what
meets it is the patch under the kernel. So every format, statistic and rounding step of linear layers serves here. What
belongs to a channel (a smoothing factor, the codes of an activation) is applied to the image once, before it is taken
apart into patches: each pixel is a token.

Legend: N images, C channels, H, W height and width, O outputs, r rank.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.formats import Format
from planish.quant.layers import QLinear
from planish.quant.transforms import Scale, Transform


def is_conv(module: nn.Module) -> bool:
    """Tell whether a module is torch's own two-dimensional convolution; a subclass may compute something else."""
    return type(module) is nn.Conv2d


def pads(conv: nn.Module) -> tuple[int, int, int, int]:
    """Return how many pixels a convolution adds: left, right, above, below."""
    geometry = cast(Any, conv)
    found: list[int] = []
    for axis in (1, 0):
        if geometry.padding == "same":
            total = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)
            found += [total // 2, total - total // 2]
        else:
            found += [0, 0] if geometry.padding == "valid" else [geometry.padding[axis]] * 2
    return found[0], found[1], found[2], found[3]


def padded(conv: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
    """Return the image with the pixels that a convolution adds."""
    mode = cast(str, conv.padding_mode)
    return nn.functional.pad(x, pads(conv), mode="constant" if mode == "zeros" else mode)


def patches(conv: nn.Conv2d, x: Tensor) -> Float[Tensor, "patches columns"]:
    """Return what meets the weight's rows: one patch for each place of the kernel, and each group of channels.

    Example:
        >>> patches(nn.Conv2d(2, 4, 3), torch.ones(1, 2, 5, 5)).shape
        torch.Size([9, 18])
    """
    images = padded(conv, x if x.ndim == 4 else x[None])
    columns: Tensor = nn.functional.unfold(images, conv.kernel_size, conv.dilation, stride=conv.stride)
    grouped: Tensor = columns.unflatten(1, (conv.groups, -1))  # (N, groups, columns, places)
    return grouped.permute(0, 3, 1, 2).flatten(0, 2)


def by_pixel(act: Format) -> bool:
    """Tell whether a grid rounds an image a pixel at a time: one with groups does; without, an image shares its scale.

    Example:
        >>> from planish.quant.formats import Affine
        >>> by_pixel(Affine(4, 64)), by_pixel(Affine(8, None))
        (True, False)
    """
    return getattr(act, "group_size", None) is not None


def rounded_image(act: Format, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Round images to a grid: each pixel's channels in the grid's groups, or each image on one scale."""
    if by_pixel(act):
        return act.fake(x.movedim(1, -1)).movedim(-1, 1)
    return act.fake(x.flatten(1)).view_as(x)


def check_pixels(where: str, act: Format | None, conv: nn.Module) -> None:
    """Refuse a grid whose groups do not divide the channels of a convolution's input."""
    if act is None or not by_pixel(act):
        return
    channels = cast(int, conv.in_channels)
    try:
        cast(Any, act).n_groups(channels)
    except ValueError:
        raise bad(where, "act", f"a grid whose groups divide {channels} channels, or a ragged one", act) from None


def channel_scale(where: str, transform: Transform) -> Float[Tensor, "c"]:
    """Return the factors of a transform that a convolution can undo: one that scales channels, and nothing else."""
    if not isinstance(transform, Scale):
        raise bad(where, "layer", "one whose transform is a Scale of its channels", type(transform).__name__)
    return transform.scale


def column_scale(conv: nn.Module, scale: Float[Tensor, "c"]) -> Float[Tensor, "rows columns"]:
    """Return the factor of every column of a convolution's weight, given its channels': (1 or O, columns)."""
    geometry = cast(Any, conv)
    places = geometry.kernel_size[0] * geometry.kernel_size[1]
    columns = scale.view(geometry.groups, -1).repeat_interleave(places, 1)
    return columns if geometry.groups == 1 else columns.repeat_interleave(geometry.out_channels // geometry.groups, 0)


class QConv(QLinear):
    """A two-dimensional convolution with a quantized weight, in place of `nn.Conv2d`.

    Its buffers are those of the `QLinear` over patches; the geometry is that of the layer it replaces. It equals that
    layer on patches, with three things said of channels instead of columns. A transform scales the image's channels.
    Where `act` has groups, each pixel's channels are rounded in them; without groups, an image shares one scale. And
    the branch is a convolution to r channels, then one of a single pixel (with groups of channels, the same for each).

    Codes are multiplied as the floats that they stand for, but for kernels of one pixel: those are linear layers.

    Args:
        layer: The weight over patches, (O, columns); its buffers are taken over.
        conv: The convolution that it replaces.

    Raises:
        ValueError: The sizes differ; the layer's transform is other than a `Scale` of the channels; groups of `act` do
            not divide them.

    Example:
        >>> from planish.quant.formats import Affine
        >>> conv = nn.Conv2d(16, 8, 3, padding=1)
        >>> rounded = Affine(8, group_size=None).encode(conv.weight.detach().flatten(1))
        >>> q = QConv(QLinear.of(rounded, conv.bias), conv)
        >>> x = torch.ones(1, 16, 4, 4)
        >>> bool((q(x) - conv(x)).abs().max() < 0.05)
        True
    """

    def __init__(self, layer: QLinear, conv: nn.Conv2d) -> None:
        columns, act = conv.weight[0].numel(), layer.act
        if (layer.in_features, layer.out_features) != (columns, conv.out_channels):
            sizes = layer.in_features, layer.out_features
            raise bad("QConv", "layer", f"{columns} -> {conv.out_channels}", f"{sizes[0]} -> {sizes[1]}")
        if layer.transform is not None:
            found = channel_scale("QConv", layer.transform).numel()
            if found != conv.in_channels:
                raise bad("QConv", "layer", f"one whose transform scales {conv.in_channels} channels", found)
        check_pixels("QConv", act, conv)
        super().__init__(columns, conv.out_channels, layer.format, bias=False, act=act, device="meta")
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self.transform, self.loras = layer.transform, dict(layer.loras)
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, in the dtype of `x`; an image may come without its batch."""
        images = x if x.ndim == 4 else x[None]
        if self.act is not None and by_pixel(self.act) and self._is_linear:
            images = images[..., :: self.stride[0], :: self.stride[1]]
            y = super().forward(images.movedim(1, -1)).movedim(-1, 1)
            return y if x.ndim == 4 else y[0]
        if self.transform is not None:
            images = images / cast(Scale, self.transform).scale.to(x.dtype)[:, None, None]
        down, up, bias = self.float_parts()
        low = None  # the branch reads unrounded inputs
        if down is not None and up is not None:
            matrix = down.to(x.dtype).view(len(down), -1, *self.kernel_size).repeat(self.groups, 1, 1, 1)
            low = nn.functional.conv2d(self._conv(images, matrix), up.to(x.dtype)[..., None, None], groups=self.groups)
        if self.act is not None:
            images = rounded_image(self.act, images)
        y = self._conv(images, self._matrix(self.weight.decode().to(x.dtype)), bias)
        y = y if low is None else y + low
        return y if x.ndim == 4 else y[0]

    @property
    def _is_linear(self) -> bool:
        """Whether it is a linear layer at every pixel that it looks at."""
        return self.kernel_size == (1, 1) and self.groups == 1 and not any(pads(self))

    def _conv(self, images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(images.dtype)
        return nn.functional.conv2d(padded(self, images), weight, bias, self.stride, 0, self.dilation, self.groups)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _rebased(self, raw: Tensor) -> Tensor:
        return (
            raw if self.transform is None else raw * column_scale(self, channel_scale("QConv", self.transform)).to(raw)
        )

    def add_lora(self, name: str, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        """Add an adapter that was trained on the float convolution, in place; see `QLinear.add_lora`.

        Args:
            name: By which it is scaled and removed.
            down: Weight of the convolution to r channels, (r, C, kernel), or that as a matrix.
            up: Weight of the convolution of one pixel that follows, (O, r, 1, 1), or that as a matrix.
            scale: Its strength.

        Raises:
            ValueError: The channels are in groups; see `QLinear.add_lora`.

        Example:
            >>> from planish.quant.formats import Affine
            >>> conv, x = nn.Conv2d(4, 16, 3), torch.ones(1, 4, 5, 5)
            >>> layer = QConv(QLinear.of(Affine(8, None).encode(conv.weight.detach().flatten(1)), conv.bias), conv)
            >>> before = layer(x)
            >>> layer.add_lora("style", torch.randn(2, 4, 3, 3), torch.randn(16, 2, 1, 1), scale=0.5)
            >>> torch.equal(layer(x), before)
            False
        """
        if self.groups != 1:
            raise bad("add_lora", "layer", "a convolution whose channels are one group", self.groups)
        down, up = (part.flatten(1) if part.ndim == 4 else part for part in (down, up))
        super().add_lora(name, down, up, scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Conv2d:  # type: ignore[override]
        """Return the `nn.Conv2d` that this layer equals when `act` is None, in `dtype` at the least."""
        weight = self.weight.decode()
        weight = weight.to(torch.promote_types(weight.dtype, dtype))
        down, up, bias = self.float_parts()
        if down is not None and up is not None:
            weight = weight + up.to(weight.dtype) @ down.to(weight.dtype)
        if self.transform is not None:
            weight = weight / column_scale(self, channel_scale("QConv", self.transform)).to(weight.dtype)
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,  # type: ignore[arg-type]
            self.groups, bias=bias is not None, padding_mode=cast(Any, self.padding_mode), device="meta",
        )  # fmt: skip
        conv.weight = nn.Parameter(self._matrix(weight), requires_grad=False)
        if bias is not None:
            conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        return conv

    def extra_repr(self) -> str:
        """Return the layer's facts for `print(model)`."""
        shape = f"{self.in_channels} -> {self.out_channels}, kernel {self.kernel_size}, stride {self.stride}"
        return f"{shape}, groups {self.groups}, {super().extra_repr()}"
