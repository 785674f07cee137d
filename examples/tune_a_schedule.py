"""Mend a quantized four-step sampler by two numbers a step in its scheduler; save it, and load it by its name."""

import torch
from diffusers import DDIMScheduler

import planish
from planish.diffusion import ReferenceLoss, measure_output_errors, tune_schedule, wrap_scheduler

STEPS = 4
stock = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
alphas = stock.alphas_cumprod


class Denoiser(torch.nn.Module):
    """The exact noise of two-valued data; `gain` is what a quantizer that shrinks leaves of it."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Return the noise in x at timestep t."""
        signal, noise = alphas[int(t)].sqrt(), (1 - alphas[int(t)]).sqrt()
        return self.gain * (x - signal * torch.tanh(signal * x / noise**2)) / noise


def draw(model: torch.nn.Module, c_x: list[float], c_eps: list[float], seed: int = 0) -> torch.Tensor:
    scheduler = wrap_scheduler(stock, c_x, c_eps)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(100, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


ones = [1.0] * STEPS
good, small = Denoiser(1.0), Denoiser(0.9)
gain = measure_output_errors(small, good, lambda: draw(small, ones, ones)).gain
print("in closed form, from one run beside the float model:", [round(g, 4) for g in gain])
found = tune_schedule(
    lambda x, e: draw(small, x, e), STEPS, ReferenceLoss(draw(good, ones, ones)), base=gain,
    float_sampler=lambda x, e: draw(good, x, e),
)  # fmt: skip
print(found)

true = draw(good, ones, ones, seed=1)
for name, lists in {"untouched": (ones, ones), "tuned": (found.sample_coeff, found.model_coeff)}.items():
    print(f"{name:10} error on other noise {(draw(small, *lists, seed=1) - true).square().mean():.2e}")

found.wrap(stock).save_pretrained("tuned-scheduler")
again = planish.QSchedDDIMScheduler.from_pretrained("tuned-scheduler")
print("loaded:", type(again).__name__, [round(c, 4) for c in again.config.model_coeff])
