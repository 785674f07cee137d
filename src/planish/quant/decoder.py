"""Text without the waste: a quantized decoder in the compiled module, one call a token.

What the model is made of is found by running it once (`anatomy`); what was built from that is then run beside the model
itself, and used only if both give the same logits. Everything else stays with transformers, whose `generate` also
prepares what ours needs: settings, logits processors and stopping criteria are theirs.

The head would be a third of what a token reads from memory, so it is read as int8 rows, and those tokens that could
still be the most probable one, by a bound on what rounding lost, are computed again from the exact rows: greedy text is
that of the exact head. Sampling sees exact logits within `SPAN` of the largest; the rest carry the rounding.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from planish._support import bad, logger, warn_once
from planish.kernels import decoding, placing
from planish.quant.anatomy import UnfitError, examine
from planish.quant.assembly import as_float, assemble, dense_rows
from planish.quant.generation import with_stop_strings
from planish.quant.layers import QLinear

SPAN = 16.0  # below that, a token is a million times less probable than the best
CHUNK = 256  # tokens of a prompt that go through the model at a time
_PROMPT = 24  # tokens of the comparison with the model itself
_BOUND = {
    torch.float32: 2e-3,
    torch.float64: 2e-3,
}  # of the logits' largest; 5e-2 where the model runs in half precision
_SIMPLE = {"MaxLengthCriteria", "EosTokenCriteria"}


class _StockError(Exception):
    """Settings ask for something that stock generation does."""


class Decoder(nn.Module):
    """A causal language model of transformers, run by the compiled decoder where that gives the same logits.

    Build it when the model is final: weights are repacked then, and later changes of the model are not seen. It can be
    passed wherever the model can to be evaluated, and generates with the arguments of the model's own `generate`.

    Args:
        model: The model, in evaluation mode; it is left as it is.
        cache_dtype: Of keys and values, float32 or float16, which is half as large and rounds. Default float32.
        head: "int8" reads the head as the module's text says; "exact" reads all of it for every token. Default "int8".
        activation_bits: 16 (error about 1e-5), or 8, which is faster and costs accuracy. Default 16.
        threads: Among how many weights are divided, 1 to 64. Default those that torch uses when it is built.

    Attributes:
        model: The model.
        path: "native", or "stock" where the model runs as transformers runs it.
        why: Why the path is stock; empty if it is native.

    Raises:
        ValueError: An argument is not one of those named.

    Example:
        >>> import warnings
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
        >>> with warnings.catch_warnings(action="ignore"):
        ...     decoder = Decoder(model)
        >>> decoder.path, decoder.why
        ('stock', 'it holds no 4-bit layers')
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401  (a transformers model)
        *,
        cache_dtype: torch.dtype = torch.float32,
        head: str = "int8",
        activation_bits: int = 16,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if cache_dtype not in (torch.float32, torch.float16):
            raise bad("Decoder", "cache_dtype", "torch.float32 or torch.float16", cache_dtype)
        if head not in ("int8", "exact"):
            raise bad("Decoder", "head", "'int8' or 'exact'", head)
        if activation_bits not in (8, 16):
            raise bad("Decoder", "activation_bits", "16 or 8", activation_bits)
        if threads is not None and not 1 <= threads <= 64:
            raise bad("Decoder", "threads", "an int between 1 and 64", threads)
        self.model = model
        self.threads = threads or min(64, torch.get_num_threads())
        self.cache_dtype, self.head, self.activation_bits = cache_dtype, head, activation_bits
        self._native: decoding.NativeDecoder | None = None
        self.why = ""
        try:
            with torch.no_grad():
                self._build()
        except UnfitError as error:
            self._native, self.why = None, str(error)
            warn_once(f"Decoder: {type(model).__name__} runs as transformers runs it, since {self.why}.")

    @property
    def path(self) -> str:
        """Which way the model runs, "native" or "stock"."""
        return "stock" if self._native is None else "native"

    def __str__(self) -> str:
        """Say in a line what runs the model."""
        if self._native is None:
            return f"run by transformers: {self.why}"
        return f"run by the native decoder ({placing.instructions()}, {self._native.parts} threads)"

    @property
    def config(self) -> Any:  # noqa: ANN401
        """The model's config."""
        return self.model.config

    def _build(self) -> None:
        model = self.model
        if not any(isinstance(m, QLinear) for m in model.modules()):
            raise UnfitError("it holds no 4-bit layers")
        if placing.absence():
            raise UnfitError(f"the compiled module is absent ({placing.absence()})")
        if any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers())):
            raise UnfitError("it is not on the CPU")
        if model.training:
            raise UnfitError("it is in training mode")
        rows = model.get_input_embeddings()
        vocab = rows.num_embeddings if isinstance(rows, nn.Embedding) else 2
        prompt = torch.randint(0, vocab, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
        prompt = prompt[:, : max(2, int(getattr(model.config, "max_position_embeddings", _PROMPT) or _PROMPT))]
        parts = examine(model, prompt)
        self._head_weight = dense_rows(parts.head)
        self._head_bias, self._head_softcap = as_float(getattr(parts.head, "bias", None)), parts.head_softcap
        self._native = assemble(
            parts, self._head_weight, self._head_bias, rounded=self.head == "int8", threads=self.threads
        )
        self._verify(prompt)

    def _verify(self, prompt: Tensor) -> None:
        """Compare logits with the model's own: of a whole prompt, and token by token through the cache and the head."""
        stock = self.model(input_ids=prompt, use_cache=False).logits.float()
        native = self._all_logits(prompt, torch.ones_like(prompt, dtype=torch.bool))
        made = cast(decoding.NativeDecoder, self._native)
        steps = []
        for i, token in enumerate(prompt[0].tolist()):
            at = torch.tensor([i])
            hidden = made.step(torch.tensor([token]), at * 0, at, at * 0, activation_bits=self.activation_bits)
            steps.append(made.logits(hidden, span=float("inf")))
            best = made.best(hidden[0])
            if steps[-1][0, best] < steps[-1].max() - 1e-4 * steps[-1].abs().max():
                raise UnfitError("its head's int8 rows name another token than its exact rows")
        size = float(stock.abs().max())
        bound = (_BOUND.get(self.model.dtype, 5e-2) if self.activation_bits == 16 else 0.5) * size
        for kind, ours in (("in a prompt", native), ("token by token", torch.stack(steps, 1))):
            gap = float((ours - stock).abs().max())
            logger.debug("decoder: logits %s differ by %.2e of %.2e", kind, gap, size)
            if not gap <= bound:
                raise UnfitError(
                    f"its logits {kind} differ by {gap:.2g} from those of the model, more than {bound:.2g}"
                )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> dict[str, Tensor]:
        """Return the logits of every token, as {"logits": (batch, tokens, vocabulary)}.

        Args:
            input_ids: Token ids.
            attention_mask: 0 where there is padding, left or right; its logits are 0.
            **kwargs: For the model's own forward pass, which runs if there are any but `use_cache`.

        Returns:
            The logits, in float32.
        """
        if self._native is None or kwargs.keys() - {"use_cache"}:
            kwargs = {"use_cache": False, **kwargs}
            return {"logits": self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits}
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check(input_ids, keep)
        return {"logits": self._all_logits(input_ids, keep.bool())}

    def nll(self, input_ids: Int[Tensor, "batch tokens"], attention_mask: Tensor | None = None) -> Float[Tensor, ""]:
        """Return the mean negative log-likelihood of the tokens after the first, in nats.

        Args:
            input_ids: Token ids, two a row or more.
            attention_mask: 0 where there is padding.

        Returns:
            The mean, over all tokens that follow another.
        """
        logits = self(input_ids, attention_mask)["logits"][:, :-1].float()
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keep = (keep[:, 1:] & keep[:, :-1]).bool()
        return nn.functional.cross_entropy(logits[keep], input_ids[:, 1:][keep])

    def _check(self, ids: Tensor, mask: Tensor) -> None:
        made = cast(decoding.NativeDecoder, self._native)
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise bad("Decoder", "input_ids", "a matrix of at least one token id", tuple(ids.shape))
        if mask.shape != ids.shape:
            raise bad("Decoder", "attention_mask", f"of the shape {tuple(ids.shape)}", tuple(mask.shape))
        if int(ids.min()) < 0 or int(ids.max()) >= made.shape.vocab:
            raise bad("Decoder", "input_ids", f"in [0, {made.shape.vocab})", [int(ids.min()), int(ids.max())])
        if not bool(mask.bool().any(1).all()):
            raise bad("Decoder", "attention_mask", "1 for at least one token of each row", "a row of padding only")
        longest = int(mask.bool().sum(1).max())
        if longest > made.positions:
            raise bad("Decoder", "input_ids", f"at most {made.positions} tokens, the model's context", longest)

    def _fill(self, ids: Tensor, keep: Bool[Tensor, "batch tokens"], *, room: int, every: bool) -> Tensor:
        """Run prompts in chunks; return the hidden states of every token, or of each prompt's last."""
        made = cast(decoding.NativeDecoder, self._native)
        counts = keep.sum(1)
        made.reserve(len(ids), min(made.positions, int(counts.max()) + room), self.cache_dtype)
        slots = torch.arange(len(ids))[:, None].expand_as(ids)[keep]
        positions = (keep.long().cumsum(1) - 1)[keep]
        tokens = ids[keep]
        wanted = torch.ones_like(tokens, dtype=torch.bool) if every else positions == counts[slots] - 1
        found = []
        for part in torch.arange(len(tokens)).split(CHUNK):
            kept = wanted[part].nonzero()[:, 0]
            found.append(
                made.step(tokens[part], slots[part], positions[part], kept, activation_bits=self.activation_bits)
            )
        return torch.cat(found)

    def _all_logits(self, ids: Tensor, keep: Bool[Tensor, "batch tokens"]) -> Tensor:
        hidden = self._fill(ids, keep, room=0, every=True)
        logits = torch.zeros(*ids.shape, len(self._head_weight))
        made = nn.functional.linear(hidden, self._head_weight.float(), self._head_bias)
        if self._head_softcap:
            made = torch.tanh(made / self._head_softcap) * self._head_softcap
        logits[keep] = made
        return logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        *,
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        generator: torch.Generator | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> Int[Tensor, "batch longer"]:
        """Continue prompts, with the arguments of transformers' `generate`.

        Greedy text and sampling, with every logits processor and stopping criterion of transformers, run natively;
        other kinds of generation (beams, assistants, outputs beside the tokens) run as transformers runs them, with a
        warning.

        Args:
            input_ids: Prompts, padded on the left.
            attention_mask: 0 where there is padding.
            generator: Source of samples; default torch's own, as in transformers.
            **settings: See `transformers.GenerationConfig`; also `streamer`, `logits_processor`, `stopping_criteria`.

        Returns:
            Prompts and continuations, padded on the right.

        Raises:
            ValueError: There is no prompt, or it and the new tokens are longer than the model's context.
        """
        ids = input_ids
        if ids is None or ids.ndim != 2 or not ids.numel():
            raise bad(
                "Decoder.generate",
                "input_ids",
                "a matrix of at least one token id",
                ids if ids is None else tuple(ids.shape),
            )
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        if self._native is None:
            return self._stock(ids, mask, settings)
        self._check(ids, mask)

        def loop(_model: Any, ids: Tensor, **prepared: Any) -> Tensor:  # noqa: ANN401
            return self._loop(ids, generator=generator, streamer=settings.get("streamer"), **prepared)

        try:
            made = self.model.generate(
                input_ids=ids, attention_mask=mask, custom_generate=loop, **with_stop_strings(settings)
            )
        except _StockError as error:
            warn_once(f"Decoder.generate: {error} run as transformers runs them.")
            return self._stock(ids, mask, settings)
        return cast(Tensor, made)

    def _stock(self, ids: Tensor, mask: Tensor, settings: dict[str, Any]) -> Tensor:
        return cast(Tensor, self.model.generate(input_ids=ids, attention_mask=mask, **settings))

    def _loop(
        self,
        ids: Tensor,
        *,
        logits_processor: Any,  # noqa: ANN401
        stopping_criteria: Any,  # noqa: ANN401
        generation_config: Any,  # noqa: ANN401
        generator: torch.Generator | None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,  # noqa: ANN401
        **_: Any,  # noqa: ANN401
    ) -> Tensor:
        """Stand in for transformers' decoding loop, with what its `generate` has prepared."""
        config = generation_config
        mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
        if mode not in ("greedy_search", "sample") or config.return_dict_in_generate:
            raise _StockError(f"generation with `{mode}`, or with outputs beside the tokens, is")
        made = cast(decoding.NativeDecoder, self._native)
        keep = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        most = int(config.max_length) - ids.shape[1]
        longest = int(keep.sum(1).max())
        if longest + most > made.positions + 1:  # the last token is never run
            raise bad(
                "Decoder.generate", "max_new_tokens", f"at most {made.positions + 1 - longest}: the model's context "
                f"holds {made.positions} tokens, the prompt has {longest}", most,
            )  # fmt: skip
        simple = {type(c).__name__ for c in stopping_criteria} <= _SIMPLE
        eos = config._eos_token_tensor if hasattr(config, "_eos_token_tensor") else None
        ends = frozenset() if eos is None else frozenset(eos.flatten().tolist())
        hidden = self._fill(ids, keep, room=most, every=False)
        if len(ids) == 1 and simple and not len(logits_processor) and not config.do_sample:
            return self._greedy(ids, hidden, most, longest, ends, streamer)
        pad = getattr(config, "_pad_token_tensor", None)
        choose = self._chooser(config, logits_processor, generator)
        positions, going = keep.sum(1), torch.ones(len(ids), dtype=torch.bool)
        slots, rows = torch.arange(len(ids)), torch.arange(len(ids))
        for count in range(1, most + 1):
            tokens = choose(ids, hidden)
            if pad is not None and ends:
                tokens = torch.where(going, tokens, pad)
            ids = torch.cat([ids, tokens[:, None]], 1)
            if streamer is not None:
                streamer.put(tokens)
            if simple:
                going &= torch.tensor([t not in ends for t in tokens.tolist()])
            else:
                going &= ~stopping_criteria(ids, None)
            if not bool(going.any()) or count == most:
                break
            hidden = made.step(tokens, slots, positions, rows, activation_bits=self.activation_bits)
            positions = positions + 1
        if streamer is not None:
            streamer.end()
        return ids

    def _greedy(
        self,
        ids: Tensor,
        hidden: Tensor,
        most: int,
        position: int,
        ends: frozenset[int],
        streamer: Any,  # noqa: ANN401
    ) -> Tensor:
        """One prompt, the most probable token each time, nothing between the calls."""
        made = cast(decoding.NativeDecoder, self._native)
        token = made.best(hidden[0])
        found: list[int] = []
        while True:
            if token < 0:
                raise ValueError(f"Decoder.generate: the logits of token {position + len(found)} hold NaN or Inf.")
            found.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if token in ends or len(found) == most:
                break
            token = made.next(token, position + len(found) - 1, hidden, activation_bits=self.activation_bits)
        if streamer is not None:
            streamer.end()
        return torch.cat([ids, torch.tensor([found], dtype=ids.dtype)], 1)

    def _chooser(
        self,
        config: Any,  # noqa: ANN401
        processors: Any,  # noqa: ANN401
        generator: torch.Generator | None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        made = cast(decoding.NativeDecoder, self._native)

        def choose(ids: Tensor, hidden: Tensor) -> Tensor:
            if not config.do_sample and not len(processors):
                best = torch.tensor([made.best(row) for row in hidden])
                if int(best.min()) < 0:
                    raise ValueError("Decoder.generate: logits hold NaN or Inf.")
                return best
            scores = processors(ids, made.logits(hidden, span=SPAN))
            if not config.do_sample:
                return cast(Tensor, scores.argmax(-1))
            drawn: Tensor = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
            return drawn

        return choose
