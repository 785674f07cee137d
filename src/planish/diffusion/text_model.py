"""A transformer that sees noisy tokens, a time and a source text, and predicts the tokens' embeddings."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from planish._support import CheckpointError, bad
from planish.diffusion.folders import written
from planish.quant.files import write_shard

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class TextDiffusionConfig:
    """Describe a `TextDiffusionModel`; defaults are the paper's, about 100 million parameters.

    Args:
        embedding_dim: Features of the token embeddings, D.
        max_length: Most positions of a text.
        source_vocab_size: Vocabulary of the sources, which gets embeddings of its own; None where sources come as
            embeddings of the same space. Default None.
        max_source_length: Most positions of a source. Default 64.
        hidden_size: Width, a multiple of twice `num_heads`. Default 768.
        num_layers: Blocks of the decoder. Default 12.
        num_encoder_layers: Blocks for the source; 0 for none. Default 6.
        num_heads: Heads of attention. Default 12.
        intermediate_size: Width inside a block's second half; None for four times the width. Default None.
        dropout: In [0, 1). Default 0.
        self_conditioning: Show the network its previous prediction. Default False.

    Raises:
        ValueError: A size is below 1, or the width does not divide.

    Example:
        >>> TextDiffusionConfig(embedding_dim=8, max_length=10, hidden_size=32, num_heads=2).intermediate
        128
    """

    embedding_dim: int
    max_length: int
    source_vocab_size: int | None = None
    max_source_length: int = 64
    hidden_size: int = 768
    num_layers: int = 12
    num_encoder_layers: int = 6
    num_heads: int = 12
    intermediate_size: int | None = None
    dropout: int | float = 0.0
    self_conditioning: bool = False

    def __post_init__(self) -> None:
        where = "TextDiffusionConfig"
        least = {"num_encoder_layers": 0, "dropout": 0}
        for name, value in asdict(self).items():
            if value is not None and value < least.get(name, 0 if name == "self_conditioning" else 1):
                raise bad(where, name, f"at least {least.get(name, 1)}", value)
        if not self.dropout < 1:
            raise bad(where, "dropout", "in [0, 1)", self.dropout)
        if self.hidden_size % (2 * self.num_heads):
            raise bad(where, "hidden_size", f"a multiple of twice {self.num_heads} heads", self.hidden_size)

    @property
    def intermediate(self) -> int:
        """Width inside a block's second half."""
        return self.intermediate_size or 4 * self.hidden_size


class Attention(nn.Module):
    """Attend from positions to positions, by four linear layers."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return what `x` reads of `memory` where `mask` is true."""
        q, k, v = (
            layer(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.q_proj, x), (self.k_proj, memory), (self.v_proj, memory))
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One block: attention to the positions, attention to a source if there is one, two linear layers."""

    def __init__(self, config: TextDiffusionConfig, *, cross: bool = False, timed: bool = False) -> None:
        super().__init__()
        size = config.hidden_size
        self.time_proj = nn.Linear(size, size) if timed else None
        self.norm, self.attention = nn.LayerNorm(size), Attention(size, config.num_heads)
        self.cross_norm = nn.LayerNorm(size) if cross else None
        self.cross_attention = Attention(size, config.num_heads) if cross else None
        self.mlp_norm, self.up_proj = nn.LayerNorm(size), nn.Linear(size, config.intermediate)
        self.down_proj, self.dropout = nn.Linear(config.intermediate, size), nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        time: Tensor | None = None,
    ) -> Tensor:
        """Return the next hidden states."""
        if self.time_proj is not None and time is not None:
            x = x + self.time_proj(time)
        seen = self.norm(x)
        x = x + self.dropout(self.attention(seen, seen, mask, causal))
        if self.cross_attention is not None and self.cross_norm is not None and memory is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory, memory_mask))
        changed: Tensor = self.dropout(self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x)))))
        return x + changed


class TextDiffusionModel(nn.Module):
    """Predict the embeddings of a text's tokens from a noisy view of them.

    Inputs of the first half's blocks are added to those of the second, as in a U-Net, and a linear map of the time to
    all. A learnt position stands before every source, so that it may be empty.

    Args:
        config: Sizes.

    Example:
        >>> config = TextDiffusionConfig(8, 5, source_vocab_size=9, hidden_size=16, num_layers=2, num_heads=2)
        >>> model = TextDiffusionModel(config)
        >>> source = torch.tensor([[4, 2, 7]])
        >>> model(torch.randn(1, 5, 8), torch.tensor([0.5]), encoder_input_ids=source).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, config: TextDiffusionConfig) -> None:
        super().__init__()
        self.config, size = config, config.hidden_size
        self.input_proj = nn.Linear(config.embedding_dim, size)
        self.self_cond_proj = nn.Linear(config.embedding_dim, size, bias=False) if config.self_conditioning else None
        self.positions = nn.Parameter(0.02 * torch.randn(config.max_length, size))
        self.source_positions = nn.Parameter(0.02 * torch.randn(config.max_source_length + 1, size))
        if config.source_vocab_size is not None:
            self.source_embedding: nn.Module = nn.Embedding(config.source_vocab_size, size)
        else:
            self.source_embedding = nn.Linear(config.embedding_dim, size)
        self.time = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))
        self.encoder = nn.ModuleList([Block(config) for _ in range(config.num_encoder_layers)])
        self.encoder_norm = nn.LayerNorm(size)
        self.blocks = nn.ModuleList([Block(config, cross=True, timed=True) for _ in range(config.num_layers)])
        self.norm, self.output_proj = nn.LayerNorm(size), nn.Linear(size, config.embedding_dim)

    def encode(
        self,
        batch: int,
        encoder_input_ids: Int[Tensor, "B S"] | None = None,
        encoder_embeds: Float[Tensor, "B S D"] | None = None,
        encoder_attention_mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode sources once for many steps; without any, the learnt position alone.

        Args:
            batch: B, the number of texts.
            encoder_input_ids: Sources, for a model with a vocabulary of its own for them.
            encoder_embeds: Sources, for a model without.
            encoder_attention_mask: Where sources are no padding; default everywhere.

        Returns:
            Hidden states (B, 1 + S, hidden), and a mask over them.

        Raises:
            ValueError: The source is of the other kind, of another batch, or longer than `max_source_length`.
        """
        where, dtype = "TextDiffusionModel", self.source_positions.dtype
        ids = self.config.source_vocab_size is not None
        source = encoder_input_ids if ids else encoder_embeds
        if (encoder_embeds if ids else encoder_input_ids) is not None:
            name = ("encoder_embeds", "encoder_input_ids") if ids else ("encoder_input_ids", "encoder_embeds")
            raise bad(where, name[0], f"None: this model takes sources as `{name[1]}`", "a tensor")
        x = torch.zeros(batch, 1, self.config.hidden_size, dtype=dtype, device=self.source_positions.device)
        mask = torch.ones(batch, 1, dtype=torch.bool, device=x.device)
        if source is not None:
            if source.shape[0] != batch or source.shape[1] > self.config.max_source_length:
                wanted = f"of {batch} rows and at most {self.config.max_source_length} positions"
                raise bad(where, "source", wanted, tuple(source.shape))
            rows = self.source_embedding(source if ids else source.to(dtype))
            x = torch.cat([x, rows.to(dtype)], 1)
            seen = torch.ones_like(source if ids else source[..., 0], dtype=torch.bool)
            seen = seen if encoder_attention_mask is None else encoder_attention_mask.bool()
            mask = torch.cat([mask, seen], 1)
        x = x + self.source_positions[: x.shape[1]]
        for block in self.encoder:
            x = block(x, mask=mask[:, None, None])
        return self.encoder_norm(x), mask

    def forward(
        self,
        inputs_embeds: Float[Tensor, "B m D"],
        timestep: Float[Tensor, "*B"],
        encoder_input_ids: Int[Tensor, "B S"] | None = None,
        encoder_embeds: Float[Tensor, "B S D"] | None = None,
        encoder_attention_mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"] | None = None,
        self_cond: Float[Tensor, "B m D"] | None = None,
        encoder_hidden_states: Float[Tensor, "B T H"] | None = None,
    ) -> Float[Tensor, "B m D"]:
        """Return the predicted embeddings.

        Args:
            inputs_embeds: What the scheduler shows: its `scale_model_input`.
            timestep: Times in [0, 1], one or one a text.
            encoder_input_ids: See `encode`.
            encoder_embeds: See `encode`.
            encoder_attention_mask: See `encode`; with `encoder_hidden_states` the mask that came with them.
            self_cond: The previous prediction, for a model with self-conditioning; None for zeros.
            encoder_hidden_states: What `encode` returned, in the place of a source.

        Raises:
            ValueError: There are more positions than `max_length`, a time is outside [0, 1], or as for `encode`.
        """
        where, (batch, length, _) = "TextDiffusionModel", inputs_embeds.shape
        if not 1 <= length <= self.config.max_length:
            raise bad(where, "inputs_embeds", f"of 1 to {self.config.max_length} positions", length)
        times = timestep.to(self.positions.device).expand(batch)
        if not bool(((times >= 0) & (times <= 1)).all()):
            raise bad(where, "timestep", "in [0, 1]", timestep.tolist())
        memory, mask = encoder_hidden_states, encoder_attention_mask
        if memory is None:
            memory, mask = self.encode(batch, encoder_input_ids, encoder_embeds, encoder_attention_mask)
        dtype = self.positions.dtype
        x = self.input_proj(inputs_embeds.to(dtype)) + self.positions[:length]
        if self_cond is not None:
            if self.self_cond_proj is None:
                raise bad(where, "self_cond", "None: the model has no self-conditioning", "a tensor")
            x = x + self.self_cond_proj(self_cond.to(dtype))
        t = F.silu(self.time(_sinusoids(times, self.config.hidden_size).to(dtype)))[:, None]
        seen = None if mask is None else mask.bool()[:, None, None]
        inputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            mirror = len(self.blocks) - 1 - i
            x = x + inputs[mirror] if mirror < i else x
            inputs.append(x)
            x = block(x, memory, seen, time=t)
        return self.output_proj(self.norm(x))  # type: ignore[no-any-return]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write sizes and weights into a folder.

        Args:
            folder: It is made where it is not there.

        Raises:
            CheckpointError: The model was quantized: `planish.save` writes it.
        """
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        with torch.device("meta"):
            plain = TextDiffusionModel(self.config).state_dict()
        if state.keys() != plain.keys():
            raise CheckpointError(
                "TextDiffusionModel: the model was quantized; write it by planish.save.", "unsupported"
            )
        with written(Path(folder) / _WEIGHTS) as path:
            write_shard(path, state)
        with written(Path(folder) / _CONFIG) as path:
            path.write_text(json.dumps(asdict(self.config), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextDiffusionModel":
        """Read what `save_pretrained` wrote.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: Sizes or weights are missing, unreadable, or do not fit each other.
        """
        folder = Path(folder)
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise CheckpointError(f"TextDiffusionModel: no {name} in {folder}.", "missing")
        try:
            config = TextDiffusionConfig(**json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
            state = load_file(folder / _WEIGHTS)
        except (ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"TextDiffusionModel: {folder} cannot be read: {error}", "unreadable") from None
        with torch.device("meta"):
            model = cls(config)
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"TextDiffusionModel: weights do not fit: {error}", "shape") from None
        return model.eval()


def _sinusoids(t: Tensor, size: int) -> Tensor:
    rates = torch.exp(torch.arange(size // 2, device=t.device) * (-math.log(10_000) / (size // 2)))
    angles = 1000 * t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)
