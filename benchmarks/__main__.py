"""`python -m benchmarks NAME [--suite S] [--quick] [--against a,b] [--fresh]`: run one benchmark, keep its rows."""

import argparse
import importlib
import logging
import os
import signal
import sys

from benchmarks import harness

NAMES = (
    "quant",
    "cost",
    "search",
    "diffusion",
    "evolve",
    "calibration",
    "tune",
    "quantiles",
    "optim",
    "robust",
    "newton",
    "sqrtm",
    "hardness",
    "choquard",
    "smoothing",
    "flows",
    "interpolation",
    "graphs",
    "noise",
    "segments",
    "activations",
    "private",
    "caching",
    "schedules",
    "text",
    "serve",
    "load",
    "kernels",
    "integer",
    "decode",
    "decode_large",
)
SUITES = {
    ("diffusion", "terrain"): "terrain",
    ("quant", "bytes"): "branches",
    ("quant", "outliers"): "outliers",
    ("quant", "ragged"): "ragged",
    ("activations", "time"): "activation_times",
    ("smoothing", "learning"): "smoothing_learning",
    ("smoothing", "time"): "smoothing_times",
    ("interpolation", "stock"): "interpolation_stock",
}
"""Other cases of a benchmark, each in a file and with results of its own."""


def _grid(text: str) -> tuple[int, int | None]:
    bits, _, group = text.partition(":")
    return int(bits), None if group == "row" else int(group)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--suite", choices=sorted({s for _, s in SUITES}), help="other cases of the same benchmark")
    parser.add_argument("--quick", action="store_true", help="a minute's worth of the same cases")
    parser.add_argument(
        "--against", help="only these rivals, comma-separated (part of a name is enough); `none` for none"
    )
    parser.add_argument("--only", help="only these subjects, ours or not, comma-separated full names; keeps no rows")
    parser.add_argument("--grids", help="only these grids: bits:group, comma-separated, as in 4:64,3:64,4:row")
    parser.add_argument("--models", help="only models whose name holds one of these, comma-separated")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run left in the cache")
    args = parser.parse_args()
    if args.suite is not None and (args.name, args.suite) not in SUITES:
        parser.error(f"{args.name} has no suite {args.suite}")
    name = args.name if args.suite is None else f"{args.name}-{args.suite}"
    module = importlib.import_module(f"benchmarks.{SUITES.get((args.name, args.suite), args.name)}")
    if getattr(module, "REUSE_MEMORY", True) and os.environ.keys().isdisjoint(harness.REUSE_MEMORY):
        again = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | harness.REUSE_MEMORY)
    # Leave through Python when told to end, so that the driver under way is ended too and not left behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    against = None if args.against is None else tuple(a for a in args.against.split(",") if a != "none")
    skipped: dict[str, str] = {}
    only = None if args.only is None else tuple(args.only.split(","))
    grids = None if args.grids is None else tuple(_grid(text) for text in args.grids.split(","))
    models = None if args.models is None else tuple(args.models.split(","))
    part = {"against": against, "only": only, "grids": grids, "models": models}
    rows = list(module.rows(args.quick, **part, fresh=args.fresh, skipped=skipped))
    if only is not None:  # a part, to fill the cache: the whole is what is published
        harness.show(rows)
        return
    path = harness.save(name, rows, quick=args.quick, skipped=skipped)
    harness.show(rows)
    for subject, reason in skipped.items():
        print(f"skipped {subject}: {reason}")
    print(f"kept in {path.relative_to(harness.ROOT)}")


if __name__ == "__main__":
    main()
