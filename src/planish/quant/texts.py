"""Texts to calibrate on and to be judged on: files, or what every Python brings along.

The default to calibrate on is the language's reference, the default to be judged on the docstrings of the standard
library; no paragraph is in both.
"""

import ast
import logging
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from planish._support import bad

logger = logging.getLogger("planish")


@dataclass(frozen=True)
class Text:
    """A text and what to call it aloud.

    Attributes:
        name: As in "calibrated on ...".
        content: The text.
    """

    name: str
    content: str


def reference_text() -> Text:
    """Return the reference of the Python language, the default text to calibrate on."""
    from pydoc_data.topics import topics  # noqa: PLC0415  (half a megabyte, wanted by few)

    return Text("Python's own language reference (pydoc_data.topics)", "\n\n".join(topics[k] for k in sorted(topics)))


def library_text() -> Text:
    """Return docstrings of Python's standard library, the default text to evaluate on; none is in `reference_text`."""
    seen = {" ".join(part.split()) for part in reference_text().content.split("\n\n")}
    parts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for part in (ast.get_docstring(node) or "").split("\n\n"):
                    key = " ".join(part.split())
                    if len(key) >= 80 and key not in seen:
                        seen.add(key)
                        parts.append(part)
    return Text("docstrings of Python's standard library", "\n\n".join(parts))


def read_text(path: Path) -> Text:
    """Read a text file.

    Args:
        path: A file in UTF-8.

    Returns:
        The text.

    Raises:
        ValueError: The file cannot be read, is not UTF-8, or is empty.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise bad("planish", "data", "a text file in UTF-8", str(path)) from None
    except OSError as error:
        raise bad("planish", "data", "a readable text file", f"{path} ({error.strerror})") from None
    if not content.strip():
        raise bad("planish", "data", "a text file that is not empty", str(path))
    return Text(str(path), content)


def cut(tokenizer: Any, text: Text, *, length: int = 512) -> list[Int[Tensor, "1 tokens"]]:  # noqa: ANN401
    """Cut a text into windows of tokens.

    Args:
        tokenizer: What makes ids of text, transformers' way.
        text: The text; what lies beyond its first eight million characters is not read.
        length: Tokens of a window, >= 2. Default 512.

    Returns:
        The windows, all of that length; a shorter one only where the text is too short for any other.

    Raises:
        ValueError: The text has fewer than two tokens, or `length` is out of range.
    """
    if length < 2:
        raise bad("cut", "length", "an int >= 2", length)
    if len(text.content) > MOST_CHARACTERS:
        logger.warning("%s: only its first %d characters are read", text.name, MOST_CHARACTERS)
    made = tokenizer(text.content[:MOST_CHARACTERS], add_special_tokens=False, return_tensors="pt", verbose=False)
    ids: Tensor = made["input_ids"]
    if ids.shape[1] < 2:
        raise bad("cut", "text", "at least two tokens long", text.name)
    return [part for part in ids.split(length, 1) if part.shape[1] == min(length, ids.shape[1])]


MOST_CHARACTERS = 8_000_000


def pick(windows: Sequence[Tensor], tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Pick windows evenly over a text.

    Args:
        windows: The windows of the text, of equal length.
        tokens: How many tokens are wanted; rounded up to whole windows.

    Returns:
        The picked windows, all if there are too few, and the rest.

    Example:
        >>> import torch
        >>> picked, rest = pick([torch.tensor([[i, i]]) for i in range(6)], tokens=4)
        >>> [int(w[0, 0]) for w in picked], len(rest)
        ([0, 3], 4)
    """
    if not windows:
        return [], []
    count = min(len(windows), -(-tokens // windows[0].shape[1]))
    chosen = {i * len(windows) // count for i in range(count)}
    return [windows[i] for i in sorted(chosen)], [w for i, w in enumerate(windows) if i not in chosen]


def count(windows: Sequence[Tensor]) -> int:
    """Return how many tokens there are in windows."""
    return sum(window.numel() for window in windows)
