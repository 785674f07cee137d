"""Text from a language model, for samples before and after."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from planish._support import require
from planish.quant.scores import device_of

PROMPTS = ("The capital of France is", "Water boils when", "Once upon a time, in a small village,")


class Words:
    """A streamer for `complete`: passes text on as it is made, whole words at a time.

    Args:
        tokenizer: The model's tokenizer.
        show: Called with each piece.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:  # noqa: ANN401
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] = []
        self.shown = 0
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the next ids; the first come from the prompt."""
        if self.prompt:
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        whole = max(text.rfind(" "), text.rfind("\n"))  # a word may still grow
        if whole > self.shown:
            self.show(text[self.shown : whole])
            self.shown = whole

    def end(self) -> None:
        """Show the last word."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.show(text[self.shown :])


@torch.no_grad()
def complete(model: nn.Module, tokenizer: Any, prompt: str, *, tokens: int = 32, streamer: Any = None) -> str:  # noqa: ANN401
    """Return how a model continues a text, most probable token by most probable token.

    Args:
        model: A transformers model that generates.
        tokenizer: Its tokenizer.
        prompt: The beginning.
        tokens: At most so many tokens more. Default 32.
        streamer: transformers' own, to see words as they come.

    Returns:
        The continuation, without the prompt.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    settings = {"max_new_tokens": tokens, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    made = model.generate(**inputs, **settings, pad_token_id=pad, streamer=streamer)  # type: ignore[operator]
    text: str = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def as_chat(tokenizer: Any, prompt: str) -> str:  # noqa: ANN401
    """Return a question in the form that a chat model expects, or as it is where there is no such form."""
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return text


def with_stop_strings(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn stop strings into a criterion, since transformers keeps the tokenizer from loops other than its own."""
    if settings.get("stop_strings") is None or settings.get("tokenizer") is None:
        return settings
    transformers = require("transformers", "transformers", "Decoder.generate")
    left = {k: v for k, v in settings.items() if k not in ("stop_strings", "tokenizer", "stopping_criteria")}
    found = transformers.StopStringCriteria(settings["tokenizer"], settings["stop_strings"])
    criteria = transformers.StoppingCriteriaList([*(settings.get("stopping_criteria") or ()), found])
    return {**left, "stopping_criteria": criteria}
