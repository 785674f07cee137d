"""Every public name: documented, with an example that runs, on a page of the reference."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from planish import _support

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "planish"
ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
MODULES = sorted(
    ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for p in PACKAGE.rglob("*.py")
)
EXAMPLE_LINES = 25


def public() -> list[tuple[str, str]]:
    names = []
    for module in ["planish", *(f"planish.{room}" for room in ROOMS)]:
        names += [(module, name) for name in importlib.import_module(module).__all__]
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_is_public_and_has_a_page(room):
    module = importlib.import_module(f"planish.{room}")
    assert module.__doc__, f"planish.{room} has no docstring"
    page = ROOT / "docs" / "reference" / f"{room}.md"
    assert f"::: planish.{room}\n" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("module", "name"), public())
def test_a_public_name_is_documented_with_an_example(module, name):
    thing = getattr(importlib.import_module(module), name)
    if not callable(thing):
        return  # a constant is explained where it is defined
    text = inspect.getdoc(thing) or ""
    assert text, "no docstring"
    if inspect.isabstract(thing):
        return  # its concrete kinds show how it is used
    assert re.search(r"^Example:$", text, re.MULTILINE), "no Example section"
    examples = doctest.DocTestParser().get_examples(text)
    assert examples, "an Example without >>>"
    assert sum(e.source.count("\n") + e.want.count("\n") for e in examples) <= EXAMPLE_LINES
    parameters = inspect.signature(thing).parameters if inspect.isfunction(thing) else {}
    undocumented = [p for p in parameters if not re.search(rf"\b\*{{0,2}}{p}:", text) and p not in {"self", "cls"}]
    assert not undocumented, f"arguments without a line in Args: {undocumented}"


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_run(module):
    try:
        loaded = importlib.import_module(module)
    except _support.MissingExtra as missing:
        pytest.skip(str(missing))
    torch.manual_seed(0)
    result = doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, "the failed examples are in the captured output"
