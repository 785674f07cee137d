"""Whitening in place of batch normalization, and the distance between two sets of features."""

import torch

from planish.linalg import ZCAWhitening2d, frechet_distance

generator = torch.Generator().manual_seed(0)
mix = torch.randn(16, 16, generator=generator)
pictures = torch.randn(64, 16, 8, 8, generator=generator)
features = torch.einsum("oc,nchw->nohw", mix, pictures)


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).flatten(1)


layers = {"batch normalization": torch.nn.BatchNorm2d(16), "whitening": ZCAWhitening2d(16, eps=1e-5)}
print("largest correlation between two channels")
print(f"  {'features':20} {(rows(features).corrcoef() - torch.eye(16)).abs().max():.4f}")
for name, layer in layers.items():
    print(f"  {name:20} {(rows(layer(features)).corrcoef() - torch.eye(16)).abs().max():.4f}")

print("\nFrechet distance to the features")
base = rows(features).double()
for name, other in (("more of the same", torch.randn(64, 16, 8, 8, generator=generator)), ("blurred", pictures / 2)):
    moved = rows(torch.einsum("oc,nchw->nohw", mix, other)).double()
    distance = frechet_distance(base.mean(1), base.cov(), moved.mean(1), moved.cov())
    print(f"  {name:20} {distance:.3f}")
