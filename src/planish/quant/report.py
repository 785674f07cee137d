"""What happened: a table that fits a terminal, and the same as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from planish.quant.experts import fused_experts
from planish.quant.stream import Block, kept

if TYPE_CHECKING:
    from planish.quant.engine import Method
    from planish.quant.sites import Site


@dataclass
class BlockReport:
    """What was done to one block.

    Attributes:
        name: The block's path in the model.
        sites: How many groups of layers that share an input were found.
        folded: For each site that was transformed, whether the transform went into the layer before.
        error: Squared error of the block's output relative to the float model's, everything before it included.
        tokens: Tokens that each expert saw, by its name in the block; empty where all layers see all.
        notes: What the method's steps say of layers, by name.
        clean: What the float block makes of its inputs; not part of the report proper.
    """

    name: str
    sites: int = 0
    folded: dict[str, bool] = field(default_factory=dict)
    error: float = math.nan
    tokens: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    clean: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, block: Block, sites: Sequence["Site"]) -> "BlockReport":
        """Start the report of a block whose sites were found and measured."""
        tokens = {name.rpartition(".")[0]: count for site in sites for name, count in site.tokens.items()}
        return cls(name=block.name or "model", sites=len(sites), tokens=tokens)

    @property
    def unseen(self) -> list[str]:
        """Experts that no token was sent to: nothing is known of what enters their last layer."""
        return [name for name, count in self.tokens.items() if not count]

    def finish(self, block: Block, clean: list[Tensor], hidden: list[Tensor]) -> None:
        """Enter the error of the block's output, padded tokens left out."""
        gap = size = 0.0
        for ours, theirs, mask in zip(hidden, clean, block.keep, strict=True):
            a, b = kept(ours, mask).float(), kept(theirs, mask).float()
            gap += (a - b).square().sum().item()
            size += b.square().sum().item()
        self.error = gap / size if size else 0.0
        self.notes = dict(block.notes) or self.notes
        self.clean = []

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise of the output, in dB."""
        return math.inf if self.error == 0 else -10 * math.log10(self.error)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON-able values."""
        fields = {k: v for k, v in asdict(self).items() if k != "clean"}
        return {**fields, "sqnr_db": self.sqnr if math.isfinite(self.sqnr) else None}


@dataclass
class Report:
    """What `quantize` did.

    Attributes:
        method: The method, as the text that would make it again.
        blocks: One entry a block.
        bytes_before: Size of the model as it came.
        bytes_after: Size of the quantized model.
        seconds: Wall time.
        left_in_float: Linear layers, and fused experts, that were not quantized, by name.
        online: Whether transforms that no layer could absorb run at the layer's input; they are left out otherwise.
        search: What the search before the pass found (loss by alpha), if there was one.

    Example:
        >>> import torch
        >>> from planish.quant import quantize, rtn
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> report = quantize(model, [torch.ones(1, 64)], rtn(group_size=32))
        >>> report.bytes_before, report.bytes_after, report.left_in_float
        (10432, 1704, [])
    """

    method: str
    blocks: list[BlockReport] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    left_in_float: list[str] = field(default_factory=list)
    online: bool = False
    search: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, model: nn.Module, method: "Method") -> "Report":
        """Start the report of a pass."""
        return cls(
            method=repr(method), bytes_before=model_bytes(model), online=method.online, search=dict(method.findings)
        )

    def add(self, entry: BlockReport) -> None:
        """Add a block."""
        self.blocks.append(entry)

    def finish(self, model: nn.Module, seconds: float) -> None:
        """Enter what is known at the end."""
        from planish.quant.sites import is_linear  # noqa: PLC0415  (sites know blocks, blocks are reported on)

        self.seconds = seconds
        self.bytes_after = model_bytes(model)
        self.left_in_float = [n for n, m in model.named_modules() if is_linear(m)] + fused_experts(model)

    def worst(self, count: int = 5) -> list[BlockReport]:
        """Return the blocks that add most error, worst first."""
        before = 0.0
        gains = []
        for entry in self.blocks:
            gains.append((entry.error - before, entry))
            before = entry.error
        return [entry for _, entry in sorted(gains, key=lambda pair: -pair[0])[:count]]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {**asdict(self), "blocks": [b.to_json() for b in self.blocks]}

    def __str__(self) -> str:
        """Return a summary that fits a terminal."""
        folds = [f for b in self.blocks for f in b.folded.values()]
        lines = [
            f"{self.method.partition('(')[0]}: {len(self.blocks)} blocks in {self.seconds:.1f} s, "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB",
        ]
        if folds:
            refused = len(folds) - sum(folds)
            rest = f", {refused} {'online' if self.online else 'left out'}" if refused else ""
            lines.append(f"transforms folded {sum(folds)} of {len(folds)}{rest}")
        if self.blocks:
            last = self.blocks[-1]
            lines.append(f"relative error after the last block {last.error:.3g} ({last.sqnr:.1f} dB)")
        lines += [f"  {entry.name}: {entry.error:.3g}" for entry in self.worst(3)]
        if self.left_in_float:
            more = " ..." if len(self.left_in_float) > 6 else ""
            lines.append(f"left in float: {', '.join(self.left_in_float[:6])}{more}")
        return "\n".join(lines)


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones counted once.

    Example:
        >>> import torch
        >>> model_bytes(torch.nn.Linear(4, 4, bias=False))
        64
    """
    seen: dict[Any, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        key = (tensor.data_ptr(), tensor.numel()) if tensor.device.type != "meta" else id(tensor)
        seen[key] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
