"""Exact changes of basis of the channels, undone in the layer.

Every transform T satisfies

    F.linear(T(x), T.weight(W), T.bias(W, b)) == F.linear(x, W, b)

so smoothing alone never changes a model. A transform acts on the last axis; that is what makes folding it into the
layer before (`absorb`) the same two lines for every transform.
"""

import abc
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from planish import kernels
from planish._support import bad


class Transform(nn.Module, abc.ABC):
    """A change of basis of the channels, undone in the layer that reads them."""

    diagonal: ClassVar[bool] = False
    """Whether each channel is only scaled: such a transform folds into a norm as well."""

    linear: ClassVar[bool] = True
    """Whether T(0) = 0; only such a transform can be folded into the layer before."""

    @abc.abstractmethod
    def forward(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """Return what the activation becomes."""

    @abc.abstractmethod
    def weight(self, w: Float[Tensor, "out channels"]) -> Float[Tensor, "out channels"]:
        """Return what the weight becomes."""

    def bias(self, w: Float[Tensor, "out channels"], b: Float[Tensor, "out"] | None) -> Float[Tensor, "out"] | None:
        """Return what the bias becomes; only a shift changes it."""
        return b


class Scale(Transform):
    """Divide channel j of the activation by s_j and multiply the matching weight column by it.

    Args:
        scale: s, (channels,), finite and above zero.

    Raises:
        ValueError: A scale is zero, negative or not finite.

    Source: SmoothQuant+ (arXiv 2312.03788), step 2; also AWQ, SVDQuant, DuQuant.

    Example:
        >>> import torch
        >>> t = Scale(torch.tensor([2.0, 0.5]))
        >>> t(torch.tensor([4.0, 1.0])).tolist(), t.weight(torch.tensor([[1.0, 1.0]])).tolist()
        ([2.0, 2.0], [[2.0, 0.5]])
    """

    diagonal = True
    scale: Tensor

    def __init__(self, scale: Float[Tensor, "channels"]) -> None:
        super().__init__()
        if not (torch.isfinite(scale).all() and (scale > 0).all()):
            worst = scale[~(torch.isfinite(scale) & (scale > 0))][0].item()
            raise bad("Scale", "scale", "finite and above zero in every channel", worst)
        self.register_buffer("scale", scale)

    def forward(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """Return x / s."""
        return x / self.scale.to(x.dtype)

    def weight(self, w: Float[Tensor, "out channels"]) -> Float[Tensor, "out channels"]:
        """Return W * s."""
        return w * self.scale.to(w.dtype)


class Shift(Transform):
    """Add c to the activation and take W c from the bias, as for inputs that four unsigned bits should hold.

    Args:
        offset: c, (channels,), finite.

    Source: SVDQuant (arXiv 2411.05007), inputs that follow GELU.

    Example:
        >>> import torch
        >>> Shift(torch.tensor([0.17]))(torch.tensor([-0.17])).item()
        0.0
    """

    linear = False
    offset: Tensor

    def __init__(self, offset: Float[Tensor, "channels"]) -> None:
        super().__init__()
        if not torch.isfinite(offset).all():
            raise bad("Shift", "offset", "finite in every channel", offset[~torch.isfinite(offset)][0].item())
        self.register_buffer("offset", offset)

    def forward(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """Return x + c."""
        return x + self.offset.to(x.dtype)

    def weight(self, w: Float[Tensor, "out channels"]) -> Float[Tensor, "out channels"]:
        """Return W, unchanged."""
        return w

    def bias(self, w: Float[Tensor, "out channels"], b: Float[Tensor, "out"] | None) -> Float[Tensor, "out"] | None:
        """Return b - W c."""
        moved = w @ self.offset.to(w.dtype)
        return -moved if b is None else b - moved


class Permute(Transform):
    """Reorder the channels.

    Args:
        index: Permutation p, (channels,): channel j of the result is channel p_j of the input.

    Raises:
        ValueError: `index` is not a permutation.

    Source: DuQuant (arXiv 2406.01721), zigzag permutation.

    Example:
        >>> import torch
        >>> Permute(torch.tensor([2, 0, 1]))(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [3.0, 1.0, 2.0]
    """

    index: Tensor

    def __init__(self, index: Int[Tensor, "channels"]) -> None:
        super().__init__()
        if not torch.equal(index.sort().values, torch.arange(index.numel(), device=index.device, dtype=index.dtype)):
            raise bad("Permute", "index", f"a permutation of 0 to {index.numel() - 1}", index.tolist()[:8])
        self.register_buffer("index", index)

    def forward(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """Return x[..., p]."""
        return x[..., self.index]

    def weight(self, w: Float[Tensor, "out channels"]) -> Float[Tensor, "out channels"]:
        """Return W[:, p]."""
        return w[:, self.index]


class Rotate(Transform):
    """Rotate blocks of neighbouring channels: x_k becomes x_k R_k.

    Args:
        blocks: Orthogonal matrices, (1 or blocks, size, size); one matrix is shared by all blocks.

    Raises:
        ValueError: A matrix is not orthogonal (to 1e-3), or the channels are not a multiple of the size.

    Source: DuQuant (arXiv 2406.01721), block-diagonal rotation; Hadamard rotations likewise.

    Example:
        >>> import torch
        >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> Rotate(swap)(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
        [2.0, 1.0, 4.0, 3.0]
    """

    blocks: Tensor

    def __init__(self, blocks: Float[Tensor, "n size size"]) -> None:
        super().__init__()
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        off = (blocks @ blocks.mT - eye).abs().max().item()
        if not off < 1e-3:
            raise bad("Rotate", "blocks", "orthogonal matrices", f"|R R' - 1| up to {off:.3g}")
        self.register_buffer(
            "blocks", blocks.contiguous()
        )  # as a file gives them back: the same sums in the same order

    def forward(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """Return x with each block of channels rotated."""
        size = self.blocks.shape[-1]
        if x.shape[-1] % size or self.blocks.shape[0] not in (1, x.shape[-1] // size):
            raise bad("Rotate", "x", f"channels that {tuple(self.blocks.shape)} blocks cover", tuple(x.shape))
        return kernels.rotate(x, self.blocks.expand(x.shape[-1] // size, -1, -1))

    def weight(self, w: Float[Tensor, "out channels"]) -> Float[Tensor, "out channels"]:
        """Return W with each block of columns rotated alike."""
        return self.forward(w)


class Chain(Transform):
    """Apply transforms from left to right.

    Args:
        *parts: The transforms.

    Example:
        >>> import torch
        >>> t = Chain(Scale(torch.tensor([2.0, 4.0])), Permute(torch.tensor([1, 0])))
        >>> t(torch.tensor([2.0, 4.0])).tolist()
        [1.0, 1.0]
    """

    def __init__(self, *parts: Transform) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.diagonal = all(p.diagonal for p in parts)  # type: ignore[misc]
        self.linear = all(p.linear for p in parts)  # type: ignore[misc]

    def forward(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        """Return the activation after all parts."""
        for part in self.parts:
            x = part(x)
        return x

    def weight(self, w: Float[Tensor, "out channels"]) -> Float[Tensor, "out channels"]:
        """Return the weight after all parts."""
        for part in self.parts:
            w = part.weight(w)  # type: ignore[operator]
        return w

    def bias(self, w: Float[Tensor, "out channels"], b: Float[Tensor, "out"] | None) -> Float[Tensor, "out"] | None:
        """Return the bias after all parts; each sees the weight as the parts before it left it."""
        for part in self.parts:
            b = part.bias(w, b)  # type: ignore[operator]
            w = part.weight(w)  # type: ignore[operator]
        return b
