"""`python -m benchmarks.roofline`: the picture of docs/jobs/run-it-fast.md, drawn from what `decode` measured.

Tokens a second of every subject, and for ours the floor: what reading the bytes of a token would allow.
"""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from benchmarks.harness import ROOT
from benchmarks.tables import Results

TARGET = ROOT / "docs" / "jobs" / "run-it-fast.svg"


def main() -> None:
    runs = [run for run in map(Results().newest, ("decode", "decode_large")) if run is not None]
    plt.rcParams.update({"svg.hashsalt": "planish", "font.size": 9})
    figure, axes = plt.subplots(len(runs), 1, figsize=(7.2, 2.6 * len(runs)), squeeze=False, layout="constrained")
    for axis, run in zip(axes[:, 0], runs, strict=True):
        known = {(r["subject"], r["metric"]): r["value"] for r in run["rows"] if r["baseline"] is None}
        names = [subject for subject, metric in known if metric == "decode"][::-1]
        colours = ["#2a6f97" if name.startswith("planish") else "#b8b8b8" for name in names]
        values = [known[name, "decode"] for name in names]
        bars = axis.barh(names, values, color=colours, height=0.62)
        axis.bar_label(bars, [f" {v:.3g}" for v in values], padding=2)
        for place, name in enumerate(names):
            if (name, "part of the floor") in known:
                floor = known[name, "decode"] / known[name, "part of the floor"]
                axis.plot([floor] * 2, [place - 0.4, place + 0.4], color="#c1121f", lw=2)
        rate = known["plain read", "bandwidth"]
        axis.set_title(
            f"{run['rows'][0]['case']}: one text, {run['machine']['cores']} threads", loc="left", fontsize=10
        )
        axis.set_xlabel(f"tokens a second; red: the bytes of a token read at {rate:.3g} GB/s")
        axis.set_xlim(
            0,
            1.18
            * max(
                *values,
                *(
                    known[n, "decode"] / known[n, "part of the floor"]
                    for n in names
                    if (n, "part of the floor") in known
                ),
            ),
        )
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
