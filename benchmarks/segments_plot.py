"""Draw which values each form can tell behind SiLU: `python -m benchmarks.segments_plot FILE.svg`."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from planish.quant.act_formats import Dual, Static
from planish.quant.formats import Affine

BITS, SIGMA = 4, 1.0


def main(path: Path) -> None:
    """Write the picture: the density of values, and a tick for every value that four bits can stand for."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    x = F.silu(SIGMA * torch.randn(40_000, generator=torch.Generator().manual_seed(0)))
    low, high = x.min().item(), x.max().item()
    plain, affine = (Affine(BITS, None, symmetric, scale_dtype="float64") for symmetric in (True, False))
    grids = {
        "symmetric": Static(plain, low, high), "two signed scales": Static(Dual(BITS), low, high),
        "zero point": Static(affine, low, high), "two unsigned scales": Static(Dual(BITS, unsigned=True), low, high),
    }  # fmt: skip
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 3.6), sharex=True, height_ratios=(2, 3))
    top.hist(x.numpy(), bins=160, density=True, color="0.7")
    top.set_yscale("log")
    top.set_ylabel("density")
    line = torch.linspace(low, high, 20_001)[None].double()
    for number, grid in enumerate(grids.values()):
        values = grid.fake(line).unique()
        error = (grid.fake(x[None].double()) - x).square().mean().item()
        bottom.plot(values.numpy(), [-number] * len(values), "|", markersize=11, color="C0" if number < 3 else "C3")
        bottom.text(high * 1.02, -number, f"{error:.1e}", va="center", fontsize=8)
    bottom.text(high * 1.02, 0.75, "mean squared\nerror", fontsize=8)
    bottom.set_yticks([-n for n in range(len(grids))], list(grids))
    bottom.set_ylim(-len(grids) + 0.4, 0.6)
    bottom.set_xlabel("silu(x), x standard normal; values that 4 bits with one range can tell")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "planish"
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
