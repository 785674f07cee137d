"""`python -m benchmarks.text_plot`: the picture of docs/papers/smoothie_text.md: what noise does, and what steps give.

Left: mean weight of the true phone in the state, on CMUdict's phones. Right: phone error rates of the kept results.
"""

import re

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks import text
from benchmarks.harness import ROOT
from benchmarks.tables import Results
from benchmarks.text_data import words
from planish.diffusion import SimplexScheduler, SmoothieScheduler

TARGET = ROOT / "docs" / "papers" / "smoothie_text.svg"
COLOURS = {"Smoothie": "#2a6f97", "embedding Gaussian": "#3a7d44", "simplex": "#c1541f", text.RIVAL: "#555555"}


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "planish", "font.size": 9})
    figure, (weight, error) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    data = words(text.N_TEST)
    space, ids = text.space(data), data.targets[:200]
    times = np.linspace(0, 1, 81)
    auto = SmoothieScheduler().set_space(space)
    lines = (
        (f"Smoothie, automatic width ({auto.sigma_min:.2f})", auto, COLOURS["Smoothie"], "-"),
        ("Smoothie, width 1.5 (BERT's)", SmoothieScheduler(sigma_min=1.5).set_space(space), COLOURS["Smoothie"], ":"),
        ("simplex, k = 5", SimplexScheduler().set_space(space), COLOURS["simplex"], "-"),
    )
    for label, scheduler, colour, style in lines:
        generator = torch.Generator().manual_seed(0)
        p = [float(scheduler.corrupt(ids, float(t), generator).probability(ids).mean()) for t in times]
        weight.plot(times, p, style, color=colour, linewidth=1.8, label=label)
    weight.set(title="what noise does", xlabel="time", ylabel="weight of the true phone")
    weight.legend(frameon=False, fontsize=8)
    found = Results().newest("text") or {"rows": []}
    for subject, colour in COLOURS.items():
        rows = [r for r in found["rows"] if r["subject"] == subject and r["metric"] == "phone error rate"]
        steps = [int(re.findall(r"(\d+) steps", r["case"])[0]) for r in rows]
        style = "--" if subject == text.RIVAL else "o-"
        error.plot(steps, [r["value"] for r in rows], style, color=colour, markersize=4, linewidth=1.6, label=subject)
    error.set(title="what steps give", xlabel="steps of sampling", ylabel="phone error rate, %", xscale="log")
    error.set_xticks(text.STEPS, [str(s) for s in text.STEPS], minor=False)
    error.minorticks_off()
    error.set_ylim(bottom=0)
    if found["rows"]:
        error.legend(frameon=False, fontsize=8)
    else:
        error.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=error.transAxes, color="#999999")
    for axis in (weight, error):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
