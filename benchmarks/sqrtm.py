"""Square roots of matrices, forward and backward: errors, times, and what `auto` makes of them; then low rank.

All subjects take turns in one process on one thread. Errors are relative Frobenius norms against float64 by
eigendecomposition: of the root, and of the gradient for a random G, which is the solution of X D + D X = G.
"""

import importlib.util
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, ROOT, Row
from planish.linalg import low_rank_correction, matrix_sqrth, solve_lyapunov_psd

Root = Callable[[Tensor], Tensor]
CONDITIONS = (1e1, 1e2, 1e4, 1e6)
SHAPES = ((256, 16), (64, 32), (64, 64), (16, 128), (1, 256), (1, 512))
TOLERANCES = (1e-1, 1e-2, 1e-5)
NO_GRADIENT = 0.5  # a gradient off by half of its size is none, however quick
RIVALS = ("scipy sqrtm", "eigh by autograd", "SVD by autograd", "Newton-Schulz 5", "Newton-Schulz 10")
PAPER, OWN = "paper MPA", "paper MPA, own gradient"
NO_GPU = "no GPU was at hand"


def _by_eigh(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


def _by_svd(a: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(a)
    return (u * s.sqrt()[..., None, :]) @ v


def _by_scipy(a: Tensor) -> Tensor:
    from scipy.linalg import sqrtm  # noqa: PLC0415

    flat = a.detach().reshape(-1, *a.shape[-2:]).numpy()
    return torch.stack([torch.from_numpy(sqrtm(one).real) for one in flat]).reshape(a.shape)


def _ours(**given: object) -> Root:
    return lambda a: matrix_sqrth(a, **given)  # type: ignore[arg-type]


def subjects(against: tuple[str, ...] | None, skipped: dict[str, str]) -> dict[str, Root]:
    """Return the methods by name."""
    found = {
        "auto": _ours(),
        "auto, 1e-2": _ours(tolerance=1e-2),
        "auto, 1e-1": _ours(tolerance=1e-1),
        "eigh": _ours(method="eigh"),
        "pade_iter 2": _ours(method="pade_iter", steps=2),
        "mpa": _ours(method="mpa"),
        "mpa, lyapunov": _ours(method="mpa", backward="lyapunov"),
        "mtp, autograd": _ours(method="mtp", backward="autograd"),
        PAPER: _ours(paper=True),
        OWN: _ours(paper=True, backward="autograd"),
        "paper MTP": _ours(paper=True, method="mtp"),
        "Newton-Schulz 5": _ours(method="newton_schulz", steps=5, backward="autograd"),
        "Newton-Schulz 10": _ours(method="newton_schulz", steps=10, backward="autograd"),
        "eigh by autograd": _by_eigh,
        "SVD by autograd": _by_svd,
        "scipy sqrtm": _by_scipy,
    }
    if importlib.util.find_spec("scipy") is None:
        skipped["scipy sqrtm"] = "not installed"
        del found["scipy sqrtm"]
    return {k: f for k, f in found.items() if against is None or k not in RIVALS or k in against}


def _basis(batch: int, n: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    return torch.linalg.qr(torch.randn(batch, n, n, generator=g, dtype=torch.float64)).Q


def logspace(batch: int, n: int, condition: float) -> Tensor:
    """Return matrices with eigenvalues at equal ratios from 1 to 1 over the condition."""
    q = _basis(batch, n)
    return (q * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)) @ q.mT


def wishart(batch: int, n: int) -> Tensor:
    """Return covariances of 4 n standard normal vectors: a condition of about 9."""
    x = torch.randn(batch, n, 4 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return x @ x.mT / (4 * n)


def _off(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def _errors(case: str, a: Tensor, dtype: torch.dtype, methods: dict[str, Root]) -> Iterator[Row]:
    exact = _by_eigh(a)
    g = torch.randn(a.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = g + g.mT
    slope = solve_lyapunov_psd(exact, g)
    for name, f in methods.items():
        leaf = a.to(dtype).requires_grad_()
        x = f(leaf)
        yield Row(case, name, "error", _off(x.detach(), exact), "relative")
        if x.requires_grad:
            (d,) = torch.autograd.grad(x, leaf, g.to(dtype))
            value = _off((d + d.mT) / 2, slope)
            if math.isfinite(value):  # NaN has no place in JSON, and is what a repeated eigenvalue gives autograd
                yield Row(case, name, "gradient error", value, "relative")


def _times(case: str, a: Tensor, methods: dict[str, Root], rounds: int) -> Iterator[Row]:
    leaf = a.float().requires_grad_()
    g = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    forward: dict[str, list[float]] = {name: [] for name in methods}
    both: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        names = list(methods)
        random.Random(turn).shuffle(names)  # so that no one always follows the same rival
        for name in names:
            f = methods[name]
            start = time.perf_counter()
            x = f(leaf)
            middle = time.perf_counter()
            if x.requires_grad:
                torch.autograd.grad(x, leaf, g)
            end = time.perf_counter()
            if turn:
                forward[name].append((middle - start) * 1e3)
                both[name].append((end - start) * 1e3)
    for name in methods:
        times = forward[name]
        yield Row(case, name, "forward", statistics.median(times), "ms", None, min(times), max(times))
        if name != "scipy sqrtm":
            times = both[name]
            yield Row(case, name, "forward and backward", statistics.median(times), "ms", None, min(times), max(times))


def _judged(case: str, rows: list[Row]) -> Iterator[Row]:
    """Yield how `auto` compares to the quickest of all methods that keep to a tolerance and have a gradient."""
    errors = {r.subject: r.value for r in rows if r.case == case and r.metric == "error"}
    slopes = {r.subject: r.value for r in rows if r.case == case and r.metric == "gradient error"}
    times = {r.subject: r.value for r in rows if r.case == case and r.metric == "forward and backward"}
    for tolerance in TOLERANCES:
        ours = {1e-1: "auto, 1e-1", 1e-2: "auto, 1e-2"}.get(tolerance, "auto")
        kept = [name for name in times if errors[name] <= tolerance and slopes[name] <= NO_GRADIENT]
        others = [name for name in kept if not name.startswith("auto")]
        best = min(others, key=times.__getitem__)
        yield Row(case, ours, f"time over the quickest within {tolerance:.0e}", times[ours] / times[best], "x", best)
    base = "Newton-Schulz 5"
    if base in times:
        for name in (PAPER, OWN):
            yield Row(case, name, "time over that of Newton-Schulz 5", times[name] / times[base], "x", base)


def layer(kind: str) -> tuple[Tensor, Tensor]:
    """Return an error of rounding to 3 bits in groups of 64, and the second moment of inputs with large channels."""
    g = torch.Generator().manual_seed(0)
    spread, rows = {"condition 1e4": (0.5, 1024), "condition 2e6": (2.0, 1024), "rank 100 of 256": (1.0, 100)}[kind]
    x = torch.randn(rows, 256, generator=g, dtype=torch.float64)
    x *= torch.logspace(0, -spread, 256, dtype=torch.float64)[torch.randperm(256, generator=g)]
    x[:, torch.randperm(256, generator=g)[:4]] *= 30
    w = torch.randn(192, 4, 64, generator=g, dtype=torch.float64)
    step = w.abs().amax(-1, keepdim=True) / 3.5
    return (w - step * (w / step).round().clamp(-4, 3)).reshape(192, 256), x.T @ x / rows


def _low_rank(kind: str, rank: int = 16) -> Iterator[Row]:
    error, moment = layer(kind)
    case = f"correction of rank {rank}, {kind}"
    whole = torch.einsum("oi,ij,oj->", error, moment, error)

    def over(scale: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(error @ scale)
        return torch.linalg.solve(scale.mT, ((u[:, :rank] * s[:rank]) @ v[:rank]).T).T

    def cholesky() -> Tensor:
        return over(torch.linalg.cholesky(moment))

    def ours() -> Tensor:
        up, down = low_rank_correction(error.float(), moment.float(), rank)
        return up.double() @ down.double()

    diagonal = moment.diagonal()
    ways: dict[str, Callable[[], Tensor]] = {
        "none": lambda: 0 * error,
        "SVD of the error": lambda: over(torch.eye(256, dtype=torch.float64)),
        "root of the diagonal (QERA-approx)": lambda: over(torch.diag(diagonal.sqrt())),
        "Cholesky": cholesky,
        "root by paper MPA": lambda: over(matrix_sqrth(moment, paper=True)),
        "root by eigh (QERA-exact)": lambda: over(matrix_sqrth(moment)),
        "without a root (ours, float32)": ours,
    }
    for name, way in ways.items():
        try:
            rest = error - way()
        except torch.linalg.LinAlgError:
            yield Row(case, name, "fails", 1.0, "", note="1: the factor is singular")
            continue
        left = torch.einsum("oi,ij,oj->", rest, moment, rest)
        yield Row(case, name, "output error", (left / whole).clamp(min=0).sqrt().item(), "relative")
    bound = torch.linalg.svdvals(error @ _by_eigh(moment))[rank:].square().sum()
    yield Row(case, "Eckart-Young bound", "output error", (bound / whole).sqrt().item(), "relative")


def rows(
    quick: bool, *, against: tuple[str, ...] | None = None, skipped: dict[str, str] | None = None, **_: object
) -> Iterator[Row]:
    """Yield errors by condition, errors and times by shape, `auto` against the best, and corrections of low rank.

    Args:
        quick: Two shapes, two rounds.
        against: Rivals, by name; all by default.
        skipped: Takes what could not run, and why.
    """
    skipped = {} if skipped is None else skipped
    skipped["CUDA"] = NO_GPU
    methods = subjects(against, skipped)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="scipy")
            for condition in CONDITIONS:
                yield from _errors(
                    f"64 x 64, condition {condition:.0e}", logspace(1, 64, condition), torch.float64, methods
                )
            for batch, n in SHAPES[:2] if quick else SHAPES:
                for kind, a in (("Wishart", wishart(batch, n)), ("condition 1e+04", logspace(batch, n, 1e4))):
                    case = f"{batch} x {n} x {n}, float32, {kind}"
                    made = [*_errors(case, a, torch.float32, methods), *_times(case, a, methods, 2 if quick else 9)]
                    yield from made
                    yield from _judged(case, made)
            for kind in ("condition 1e4", "condition 2e6", "rank 100 of 256"):
                yield from _low_rank(kind)
    finally:
        torch.set_num_threads(threads)


def plot(path: Path, results: Path) -> None:
    """Draw errors against times, from kept results: what lies left and below is better."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # noqa: PLC0415

    found = json.loads(results.read_text(encoding="utf-8"))["rows"]
    panels = ("256 x 16 x 16", "64 x 64 x 64", "1 x 256 x 256")
    marks = {"Wishart": "o", "condition 1e+04": "s"}
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.2), sharey=True, layout="constrained")
    names = [n for n in dict.fromkeys(r["subject"] for r in found if r["metric"] == "forward and backward")]
    names = [n for n in names if not n.startswith("auto,")]
    for axis, panel in zip(axes, panels, strict=True):
        for kind, mark in marks.items():
            here = [r for r in found if r["case"] == f"{panel}, float32, {kind}" and not r["baseline"]]
            errors = {r["subject"]: r["value"] for r in here if r["metric"] == "error"}
            times = {r["subject"]: r["value"] for r in here if r["metric"] == "forward and backward"}
            for i, name in enumerate(names):
                label = name if kind == "Wishart" else None
                size = 90 if name == "auto" else 40
                axis.scatter(
                    times[name], errors[name], size, color=plt.get_cmap("tab20")(i), marker=mark, label=label, alpha=0.8
                )
        axis.set(xscale="log", yscale="log", title=f"{panel}, float32", xlabel="forward and backward, ms")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the root")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle("circles: Wishart, condition about 9; squares: condition 1e4", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    plot(ROOT / "docs" / "papers" / "matsqrt.svg", max(RESULTS.glob("*/sqrtm.json")))
