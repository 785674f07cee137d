"""Shared by all tests: fixed seeds, shapes checked on demand, and the table of claims."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# The same examples in every run: a failure is a fact about the code, not about the day.
settings.register_profile("planish", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("planish")

_CLAIM = "planish_claim"


def pytest_addoption(parser):
    parser.addoption(
        "--shapes", action="store_true", help="check the shapes and types of every call (jaxtyping, beartype)"
    )
    parser.addoption("--claims-json", metavar="PATH", help="write the table of claims to PATH")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers that spin for each other's cores are several times slower
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
        torch.set_num_threads(1)
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        install_import_hook("planish", "beartype.beartype")


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)  # other people's code reads the global state
    torch.manual_seed(0)


@pytest.fixture
def record_claim(request):
    """Record a claim's figures and hold the test to them: record_claim(measured, needed, "dB").

    `measured` must be at least `needed`, or at most with at_least=False; needs @pytest.mark.claim(paper, sentence).
    """
    marker = request.node.get_closest_marker("claim")
    if marker is None:
        raise pytest.UsageError(f"{request.node.nodeid}: record_claim needs @pytest.mark.claim(paper, sentence)")
    paper, sentence = marker.args

    def record(measured: float, needed: float, unit: str = "", *, at_least: bool = True) -> None:
        holds = measured >= needed if at_least else measured <= needed
        row = {
            "paper": paper,
            "claim": sentence,
            "measured": f"{measured:.4g} {unit}".strip(),
            "needed": f"{'>=' if at_least else '<='} {needed:.4g} {unit}".strip(),
            "verdict": "holds" if holds else "FAILS",
        }
        request.node.user_properties.append((_CLAIM, row))
        assert holds, f"{paper}: {sentence}: measured {row['measured']}, needed {row['needed']}"

    return record


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and report.passed and item.get_closest_marker("claim"):
        if not any(name == _CLAIM for name, _ in item.user_properties):
            report.outcome, report.longrepr = "failed", f"{item.nodeid}: a claim without a figure: call record_claim"
    return report


def pytest_terminal_summary(terminalreporter, config):
    rows = [
        row
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.when == "call"
        for name, row in report.user_properties
        if name == _CLAIM
    ]
    rows.sort(key=lambda row: (row["paper"], row["claim"], row["measured"]))
    if path := config.getoption("--claims-json"):
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)
    if rows:
        terminalreporter.section("claims")
        columns = ("paper", "claim", "measured", "needed", "verdict")
        widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
        for row in [dict(zip(columns, columns, strict=True)), *rows]:
            terminalreporter.line("  ".join(row[c].ljust(w) for c, w in zip(columns, widths, strict=True)).rstrip())


@pytest.fixture
def unchecked(request: pytest.FixtureRequest) -> None:
    """Skip where shapes are checked: the checks cannot be part of a compiled graph."""
    if request.config.getoption("--shapes"):
        pytest.skip("checked functions cannot be compiled")
