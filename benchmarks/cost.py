"""What quantizing costs: seconds and memory of ours against llm-compressor's AWQ, same model, tokens and machine.

Each measurement is a process of its own; subjects take turns, so that a slow spell of the machine falls on all. Memory
is the peak while quantizing, less what was resident just before (the loaded model and the libraries); the process's
whole peak stands beside it. The clock covers quantizing alone: loading and writing are not in it.
"""

from collections.abc import Iterator
from statistics import median

from safetensors.torch import save_file

from benchmarks import data
from benchmarks.harness import Row
from benchmarks.subjects import Case, Subject, chosen, timed, unable

COMPARED = ("smoothquant+", "smoothquant+ by layer", "awq (ours)", "best", "llm-compressor awq")
BASELINE = "llm-compressor awq"
METRICS = {
    "seconds": ("quantizing", "s", 1.0),
    "cpu_seconds": ("processor time", "s", 1.0),
    "extra": ("memory above the loaded model", "MiB", 2.0**20),
    "process_peak": ("peak memory of the process", "MiB", 2.0**20),
}


def _measured(line: dict[str, float]) -> dict[str, float]:
    return {
        name: (line["rss_peak"] - line["rss_before"] if name == "extra" else line[name]) / scale
        for name, (_, _, scale) in METRICS.items()
    }


def rows(
    quick: bool,
    *,
    against: tuple[str, ...] | None = None,
    only: tuple[str, ...] | None = None,
    skipped: dict[str, str] | None = None,
    fresh: bool = False,
    **_: object,
) -> Iterator[Row]:
    """Yield minimum, median and ratio to llm-compressor's AWQ of each subject's costs; a stopped series goes on.

    Args:
        quick: One round on few tokens.
        against: Only rivals whose name holds one of these; None for all.
        only: Only the subjects with these names; None for all.
        skipped: Filled with who could not run, and why.
        fresh: Measure again what an earlier run of the same code left in the cache.
        **_: What other benchmarks are asked beside this: a cost has one grid and one model.
    """
    skipped = {} if skipped is None else skipped
    shape, rounds = ((4, 128), 1) if quick else ((16, 512), 2)
    case = Case("SmolLM2-135M", 4, 64)
    model = data.language_model()
    calibration = data.windows(model, *shape, evaluation=False)
    tokens = data.cache_dir() / f"cost-{calibration.fingerprint}.tokens"
    save_file({"input_ids": calibration.ids}, tokens)
    subjects: dict[str, Subject] = {}
    for name, subject in chosen(against, only).items():
        reason = unable(subject, case, set(), encoder=False)
        if name in COMPARED and reason is None:
            subjects[name] = subject
        elif name in COMPARED:
            skipped[name] = reason or ""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for take in range(rounds):
        for name, subject in subjects.items():
            if name in skipped:
                continue
            try:
                runs[name].append(_measured(timed(subject, case, model, tokens, take, fresh=fresh)))
            except RuntimeError as error:
                skipped[name] = str(error)
    title = f"{case.name}, {calibration.source}, {rounds} round{'s' * (rounds > 1)}"
    runs = {name: lines for name, lines in runs.items() if len(lines) == rounds}
    for name, lines in runs.items():
        for metric, (label, unit, _) in METRICS.items():
            values = [line[metric] for line in lines]
            yield Row(title, name, label, median(values), unit, None, min(values), max(values), "[least, most]")
    for name, lines in runs.items():
        if name == BASELINE or BASELINE not in runs:
            continue
        for metric, (label, _, _) in METRICS.items():
            ratios = [mine[metric] / theirs[metric] for mine, theirs in zip(lines, runs[BASELINE], strict=True)]
            yield Row(title, name, label, median(ratios), "ratio", BASELINE, min(ratios), max(ratios), "[least, most]")
