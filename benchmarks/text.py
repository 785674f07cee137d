"""Does noise on distances write better than noise on embeddings or on one-hot vectors? Phones from letters, CMUdict.

One network, trained three times a seed: under Smoothie and under its two siblings, by the same steps, rate and average;
beside them a transformer of as many layers and the same width that writes one phone after the other. Errors are edits
over phones, on words that training has not seen. Every training is kept in the cache: a run that was stopped goes on.

What a step of the sampler needs is measured apart, against the size of the vocabulary.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import text_rival
from benchmarks.data import cache_dir
from benchmarks.harness import Row, write_json
from benchmarks.text_data import LENGTH, SOURCE_LENGTH, Words, padded, phone_errors, words
from benchmarks.text_memory import memory_rows
from planish.diffusion import (
    EmbeddingGaussianScheduler,
    EmbeddingSpace,
    SimplexScheduler,
    SmoothieScheduler,
    TextDiffusionConfig,
    TextDiffusionModel,
    TextDiffusionPipeline,
    train_text_diffusion,
)
from planish.diffusion.text_schedulers import TextScheduler

VERSION = 1
SCHEDULERS: dict[str, Callable[[], TextScheduler]] = {
    "Smoothie": SmoothieScheduler,
    "embedding Gaussian": EmbeddingGaussianScheduler,
    "simplex": SimplexScheduler,
}
RIVAL = "autoregressive"
SUBJECTS = (*SCHEDULERS, RIVAL)
STEPS = (2, 10, 30, 100)
SEEDS, ITERATIONS, BATCH, RATE, N_TEST = 3, 3000, 96, 2e-3, 1000
T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
Score = dict[str, dict[str, list[int]]]
logger = logging.getLogger("benchmarks.text")


def config(data: Words) -> TextDiffusionConfig:
    return TextDiffusionConfig(
        64, LENGTH, source_vocab_size=len(data.letters), max_source_length=SOURCE_LENGTH, hidden_size=64, num_layers=2,
        num_encoder_layers=2, num_heads=4,
    )  # fmt: skip


def space(data: Words) -> EmbeddingSpace:
    return EmbeddingSpace.from_cooccurrence(data.targets, len(data.phones), 64)


def scored(texts: list[str], data: Words) -> dict[str, list[int]]:
    errors, lengths = phone_errors(texts, [right for _, right in data.test])
    return {"errors": errors, "lengths": lengths}


def diffusion(
    data: Words, scheduler: TextScheduler, seed: int, iterations: int, checkpoint: Path | None = None
) -> TextDiffusionPipeline:
    """Train the network under one scheduler."""
    torch.random.default_generator.manual_seed(seed)  # of the first weights: the same for all
    model = TextDiffusionModel(config(data))
    train_text_diffusion(
        model, scheduler.set_space(space(data)), data.targets, data.sources, steps=iterations, batch_size=BATCH,
        lr=RATE, warmup=0.05, decay="cosine", ema=0.999, checkpoint=checkpoint, save_every=250,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return TextDiffusionPipeline(data.phones, scheduler.space, model, scheduler, data.letters)


def train(data: Words, subject: str, seed: int, iterations: int, folder: Path) -> Score:
    """Train one subject and return its errors, word by word, for each number of steps."""
    words_, name = [word for word, _ in data.test], f"{subject.replace(' ', '-')}-{iterations}-{seed}"
    if subject == RIVAL:
        torch.random.default_generator.manual_seed(seed)
        model = text_rival.Autoregressive(config(data), len(data.phones))
        text_rival.train(
            model, data.sources, data.targets, steps=iterations, batch_size=BATCH, lr=RATE, seed=seed
        )  # fmt: skip
        sources = torch.tensor([padded(data.letters.encode(word), SOURCE_LENGTH) for word in words_])
        rows = model.write(sources).tolist()
        ended = [row[: row.index(1)] if 1 in row else row for row in rows]
        return {"one by one": scored([data.phones.decode(row) for row in ended], data)}
    pipeline = diffusion(data, SCHEDULERS[subject](), seed, iterations, folder / f"{name}.run.safetensors")
    score = {}
    for steps in STEPS:
        written = pipeline(words_, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed))
        score[str(steps)] = scored(written.texts, data)
    return score


def kept(data: Words, subject: str, seed: int, iterations: int, *, fresh: bool) -> Score:
    """Return a training's errors, from the cache when it is there."""
    folder = cache_dir() / f"text-{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{subject.replace(' ', '-')}-{iterations}-{seed}.json"
    run = path.with_suffix(".run.safetensors")
    if fresh:
        path.unlink(missing_ok=True)
        run.unlink(missing_ok=True)
    if not path.is_file():
        logger.info("%s, seed %d: training", subject, seed)
        write_json(path, train(data, subject, seed, iterations, folder))
    score: Score = json.loads(path.read_text(encoding="utf-8"))
    return score


def rate(score: dict[str, list[int]]) -> float:
    """Return the phone error rate, in percent."""
    return 100 * sum(score["errors"]) / sum(score["lengths"])


def _rows(found: dict[str, list[Score]], iterations: int) -> Iterator[Row]:
    seeds = min(map(len, found.values()))
    note = f"Means over {seeds} seed{'s' * (seeds > 1)}; {N_TEST} words that training has not seen."
    cases = {str(steps): f"Phones from letters, {iterations} iterations, {steps} steps of sampling" for steps in STEPS}
    for steps, case in cases.items():
        for subject, scores in found.items():
            each = [score.get(steps) or score["one by one"] for score in scores]
            errors = np.array([rate(one) for one in each])
            right = [100 * float(np.mean(np.array(one["errors"]) == 0)) for one in each]
            yield Row(case, subject, "phone error rate", float(errors.mean()), "%", note=note)
            yield Row(case, subject, "words right", float(np.mean(right)), "%")
            if subject in SCHEDULERS and subject != "Smoothie":
                ours = np.array([rate(score[steps]) for score in found["Smoothie"]])
                gaps, low, high = errors - ours, None, None
                if seeds > 1:
                    half = T975[seeds] * float(gaps.std(ddof=1)) / seeds**0.5
                    low, high = float(gaps.mean()) - half, float(gaps.mean()) + half
                yield Row(case, subject, "phone error rate, above", float(gaps.mean()), "points", "Smoothie", low, high)


def rows(
    quick: bool,
    *,
    only: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
    **_: object,
) -> Iterator[Row]:
    """Yield phone error rates, words right, and memory against the size of the vocabulary.

    Args:
        quick: 300 iterations, one seed.
        only: Subjects to train, by their names; "seed=0" in it for the first seed alone, "memory" for that as well.
        fresh: Train again what the cache holds.
        skipped: Filled with what could not run, and why.
        **_: What other benchmarks are asked beside this.
    """
    skipped = {} if skipped is None else skipped
    if only is None or "memory" in only:
        yield from memory_rows(quick)
    try:
        data = words(N_TEST)
    except FileNotFoundError as error:
        skipped["phones from letters"] = str(error)
        return
    iterations = 300 if quick else ITERATIONS
    names = [s for s in SUBJECTS if only is None or s in only or not set(only) & set(SUBJECTS)]
    seeds = 1 if quick or "seed=0" in (only or ()) else SEEDS
    found: dict[str, list[Score]] = {name: [] for name in names}
    for seed in range(seeds):  # a seed at a time: what was stopped leaves whole comparisons
        for name in names:
            found[name].append(kept(data, name, seed, iterations, fresh=fresh))
    if set(SCHEDULERS) <= found.keys():
        yield from _rows(found, iterations)
