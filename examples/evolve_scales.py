"""Round a small classifier to two bits, then let its scales evolve towards what the float network answers."""

import copy
from dataclasses import replace

import torch
from torch import nn

from planish.quant import Evolve, evolve, quantize, rtn

torch.manual_seed(0)
centres = 2 * torch.randn(32, 16)


def points(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(32, (n,))
    return centres[labels] + torch.randn(n, 16), labels


net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(300):
    x, y = points(128)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
net.eval().requires_grad_(False)

batches = [points(100)[0] for _ in range(5)]
unseen, labels = points(2000)

# Inside `quantize`, each block's own output is the judge; any method can be refined so. This network has no list of
# blocks and is a single one, so its output is a prediction, and divergence is the right loss.
start = rtn(bits=2, group_size=None)
for name, method in (("rounded", start), ("refined while rounding", replace(start, refine=Evolve("kl", passes=4)))):
    model = copy.deepcopy(net)
    quantize(model, batches, method)
    right = (model(unseen).argmax(-1) == labels).float().mean().item()
    print(f"{name:<24} {right:.1%} right (float: {(net(unseen).argmax(-1) == labels).float().mean().item():.1%})")

# Over a whole quantized model, its predictions are. A fifth of the batches must agree to every change.
done = evolve(model, batches, net, Evolve("kl", passes=5))
print(done)
print(f"{'refined as a whole':<24} {(model(unseen).argmax(-1) == labels).float().mean().item():.1%} right")
