"""A 4-bit product on the CPU against its rivals, in one process: time, memory rate, and the cost of rounding.

Rivals take turns within each round, so that a slow moment of the machine slows all of them; a pause before each turn
lets the threads of the last one fall asleep, and one call that is not timed wakes its own. Matrices are cycled through
until more memory has been touched than any cache holds, one row of activations at a time; from sixteen rows on one
matrix is enough, since the arithmetic decides. Whoever is not installed is named as skipped.

Legend: N outputs, K inputs, M rows.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from benchmarks.harness import ROOT, Row

SHAPES = ((4096, 4096), (11008, 4096), (4096, 14336))
ROWS = (1, 16, 128, 512)
GROUP = 128
TOUCHED = 256 << 20  # bytes of 4-bit weights behind each figure for one row
SECONDS = 0.8  # a subject and case
REST = 0.03  # seconds for the threads of the one before to stop spinning
WAKE = 0.01  # seconds of calls that are not timed: an idle core of a virtual machine takes milliseconds to come back


def rows(quick: bool, *, skipped: dict[str, str], against: tuple[str, ...] | None = None, **_: object) -> Iterator[Row]:
    """Measure every shape with one and with two threads, each number of threads in a process of its own."""
    shapes = ((256, 512),) if quick else SHAPES
    counts = (1, 16) if quick else ROWS
    launcher = os.environ.get("PLANISH_BENCH_LAUNCHER", "").split()  # put in front, such as `taskset -c 2,3`
    python = os.environ.get("PLANISH_RIVALS_PYTHON", sys.executable)  # where the rivals are installed
    for threads in (1, 2):
        for n, k in shapes:
            for m in counts:
                case = {"n": n, "k": k, "m": m, "threads": threads, "quick": quick, "against": against}
                command = [*launcher, python, "-m", "benchmarks.kernels", json.dumps(case)]
                environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
                done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise RuntimeError(f"benchmarks.kernels: {case} failed:\n{done.stderr[-2000:]}")
                answer = json.loads(done.stdout.splitlines()[-1])
                skipped.update(answer["skipped"])
                yield from (Row(**row) for row in answer["rows"])


def _race(subjects: dict[str, list[Callable[[], object]]], seconds: float) -> dict[str, list[float]]:
    """Time each subject's calls, all matrices of one after another, subjects in turn; seconds a call of each round."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for calls in subjects.values():
        for call in calls:
            call()  # compile, prepare, fault pages in
    end, done = time.perf_counter() + seconds * len(subjects), 0
    while done < 5 or time.perf_counter() < end:
        for name, calls in subjects.items():
            time.sleep(REST)
            start = time.perf_counter()
            while time.perf_counter() < start + WAKE:  # the subject's own threads
                calls[0]()
            start = time.perf_counter()
            for call in calls:
                call()
            times[name].append((time.perf_counter() - start) / len(calls))
        done += 1
    return times


def measure(*, n: int, k: int, m: int, threads: int, quick: bool, against: tuple[str, ...] | None) -> dict[str, object]:
    """Race ours and the rivals at one shape."""
    from benchmarks import matmuls  # noqa: PLC0415

    size = n * k // 2
    few = 1 if quick or m > 1 else -(-TOUCHED // size)
    group = 64 if quick else GROUP
    problem = matmuls.Problem(n, k, m, group, threads, few)
    subjects: dict[str, list[Callable[[], object]]] = {}
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, make in matmuls.SUBJECTS.items():
        ours = name.startswith("planish") or name.startswith("plain read")
        if against is not None and not ours and not any(part in name for part in against):
            continue
        try:
            # a float weight is eight times as large: fewer copies touch as much memory
            subjects[name] = [make(problem, seed) for seed in range(max(1, few // matmuls.BULK.get(name, 1)))]
        except ImportError as error:
            skipped[name] = str(error)
            continue
        if name not in matmuls.READS:
            errors[name] = problem.error(subjects[name][0]())
    times = _race(subjects, 0.02 if quick else SECONDS)
    out: list[dict[str, object]] = []
    case = f"{n}x{k}, {m} row{'s' if m > 1 else ''}, {threads} thread{'s' if threads > 1 else ''}"
    rounded = "planish, 16-bit activations"
    read = {name: problem.read_bytes() / statistics.median(times[name]) for name in matmuls.READS if name in times}

    def row(subject: str, metric: str, value: float, unit: str, baseline: str | None = None) -> None:
        out.append({"case": case, "subject": subject, "metric": metric, "value": value, "unit": unit,
                    "baseline": baseline})  # fmt: skip

    for name, t in times.items():
        if name in read:
            row(name, "rate", read[name] / 1e9, "GB/s")
            continue
        row(name, "median", statistics.median(t) * 1e3, "ms")
        row(name, "least", min(t) * 1e3, "ms")
        row(name, "error", errors[name], "of the result's norm")
        if name.startswith("planish") and m == 1:
            rate = problem.prepared_bytes() / statistics.median(t)
            row(name, "rate", rate / 1e9, "GB/s")
            for base, floor in read.items():
                row(name, "share of the memory's rate", rate / floor, "ratio", base)
    for name, t in times.items():
        if name not in read and not name.startswith("planish"):
            for subject in (rounded, "planish, 8-bit activations"):
                ratio = statistics.median(a / b for a, b in zip(t, times[subject], strict=True))
                row(subject, "speed-up", ratio, "times", name)
    return {"rows": out, "skipped": skipped}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
