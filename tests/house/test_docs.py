"""The documentation builds without a warning, holds every public name, and needs no network."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = sorted(p.parent.name for p in (ROOT / "src" / "planish").glob("*/__init__.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_on_its_page(site, room):
    page = (site / "reference" / room / "index.html").read_text(encoding="utf-8")
    names = importlib.import_module(f"planish.{room}").__all__
    assert [name for name in names if f'id="planish.{room}.{name}"' not in page] == []


@pytest.mark.slow
def test_the_pages_load_nothing_from_the_network(site):
    loads = re.compile(
        r"""<(?:script|img|iframe)[^>]+src=["'](?:https?:)?//|<link[^>]+(?:stylesheet|preconnect)[^>]+//"""
    )
    assert [str(p) for p in site.rglob("*.html") if loads.search(p.read_text(encoding="utf-8"))] == []
