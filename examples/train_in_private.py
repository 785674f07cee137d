"""Train a classifier of digits such that no single image shows in it, and see what that costs."""

import logging
import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from planish.optim import calibrate_noise, make_private_mngp

torch.manual_seed(0)  # for the same figures each time; outside examples leave the noise to chance
images, digits = load_digits(return_X_y=True)
x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(digits)  # scaled by a public number
train, x_test, y_test = TensorDataset(x[:1400], y[:1400]), x[1400:], y[1400:]
logging.getLogger("opacus").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Full backward hook is firing")  # torch, at the hooks of Opacus

print("noise for epsilon 4, 40 epochs:")
for adjacency in ("add_remove", "replace"):
    print(f"  {adjacency:10}", round(calibrate_noise(4.0, 1e-4, 400, 0.1, adjacency=adjacency), 3))

for epsilon in (1.0, 4.0, 16.0):
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    model, optimizer, loader = make_private_mngp(
        model,
        torch.optim.SGD(model.parameters(), lr=2.0),
        DataLoader(train, batch_size=140),
        target_epsilon=epsilon,
        target_delta=1e-4,
        epochs=40,
    )
    for images, labels in [batch for _ in range(40) for batch in loader]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    correct = float((model(x_test).argmax(1) == y_test).float().mean())
    print(f"epsilon {optimizer.get_epsilon(1e-4):6.3f}: {100 * correct:.1f} % of the test images")
