"""The table of claims of tests/conftest.py: a claim holds, fails, or is refused for want of a figure."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TESTS = """
import pytest

@pytest.mark.claim("paper", "more is better")
def test_more(record_claim):
    record_claim(3.0, 2.0, "dB")

@pytest.mark.claim("paper", "less is better")
def test_less(record_claim):
    record_claim(0.5, 0.25, at_least=False)

@pytest.mark.claim("paper", "says nothing")
def test_silent():
    pass
"""


def test_the_table_of_claims(tmp_path):
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_claims.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    claim(paper, sentence): a claim\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--claims-json", "claims.json"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed" in run.stdout
    assert "2 failed" in run.stdout
    assert "a claim without a figure" in run.stdout
    rows = {row["claim"]: row for row in json.loads((tmp_path / "claims.json").read_text())}
    assert rows["more is better"]["verdict"] == "holds"
    assert rows["less is better"] == {
        "paper": "paper",
        "claim": "less is better",
        "measured": "0.5",
        "needed": "<= 0.25",
        "verdict": "FAILS",
    }
    assert re.search(r"more is better +3 dB +>= 2 dB +holds", run.stdout)
