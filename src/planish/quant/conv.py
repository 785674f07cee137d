"""Convolutions in few bits: a linear layer over patches of the image.

The weight is seen as (outputs, columns), a column for each input channel of a group and each place of the kernel; what
meets it is the patch under the kernel. So every format, statistic and rounding step of linear layers serves here.

Legend: N images, C channels, H, W height and width, O outputs.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad
from planish.quant.layers import QLinear


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


class QConv(QLinear):
    """A two-dimensional convolution with a quantized weight, in place of `nn.Conv2d`.

    Its buffers are those of the `QLinear` over patches; the geometry is that of the layer it replaces. Where `act` is
    given, the input is rounded to it an image at a time.

    Args:
        layer: The weight over patches, (O, columns); its buffers are taken over.
        conv: The convolution that it replaces.

    Raises:
        ValueError: The sizes differ; the layer has a transform or a float branch; `act` has groups.

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
        columns = conv.weight[0].numel()
        if (layer.in_features, layer.out_features) != (columns, conv.out_channels):
            sizes = layer.in_features, layer.out_features
            raise bad("QConv", "layer", f"{columns} -> {conv.out_channels}", f"{sizes[0]} -> {sizes[1]}")
        if layer.transform is not None or layer.down is not None or layer.loras:
            raise bad("QConv", "layer", "one without transform and float branch", "one with")
        if layer.act is not None and getattr(layer.act, "group_size", None) is not None:
            raise bad("QConv", "act", "a format without groups: an image shares one scale", layer.act)
        super().__init__(columns, conv.out_channels, layer.format, bias=False, act=layer.act, device="meta")
        for name, buffer in layer.named_buffers():
            setattr(self, name, buffer)
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, in the dtype of `x`; an image may come without its batch."""
        images = x if x.ndim == 4 else x[None]
        if self.act is not None:
            images = self.act.fake(images.flatten(1)).view_as(images)
        y = nn.functional.conv2d(
            padded(self, images), self._matrix(x.dtype), None if self.bias is None else self.bias.to(x.dtype),
            self.stride, 0, self.dilation, self.groups,
        )  # fmt: skip
        return y if x.ndim == 4 else y[0]

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return self.weight.decode().to(dtype).view(shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Conv2d:  # type: ignore[override]
        """Return the `nn.Conv2d` that this layer equals when `act` is None, in `dtype` at the least."""
        exact = self.weight.decode().dtype
        weight = self._matrix(torch.promote_types(exact, dtype))
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,  # type: ignore[arg-type]
            self.groups, bias=self.bias is not None, padding_mode=cast(Any, self.padding_mode), device="meta",
        )  # fmt: skip
        conv.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.to(weight.dtype), requires_grad=False)
        return conv

    def extra_repr(self) -> str:
        """Return the layer's facts for `print(model)`."""
        shape = f"{self.in_channels} -> {self.out_channels}, kernel {self.kernel_size}, stride {self.stride}"
        return f"{shape}, groups {self.groups}, {super().extra_repr()}"
