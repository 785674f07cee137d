"""The honest upper line: a transformer of the same blocks and size that writes one phone after the other."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.diffusion import TextDiffusionConfig
from planish.diffusion.text_model import Block


class Autoregressive(nn.Module):
    """Encoder and decoder of the blocks of `TextDiffusionModel`, with token embeddings in and logits out."""

    def __init__(self, config: TextDiffusionConfig, vocab_size: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.tokens = nn.Embedding(vocab_size + 1, size)  # one more to begin with
        self.letters = nn.Embedding(config.source_vocab_size or 1, size)
        self.positions = nn.Parameter(0.02 * torch.randn(config.max_length, size))
        self.source_positions = nn.Parameter(0.02 * torch.randn(config.max_source_length, size))
        self.encoder = nn.ModuleList([Block(config) for _ in range(config.num_encoder_layers)])
        self.blocks = nn.ModuleList([Block(config, cross=True) for _ in range(config.num_layers)])
        self.encoder_norm, self.norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.head = nn.Linear(size, vocab_size)

    def encode(self, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states of letters, and where they are no padding."""
        mask = (sources != 0)[:, None, None]
        x = self.letters(sources) + self.source_positions[: sources.shape[1]]
        for block in self.encoder:
            x = block(x, mask=mask)
        return self.encoder_norm(x), mask

    def forward(self, given: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return logits of the token after each of those given."""
        x = self.tokens(given) + self.positions[: given.shape[1]]
        for block in self.blocks:
            x = block(x, memory, mask, causal=True)
        return self.head(self.norm(x))

    @torch.no_grad()
    def write(self, sources: Tensor) -> Tensor:
        """Return the most likely token after each other, (B, max_length); padding after the end."""
        self.eval()
        memory, mask = self.encode(sources)
        found = torch.full((len(sources), 1), self.tokens.num_embeddings - 1)
        ended = torch.zeros(len(sources), dtype=torch.bool)
        for _ in range(self.config.max_length):
            token = self(found, memory, mask)[:, -1].argmax(-1).masked_fill(ended, 0)
            ended |= token == 1
            found = torch.cat([found, token[:, None]], 1)
        return found[:, 1:]


def train(
    model: Autoregressive, sources: Tensor, targets: Tensor, *, steps: int, batch_size: int, lr: float, seed: int
) -> None:
    """Train by the steps, batches, rate and average of the diffusion models; cross-entropy up to the end."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)
    warm = 0.05 * steps
    model.train()
    for step in range(steps):
        rows = torch.randint(len(targets), (batch_size,), generator=generator)
        begin = torch.full((batch_size, 1), model.tokens.num_embeddings - 1)
        logits = model(torch.cat([begin, targets[rows, :-1]], 1), *model.encode(sources[rows]))
        loss = F.cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), ignore_index=0)
        falling = 0.5 + 0.5 * math.cos(math.pi * max(0.0, step - warm) / (steps - warm))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warm) * falling
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, p in zip(average, parameters, strict=True):
                mean.lerp_(p, 1 - min(0.999, (1 + step) / (10 + step)))
    with torch.no_grad():
        for mean, p in zip(average, parameters, strict=True):
            p.copy_(mean)
