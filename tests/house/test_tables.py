"""The tables in the README and the docs are those that the results give, and tell the truth of what they are given."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.harness import Row

ROOT = Path(__file__).parents[2]
CASE = tables.HEADLINE


def test_the_committed_tables_are_what_the_results_say():
    pytest.importorskip("typer")
    stale = [
        name
        for name in tables.PAGES
        if (text := (ROOT / name).read_text(encoding="utf-8")) != tables.rewrite(text, tables.Results())
    ]
    assert not stale, "run `python -m benchmarks.tables`"


def test_pages_with_a_marker_are_found():
    assert {"README.md", "docs/papers/smoothquant_plus.md", "docs/reference/cli.md"} <= set(tables.PAGES)


@pytest.fixture
def results(tmp_path):
    def write(machine: str, date: str, benchmark: str, rows: list[Row], skipped: dict[str, str]) -> None:
        folder = tmp_path / "results" / machine
        folder.mkdir(parents=True, exist_ok=True)
        run = {"date": date, "machine": {"cpu": machine.upper(), "cores": 2}, "skipped": skipped}
        (folder / f"{benchmark}.json").write_text(json.dumps({**run, "rows": [asdict(row) for row in rows]}))

    write.known = tables.Results(tmp_path / "results", tmp_path / "claims.json")
    return write


def scores(name: str, nll: float, kl: float, note: str = "") -> list[Row]:
    return [
        Row(CASE, name, "nll", nll, "nats/token", note=note),
        Row(CASE, name, "perplexity", 2.0**nll, "", None, 1.0, 9.0, note),
        Row(CASE, name, "kl", kl, "nats/token", None, kl / 2, kl * 2, note),
        Row(CASE, name, "quantizing", 12.4, "s"),
    ]


def test_the_headline(results):
    rows = [
        *scores("float", 3.0, 0.0, "calibrated on this; scored on that")[:3],
        *scores("rtn", 3.4, 0.4),
        *scores("best", 3.1, 0.125),
        *scores("hqq", 3.2, 0.25, "hqq is special."),
        Row(CASE, "best", "kl difference", -0.3, "nats/token", "rtn", -0.4, -0.2),
    ]
    results("old", "2026-01-01", "quant", scores("float", 9.0, 0.0), {})
    results("new", "2026-02-01", "quant", rows, {f"awq on {CASE}": "no", "awq on another": "no"})
    lines = tables.quant(results.known).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| float", "| **best**", "| hqq", "| **rtn**"]
    assert lines[3] == "| **best** | 8.57 | 0.125 [0.062, 0.250] | 75% | 12 |"
    assert lines[5].endswith("| - | 12 |")
    assert "calibrated on this; scored on that" in lines[7] and "hqq is special. Not in the table" in lines[7]
    assert "kept in the results: awq. NEW, 2 cores, 2026-02-01" in lines[7]


def test_costs_and_grids(results):
    rows = [
        Row("case", "best", "quantizing", 10.0, "s", None, 9.0, 11.0),
        Row("case", "best", "memory above the loaded model", 99.6, "MiB"),
        Row("case", "best", "quantizing", 0.25, "ratio", "awq", 0.2, 0.3),
    ]
    results("new", "2026-02-01", "cost", rows, {"awq": "it fell"})
    results("new", "2026-02-01", "quant", scores("float", 3.0, 0.0) + scores("rtn", 3.4, 0.4), {})

    assert "10.0 [9.0, 11.0] | 0.25 | 100 |" in tables.cost(results.known)
    assert "times awq's" in tables.cost(results.known) and "Could not run: awq." in tables.cost(results.known)
    assert "|  | 4 bits, groups of 64 |\n| --- | ---: |\n| **rtn** | 0.4 |" in tables.grids(results.known)


def test_the_search(results):
    rows = [
        Row("case", "naive", "alpha", 0.5, ""),
        Row("case", "naive", "time", 100.0, "s"),
        Row("case", "one pass", "alpha", 0.45, "", "naive"),
        Row("case", "one pass", "largest difference of losses", 1e-5, "hidden MSE", "naive"),
        Row("case", "one pass", "time", 25.0, "s"),
        Row("case", "one pass", "time", 0.25, "ratio", "naive"),
    ]
    results("new", "2026-02-01", "search", rows, {})
    told = tables.search(results.known).splitlines()
    assert told[2:4] == ["| naive | 0.5 | - | 100 | - |", "| one pass | 0.45 | 1e-05 | 25 | 0.25 |"]


def test_the_tuner(results):
    rows = [
        Row("net, standard", "SMOOTHIE", "test AUC", 0.75, ""),
        Row("net, standard", "SMOOTHIE", "mean rank", 1.0, "1 is best"),
        Row("net, standard", "SMOOTHIE", "processor time", 0.5, "s a table"),
        Row("net, standard", "random 5", "test AUC", 0.7, ""),
        Row("net, standard", "random 5", "mean rank", 2.0, "1 is best"),
        Row("net, standard", "SMOOTHIE", "test AUC difference", 0.05, "", "random 5", 0.01, 0.09),
        Row("net, standard", "SMOOTHIE", "tables won", 2.0, "of 3", "random 5"),
        Row("net, standard", "SMOOTHIE", "tables lost", 1.0, "of 3", "random 5"),
        Row("net, standard", "smoothness", "rank correlation with test AUC", 0.25, "", None, 0.1, 0.4),
        Row("net, one table", "SMOOTHIE", "test AUC", 0.1, ""),
    ]
    results("new", "2026-02-01", "tune", rows, {"gone": "away"})
    told = tables.tune(results.known).splitlines()
    assert told[0] == "Net, standard."
    assert told[4] == "| **SMOOTHIE** | 0.750 | +0.050 [+0.010, +0.090] | 2 : 1 | 1.0 | 0.50 |"
    assert told[5] == "| random 5 | 0.700 | - | - | 2.0 | - |"
    assert "over all 30: 0.25 [0.10, 0.40]." in told[7] and "Could not enter: gone." in told[-1]


def test_what_was_not_measured_is_said_to_be_so(results):
    for name in ("quant", "grids", "cost", "search", "tune", "claims:smoothquant_plus"):
        page = f"<!-- table:{name} -->\n| invented | 1 |\n<!-- /table -->"
        told = tables.rewrite(page, results.known)
        assert "easured yet" in told or "been measured yet" in told
        assert "invented" not in told and tables.rewrite(told, results.known) == told
    with pytest.raises(ValueError, match="`x` must be one of quant"):
        tables.rewrite("<!-- table:x -->\n<!-- /table -->", results.known)


def test_claims_of_one_paper(results):
    row = {"paper": "p", "claim": "more", "measured": "3", "needed": ">= 2", "verdict": "holds"}
    results.known.claims.write_text(json.dumps([row, {**row, "paper": "q", "claim": "less"}]))
    assert tables.claims(results.known, "p").splitlines()[2:] == ["| more | 3 | >= 2 | holds |"]


def test_rows_of_any_benchmark(results):
    rows = [
        Row("a case", "ours", "error", 1.234e-7, "m", None, 1e-7, 2e-7, "mind this."),
        Row("a case", "theirs", "time", 12345.6, "s"),
        Row("a case", "ours", "time", 0.5, "ratio", "theirs"),
        Row("another case", "ours", "error", 0.0, "m"),
    ]
    results("m", "2026-01-01", "thing", rows, {"gone": "away"})
    told = tables.render("rows:thing", results.known).splitlines()
    assert told[:5] == [
        "A case.",
        "",
        "| subject | error | time | time, against theirs |",
        "| --- | ---: | ---: | ---: |",
        "| ours | 1.2e-07 [1.0e-07, 2.0e-07] m | - | 0.5 |",
    ]
    assert told[5] == "| theirs | - | 12346 s | - |"
    assert told[-1] == "mind this. Not run: gone: away. M, 2026-01-01; made by `python -m benchmarks thing`."
    assert "Nothing has been measured" in tables.render("rows:nothing", results.known)
