"""`python -m benchmarks.flows_plot`: the picture of docs/papers/smooth_flows.md, of two flows trained by likelihood.

Left: log-densities along a cut through two basins. Middle: their slopes, the forces along the cut. Right: the total
energy of one simulation on each.
"""

import math

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

from benchmarks import flows_cases
from benchmarks.harness import ROOT
from planish.flows import simulate_nve

TARGET = ROOT / "docs" / "papers" / "smooth_flows.svg"
COLOURS = {"RQ spline": "#c1541f", "smooth": "#2a6f97"}
F64 = torch.float64


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "planish", "font.size": 9})
    torch.set_num_threads(1)
    figure, (height, slope, total) = plt.subplots(1, 3, figsize=(10.2, 3.3), layout="constrained")
    phi = torch.linspace(-165, -35, 651, dtype=F64)
    cut = torch.stack([phi, torch.full_like(phi, 140.0)], -1) * math.pi / 180
    truth = flows_cases.log_density(cut), flows_cases.forces(cut)[:, 0]
    start = flows_cases.draw(64, 20_000)[:1]
    velocity = torch.tensor([[1.0, -0.6]], dtype=F64)
    for name, colour in COLOURS.items():
        model = flows_cases.MODELS[name](0)
        flows_cases.train(model, flows_cases.draw(20_000, 0), force_weight=0.0, steps=700, seed=0)
        model = model.double()
        with torch.no_grad():
            height.plot(phi, model(cut), color=colour, linewidth=1.6, label=name)
        slope.plot(phi, flows_cases.force_of(model, cut)[:, 0], color=colour, linewidth=1.4)
        seen = simulate_nve(lambda x, model=model: -model(x), start, velocity, step=4e-4, n_steps=2500, every=5)
        change = (seen.total() - seen.total()[0])[:, 0]
        total.plot(4e-4 * 5 * torch.arange(len(change)), 1e3 * change, color=colour, linewidth=1.4)
    for axis, exact in zip((height, slope), truth, strict=True):
        axis.plot(phi, exact, color="#333333", linestyle=":", linewidth=1.2, label="truth")
        axis.set_xlabel("phi, degrees (psi = 140)")
    height.set(title="log-density", ylabel="log p, nats")
    height.legend(frameon=False, fontsize=8)
    slope.set(title="force along the cut", ylabel="kT / rad")
    total.set(title="dynamics at constant energy", xlabel="time", ylabel="change of total energy, kT / 1000")
    for axis in (height, slope, total):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
