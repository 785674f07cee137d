"""The whole conditional distribution from few rows: quantile networks beside forests, boosting and kernel methods.

Every method has the same n rows and chooses its own knobs on a part of them; none sees the truth. On laws that are
known, the error is that of the quantiles at five levels, averaged over levels and over fresh rows ("L1", and "L2" its
square). On real tables it is the pinball loss at those levels on a fifth of the rows, and the coverage of the interval
between the outermost. Crossings are counted between neighbours of 99 levels; methods with a model a level have five.

"the paper's settings" are one network of width 128 with levels drawn once; with and without its penalty.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import quantiles_rivals as rivals
from benchmarks.data import cache_dir
from benchmarks.harness import Row, write_json
from benchmarks.quantiles_cases import LEVELS, Array, Law, laws, tables

OURS = "planish"
PAPER = {
    "hidden_layer_sizes": (128, 128, 128), "n_members": 1, "resample_levels": False, "average": 0.0,
    "batch_size": 256, "start": "random",
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    OURS: {},
    "planish, hard": {"monotone": "hard", "n_levels": 8},
    "the paper's settings": PAPER,
    "the paper's, no penalty": {**PAPER, "monotone": "none"},
}
RIVALS: dict[str, Callable[[Array, Array, Array, int], Array]] = {
    "quantile forest": rivals.forest,
    "gradient boosting": rivals.boosting,
    "kernel regression": rivals.kernel,
}
TEST_ROWS = 2000
DRAWS = 3
Found = dict[str, float]
logger = logging.getLogger("benchmarks")


def _network(settings: dict[str, Any], X: Array, y: Array, X_test: Array, seed: int) -> tuple[Array, float]:
    from planish.regression import QuantileProcessRegressor  # noqa: PLC0415

    model = QuantileProcessRegressor(random_state=seed, device="cpu", **settings).fit(X, y)
    return model.predict(X_test, quantiles=list(LEVELS)), model.crossing_rate(X_test)


def _timed(name: str, quick: bool, X: Array, y: Array, X_test: Array, seed: int) -> tuple[Array, float, float]:
    """Return quantiles, crossings, and processor seconds."""
    began = time.process_time()
    if name in RIVALS:
        curves = RIVALS[name](X, y, X_test, seed)
        seconds = time.process_time() - began
        return curves, float((np.diff(curves, axis=1) < 0).mean()), seconds
    settings = {**NETWORKS[name], **({"max_iter": 3, "hidden_layer_sizes": (8, 8)} if quick else {})}
    curves, crossings = _network(settings, X, y, X_test, seed)
    return curves, crossings, time.process_time() - began


def _on_law(law: Law, n: int, seed: int, name: str, quick: bool) -> Found:
    random = np.random.default_rng(seed)
    X, y = law.draw(n, random)
    X_test = random.random((TEST_ROWS, law.n_features))
    curves, crossings, seconds = _timed(name, quick, X, y, X_test, seed)
    away = curves - law.quantiles(X_test)
    return {
        "L1": float(np.abs(away).mean()), "L2": float((away**2).mean()), "crossings": crossings, "time": seconds,
    }  # fmt: skip


def _on_table(X: Array, y: Array, seed: int, name: str, quick: bool) -> Found:
    order = np.random.default_rng(seed).permutation(len(y))
    test, train = order[: len(y) // 5], order[len(y) // 5 :]
    curves, crossings, seconds = _timed(name, quick, X[train], y[train], X[test], seed)
    inside = (y[test] >= curves[:, 0]) & (y[test] <= curves[:, -1])
    return {
        "pinball": rivals.pinball(y[test], curves) / float(np.std(y)), "coverage": float(inside.mean()),
        "crossings": crossings, "time": seconds,
    }  # fmt: skip


def _kept(key: str, make: Callable[[], Found], fresh: bool) -> Found:
    """Return what an earlier run measured with this very code, or measure it."""
    code = b"".join(
        path.read_bytes()
        for path in (
            *sorted(Path(__file__).parent.glob("quantiles*.py")),
            *sorted((Path(__file__).parents[1] / "src/planish/regression").glob("*.py")),
        )
        if path.name not in ("display.py", "__init__.py", "quantiles.py")
    )
    name = hashlib.sha256(code + key.encode() + repr((NETWORKS, TEST_ROWS)).encode()).hexdigest()[:20]
    path = cache_dir() / "quantiles" / f"{name}.json"
    if path.exists() and not fresh:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    found = make()
    write_json(path, found)
    return found


UNITS = {"L1": "", "L2": "", "pinball": "of the target's deviation", "coverage": "", "crossings": "", "time": "s"}


def interval(values: Array) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by Student's t."""
    from scipy.stats import t  # noqa: PLC0415

    if len(values) < 2:
        return -np.inf, np.inf
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def _rows(case: str, found: dict[str, list[Found]], metric: str, note: str) -> Iterator[Row]:
    for name, runs in found.items():
        for key in runs[0]:
            value = float(np.mean([run[key] for run in runs]))
            yield Row(case, name, key, value, UNITS[key], note=f"Means of {len(runs)} {note}." if key == metric else "")
    entered = [name for name in RIVALS if name in found]
    if OURS not in found or not entered:
        return
    means = {name: np.mean([run[metric] for run in found[name]]) for name in entered}
    best = min(entered, key=lambda name: means[name])
    apart = np.array([a[metric] - b[metric] for a, b in zip(found[OURS], found[best], strict=True)])
    low, high = interval(apart)
    bounds = (low, high) if np.isfinite(low) else (None, None)
    yield Row(case, OURS, f"{metric} difference", float(apart.mean()), UNITS[metric], best, *bounds)


def rows(
    quick: bool,
    *,
    against: tuple[str, ...] | None = None,
    only: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
    **_: object,
) -> Iterator[Row]:
    """Yield errors, crossings and seconds of every method on every law and table; what was measured is kept.

    Args:
        quick: One law of 60 rows, one table, networks that hardly train.
        against: Rivals by a part of their names; all by default.
        only: Methods by their names, to fill what is kept.
        fresh: Measure again.
        skipped: Filled with what could not run, and why.
    """
    skipped = {} if skipped is None else skipped
    names = [*NETWORKS, *(n for n in RIVALS if against is None or any(a in n for a in against))]
    names = [name for name in names if only is None or name in only]
    try:
        import quantile_forest  # noqa: F401, PLC0415
    except ImportError as error:
        skipped["quantile forest"] = str(error)
        names = [name for name in names if name != "quantile forest"]
    n = 60 if quick else 512
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for law in laws()[:1] if quick else laws():
            case, found = f"{law.name}, n = {n}", {}
            for name in names:
                logger.info("%s: %s", case, name)
                found[name] = [
                    _kept(f"{case}, {seed}, {name}, {quick}", partial(_on_law, law, n, seed, name, quick), fresh)
                    for seed in range(1 if quick else DRAWS)
                ]
            yield from _rows(case, found, "L1", f"draws of {n} rows")
        for table, X, y in tables(skipped):
            found = {}
            for name in names:
                logger.info("%s: %s", table, name)
                found[name] = [
                    _kept(f"{table}, {seed}, {name}, {quick}", partial(_on_table, X, y, seed, name, quick), fresh)
                    for seed in range(1 if quick else DRAWS)
                ]
            yield from _rows(f"{table}, n = {len(y) - len(y) // 5}", found, "pinball", "splits")
            if quick:
                break
    finally:
        torch.set_num_threads(threads)
