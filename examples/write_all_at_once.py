"""Train a diffusion model that rewrites dates, all characters at once, and look at its noise and its steps."""

import datetime
import random
import tempfile

import torch

from planish.diffusion import (
    EmbeddingSpace,
    SmoothieScheduler,
    SymbolTokenizer,
    TextDiffusionConfig,
    TextDiffusionModel,
    TextDiffusionPipeline,
    train_text_diffusion,
)

random.seed(0)
torch.manual_seed(0)
days = [datetime.date(1990, 1, 1) + datetime.timedelta(days=i) for i in range(15_000)]
random.shuffle(days)
pairs = [(f"{day:%d %b %Y}".lower(), day.isoformat()) for day in days]  # "07 mar 1994" -> "1994-03-07"
train, test = pairs[:-200], pairs[-200:]
reader = SymbolTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 ")
writer = SymbolTokenizer("0123456789-")
sources = torch.tensor([reader.encode(a) for a, _ in train])
targets = torch.tensor([[*writer.encode(b), writer.eos_token_id] for _, b in train])

space = EmbeddingSpace.from_cooccurrence(targets, len(writer), dim=12, ignore_ids=[writer.pad_token_id])
scheduler = SmoothieScheduler().set_space(space)
print(f"width of the kernel at the start, found for these embeddings: {scheduler.sigma_min:.2f}")
for t in (0.02, 0.1, 0.2, 0.4):
    noisy = scheduler.corrupt(targets[:200], t, torch.Generator().manual_seed(0))
    print(f"  weight of the true character at t = {t}: {noisy.probability(targets[:200]).mean():.2f}")

sizes = TextDiffusionConfig(
    space.dim, targets.shape[1], source_vocab_size=len(reader), hidden_size=48, num_layers=2, num_encoder_layers=1,
    num_heads=4,
)  # fmt: skip
model = TextDiffusionModel(sizes)
report = train_text_diffusion(
    model, scheduler, targets, sources, steps=600, batch_size=64, lr=4e-3, warmup=0.05, decay="cosine", ema=0.99,
    progress=lambda _, done, total: print(f"trained {done} of {total}") if done % 200 == 0 else None,
)  # fmt: skip
print(f"loss {report.loss:.3f}")

pipeline = TextDiffusionPipeline(writer, space, model, scheduler, reader)
for steps in (1, 5, 20):
    texts = pipeline([a for a, _ in test], num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).texts
    right = sum(text == b for text, (_, b) in zip(texts, test, strict=True))
    print(f"{steps:3} steps: {right / 2:.0f} % of 200 new dates right")

with tempfile.TemporaryDirectory() as home:
    pipeline.save_pretrained(f"{home}/dates")
    again = TextDiffusionPipeline.from_pretrained(f"{home}/dates")
out = again("23 nov 2026", num_inference_steps=200, patience=5)
print(f"{out.texts[0]} after {out.steps} steps of 200, when five had changed nothing")
