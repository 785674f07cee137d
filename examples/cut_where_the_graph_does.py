"""Eight bits, one scale a tensor: a modulation cut into its parts, a scale for each side of SiLU and GELU."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import planish
from planish.quant import detect_segments, segquant

generator = torch.Generator().manual_seed(0)


class Block(nn.Module):
    """What denoisers are made of: an embedding decides shift, scale and gate of everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ada = nn.LayerNorm(64, elementwise_affine=False), nn.Linear(64, 3 * 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        with torch.no_grad():
            for part, size in zip(self.ada.weight.chunk(3), (0.1, 0.5, 3.0), strict=True):
                part.copy_(torch.randn(part.shape, generator=generator) * size / 8)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Return x, moved as the embedding says."""
        shift, scale, gate = self.ada(F.silu(embedding)).chunk(3, dim=1)
        y = self.norm(x) * (1 + scale) + shift
        return x + gate * self.down(F.gelu(self.up(y)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(128, 64, generator=generator), torch.randn(128, 64, generator=generator)


torch.manual_seed(0)
model = Block().eval().requires_grad_(False)
batches, fresh = [batch() for _ in range(4)], batch()
wanted = model(*fresh)

print("read from the graph:", detect_segments(model, fresh), sep="\n  ")
pieces = {
    "neither": {"patterns": (), "sides": "off"},
    "cuts": {"sides": "off"},
    "two signed scales": {"patterns": (), "sides": "signed"},
    "two unsigned scales": {"patterns": ()},
    "cuts and two unsigned scales": {},
}
for name, choice in pieces.items():
    small = copy.deepcopy(model)
    report = planish.quantize(small, batches, segquant(**choice))
    error = (small(*fresh) - wanted).square().sum() / wanted.square().sum()
    print(f"{name:<30} {-10 * error.log10().item():5.1f} dB   {report.bytes_after:6} bytes")
for layer, note in report.blocks[0].notes.items():
    print(f"{layer}: {note['form']}; inputs rounded {note['input_roundings']} x, products {note['products']} x")
