"""`python -m benchmarks.activations_plot`: the picture of docs/papers/sau.md: kernels, widths, and what they leave.

Left: the unit next to zero for three widths. Middle: how far each kernel lies above Leaky ReLU at width 1. Right: its
derivative at width 1.
"""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.harness import ROOT
from planish.nn import sau
from planish.nn.profiles import PROFILES

TARGET = ROOT / "docs" / "papers" / "sau.svg"
SLOPE = 0.15
COLOURS = ("#2a6f97", "#c1541f", "#3a7d44", "#7b4b94", "#555555", "#999999", "#b8860b")


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "planish", "font.size": 9})
    figure, (unit, above, slope) = plt.subplots(1, 3, figsize=(10.2, 3.4), layout="constrained")
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)
    unit.plot(x, sau(x, SLOPE, 0.0), color="#555555", linestyle="--", linewidth=1.2, label="0 (Leaky ReLU)")
    for colour, sigma in zip(COLOURS, (0.25, 0.5, 1.0), strict=False):
        unit.plot(x, sau(x, SLOPE, sigma), color=colour, linewidth=1.8, label=f"{sigma:g}")
    unit.set(title="the unit, Gaussian kernel", xlabel="x", ylabel="SAU(x)")
    unit.legend(frameon=False, fontsize=8, title="width", title_fontsize=8)
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for colour, kernel in zip(COLOURS, PROFILES, strict=True):
        at = x.clone().requires_grad_()
        y = sau(at, SLOPE, 1.0, kernel=kernel)
        (derivative,) = torch.autograd.grad(y.sum(), at)
        above.plot(x, y.detach() - sau(x, SLOPE, 0.0), color=colour, linewidth=1.5, label=kernel)
        slope.plot(x, derivative, color=colour, linewidth=1.5)
    above.set(title="above Leaky ReLU, width 1", xlabel="x", ylabel="SAU(x) - L(x)")
    above.set_ylim(0, 0.78)
    above.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper center")
    slope.set(title="derivative, width 1", xlabel="x", ylabel="SAU'(x)")
    for axis in (unit, above, slope):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
