"""The run-time layer: everything a method can produce is a `QLinear`.

    y = Q(W) q(T(x)) + up(down(T(x))) + b + the same for every adapter (LoRA) that was added

Each part is optional except Q(W). The buffers carry the names and the layout of a compressed-tensors checkpoint, so
that `state_dict()` is what lies on disk.

Legend: O outputs, I inputs, G groups of a row.
"""

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish import kernels
from planish._support import bad
from planish.quant.formats import FP4, SCALE_DTYPES, Affine, Format, QTensor, Weight
from planish.quant.fp4 import halves, split_scale
from planish.quant.integers import Term, has_integers, terms
from planish.quant.packing import n_words, pack, unpack
from planish.quant.transforms import Transform


class QLinear(nn.Module):
    """A linear layer with a quantized weight, in place of `nn.Linear`.

    Build it from a rounded weight with `QLinear.of`; the constructor makes empty buffers to be filled from a
    checkpoint.

    Args:
        in_features: I.
        out_features: O.
        format: Grid of the weight, `Affine` or `FP4`; groups run along the inputs.
        bias: Whether there is a bias.
        transform: Applied to the input first; None where it was folded into the layer before.
        act: Grid to which the (transformed) input is rounded, a row at a time; None keeps it in float. On a CPU an
            `Affine` grid of 2 to 8 bits runs on integers, where an input that is not finite gives a result that is not;
            `Dual` and `Static` run on integers too and refuse it, as any grid does elsewhere.
        rank: Rank of a float branch beside the quantized weight; 0 for none.
        loras: Rank and scale of the adapters by name, see `add_lora`.
        dtype: Of bias, branch and adapters; default torch's default.
        device: Where the buffers live.

    Attributes:
        activation_bits: How finely a kernel may round a float activation that meets a 4-bit weight, see
            `kernels.w4a16`: 16 (default), 8 (faster, and visibly less exact), or None for not at all. A property of the
            run, not of the model: it is in no checkpoint.

    Example:
        >>> import torch
        >>> from planish.quant.formats import Affine
        >>> linear = torch.nn.Linear(64, 8)
        >>> q = QLinear.of(Affine(8, group_size=32).encode(linear.weight.detach()), linear.bias)
        >>> x = torch.ones(2, 64)
        >>> bool((q(x) - linear(x)).abs().max() < 0.05)
        True
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor | None
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    lora_down: Tensor | None
    lora_up: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Weight,
        *,
        bias: bool = True,
        transform: Transform | None = None,
        act: Format | None = None,
        rank: int = 0,
        loras: Mapping[str, tuple[int, float]] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.act = act
        self.transform = transform
        self.activation_bits: int | None = 16
        bits, groups = format.bits, format.n_groups(in_features)
        words = (out_features, n_words(in_features, bits))
        self.register_buffer("weight_packed", torch.zeros(words, dtype=torch.int32, device=device))
        stored = SCALE_DTYPES[format.scale_dtype] if isinstance(format, Affine) else torch.float8_e4m3fn
        self.register_buffer("weight_scale", torch.ones(out_features, groups, dtype=stored, device=device))
        whole = torch.ones((), dtype=torch.float32, device=device)  # a power of two, times which all scales are meant
        self.register_buffer("weight_global_scale", None if isinstance(format, Affine) else whole)
        zeros = torch.zeros(n_words(out_features, bits), groups, dtype=torch.int32, device=device)
        self.register_buffer("weight_zero_point", None if format.symmetric else zeros)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self.register_buffer("down", torch.zeros(rank, in_features, dtype=dtype, device=device) if rank else None)
        self.register_buffer("up", torch.zeros(out_features, rank, dtype=dtype, device=device) if rank else None)
        self.loras = dict(loras or {})
        rank = sum(r for r, _ in self.loras.values())
        down, up = (torch.zeros(s, dtype=dtype, device=device) for s in ((rank, in_features), (out_features, rank)))
        self.register_buffer("lora_down", down if rank else None)
        self.register_buffer("lora_up", up if rank else None)

    @classmethod
    def of(
        cls,
        weight: QTensor,
        bias: Float[Tensor, "out"] | None = None,
        *,
        transform: Transform | None = None,
        act: Format | None = None,
        low_rank: tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]] | None = None,
    ) -> "QLinear":
        """Build the layer from a rounded weight.

        Args:
            weight: Codes and scales in an `Affine` or `FP4` format, (O, I).
            bias: b, or None.
            transform: See the class.
            act: See the class.
            low_rank: The branch as (down, up).

        Raises:
            ValueError: The weight is not two-dimensional or in another format.

        Returns:
            The layer.
        """
        if not isinstance(weight.format, Affine | FP4) or weight.codes.ndim != 2:
            raise bad("QLinear.of", "weight", "a matrix in an Affine or FP4 format", f"{weight.format}, {weight.shape}")
        out, inp = weight.shape
        layer = cls(inp, out, weight.format, bias=False, transform=transform, act=act, device="meta")
        layer.weight_packed = pack(weight.codes, weight.format.bits)
        layer.weight_scale = weight.scale.contiguous()
        if isinstance(weight.format, FP4):
            layer.weight_scale, layer.weight_global_scale = split_scale(layer.weight_scale)
        if weight.zero is not None:  # zero points are packed along the outputs
            layer.weight_zero_point = pack(weight.zero.T.contiguous(), weight.format.bits).T.contiguous()
        layer.weight_shape = torch.tensor([out, inp])
        layer.bias = None if bias is None else bias.detach().clone()
        if low_rank is not None:
            layer.down, layer.up = (part.detach().clone() for part in low_rank)
        return layer

    @property
    def weight(self) -> QTensor:
        """The weight as codes and scales."""
        codes = unpack(self.weight_packed, self.format.bits, self.in_features)
        zero = None if self.format.symmetric else self.zeros()
        scale = self.weight_scale
        if self.weight_global_scale is not None:
            scale = scale.float() * self.weight_global_scale
        return QTensor(codes=codes, scale=scale, zero=zero, format=self.format)

    def zeros(self) -> Tensor:
        """Zero points unpacked, uint8 (O, G); the middle code where the format is symmetric."""
        if self.weight_zero_point is None:
            middle = 1 << (self.format.bits - 1)
            return torch.full_like(self.weight_scale, middle, dtype=torch.uint8)
        return unpack(self.weight_zero_point.T.contiguous(), self.format.bits, self.out_features).T.contiguous()

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Return the layer's output, in the dtype of `x`."""
        if self.transform is not None:
            x = self.transform(x)
        if self._on_integers(x):
            return self._integer_product(x)
        down, up, bias = self.float_parts()
        low = None if down is None else x @ down.to(x.dtype).T  # the branch reads unrounded inputs
        if self.act is not None:
            x = self.act.fake(x)
        packed, scale, zeros, bits = self._operands()
        y = kernels.w4a16(
            x, packed, scale, zeros, None if bias is None else bias.to(x.dtype),
            bits=bits, group_size=self.format.group_size or self.in_features,
            activation_bits=None if self.act is not None else self.activation_bits,
        )  # fmt: skip
        return y if low is None else y + low @ cast(Tensor, up).to(x.dtype).T

    def add_lora(
        self, name: str, down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"], scale: float = 1.0
    ) -> None:
        """Add an adapter that was trained on the float layer, in place; codes and branch stay as they are.

        It adds scale * up @ down @ x with x the layer's own input, before any transform that is in the layer. Where a
        transform was folded into the layer before, that input is no longer the float model's: quantize with
        `svdquant(fold=False)`, its default, to keep it.

        Args:
            name: By which it is scaled and removed.
            down: (r, I).
            up: (O, r).
            scale: Its strength (alpha / r, as most adapters are published).

        Raises:
            ValueError: The name is empty or taken, a shape does not fit, or a value is not finite.

        Example:
            >>> from planish.quant.formats import Affine
            >>> layer, x = QLinear.of(Affine(4, 32).encode(torch.randn(8, 64))), torch.randn(1, 64)
            >>> before = layer(x)
            >>> layer.add_lora("style", torch.randn(2, 64), torch.randn(8, 2), scale=0.5)
            >>> torch.equal(layer(x), before)
            False
            >>> layer.remove_lora("style")
            >>> torch.equal(layer(x), before)
            True
        """
        if not isinstance(name, str) or not name or name in self.loras:
            raise bad("add_lora", "name", "a name that is not taken", name)
        rank = len(down) if down.ndim == 2 else 0
        if not rank or tuple(down.shape) != (rank, self.in_features) or tuple(up.shape) != (self.out_features, rank):
            shapes = f"(r, {self.in_features}) and (out, r) with out {self.out_features}"
            raise bad("add_lora", "down, up", f"of shape {shapes}", (tuple(down.shape), tuple(up.shape)))
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise bad("add_lora", "down, up", "finite", "NaN or infinity")
        self._check_strength("add_lora", scale)
        device = self.weight_packed.device
        down, up = down.detach().to(device), up.detach().to(device)
        if self.lora_down is not None and self.lora_up is not None:  # the finest of all, so that none is changed
            wide = torch.promote_types(torch.promote_types(down.dtype, up.dtype), self.lora_down.dtype)
            down = torch.cat([self.lora_down.to(wide), down.to(wide)])
            up = torch.cat([self.lora_up.to(wide), up.to(wide)], 1)
        wide = torch.promote_types(down.dtype, up.dtype)
        self.lora_down, self.lora_up = down.to(wide, copy=True), up.to(wide, copy=True)
        self.loras[name] = rank, float(scale)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change the strength of an adapter.

        Args:
            name: Given to `add_lora`.
            scale: Its new strength.

        Raises:
            ValueError: There is no such adapter, or the strength is not finite.
        """
        self._check_lora("set_lora_scale", name)
        self._check_strength("set_lora_scale", scale)
        self.loras[name] = self.loras[name][0], float(scale)

    def remove_lora(self, name: str) -> None:
        """Take an adapter away again: with none left the layer computes what it did before, bit for bit.

        Args:
            name: Given to `add_lora`.

        Raises:
            ValueError: There is no such adapter.
        """
        self._check_lora("remove_lora", name)
        keep = torch.tensor([n != name for n, (rank, _) in self.loras.items() for _ in range(rank)])
        keep = keep.to(self.weight_packed.device)
        del self.loras[name]
        down, up = cast(Tensor, self.lora_down), cast(Tensor, self.lora_up)
        self.lora_down, self.lora_up = (down[keep], up[:, keep]) if self.loras else (None, None)

    def _check_lora(self, where: str, name: str) -> None:
        if name not in self.loras:
            raise bad(where, "name", f"one of {', '.join(self.loras) or 'none: there is no adapter'}", name)

    @staticmethod
    def _check_strength(where: str, scale: float) -> None:
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise bad(where, "scale", "a finite number", scale)

    def float_parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (down, up, bias) of the float side as it acts on the transformed input, adapters included."""
        if not self.loras:
            return self.down, self.up, self.bias
        made = cast(Tensor, self.lora_down), cast(Tensor, self.lora_up)
        sources = (*made, self.down, self.up, self.bias)
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)
        ):
            return self._adapted(*made)
        state = [None if t is None else t._version for t in sources], dict(self.loras)
        kept = self.__dict__.get("_joined")
        if kept is None or kept[1] != state or any(a is not b for a, b in zip(kept[0], sources, strict=True)):
            kept = self.__dict__["_joined"] = sources, state, self._adapted(*made)
        return cast(tuple[Tensor | None, Tensor | None, Tensor | None], kept[2])

    def _adapted(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Join branch and adapters into one, in float32 or finer."""
        wide = torch.promote_types(down.dtype, torch.float32)
        strength = [scale for rank, scale in self.loras.values() for _ in range(rank)]
        raw, up = down.to(wide), up.to(wide) * torch.tensor(strength, dtype=wide, device=up.device)
        down, bias = raw, self.bias
        if self.transform is not None:  # a matrix over the raw input becomes one over the transformed one
            down = self._rebased(raw)
            if not self.transform.linear:
                moved = up @ cast(Tensor, self.transform.bias(raw, None))
                bias = moved if bias is None else bias.to(wide) + moved
        if self.down is not None and self.up is not None:
            down, up = torch.cat([self.down.to(wide), down]), torch.cat([self.up.to(wide), up], 1)
        return down, up, bias

    def _rebased(self, raw: Tensor) -> Tensor:
        return raw if self.transform is None else self.transform.weight(raw)

    def _on_integers(self, x: Tensor) -> bool:
        """Whether the product is one of integers: where there are kernels for it, and nobody wants gradients."""
        wanted = (x, self.bias, self.down, self.up, self.lora_down, self.lora_up)
        return (
            has_integers(self.act)
            and x.dtype != torch.float64
            and x.device.type == "cpu"
            and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted))
        )

    def _integer_product(self, x: Tensor) -> Tensor:
        """Encode the (transformed) input on the grid of `act`, and multiply codes by codes."""
        down, up, bias = self.float_parts()
        packed, scale, zeros, bits = self._operands()
        first, *rest = terms(cast(Format, self.act), x)

        def product(term: Term, dtype: torch.dtype, **beside: Tensor | None) -> Tensor:
            return kernels.qgemm(
                term.codes, term.scale, packed, scale, zeros, bits=bits,
                group_size=self.format.group_size or self.in_features, x_zero=term.zero, x_group_size=term.group_size,
                dtype=dtype, **beside,
            )  # fmt: skip

        wide = torch.promote_types(x.dtype, torch.float32) if rest else x.dtype
        y = product(first, wide, bias=bias, down=down, up=up, x=None if down is None else x)
        for term in rest:
            y = y + product(term, wide)
        return y.to(x.dtype)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Packed codes, scales, zero points and bits as the kernels want them.

        Made once for as long as the stored ones are not written to. Four-bit floats are integers of five bits there:
        twice their value, at half the scale.
        """
        sources = (self.weight_packed, self.weight_scale, self.weight_zero_point, self.weight_global_scale)
        versions = None if torch.compiler.is_compiling() else [None if t is None else t._version for t in sources]
        kept = self.__dict__.get("_kept_operands")
        if versions is None:  # a graph holds no versions: they are made at each call
            return self._made_operands()
        if kept is None or kept[1] != versions or any(a is not b for a, b in zip(kept[0], sources, strict=True)):
            kept = self.__dict__["_kept_operands"] = sources, versions, self._made_operands()
        return cast(tuple[Tensor, Tensor, Tensor, int], kept[2])

    def _made_operands(self) -> tuple[Tensor, Tensor, Tensor, int]:
        if isinstance(self.format, Affine):
            return self.weight_packed, self.weight_scale, self.zeros(), self.format.bits
        weight = self.weight
        codes = (halves(weight.codes) + 16).to(torch.uint8)
        return pack(codes, 5), weight.scale / 2, torch.full_like(weight.scale, 16, dtype=torch.uint8), 5

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QLinear":
        """Move the layer, but leave the scales in the precision that the codes were chosen for."""
        scale, whole = self.weight_scale, self.weight_global_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        if whole is not None and cast(Tensor, self.weight_global_scale).dtype != whole.dtype:
            self.weight_global_scale = whole.to(self.weight_scale.device)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return the `nn.Linear` that this layer equals when `act` is None, in `dtype` at the least."""
        weight = self.weight.decode()
        weight = weight.to(torch.promote_types(weight.dtype, dtype))
        down, up, bias = self.float_parts()
        if down is not None and up is not None:
            weight = weight + up.to(weight.dtype) @ down.to(weight.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        if self.transform is not None:  # columns of the product with a basis; the offset goes to the bias
            eye = torch.eye(self.in_features, dtype=weight.dtype, device=weight.device)
            offset = self.transform(torch.zeros_like(eye[:1]))
            moved = (weight @ offset.T).squeeze(1)
            weight = weight @ (self.transform(eye) - offset).T
            if not self.transform.linear:
                bias = moved if bias is None else bias + moved
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        """Return the layer's facts for `print(model)`."""
        parts = [f"{self.in_features} -> {self.out_features}", str(self.format)]
        parts += [f"act={self.act}"] if self.act is not None else []
        parts += [f"rank={self.down.shape[0]}"] if self.down is not None else []
        parts += [f"loras={list(self.loras)}"] if self.loras else []
        return ", ".join(parts)
