"""Smooth units beside ReLU, PReLU, GELU: how well a small network learns derivatives, and classes.

Networks of one seed begin with the same weights and see the same points, whatever their activation. What the units take
is another suite: `python -m benchmarks activations --suite time`.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row
from planish.nn import SAU, SMU, SMU1, ReQU

CURVE = "sin(3x) from 64 points, 1-64-64-1"
DIGITS = "digits, 64-16-16-10"
UNITS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU(0.15)": lambda: nn.LeakyReLU(0.15),
    "PReLU(0.15)": lambda: nn.PReLU(init=0.15),
    "SAU, the paper's width": SAU,
    "SAU, width 0.5": lambda: SAU(sigma=0.5),
    "SAU, width trained": lambda: SAU(sigma=0.5, learn_sigma=True),
    "SMU, the paper's mu": SMU,
    "SMU, mu 1": lambda: SMU(mu=1.0),
    "SMU-1, the known mu": SMU1,
    "SMU-1, mu 0.5": lambda: SMU1(mu=0.5),
    "ReQU": ReQU,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "Softplus": nn.Softplus,
}
OURS = ("SAU", "SMU", "ReQU")


def network(widths: list[int], unit: Callable[[], nn.Module], seed: int) -> nn.Sequential:
    """Return a multilayer perceptron; its weights depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        layers += [linear, unit()]
    return nn.Sequential(*layers[:-1])


def _train(net: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()


def curve_errors(unit: Callable[[], nn.Module], seed: int, steps: int = 1500) -> tuple[float, float]:
    """Fit sin(3x) on [-2, 2] by values alone; return the root mean square errors of values and of derivatives."""
    net = network([1, 64, 64, 1], unit, seed)
    x = torch.linspace(-2, 2, 64)[:, None]
    _train(net, lambda _: F.mse_loss(net(x), torch.sin(3 * x)), steps, 3e-3)
    between = torch.linspace(-2, 2, 1001)[:, None].requires_grad_()
    y = net(between)
    (slope,) = torch.autograd.grad(y.sum(), between)
    with torch.no_grad():
        return (
            float((y - torch.sin(3 * between)).square().mean().sqrt()),
            float((slope - 3 * torch.cos(3 * between)).square().mean().sqrt()),
        )


def digits_accuracy(unit: Callable[[], nn.Module], seed: int, steps: int = 400) -> float:
    """Train on half of scikit-learn's digits, batches of 64; return the accuracy on the other half, in percent."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    x, y = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    half = len(y) // 2
    batches = [torch.randint(half, (64,), generator=generator) for _ in range(steps)]
    net = network([64, 16, 16, 10], unit, seed)
    _train(net, lambda i: F.cross_entropy(net(x[batches[i]]), y[batches[i]]), steps, 1e-2)
    with torch.no_grad():
        return 100 * float((net(x[half:]).argmax(1) == y[half:]).float().mean())


def _mean(values: list[float]) -> tuple[float, float, float]:
    mean = statistics.fmean(values)
    half = 2 * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def rows(
    quick: bool, *, against: tuple[str, ...] | None = None, skipped: dict[str, str] | None = None, **_: object
) -> Iterator[Row]:
    """Yield errors of curves and of derivatives, and accuracies on digits.

    Args:
        quick: Two seeds of short training.
        against: Rivals to keep, by a part of their names; all by default.
        skipped: Takes what could not run, and why.
    """
    skipped = {} if skipped is None else skipped
    units = {
        name: unit
        for name, unit in UNITS.items()
        if against is None or name.startswith(OURS) or any(part in name for part in against)
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seeds = range(2 if quick else 5)
    steps = 20 if quick else 1500
    note = f"mean over {len(seeds)} seeds, with two standard errors either way"
    for name, unit in units.items():
        found = [curve_errors(unit, seed, steps) for seed in seeds]
        for metric, values in zip(("value", "derivative"), zip(*found, strict=True), strict=True):
            mean, low, high = _mean(list(values))
            yield Row(CURVE, name, f"RMSE of the {metric}", mean, "", None, low, high, note)
    try:
        import sklearn  # noqa: F401, PLC0415
    except ImportError:
        skipped["digits"] = "scikit-learn is not installed"
    else:
        for name, unit in units.items():
            mean, low, high = _mean([digits_accuracy(unit, seed, 20 if quick else 400) for seed in seeds])
            yield Row(DIGITS, name, "accuracy", mean, "%", None, low, high, note)
    torch.set_num_threads(threads)
