"""Tables for the tuner's benchmark: software analytics where the shared data is, and scikit-learn's own."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.data import shared_data

Array = npt.NDArray[Any]
STANDARD = ("breast_cancer", "wine", "digits")
ROWS = 600  # of a standard table: digits would cost more than all others


@dataclass(frozen=True)
class Task:
    """Training rows, from which validation rows are split off, and test rows that nothing but the last score sees.

    Attributes:
        kind: "defects", "warnings" or "standard".
    """

    kind: str
    name: str
    X: Array
    y: Array
    X_test: Array
    y_test: Array


def _defects(folder: Path) -> Iterator[Task]:
    """Yield one task a project: all releases but the last to learn from, the last to predict."""
    releases: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.csv")):
        releases[path.stem.rpartition("-")[0]].append(path)
    for project, paths in releases.items():
        parts = []
        for path in paths:  # names sort as versions do: one digit a part
            rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))[1:]
            values = np.array([[float(v) for v in row[3:]] for row in rows])
            parts.append((values[:, :-1], (values[:, -1] > 0).astype(int)))
        X, y = (np.concatenate(column) for column in zip(*parts[:-1], strict=True))
        yield Task("defects", project, X, y, *parts[-1])


def _warnings(folder: Path) -> Iterator[Task]:
    """Yield derby: tomcat's training file has 13 rows, the other projects fewer still."""
    tables = []
    for version in "BC":
        lines = (folder / f"derby_{version}_features.csv").read_text(encoding="utf-8").splitlines()
        tables.append(list(csv.DictReader(lines)))
    shared = [name for name in tables[0][0] if name in tables[1][0] and name != "category"]
    numeric = [name for name in shared if all(_is_number(row[name]) for table in tables for row in table)]
    label = {"close": 1, "1": 1, "open": 0, "0": 0}
    (X, y), test = (
        (np.array([[float(r[n]) for n in numeric] for r in t]), np.array([label[r["category"]] for r in t]))
        for t in tables
    )
    yield Task("warnings", "derby", X, y, *test)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _standard() -> Iterator[Task]:
    from sklearn import datasets  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    for name in STANDARD:
        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(X))[:ROWS]
        parts = train_test_split(X[order], y[order], test_size=0.3, stratify=y[order], random_state=0)
        yield Task("standard", name, parts[0], parts[2], parts[1], parts[3])


def tasks(skipped: dict[str, str]) -> list[Task]:
    """Return all tasks, software analytics first; what is absent is noted."""
    found: list[Task] = []
    folder = shared_data()
    if folder is None or not (folder / "defects").is_dir():
        skipped["defects and warnings"] = "the shared data is absent (PLANISH_DATA)"
    else:
        found += [*_defects(folder / "defects"), *_warnings(folder / "warnings")]
    skipped["issue lifetime"] = "the paper's third kind of data could not be obtained"
    return [*found, *_standard()]
