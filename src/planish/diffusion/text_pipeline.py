"""From texts to texts by diffusion: tokenizer, embeddings, network and scheduler, kept in one folder."""

import json
import shutil
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from planish._support import CheckpointError, bad, require, warn_once
from planish.diffusion.embeddings import EmbeddingSpace
from planish.diffusion.smoothie import SmoothieScheduler
from planish.diffusion.symbols import SymbolTokenizer
from planish.diffusion.text_model import TextDiffusionModel
from planish.diffusion.text_schedulers import EmbeddingGaussianScheduler, SimplexScheduler, TextScheduler
from planish.quant.files import write_shard

_SCHEDULERS = {s.__name__: s for s in (SmoothieScheduler, EmbeddingGaussianScheduler, SimplexScheduler)}


@runtime_checkable
class Tokenizer(Protocol):
    """What a pipeline needs of a tokenizer: those of transformers have it."""

    pad_token_id: Any
    eos_token_id: Any

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return a text."""
        ...


@dataclass(frozen=True)
class TextDiffusionOutput:
    """What a pipeline writes.

    Attributes:
        texts: One a source.
        ids: The tokens, (B, m), ends and padding included.
        steps: Calls of the network: fewer than asked where `patience` stopped early.
    """

    texts: list[str]
    ids: Tensor
    steps: int


class TextDiffusionPipeline:
    """Write a text for each source, all tokens at once, from noise.

    Args:
        tokenizer: Of the texts: of transformers, a `SymbolTokenizer`, or anything with `encode`, `decode`,
            `pad_token_id` and `eos_token_id`.
        space: Embeddings of the tokenizer's tokens.
        model: The network.
        scheduler: What it was trained with; it is set to work in `space`.
        source_tokenizer: Of the sources; default `tokenizer`.

    Raises:
        ValueError: Tokenizer, embeddings and network do not fit each other.

    Example:
        >>> from planish.diffusion import SmoothieScheduler, TextDiffusionConfig
        >>> letters = SymbolTokenizer("abc")
        >>> space = EmbeddingSpace(torch.randn(5, 4))
        >>> sizes = TextDiffusionConfig(4, 3, source_vocab_size=5, hidden_size=8, num_layers=1, num_heads=2)
        >>> pipeline = TextDiffusionPipeline(letters, space, TextDiffusionModel(sizes), SmoothieScheduler())
        >>> len(pipeline(["ab", ""], num_inference_steps=3).texts)  # of a network that learnt nothing
        2
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        space: EmbeddingSpace,
        model: TextDiffusionModel,
        scheduler: TextScheduler,
        source_tokenizer: Tokenizer | None = None,
    ) -> None:
        where = "TextDiffusionPipeline"
        for name, given in (("tokenizer", tokenizer), ("source_tokenizer", source_tokenizer or tokenizer)):
            if not isinstance(given, Tokenizer):
                raise bad(where, name, "one with encode, decode, pad_token_id and eos_token_id", type(given).__name__)
            if given.pad_token_id is None:
                raise bad(where, name, "one with a pad", "pad_token_id = None")
        if isinstance(tokenizer, Sized):
            size = len(tokenizer)
            if size > space.vocab_size or not space.ignored[size:].all():
                wanted = f"of the tokenizer's {size} tokens, the rest in `ignore_ids`"
                raise bad(where, "space", wanted, f"{space.vocab_size} tokens")
        if space.dim != model.config.embedding_dim:
            raise bad(where, "space", f"of the model's {model.config.embedding_dim} features", space.dim)
        self.tokenizer, self.space, self.model = tokenizer, space, model
        self.source_tokenizer = source_tokenizer or tokenizer
        self.scheduler = scheduler.set_space(space)

    @property
    def eos_token_id(self) -> int | None:
        """The token at which texts end; None where the tokenizer has none, so that they end at padding alone."""
        end = self.tokenizer.eos_token_id
        return getattr(self.tokenizer, "sep_token_id", None) if end is None else end

    @torch.no_grad()
    def __call__(
        self,
        texts: str | Sequence[str],
        num_inference_steps: int = 200,
        max_length: int | None = None,
        guidance_scale: int | float = 1.0,
        patience: int | None = None,
        generator: torch.Generator | None = None,
    ) -> TextDiffusionOutput:
        """Write a text for each source.

        Args:
            texts: Sources, possibly empty ones; those longer than the model's context are cut, with a warning.
            num_inference_steps: Calls of the network, >= 1. Default 200, the paper's.
            max_length: Positions, at most the model's; default the model's.
            guidance_scale: How far to go from a prediction without a source to that with it: 1 for just that. Needs a
                model trained with `source_dropout`. Default 1.
            patience: Stop when no token changed for that many steps, >= 1; None for never. Default None.
            generator: Source of noise; default torch's own.

        Returns:
            Texts, ids and the number of steps.

        Raises:
            ValueError: An argument is out of range, or there is no source.
        """
        where, most = "TextDiffusionPipeline", self.model.config.max_length
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = most if max_length is None else max_length
        if not texts:
            raise bad(where, "texts", "at least one", texts)
        if not 1 <= length <= most:
            raise bad(where, "max_length", f"in [1, {most}], the model's", length)
        if patience is not None and patience < 1:
            raise bad(where, "patience", "at least 1 or None", patience)
        self.model.eval()
        self.scheduler.set_timesteps(num_inference_steps)
        conditions = [self._encoded(texts)]
        if guidance_scale != 1:
            conditions.append(self.model.encode(len(texts)))
        state = self.scheduler.prior((len(texts), length), generator)
        previous: Tensor | None = None
        ids, steps, stable = torch.full((len(texts), length), -1, device=self.space.weight.device), 0, 0
        for t in self.scheduler.timesteps.tolist():
            seen = self.scheduler.scale_model_input(state, t)
            held = previous if self.model.config.self_conditioning else None
            predictions = [
                self.model(
                    seen, torch.tensor([t]), self_cond=held, encoder_hidden_states=h, encoder_attention_mask=mask
                )
                for h, mask in conditions
            ]
            previous = predictions[-1] + guidance_scale * (predictions[0] - predictions[-1])
            if len(predictions) == 1:
                previous = predictions[0]
            now, steps = self.space.nearest(previous), steps + 1
            stable = stable + 1 if torch.equal(now, ids) else 0
            ids = now
            if patience is not None and stable >= patience:
                break
            state = self.scheduler.step(previous, t, state, generator, return_dict=False)[0]
        return TextDiffusionOutput([self.decode(row) for row in ids.tolist()], ids, steps)

    def _encoded(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode sources, padded to the longest."""
        device, most = self.model.positions.device, self.model.config.max_source_length
        rows = [list(self.source_tokenizer.encode(text)) for text in texts]
        if any(len(row) > most for row in rows):
            warn_once(f"TextDiffusionPipeline: a source is longer than the model's {most} positions; the rest is cut.")
        width = min(max(map(len, rows)), most)
        if not width:
            return self.model.encode(len(texts))
        pad = self.source_tokenizer.pad_token_id
        ids = torch.tensor([(row + [pad] * width)[:width] for row in rows], device=device)
        mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows], device=device)
        size = self.model.config.source_vocab_size
        if size is None:
            return self.model.encode(len(texts), None, self.space.encode(ids), mask)
        if int(ids.max()) >= size:
            raise bad("TextDiffusionPipeline", "texts", f"of the model's {size} source tokens", int(ids.max()))
        return self.model.encode(len(texts), ids, None, mask)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens up to the first end, without padding and special tokens.

        Args:
            ids: Tokens.
        """
        ids = list(ids)
        if self.eos_token_id in ids:
            ids = ids[: ids.index(self.eos_token_id)]
        special = {self.tokenizer.pad_token_id, *getattr(self.tokenizer, "all_special_ids", ())}
        return self.tokenizer.decode([i for i in ids if i not in special])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all parts into a new folder, which appears whole or not at all.

        Args:
            folder: It is not there yet. Tokenizers are written if they have `save_pretrained`.

        Raises:
            CheckpointError: The folder is there already, or the model was quantized.
        """
        folder = Path(folder)
        if folder.exists():
            raise CheckpointError(f"TextDiffusionPipeline: {folder} is there already.", "exists")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self.model.save_pretrained(partial / "model")
            self.scheduler.save_pretrained(partial / "scheduler")
            tensors = {"weight": self.space.weight.contiguous(), "ignored": self.space.ignored}
            write_shard(partial / "space.safetensors", tensors)
            kinds = {}
            tokenizers = {"tokenizer": self.tokenizer, "source_tokenizer": self.source_tokenizer}
            if self.source_tokenizer is self.tokenizer:
                del tokenizers["source_tokenizer"]
            for name, tokenizer in tokenizers.items():
                if hasattr(tokenizer, "save_pretrained"):
                    tokenizer.save_pretrained(partial / name)
                kinds[name] = "symbols" if isinstance(tokenizer, SymbolTokenizer) else "transformers"
            about = {"scheduler": type(self.scheduler).__name__, "tokenizers": kinds}
            (partial / "pipeline.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        source_tokenizer: Tokenizer | None = None,
        model: TextDiffusionModel | None = None,
    ) -> "TextDiffusionPipeline":
        """Read what `save_pretrained` wrote.

        Args:
            folder: The folder.
            tokenizer: In the place of the one written; needed where none could be.
            source_tokenizer: Likewise.
            model: Likewise, such as a quantized one.

        Raises:
            CheckpointError: It is no such folder, or a part is missing.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
            kind = _SCHEDULERS[about["scheduler"]]
            kinds = dict(about["tokenizers"])
            parts = load_file(folder / "space.safetensors")
            space = EmbeddingSpace(
                parts["weight"], standardize=None, ignore_ids=parts["ignored"].nonzero().flatten().tolist()
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"TextDiffusionPipeline: {folder} cannot be read: {error!r}", "unreadable") from None
        given: dict[str, Any] = {"tokenizer": tokenizer, "source_tokenizer": source_tokenizer}
        for name, kept in kinds.items():
            if given[name] is None and not (folder / name).is_dir():
                raise CheckpointError(f"TextDiffusionPipeline: no {name} in {folder}; give one.", "missing")
            if given[name] is None:
                given[name] = _tokenizer(folder / name, kept)
        scheduler = kind.from_pretrained(folder / "scheduler")
        model = TextDiffusionModel.from_pretrained(folder / "model") if model is None else model
        return cls(given["tokenizer"], space, model, scheduler, given["source_tokenizer"])


def _tokenizer(folder: Path, kind: str) -> Tokenizer:
    if kind == "symbols":
        return SymbolTokenizer.from_pretrained(folder)
    auto = require("transformers", "transformers", "The tokenizer of this pipeline").AutoTokenizer
    read: Tokenizer = auto.from_pretrained(folder)
    return read
