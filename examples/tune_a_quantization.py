"""Which settings of a method? Thirty are fitted to a little data and looked at, five are fitted in full and measured.

The probe gives `best` a sixteenth of the data and asks how rough the change of the network's output is along random
directions of its input; the less, the better. The objective gives it all of the data and measures the error of its
output on points that calibration did not see. The study keeps both, so one sees whether the probe knew anything.
"""

import copy

import optuna
import torch
from torch import nn

import planish
from planish.quant import best
from planish.tune import SmoothieSampler, directional_curvature
from planish.tune.ranking import rank_correlation

optuna.logging.set_verbosity(optuna.logging.WARNING)
torch.manual_seed(0)  # of the layers' weights
generator = torch.Generator().manual_seed(0)
model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 1))
points = torch.rand(2048, 2, generator=generator) * 4 - 2
curve = (points[:, :1] * 3).sin() * points[:, 1:].exp()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for step in range(300):
    part = slice(step % 4 * 512, step % 4 * 512 + 512)
    loss = nn.functional.mse_loss(model(points[part]), curve[part])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
fresh = torch.rand(1024, 2, generator=generator) * 4 - 2


def small(data: torch.Tensor, **settings: float) -> nn.Module:
    twin = copy.deepcopy(model)
    planish.quantize(twin, data.split(512), best(bits=3, group_size=32, **settings), skip=("0", "5"))
    return twin  # its first and last layer stay float


def roughness(params: dict) -> float:
    twin = small(points[:128], **params)

    @torch.no_grad()
    def change(x: torch.Tensor) -> torch.Tensor:
        return (twin(x.float()) - model(x.float())).reshape(-1)

    return directional_curvature(change, fresh[:256], step=0.05)


def objective(trial: optuna.Trial) -> float:
    alpha, correct = trial.suggest_float("alpha", 0.0, 1.0), trial.suggest_float("correct", 0.0, 1.0)
    symmetric = trial.suggest_categorical("symmetric", [False, True])
    twin = small(points, symmetric=symmetric, alpha=alpha, correct=correct)
    return planish.evaluate(twin, fresh.split(256), model).relative_error.value


space = {
    "alpha": optuna.distributions.FloatDistribution(0.0, 1.0),
    "correct": optuna.distributions.FloatDistribution(0.0, 1.0),
    "symmetric": optuna.distributions.CategoricalDistribution((False, True)),
}
sampler = SmoothieSampler(roughness, space, n_candidates=30, n_finalists=5, keep="smallest", seed=0)
study = optuna.create_study(sampler=sampler)  # with storage=..., workers share it, and it survives being killed
study.optimize(objective, n_trials=5)
plain = planish.evaluate(small(points), fresh.split(256), model).relative_error.value
print(f"untuned: error {plain:.4f}")
for trial in study.trials:
    settings = ", ".join(f"{k}={v:.2g}" for k, v in trial.params.items())
    print(f"roughness {trial.user_attrs['smoothness']:6.3f}  error {trial.value:.4f}  {settings}")
found = rank_correlation([t.user_attrs["smoothness"] for t in study.trials], [t.value for t in study.trials])
print(f"best: {study.best_params}; rank correlation of roughness with error {found:.2f}")
