"""A diffusion pipeline in 4 bits on both sides: trained here on digits, rounded two ways, saved, and read back."""

import torch
from diffusers import DiffusionPipeline, logging
from sklearn.datasets import load_digits

from planish.diffusion import digits_dit, digits_pipeline, train_denoiser
from planish.plugins.diffusers import quantize_pipeline
from planish.quant import Affine, Method, svdquant

logging.set_verbosity_error()
logging.disable_progress_bar()
found = load_digits()
images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
model = digits_dit(layers=2)
losses = train_denoiser(model, images, torch.tensor(found.target), steps=80, batch_size=64, lr=2e-3)
print(f"trained: loss {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f}")
digits_pipeline(model).save_pretrained("digits")


def draw(pipeline: DiffusionPipeline, seed: int) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed)
    made = pipeline(list(range(10)), 1.5, noise, num_inference_steps=8, output_type="np").images
    return torch.from_numpy(made)


pictures = draw(DiffusionPipeline.from_pretrained("digits"), seed=1)
grid = Affine(4, 64, symmetric=True)
for method in (Method("to nearest", grid, grid), svdquant(rank=16)):
    pipeline = DiffusionPipeline.from_pretrained("digits")
    report = quantize_pipeline(pipeline, lambda: draw(pipeline, seed=0), method)  # noqa: B023  (runs at once)
    error = (draw(pipeline, seed=1) - pictures).square().mean()
    print(f"{method.name:>10}: {-10 * error.log10():.1f} dB from float, {report.report.bytes_after / 1e6:.2f} MB")

pipeline.save_pretrained("digits-small")
again = DiffusionPipeline.from_pretrained("digits-small")
print("read back, bit for bit:", torch.equal(draw(again, seed=1), draw(pipeline, seed=1)))
