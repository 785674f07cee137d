"""A torus with known forces, and how near a flow comes: likelihood, forces, and energy conserved on what it learned.

The target is a mixture of five products of von Mises densities, placed like the basins of a peptide's torsions.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from planish.flows import SmoothFlow, simulate_nve

PI = math.pi
CENTERS = torch.tensor([[-65.0, -40], [-120, 130], [-70, 150], [57, 40], [-90, 70]], dtype=torch.float64) * PI / 180
KAPPAS = torch.tensor([[25.0, 18], [9, 12], [20, 15], [30, 20], [12, 9]], dtype=torch.float64)
SHARES = torch.tensor([0.35, 0.25, 0.2, 0.08, 0.12], dtype=torch.float64)


def log_density(x: Tensor) -> Tensor:
    """Return the target's log-density, nats."""
    centers, kappas, shares = (t.to(x) for t in (CENTERS, KAPPAS, SHARES))
    log_norm = torch.log(2 * PI * torch.special.i0e(kappas)) + kappas
    inner = kappas * (x[..., None, :] - centers).cos() - log_norm
    return (shares.log() + inner.sum(-1)).logsumexp(-1)


def forces(x: Tensor) -> Tensor:
    """Return the target's exact forces, kT per radian."""
    at = x.detach().requires_grad_()
    return torch.autograd.grad(log_density(at).sum(), at)[0]


def draw(n: int, seed: int) -> Tensor:
    """Return n exact samples, float64."""
    rng = np.random.default_rng(seed)
    which = rng.choice(len(SHARES), size=n, p=SHARES.numpy())
    return torch.from_numpy(rng.vonmises(CENTERS.numpy()[which], KAPPAS.numpy()[which]))


class Ours(nn.Module):
    """A flow of this library; `univariate` as there."""

    def __init__(self, univariate: str, seed: int, layers: int = 4) -> None:
        super().__init__()
        self.flow = SmoothFlow(
            2, periodic=True, components=8, transforms=layers, low=-PI, high=PI, univariate=univariate,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return log-densities."""
        return self.flow().log_prob(x)


class Zuko(nn.Module):
    """zuko's neural circular spline flow, autoregressive, with as many layers, bins and units."""

    def __init__(self, seed: int, layers: int = 4) -> None:
        super().__init__()
        import zuko  # noqa: PLC0415

        with torch.random.fork_rng(devices=[]):  # zuko draws its weights from the global state
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            self.flow = zuko.flows.NCSF(2, bins=8, transforms=layers, hidden_features=(64, 64), activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-densities; the flow wants angles in [-pi, pi)."""
        made: Tensor = self.flow().log_prob(torch.remainder(x + PI, 2 * PI) - PI)
        return made


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "smooth": lambda seed: Ours("smooth", seed),
    "RQ spline": lambda seed: Ours("spline", seed),
    "zuko NCSF": Zuko,
}


@dataclass(frozen=True)
class Score:
    """How near a trained flow came."""

    parameters: int
    kl: float
    force_rmse: float
    force_median: float
    force_worst: float
    drift: float
    seconds: float


def train(model: nn.Module, x: Tensor, *, force_weight: float, steps: int, seed: int, batch: int = 256) -> None:
    """Fit a model of log-densities by likelihood and, with a weight, forces; Adam with a cosine schedule."""
    x, target = x.float(), forces(x).float()
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=g)
        at = x[rows].requires_grad_(force_weight > 0)
        log_prob = model(at)
        loss = -log_prob.mean()
        if force_weight:
            (made,) = torch.autograd.grad(log_prob.sum(), at, create_graph=True)
            loss = (1 - force_weight) * loss + force_weight * (made - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()


def force_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return the gradient of a model's log-density."""
    at = x.detach().requires_grad_()
    return torch.autograd.grad(model(at).sum(), at)[0]


def judge(model: nn.Module, seconds: float = 0.0, *, n_test: int = 4000, md_steps: int = 600) -> Score:
    """Score a trained model in float64, on samples that all models share."""
    model = model.double()
    x = draw(n_test, 10_000)
    with torch.no_grad():
        kl = float((log_density(x) - model(x)).mean())
    error = (force_of(model, x) - forces(x)).norm(dim=-1)
    start = draw(64, 20_000)
    v = torch.randn(64, 2, generator=torch.Generator().manual_seed(20_001), dtype=torch.float64)
    drift = simulate_nve(lambda x: -model(x), start, v, step=4e-4, n_steps=md_steps).drift().median()
    rmse = error.square().mean().div(2).sqrt()  # of a component
    n = sum(p.numel() for p in model.parameters())
    return Score(n, kl, float(rmse), float(error.median()), float(error.max()), float(drift), seconds)


def run(name: str, *, seed: int, force_weight: float = 0.0, steps: int = 700, n_train: int = 20_000) -> Score:
    """Train and score a model."""
    model = MODELS[name](seed)
    began = time.process_time()
    train(model, draw(n_train, seed), force_weight=force_weight, steps=steps, seed=seed)
    return judge(model, time.process_time() - began)
