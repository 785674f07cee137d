"""Finished pieces of a benchmark, kept in the cache folder so that a stopped run goes on."""

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from benchmarks import data, harness

T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's t at 97.5 %, by number of seeds


def kept(benchmark: str, key: str, make: Callable[[], Any], *, fresh: bool = False) -> Any:  # noqa: ANN401
    """Return what an earlier run made under this key, or make it and keep it; JSON only."""
    path = data.cache_dir() / benchmark / f"{sha256(key.encode()).hexdigest()[:24]}.json"
    if path.is_file() and not fresh:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key:
            return found["value"]
    value = make()
    harness.write_json(path, {"key": key, "value": value})
    return value


def interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """Return the mean over seeds and its 95 % interval."""
    n = len(values)
    mean = sum(values) / n
    if n not in T_QUANTILE:
        return mean, None, None
    half = T_QUANTILE[n] * (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    return mean, mean - half, mean + half
