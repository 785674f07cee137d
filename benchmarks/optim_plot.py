"""`python -m benchmarks.optim_plot`: the picture of docs/papers/generalized_smooth.md, from what `optim` measured.

How far the objective of phase retrieval is above its floor, by iteration, on logarithmic axes.
"""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from benchmarks.harness import ROOT
from benchmarks.optim import CURVES
from benchmarks.tables import Results

TARGET = ROOT / "docs" / "papers" / "optim.svg"
OURS, GREYS = "#2a6f97", ("#555555", "#777777", "#999999", "#b0b0b0")
STYLES = {"1/3-GD": ("#c1541f", "-"), "2/3-GD": ("#c1541f", "--"), "1-GD": ("#c1541f", ":")}


def main() -> None:
    run = Results().newest("optim")
    if run is None:
        raise SystemExit("nothing measured yet: `python -m benchmarks optim` first")
    rows = [row for row in run["rows"] if row["case"] == CURVES]
    plt.rcParams.update({"svg.hashsalt": "planish", "font.size": 9})
    figure, axis = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    plain = iter(zip(GREYS, ("-", "--", "-.", ":"), strict=True))
    for name in dict.fromkeys(row["subject"] for row in rows):
        points = [(int(row["metric"]) + 1, max(row["value"], 1e-3)) for row in rows if row["subject"] == name]
        ours = name.startswith("planish")
        colour, style = (OURS, "-") if ours else STYLES.get(name) or next(plain)
        axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=2.2 if ours else 1.4, label=name)
    axis.set(xscale="log", yscale="log", xlabel="iteration + 1", ylabel="f less the floor of its noise, cut at 0.001")
    axis.set_ylim(bottom=8e-4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
