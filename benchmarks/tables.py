"""`python -m benchmarks.tables [--check]`: the tables of the README and the docs, made from what was measured.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. It is made from the newest results of
`python -m benchmarks` in benchmarks/results, from docs/claims.json (`make claims`), or from the command line itself;
nothing between the markers is typed by hand. What has not been measured is said to be so.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT
from benchmarks.pivot import command_of, contest, pivot
from benchmarks.subjects import SUBJECTS

HEADLINE = "SmolLM2-135M, 4 bits, groups of 64"
_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w:+-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
PAGES = tuple(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "<!-- table:" in page.read_text(encoding="utf-8")
)


class Results:
    """What is known: where results lie, and the claims.

    Attributes:
        folder: One folder a machine, one file a benchmark.
        claims: The table of claims as JSON.
    """

    def __init__(self, folder: Path = RESULTS, claims: Path = ROOT / "docs" / "claims.json") -> None:
        self.folder, self.claims = folder, claims

    def newest(self, benchmark: str) -> dict[str, Any] | None:
        """Return the newest full run of a benchmark on any machine, None where there is none."""
        found = [
            {**json.loads(path.read_text(encoding="utf-8")), "where": path.parent.name}
            for path in sorted(self.folder.glob(f"*/{benchmark}.json"))
        ]
        return max(found, key=lambda run: str(run["date"]), default=None)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    marks = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, marks, *rows))


def _unmeasured(benchmark: str) -> str:
    return f"Nothing has been measured yet: `{command_of(benchmark)}` fills this table.\n"


def _pick(run: Mapping[str, Any], case: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the absolute rows of one case: by subject, then by metric."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in run["rows"]:
        if row["case"] == case and row["baseline"] is None:
            found.setdefault(row["subject"], {})[row["metric"]] = row
    return found


def _label(subject: str) -> str:
    """Name a subject; what is ours stands out."""
    ours = subject in SUBJECTS and SUBJECTS[subject].ours
    return f"**{subject}**" if ours else subject


def _value(rows: Mapping[str, Mapping[str, Any]], metric: str, form: str, *, interval: bool = False) -> str:
    if metric not in rows:
        return "-"
    row = rows[metric]
    if not interval or row["low"] is None:
        return f"{row['value']:{form}}"
    return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def _origin(run: Mapping[str, Any], command: str) -> str:
    machine = run["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {run['date']}; made by `python -m benchmarks {command}`."


def _missing(run: Mapping[str, Any], case: str) -> list[str]:
    names = [name.removesuffix(f" on {case}") for name in run["skipped"] if name.endswith(f" on {case}")]
    return [f"Not in the table, for the reasons kept in the results: {', '.join(names)}."] if names else []


def quant(results: Results) -> str:
    """Return the headline: every subject at 4 bits in groups of 64, ours in bold, the least divergence first."""
    run = results.newest("quant")
    found = {} if run is None else _pick(run, HEADLINE)
    if run is None or "float" not in found:
        return _unmeasured("quant")
    nll = {name: rows["nll"]["value"] for name, rows in found.items()}
    lost = nll["rtn"] - nll["float"] if "rtn" in nll else None
    lines = []
    for name, rows in sorted(found.items(), key=lambda item: item[1]["kl"]["value"]):
        closed = "-" if lost is None or name in ("float", "rtn") else f"{(nll['rtn'] - nll[name]) / lost:.0%}"
        quick = _value(rows, "quantizing", ".0f")
        kl = "0" if name == "float" else _value(rows, "kl", ".3f", interval=True)
        lines.append((_label(name), _value(rows, "perplexity", ".2f"), kl, closed, quick))
    header = ("", "perplexity", "KL from float, nats/token [95 %]", "RTN's gap closed", "quantized in, s")
    notes = dict.fromkeys(rows["kl"]["note"] for name, rows in found.items() if name != "float")
    told = [
        f"{HEADLINE}: {found['float']['kl']['note']}.",
        "Ours in bold. The gap is the log-likelihood that rounding to nearest (`rtn`) loses.",
        "Seconds are of one run each on a machine that was doing other work; `python -m benchmarks cost` takes turns.",
        *(note for note in notes if note),
        *_missing(run, HEADLINE),
        _origin(run, "quant"),
    ]
    return f"{table(header, lines)}\n{' '.join(told)}\n"


def grids(results: Results) -> str:
    """Return how far every subject is from float on every grid: a column a case."""
    run = results.newest("quant")
    if run is None:
        return _unmeasured("quant")
    parts = []
    for metric, what, model in (
        ("kl", "KL from float, nats/token", "SmolLM2-135M"),
        ("cosine", "1 - cosine of embeddings to float", "MiniLM-L6"),
    ):
        names = dict.fromkeys(row["case"] for row in run["rows"] if row["case"].startswith(f"{model}, "))
        cases = {case: _pick(run, case) for case in names}
        subjects = dict.fromkeys(name for case in cases.values() for name in case if name != "float")
        if not subjects:
            continue
        lines = [
            (_label(name), *(_value(case.get(name, {}), metric, ".3g") for case in cases.values())) for name in subjects
        ]
        header = ("", *(case.removeprefix(f"{model}, ") for case in cases))
        parts.append(f"{model}: {what}.\n\n{table(header, lines)}\n")
    return "".join(parts) + f"A dash: it could not enter, for the reason kept in the results. {_origin(run, 'quant')}\n"


def cost(results: Results) -> str:
    """Return seconds and memory of quantizing, beside the baseline's."""
    run = results.newest("cost")
    if run is None:
        return _unmeasured("cost")
    case = run["rows"][0]["case"] if run["rows"] else ""
    ratios = {(r["subject"], r["metric"]): r for r in run["rows"] if r["baseline"]}
    lines = []
    for name, rows in _pick(run, case).items():
        ratio = ratios.get((name, "quantizing"))
        lines.append(
            (
                _label(name),
                _value(rows, "quantizing", ".1f", interval=True),
                "-" if ratio is None else f"{ratio['value']:.2f}",
                _value(rows, "memory above the loaded model", ".0f"),
            )
        )
    base = next((r["baseline"] for r in ratios.values()), None)
    header = ("", "s [least, most]", f"times {base}'s" if base else "ratio", "MiB above the loaded model")
    out = f" Could not run: {', '.join(run['skipped'])}." if run["skipped"] else ""
    return f"{table(header, lines)}\n{case}.{out} {_origin(run, 'cost')}\n"


def search(results: Results) -> str:
    """Return what the one-pass search saves, and how its losses and its alpha agree with the naive one's."""
    run = results.newest("search")
    if run is None:
        return _unmeasured("search")
    lines = []
    for name in dict.fromkeys(row["subject"] for row in run["rows"]):
        rows = {(row["metric"], row["unit"]): row["value"] for row in run["rows"] if row["subject"] == name}
        cells = (("alpha", ""), ("largest difference of losses", "hidden MSE"), ("time", "s"), ("time", "ratio"))
        lines.append((name, *(f"{rows[cell]:.3g}" if cell in rows else "-" for cell in cells)))
    header = ("", "alpha found", "largest difference of losses", "s", "times the naive one's")
    return f"{table(header, lines)}\n{run['rows'][0]['case']}. {_origin(run, 'search')}\n"


def calibration(results: Results) -> str:
    """Return the smooth calibration error by definition, by us and by relplot; and what each takes."""
    run = results.newest("calibration")
    if run is None:
        return _unmeasured("calibration")
    away = {(r["case"], r["subject"]): r["value"] for r in run["rows"] if r["metric"] == "difference"}
    exact, times = [], []
    for case in dict.fromkeys(row["case"] for row in run["rows"]):
        found = _pick(run, case)
        if "definition" in found:
            right = found["definition"]["smECE"]["value"]
            cells = [
                f"{away[case, who]:+.1g} ({away[case, who] / right:+.1%})" if (case, who) in away else "-"
                for who in ("planish", "relplot")
            ]
            exact.append((case, f"{right:.6f}", *cells))
        else:
            ratio = next((r["value"] for r in run["rows"] if r["case"] == case and r["baseline"] == "relplot"), None)
            cells = [_value(found.get(who, {}), "time", ".2f", interval=True) for who in ("planish", "relplot")]
            times.append((case, *cells, "-" if ratio is None else f"{ratio:.0f}"))
    first = table(("", "by definition", "**planish** is off by", "relplot is off by"), exact)
    second = table(("", "**planish**, ms [least, most]", "relplot, ms", "times faster"), times)
    return f"{first}\n{second}\nMedians of turns in one process, one thread. {_origin(run, 'calibration')}\n"


def tune(results: Results) -> str:
    """Return what each way of choosing settings gives, over the tables of one kind, for each learner."""
    run = results.newest("tune")
    if run is None:
        return _unmeasured("tune")
    parts = []
    for case in dict.fromkeys(row["case"] for row in run["rows"] if row["metric"] == "mean rank"):
        here = [row for row in run["rows"] if row["case"] == case]
        apart = {(r["subject"], r["metric"]): r for r in here if r["baseline"]}
        lines = []
        for name in dict.fromkeys(row["subject"] for row in here if row["metric"] == "mean rank"):
            rows = {r["metric"]: r for r in here if r["subject"] == name and not r["baseline"]}
            gap = {metric: apart[name, metric] for subject, metric in apart if subject == name}
            won = "-"
            if gap:
                won = f"{gap['tables won']['value']:.0f} : {gap['tables lost']['value']:.0f}"
            lines.append(
                (
                    f"**{name}**" if name.startswith("SMOOTHIE") else name,
                    _value(rows, "test AUC", ".3f"),
                    _value(gap, "test AUC difference", "+.3f", interval=True),
                    won,
                    _value(rows, "mean rank", ".1f"),
                    _value(rows, "processor time", ".2f"),
                )
            )
        told = {r["metric"]: r for r in here if r["subject"] in ("smoothness", "all methods")}
        header = ("", "test AUC", "less that of random 5 [95 %]", "won : lost", "mean rank", "s")
        told_rank = _value(told, "rank correlation with test AUC", ".2f", interval=True)
        friedman = f"; Friedman p {_value(told, 'Friedman p', '.2g')}" if "Friedman p" in told else ""
        parts.append(
            f"{case[0].upper()}{case[1:]}.\n\n{table(header, lines)}\n"
            f"Rank correlation of S with the test AUC over all 30: {told_rank}{friedman}.\n\n"
        )
    out = f"Could not enter: {', '.join(run['skipped'])}. " if run["skipped"] else ""
    won = "Tables won or lost: those whose own interval of paired differences leaves out zero."
    return f"{''.join(parts)}{won} {out}{_origin(run, 'tune')}\n"


def claims(results: Results, paper: str) -> str:
    """Return the claims of one paper that tests assert, with what was measured and what was needed."""
    kept = json.loads(results.claims.read_text(encoding="utf-8")) if results.claims.exists() else []
    rows = [row for row in kept if row["paper"] == paper]
    if not rows:
        return "Not measured yet: `make claims` fills this table.\n"
    return table(
        ("claim", "measured", "needed", "verdict"),
        ((row["claim"], row["measured"], row["needed"], row["verdict"]) for row in rows),
    )


def cli() -> str:
    """Return the commands of the command line with their options, as they describe themselves."""
    import typer  # noqa: PLC0415

    from planish.__main__ import app  # noqa: PLC0415

    parts = []
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        lines = []
        for option in command.params:
            spelt = option.metavar or option.name if option.param_type_name == "argument" else _spelt(option)
            default = "" if option.required or option.default in (None, False) else f"`{option.default}`"
            default = f"`{option.opts[0]}`" if option.default is True else default
            lines.append((f"`{spelt}`", (option.help or "").replace("|", "\\|"), default))
        shown = "".join(f"| {' | '.join(cells)} |\n" for cells in (("", "", "default"), ("---",) * 3, *lines))
        parts.append(f"## planish {name}\n\n{command.help}\n\n{shown}")
    return "\n".join(parts)


def _spelt(option: Any) -> str:  # noqa: ANN401  (the parser's own)
    return " / ".join((*option.opts, *option.secondary_opts))


def decode(results: Results, benchmark: str) -> str:
    """Make the table of tokens a second, and say beneath it what else was found."""
    run = results.newest(benchmark)
    if run is None:
        return _unmeasured(benchmark)
    case = run["rows"][0]["case"]
    found = _pick(run, case)
    rate = found.pop("plain read")["bandwidth"]["value"]
    cost = {r["subject"]: r["value"] for r in run["rows"] if r["metric"] == "negative log-likelihood" and r["baseline"]}

    def cell(subject: str, metric: str, form: str, factor: float = 1) -> str:
        row = found[subject].get(metric)
        return "-" if row is None else format(row["value"] * factor, form)

    lines = [
        [
            f"**{subject}**" if subject.startswith("planish") else subject,
            cell(subject, "decode", ".0f" if found[subject]["decode"]["value"] > 100 else ".1f"),
            cell(subject, "prompt", ".0f"),
            cell(subject, "bytes a token", ".0f"),
            cell(subject, "part of the floor", ".0f", 100),
            format(cost[subject], "+.4f") if subject in cost else "-",
        ]
        for subject in found
    ]
    header = ["", "decode, tokens/s", "prompt, tokens/s", "MB a token", "part of the floor, %", "nats a token lost"]
    ratios = {
        (r["baseline"], r["metric"]): r for r in run["rows"] if r["subject"] == "planish" and r["unit"] == "ratio"
    }
    said = "; ".join(
        f"{metric} {r['value']:.2f} times {rival} [{r['low']:.2f}, {r['high']:.2f}]"
        for (rival, metric), r in ratios.items()
    )
    same = [r for r in run["rows"] if "least" in r["metric"]]
    told = "".join(
        f" Greedy text was that of the model itself for {r['value']:.0f} {r['unit']}, at the least." for r in same
    )
    skipped = "".join(f" Not run: {name}: {why}." for name, why in run["skipped"].items())
    return (
        f"{table(header, lines)}\n{case}, one text, {run['machine']['cores']} threads; memory was read plainly at "
        f"{rate:.1f} GB/s. Medians over rounds of taking turns: {said}.{told}{skipped} llama.cpp as its wheel "
        f"`xllamacpp` brings it, compiled for AVX2. {run['machine']['cpu']}, {run['date']}; made by "
        f"`python -m benchmarks {benchmark}`.\n"
    )


def rows(results: Results, benchmark: str) -> str:
    """Return all rows of a benchmark that has no table of its own making."""
    run = results.newest(benchmark)
    return _unmeasured(benchmark) if run is None else pivot(run, benchmark)


def kernels(results: Results) -> str:
    """Make the table of single products."""
    run = results.newest("kernels")
    ours = {f"{bits} bits": f"planish, {bits}-bit activations" for bits in (16, 8)}
    return _unmeasured("kernels") if run is None else contest(run, ours)


def render(name: str, results: Results) -> str:
    """Return the table of a marker.

    Raises:
        ValueError: No table has that name.
    """
    kind, _, rest = name.partition(":")
    makers: dict[str, Callable[[], str]] = {
        "quant": lambda: quant(results),
        "grids": lambda: grids(results),
        "cost": lambda: cost(results),
        "search": lambda: search(results),
        "decode": lambda: "\n".join(decode(results, name) for name in ("decode", "decode_large")),
        "kernels": lambda: kernels(results),
        "calibration": lambda: calibration(results),
        "tune": lambda: tune(results),
        "claims": lambda: claims(results, rest),
        "rows": lambda: rows(results, rest),
        "cli": cli,
    }
    if kind not in makers:
        raise ValueError(f"tables: `{name}` must be one of {', '.join(makers)}.")
    return makers[kind]()


def rewrite(text: str, results: Results) -> str:
    """Return a page with every table between markers made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{render(found['name'], results)}{found[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages, or tell which are stale; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is not what it should be")
    check = parser.parse_args(arguments).check
    stale = []
    for name in PAGES:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = rewrite(old, Results())
        if new == old:
            continue
        stale.append(name)
        if not check:
            partial = path.with_name(path.name + ".partial")
            partial.write_text(new, encoding="utf-8")
            partial.replace(path)
    for name in stale:
        print(
            f"{name}: {'a table differs from the results; run `python -m benchmarks.tables`' if check else 'rewritten'}"
        )
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
