"""`python -m benchmarks.smoothing_plot`: the picture of docs/papers/ppg.md, from what `smoothing` measured.

Left: bias of each sweep beside that of PaRIS at the cost of all ten. Right: bias and spread of estimates of one cost.
"""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from benchmarks.harness import ROOT
from benchmarks.smoothing import BIAS, by_sweep
from benchmarks.tables import Results

TARGET = ROOT / "docs" / "papers" / "ppg.svg"
OURS, RIVAL, GREY = "#2a6f97", "#c1541f", "#777777"


def main() -> None:
    run = Results().newest("smoothing")
    if run is None:
        raise SystemExit("nothing measured yet: `python -m benchmarks smoothing` first")
    plt.rcParams.update({"svg.hashsalt": "planish", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
    found = [row for row in run["rows"] if row["case"] == by_sweep(20)]
    sweeps = [int(row["subject"].split()[1]) for row in found]
    values = [abs(row["value"]) for row in found]
    low = [max(0.02, min(abs(row["low"]), abs(row["high"])) if row["low"] * row["high"] > 0 else 0.02) for row in found]
    high = [max(abs(row["low"]), abs(row["high"])) for row in found]
    left.errorbar(
        sweeps, values, [[v - a for v, a in zip(values, low, strict=True)],
                         [b - v for v, b in zip(values, high, strict=True)]],
        fmt="o-", color=OURS, ms=4, lw=1.4, elinewidth=0.8, label="PPG, 20 particles, 95 %",
    )  # fmt: skip
    table = {(row["subject"], row["metric"]): row for row in run["rows"] if row["case"] == BIAS}
    names = list(dict.fromkeys(subject for subject, _ in table))
    one = next(name for name in names if name.startswith("PaRIS"))
    bias = table[one, "bias"]
    left.axhspan(*sorted((abs(bias["low"]), abs(bias["high"]))), color=RIVAL, alpha=0.15, lw=0)
    left.axhline(abs(bias["value"]), color=RIVAL, lw=1.2, label="PaRIS, 200 particles, 95 %")
    left.set(yscale="log", xlabel="sweep", ylabel="size of the bias", xticks=sweeps, ylim=(0.1, None))
    left.legend(frameon=False, fontsize=8)
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name in names:
        kind, _, burn_in = name.split(":")[0].replace(", first pass + ", ", 1 + ").partition(", burn-in ")
        point = abs(table[name, "bias"]["value"]), table[name, "standard deviation"]["value"]
        lines.setdefault(kind, []).append((*point, burn_in))
    shades = iter((OURS, "#61a5c2", "#012a4a"))
    for kind, points in lines.items():
        colour = next(shades) if kind.startswith("PPG") else RIVAL if kind == one else GREY
        right.plot(*zip(*[(x, y) for x, y, _ in points], strict=True), "o-", ms=4, lw=1, color=colour, label=kind)
        for x, y, burn_in in points:
            if burn_in not in ("", "0"):
                right.annotate(burn_in, (x, y), xytext=(5, 2), textcoords="offset points", fontsize=7, color=colour)
    right.set(xlabel="size of the bias (numbers: sweeps of burn-in)", ylabel="standard deviation", xscale="log")
    right.margins(x=0.1, y=0.12)
    right.legend(frameon=False, fontsize=7, loc="lower left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
