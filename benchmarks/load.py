"""A crowd at the endpoint of `planish serve`: are answers right, is everything given back, does it stand?

The server runs in float32, so that what a request gets does not depend on who else is served (in bfloat16 greedy
tokens may differ between batches of different sizes, in any engine). After the crowd the server must be idle, its
cache of keys and values empty, and its memory and open files must not have grown on a second crowd.
"""

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks import data
from benchmarks.harness import ROOT, Row, cores
from benchmarks.serve import _VLLM, checkpoint, interpreter

REQUESTS, CLIENTS, PORT = 240, 16, 8765
KINDS = (
    *("in one piece", "streamed", "cancelled", "refused", "right", "right as far as it got"),
    *("wrong", "wrongly taken", "failed"),
)
NAME = "small"


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            _get(f"{url}/health")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)


def _metric(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def _held(process: int) -> tuple[float, int]:
    """Return the resident MiB and the open files of a process and its children."""
    size = float(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1024  # type: ignore[index]
    files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            more = _held(int(child))
            size, files = size + more[0], files + more[1]
    return size, files


def rows(
    quick: bool,
    *,
    skipped: dict[str, str] | None = None,
    **_: object,
) -> Iterator[Row]:
    skipped = {} if skipped is None else skipped
    python, small, url = (
        interpreter("PLANISH_VLLM", ".venv-vllm"),
        checkpoint(data.language_model()),
        f"http://127.0.0.1:{PORT}",
    )
    if not python.exists():
        skipped["planish serve"] = "vLLM has no environment here: make vllm"
        return
    requests = 48 if quick else REQUESTS
    case = f"{requests} requests of {CLIENTS} clients, float32, SmolLM2-135M 4-bit, {cores()} cores"
    command = [python, "-m", "planish", "serve", small, "--engine", "vllm", "--port", str(PORT), "--dtype", "float32"]
    flags = ["--max-model-len", "1024", "--", "--enforce-eager", "--max-num-seqs", "16", "--served-model-name", NAME]
    server = subprocess.Popen(
        [*map(str, command), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **_VLLM, "OMP_NUM_THREADS": str(cores())},
    )  # fmt: skip
    try:
        _wait(url, server)
        held, found = [], {}
        for _round in range(2):  # the first crowd warms what is kept for ever
            crowd = [str(python), "-P", str(ROOT / "benchmarks" / "rivals" / "http_clients.py"), url, NAME]
            run = subprocess.run([*crowd, str(requests), str(CLIENTS)], capture_output=True, text=True, check=True)
            found = json.loads(run.stdout.rstrip().rpartition("\n")[2])
            time.sleep(2)
            held.append(_held(server.pid))
        metrics = _get(f"{url}/metrics")
    finally:
        server.terminate()
        server.wait(60)
    counts = found["counts"]
    note = "; ".join(found["notes"])
    figures = {name: counts.get(name, 0) for name in KINDS} | {
        "rate, requests/s": requests / found["seconds"],
        "median wait for a stream's first words, s": found["waits"][len(found["waits"]) // 2],
        "still running afterwards": _metric(metrics, "vllm:num_requests_running"),
        "cache still used, of 1": _metric(metrics, "vllm:kv_cache_usage_perc"),
        "memory grown by the second crowd, MiB": held[1][0] - held[0][0],
        "files opened by the second crowd": held[1][1] - held[0][1],
        "exit code": server.returncode,
    }
    for name, value in figures.items():
        yield Row(case, name, "figure", value, "", note=note)
