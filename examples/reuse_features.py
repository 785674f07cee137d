"""Train a small denoiser of digits, then draw with one call in five in full. Prints what it costs; draws both ways."""

import torch
from sklearn.datasets import load_digits

from planish.diffusion import apply_cache, digits_dit, fit_cache, multiply_adds, remove_cache, sample, train_denoiser

bunch = load_digits()
images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
model = digits_dit(classes=10, heads=2, head_dim=16)
train_denoiser(model, images, torch.tensor(bunch.target), steps=300, batch_size=64, lr=3e-3)


def draw(seed: int, n: int = 20) -> torch.Tensor:
    return sample(model, torch.arange(n) % 10, steps=40, seed=seed)


plain, full = draw(0), multiply_adds(model, lambda: draw(0, 2))
print("model                          PSNR, dB   multiply-adds")
rows = [plain]
for name, settings in {
    "uniform schedule": {"schedule": "uniform", "correction": None, "extrapolate": False},
    "schedule by programming": {"correction": None, "extrapolate": False},
    "carried on where it pays": {},
}.items():
    plan = fit_cache(model, lambda: draw(1), 5, **settings)
    apply_cache(model, plan)
    drawn, cost = draw(0), multiply_adds(model, lambda: draw(0, 2))
    remove_cache(model)
    error = (drawn.clamp(-1, 1) - plain.clamp(-1, 1)).square().mean()
    print(f"{name:30} {10 * torch.log10(4 / error):8.1f} {cost / full:15.0%}")
    rows.append(drawn)
print(plan)
plan.save("digits.plan")

try:
    from matplotlib import pyplot as plt
except ImportError:
    print("no matplotlib, no picture")
else:
    framed = [torch.nn.functional.pad(r[:10, 0], (1, 1, 1, 1)).permute(1, 0, 2).flatten(1) for r in rows]
    large = torch.cat(framed).clamp(-1, 1).repeat_interleave(6, 0).repeat_interleave(6, 1)
    plt.imsave("digits.png", large, cmap="gray", vmin=-1, vmax=1)
    print("picture: digits.png, from above: no cache, and the three caches in turn")
