"""The tables of the quantile benchmark, for the pages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quantiles import NETWORKS, OURS, RIVALS

Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def verdict(row: Mapping[str, Any]) -> str:
    """Tell whether ours is better, worse, or tied by the interval of paired differences."""
    if row["low"] is None:
        return "one run"
    if row["high"] < 0:
        return "best"
    return "worse" if row["low"] > 0 else "tied"


def _block(run: Mapping[str, Any], metric: str, table: Table) -> str:
    here = [row for row in run["rows"] if row["metric"] == metric]
    cases = list(dict.fromkeys(row["case"] for row in here))
    if not cases:
        return ""
    value = {(row["case"], row["subject"]): row["value"] for row in here}
    against = {row["case"]: row for row in run["rows"] if row["metric"] == f"{metric} difference"}
    subjects = [name for name in (OURS, *RIVALS, *list(NETWORKS)[1:]) if any((case, name) in value for case in cases)]
    lines = [
        [
            case,
            *(f"{value[case, name]:.3f}" if (case, name) in value else "-" for name in subjects),
            f"{verdict(against[case])} ({against[case]['baseline']})" if case in against else "-",
        ]
        for case in cases
    ]
    return table(["", *(f"**{n}**" if n.startswith(OURS) else n for n in subjects), "**planish** beside the best rival"], lines)


def _other(run: Mapping[str, Any], table: Table) -> str:
    """Return the mean over cases of crossings, time and coverage."""
    lines = []
    for name in (OURS, *RIVALS, *list(NETWORKS)[1:]):
        cells = []
        for metric, form in (("crossings", ".3%"), ("coverage", ".1%"), ("time", ".1f")):
            values = [row["value"] for row in run["rows"] if row["subject"] == name and row["metric"] == metric]
            cells.append(f"{sum(values) / len(values):{form}}" if values else "-")
            if metric == "crossings":
                cells.append(f"{max(values):{form}}" if values else "-")
        lines.append([f"**{name}**" if name.startswith(OURS) else name, *cells])
    header = ["", "pairs of levels that cross", "on the worst case", "coverage of 90 % intervals, tables", "s a fit"]
    return table(header, lines)


def quantiles(run: Mapping[str, Any], table: Table) -> str:
    """Return errors on known laws, losses on real tables, and what else was seen."""
    note = next((row["note"] for row in run["rows"] if row["note"]), "")
    said = [verdict(row) for row in run["rows"] if row["metric"] in ("L1 difference", "pinball difference")]
    count = ", ".join(f"{word} on {said.count(word)}" for word in ("best", "tied", "worse"))
    return (
        f"Mean distance from the true quantiles at levels 0.05, 0.25, 0.5, 0.75 and 0.95.\n\n{_block(run, 'L1', table)}\n"
        "Mean pinball loss at these levels on real tables, in deviations of the target.\n\n"
        f"{_block(run, 'pinball', table)}\n{_other(run, table)}\n"
        f"Each number is a {note}; seconds are of the processor. Of {len(said)} cases planish is {count}, by the 95 % "
        "interval of paired differences to the rival with the best mean."
    )
