"""Two densities of the same likelihood: the spline's force jumps, the smooth flow's does not, and dynamics tells."""

import math

import torch

from planish.flows import SmoothFlow, force_matching_loss, simulate_nve

PI, STEPS = math.pi, 250
centers = torch.tensor([[-1.1, -0.7], [-1.8, 2.3], [1.0, 0.7]], dtype=torch.float64)
kappa = torch.tensor([12.0, 9.0, 20.0], dtype=torch.float64)
log_norm = 2 * (torch.log(2 * PI * torch.special.i0e(kappa)) + kappa)


def log_density(x: torch.Tensor) -> torch.Tensor:
    """A mixture of three products of von Mises densities, equal shares."""
    return ((kappa * (x[..., None, :] - centers).cos().sum(-1)) - log_norm - math.log(3)).logsumexp(-1)


g = torch.Generator().manual_seed(0)
torch.manual_seed(0)
which = torch.randint(3, (4000,), generator=g)
x = torch.distributions.VonMises(centers[which], kappa[which, None]).sample().requires_grad_()
forces = torch.autograd.grad(log_density(x).sum(), x)[0].float()
data, start = x.detach().float(), x.detach()[:64]
velocity = torch.randn(64, 2, generator=g, dtype=torch.float64)

print("                nats to the truth   force RMSE, kT/rad   mean change of energy in dynamics, kT")
for univariate in ("spline", "smooth"):
    flow = SmoothFlow(2, periodic=True, low=-PI, high=PI, univariate=univariate, generator=g)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(data), (192,), generator=g)
        loss = force_matching_loss(flow(), data[rows], forces[rows], force_weight=0.002)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
    density = flow.double()()
    gap = (log_density(x) - density.log_prob(x)).mean().item()
    error = (density.force(x) - forces).square().mean().sqrt().item()
    drift = simulate_nve(density.energy, start, velocity, step=4e-4, n_steps=250).drift().mean().item()
    print(f"{univariate:12s}    {gap:17.4f}   {error:18.2f}   {drift:38.1e}")
