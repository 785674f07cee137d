"""Rows, the machine they were measured on, where they are kept and how they are shown."""

import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The C library gives large blocks back and fetches zeroed pages anew: a tenfold cost for a 100 MB activation on some
# virtual machines. Every subject, ours or not, runs with memory that is kept.
REUSE_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "planish")
_ZEN = {23: "zen2", 25: "zen4", 26: "zen5"}


@dataclass(frozen=True)
class Row:
    """One number: `subject` scored `value` `unit` by `metric` on `case`.

    `baseline` names the subject that the value is relative to (a difference or a ratio), None for an absolute one.
    `low` and `high` bound the 95 % interval where one was computed. `note` says what a reader must know.
    """

    case: str
    subject: str
    metric: str
    value: float
    unit: str
    baseline: str | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}


def cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, object]:
    """Describe this machine: cpu model, flags that matter to kernels, cores, memory, system, package versions."""
    info = _cpuinfo()
    wanted = re.compile(r"^(avx|amx|fma|f16c|sse4|vnni|bf16|asimd|sve|i8mm|dotprod)")
    flags = info.get("flags", info.get("Features", "")).split()
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "family": info.get("cpu family", ""),
        "flags": [flag for flag in flags if wanted.match(flag)],
        "cores": cores(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def slug(description: dict[str, object]) -> str:
    """Name a machine for a folder: its processor's words, its generation where AMD hides it, its cores.

    Example:
        >>> slug({"cpu": "AMD EPYC", "family": "26", "cores": 2})
        'epyc-zen5-2c'
        >>> slug({"cpu": "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "family": "6", "cores": 8})
        'xeon-gold-6338-8c'
    """
    text = str(description["cpu"]).lower().split("@")[0]
    words = re.sub(r"\((r|tm)\)|\b(intel|amd|cpu|processor|\d+-core)\b", " ", text).split()
    zen = _ZEN.get(int(description["family"] or 0)) if "amd" in text and len(words) <= 1 else None
    return "-".join([*words, *([zen] if zen else []), f"{description['cores']}c"])


def write_json(path: Path, content: object) -> None:
    """Write JSON to a temporary name, then rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def save(name: str, rows: Sequence[Row], *, quick: bool, skipped: dict[str, str]) -> Path:
    """Keep the rows of one benchmark under this machine's folder; a quick run goes beside the full one."""
    where = machine()
    path = RESULTS / slug(where) / f"{name}{'-quick' if quick else ''}.json"
    when = time.strftime("%Y-%m-%d", time.gmtime())
    write_json(
        path,
        {
            "benchmark": name,
            "quick": quick,
            "date": when,
            "machine": where,
            "skipped": skipped,
            "rows": [asdict(row) for row in rows],
        },
    )
    return path


def _cell(row: Row) -> str:
    text = f"{row.value:.4g}"
    return text if row.low is None or row.high is None else f"{text} [{row.low:.3g}, {row.high:.3g}]"


def show(rows: Iterable[Row]) -> None:
    """Print one table a case: subjects down, absolute metrics across; then what is relative, a line each."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    rows = list(rows)
    console = Console()
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if row.case == case]
        absolute = [row for row in here if row.baseline is None]
        metrics = list(dict.fromkeys((row.metric, row.unit) for row in absolute))
        table = Table("subject", *(f"{m}\n{u}" for m, u in metrics), title=case, title_justify="left")
        for subject in dict.fromkeys(row.subject for row in absolute):
            cells = {(r.metric, r.unit): _cell(r) for r in absolute if r.subject == subject}
            table.add_row(subject, *(cells.get(key, "") for key in metrics))
        console.print(table)
        relative = [row for row in here if row.baseline is not None]
        if relative:
            table = Table("subject", "against", "metric", "value [95 % interval]", "unit")
            for row in relative:
                table.add_row(row.subject, row.baseline, row.metric, _cell(row), row.unit)
            console.print(table)
        for note in dict.fromkeys(row.note for row in here if row.note):
            console.print(f"  {note}")
