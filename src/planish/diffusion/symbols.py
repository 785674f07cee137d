"""A vocabulary of symbols: letters, phones, anything that needs no learnt segmentation."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from planish._support import CheckpointError, bad
from planish.diffusion.folders import written

_FILE = "symbols.json"


class SymbolTokenizer:
    """Number symbols, after a pad (0) and an end (1).

    Args:
        symbols: The vocabulary, each once.
        separator: What stands between the symbols of a text; "" for letters. Default "".

    Raises:
        ValueError: A symbol occurs twice, is empty or holds the separator.

    Attributes:
        pad_token_id: 0.
        eos_token_id: 1.

    Example:
        >>> phones = SymbolTokenizer(["AA", "B", "K"], separator=" ")
        >>> phones.encode("B AA K"), phones.decode([3, 2, 4])
        ([3, 2, 4], 'B AA K')
    """

    pad_token_id = 0
    eos_token_id = 1

    def __init__(self, symbols: Iterable[str], separator: str = "") -> None:
        self.symbols, self.separator = list(symbols), separator
        self._ids = {symbol: i + 2 for i, symbol in enumerate(self.symbols)}
        wrong = [s for s in self.symbols if not s or (separator and separator in s)]
        if len(self._ids) != len(self.symbols) or wrong:
            raise bad(
                "SymbolTokenizer", "symbols", "different, not empty and without the separator", wrong or "a repeat"
            )

    def __len__(self) -> int:
        return len(self.symbols) + 2

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's symbols.

        Args:
            text: Symbols with the separator between them.

        Raises:
            ValueError: A symbol is not of the vocabulary.
        """
        parts = (text.split(self.separator) if text else []) if self.separator else list(text)
        try:
            return [self._ids[part] for part in parts]
        except KeyError as error:
            raise bad("SymbolTokenizer.encode", "text", "made of the vocabulary's symbols", error.args[0]) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without pads and ends.

        Args:
            ids: Ids.
        """
        return self.separator.join(self.symbols[i - 2] for i in ids if i >= 2)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the vocabulary into a folder.

        Args:
            folder: It is made where it is not there.
        """
        with written(Path(folder) / _FILE) as path:
            text = json.dumps({"symbols": self.symbols, "separator": self.separator}, ensure_ascii=False, indent=1)
            path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SymbolTokenizer":
        """Read what `save_pretrained` wrote.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: It holds no such vocabulary.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise CheckpointError(f"SymbolTokenizer: no {_FILE} in {folder}.", "missing")
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return cls(map(str, kept["symbols"]), str(kept["separator"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"SymbolTokenizer: {path} cannot be read: {error}", "unreadable") from None
