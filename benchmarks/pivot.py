"""A plain table of a benchmark's rows: a line a subject, a column a metric, one table a case; ratios stand below."""

from collections.abc import Mapping
from typing import Any


def number(value: float) -> str:
    """Write a number with three significant digits, large ones without an exponent."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = f"{value:.3g}"
        return digits if "e" not in digits else f"{value:.0f}"
    return f"{value:.1e}"


def command_of(benchmark: str) -> str:
    """Return what runs a benchmark: a suite's results are kept under NAME-SUITE."""
    return f"python -m benchmarks {benchmark.replace('-', ' --suite ')}"


def _cell(row: Mapping[str, Any]) -> str:
    text = number(row["value"])
    if row["low"] is not None and row["high"] is not None:
        text += f" [{number(row['low'])}, {number(row['high'])}]"
    return text if row["unit"] in {"", "ratio"} else f"{text} {row['unit']}"


def _table(name: str, rows: list[Mapping[str, Any]]) -> str:
    """Make one table; comparisons get columns of their own, which name what they compare with."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))

    def column(row: Mapping[str, Any]) -> str:
        against = row["baseline"]
        return row["metric"] if against is None else f"{row['metric']}, against {against}"

    columns = list(dict.fromkeys(column(row) for row in rows))
    found = {(row["subject"], column(row)): _cell(row) for row in rows}
    lines = [["subject", *columns], ["---", *("---:" for _ in columns)]]
    lines += [[subject, *(found.get((subject, c), "-") for c in columns)] for subject in subjects]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{name[:1].upper()}{name[1:]}.\n\n{body}\n"


def pivot(run: Mapping[str, Any], benchmark: str) -> str:
    """Return the tables of a run in Markdown, with its notes and where it was made.

    Args:
        run: What `benchmarks.harness.save` wrote.
        benchmark: Its name.
    """
    cases = list(dict.fromkeys(row["case"] for row in run["rows"]))
    parts = [_table(case, [row for row in run["rows"] if row["case"] == case]) for case in cases]
    notes = [note for note in dict.fromkeys(row["note"] for row in run["rows"]) if note]
    skipped = [f"Not run: {name}: {why}." for name, why in run["skipped"].items()]
    where = f"{run['machine']['cpu']}, {run['date']}; made by `{command_of(benchmark)}`."
    return "\n".join(parts) + "\n" + " ".join([*notes, *skipped, where]) + "\n"


def contest(run: Mapping[str, Any], ours: Mapping[str, str]) -> str:
    """Return a table with a line a case: our times and share of the memory's rate, and how the fastest rival does.

    Args:
        run: What `benchmarks.harness.save` wrote; speed-ups are rows in "times", against every rival.
        ours: Our subjects, by what their columns are called.
    """
    lines = []
    for case in dict.fromkeys(row["case"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["case"] == case]
        line = [case]
        for subject in ours.values():
            found = {row["metric"]: row["value"] for row in rows if row["subject"] == subject and not row["baseline"]}
            share = [
                r["value"] for r in rows if r["subject"] == subject and r["metric"] == "share of the memory's rate"
            ]
            ahead = {r["baseline"]: r["value"] for r in rows if r["subject"] == subject and r["unit"] == "times"}
            rival = min(ahead, key=ahead.__getitem__)
            line += [f"{number(found['median'])} ms", f"{share[0]:.2f}" if share else "-"]
            line += [f"{number(ahead[rival])} x {rival}"]
        lines.append(line)
    columns = [
        f"{name}{what}" for name in ours for what in (", median", ", share of a plain read", ", against the fastest")
    ]
    head = [["", *columns], ["---", *("---:" for _ in columns)]]
    body = "\n".join(f"| {' | '.join(line)} |" for line in (*head, *lines))
    skipped = "".join(f" Not run: {name}: {why}." for name, why in run["skipped"].items())
    where = f"{run['machine']['cpu']}, {run['date']}; made by `{command_of(run['benchmark'])}`."
    return f"{body}\n\nMedians over rounds of taking turns. {where}{skipped}\n"
