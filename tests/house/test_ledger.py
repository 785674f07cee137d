"""papers.toml tells the truth: what is called working is there, with its test, benchmark and page."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEDGER = tomllib.loads((ROOT / "papers.toml").read_text(encoding="utf-8"))
WORKING = sorted(key for key, paper in LEDGER.items() if paper["status"] == "working")


def test_the_twenty_three_papers_are_listed_once():
    assert len(LEDGER) == 23
    assert len({paper["arxiv"] for paper in LEDGER.values()}) == 23
    assert len({paper["module"] for paper in LEDGER.values()}) == 23


@pytest.mark.parametrize("key", sorted(LEDGER))
def test_an_entry_is_well_formed(key):
    paper = LEDGER[key]
    assert re.fullmatch(r"\d{4}\.\d{5}", paper["arxiv"])
    assert paper["title"]
    assert paper["module"].startswith("planish.")
    required = {"title", "arxiv", "module", "status"}
    if paper["status"] == "working":
        required |= {"api", "tests", "bench", "docs"}
    else:
        assert paper["status"] == "planned"
    assert required <= paper.keys() <= required | {"first_title"}


@pytest.mark.parametrize("key", WORKING)
def test_what_is_called_working_is_there(key):
    paper = LEDGER[key]
    importlib.import_module(paper["module"])
    for name in paper["api"]:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    for path in [*paper["tests"], paper["bench"], paper["docs"]]:
        assert (ROOT / path).is_file(), path
    claims = "".join((ROOT / path).read_text(encoding="utf-8") for path in paper["tests"])
    assert re.search(rf'\bclaim\(\s*"{key}"', claims), f'no test of {key} carries @pytest.mark.claim("{key}", ...)'
