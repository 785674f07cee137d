"""Does training under noise beat pretending? NIPQ beside LSQ, PACT and DiffQ at 2, 3 and 4 bits, weights and inputs.

All start from the same float network of a seed, round the same layers (all convolutions; inputs but the image itself)
with one scale a tensor, and are trained for as many epochs by Adam. NIPQ and DiffQ spend the last ones rounding.
"Codes changing" is the share of weights whose code differs between the ends of consecutive epochs, over the last three
of the main phase. Every training is kept in the cache: a run that was stopped goes on.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.data import cache_dir
from benchmarks.harness import Row, write_json
from benchmarks.noise_rivals import ClippedInput, LearnedStep, MinMaxNoise, TanhWeight
from benchmarks.noise_tasks import Task, cifar_task, wave_task
from planish.quant import proxies
from planish.quant.methods import nipq

VERSION = 1
SUBJECTS = ("LSQ", "PACT", "DiffQ", "NIPQ", "NIPQ, uniform noise", "NIPQ, learned widths")
BASE = "LSQ"
BITS = (2, 3, 4)
SEEDS = {"MNIST-1D-like": 3, "CIFAR-10, ResNet-20": 3}
Score = dict[str, float]


class Trainer:
    """One training: data in an order that the seed decides, Adam, a cosine.

    Args:
        task: What is trained.
        seed: Of the order of the data and of torch.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.random = task, torch.Generator().manual_seed(1000 + seed)

    def epochs(
        self, model: nn.Module, groups: list[dict[str, object]], first: int, last: int, total: int,
        extra: Callable[[], Tensor] | None = None, ended: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Train from epoch `first` to `last` of `total`; the rate falls along the cosine of all of them."""
        x, y = self.task.train
        steps = len(x) // self.task.batch
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * (first * steps + i) / (total * steps))
        )
        for _ in range(first, last):
            model.train()
            order = torch.randperm(len(x), generator=self.random)
            for rows in order[: steps * self.task.batch].split(self.task.batch):
                loss = F.cross_entropy(model(x[rows]), y[rows])
                if extra is not None:
                    loss = loss + extra()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            ended()


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    model.eval()
    hits = [(model(x).argmax(1) == y).sum() for x, y in zip(*(t.split(250) for t in task.test), strict=True)]
    return float(sum(hits)) / len(task.test[1])


def float_model(task: Task, seed: int, folder: Path) -> nn.Module:
    """Return the trained float network of a seed, from the cache when it is there."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    model = task.make(seed)
    if not task.epochs_float:
        return model
    path = folder / f"float-{seed}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model
    groups: list[dict[str, object]] = [{"params": list(model.parameters()), "lr": 3e-3}]
    Trainer(task, seed).epochs(model, groups, 0, task.epochs_float, task.epochs_float)
    partial = path.with_suffix(".partial")
    save_file(model.state_dict(), partial)
    partial.rename(path)
    return model


def _install(model: nn.Module, task: Task, kind: str, bits: int) -> None:
    """Put a rival's quantizers where NIPQ has its proxies."""
    sample = task.train[0][: task.batch]
    layers = proxies.rounded_layers(model, ())
    calls = proxies.trace(model, layers, sample)
    for name, (x, _) in calls.items():
        layer = layers[name]
        weight = proxies.weight_in(layer).detach()
        made = {"LSQ": lambda w=weight: LearnedStep(w, bits, signed=True), "PACT": lambda: TanhWeight(bits),
                "DiffQ": lambda: MinMaxNoise(bits)}[kind]()  # fmt: skip
        parametrize.register_parametrization(layer, "weight", made)
        if x.data_ptr() != sample.data_ptr():
            if kind == "PACT":
                layer.add_module("rounder", ClippedInput(x, bits))
            else:  # DiffQ has none of its own
                layer.add_module("rounder", LearnedStep(x, bits, signed=bool((x < 0).any())))
            layer.register_forward_pre_hook(lambda m, args: (m.rounder(args[0]), *args[1:]))


def _codes(model: nn.Module) -> list[Tensor]:
    lists = [m.parametrizations["weight"] for m in model.modules() if parametrize.is_parametrized(m, "weight")]
    with torch.no_grad():
        return [part[0].codes(part.original).clone() for part in lists]


class _Changes:
    """How many codes change from epoch to epoch."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before, self.shares = model, _codes(model), []

    def __call__(self) -> None:
        now = _codes(self.model)
        changed = sum(int((a != b).sum()) for a, b in zip(now, self.before, strict=True))
        self.shares.append(changed / sum(a.numel() for a in now))
        self.before = now

    @property
    def late(self) -> float:
        return float(np.mean(self.shares[-3:]))


def train(task: Task, subject: str, bits: int, seed: int, folder: Path) -> Score:
    """Train one subject from the float network and return its scores."""
    torch.random.default_generator.manual_seed(seed)  # of the rivals' noise; ours has its own generator
    ours, learn = subject.startswith("NIPQ"), "learned" in subject
    model, trainer = float_model(task, seed, folder), Trainer(task, seed)
    extra: Callable[[], Tensor] | None = None
    if ours:
        nipq.attach(
            model, task.train[0][: task.batch], bits=bits, act_bits=bits, learn=learn, per_tensor=True,
            noise="uniform" if "uniform" in subject else "empirical", generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        extra = (lambda: nipq.cost(model)) if learn else None
    else:
        _install(model, task, subject, bits)
        if subject == "PACT":
            alphas = [m.alpha for m in model.modules() if isinstance(m, ClippedInput)]
            extra = lambda: 1e-3 * torch.stack(alphas).square().sum()  # noqa: E731

    def groups() -> list[dict[str, object]]:
        return nipq.param_groups(model, task.lr) if ours else [{"params": list(model.parameters()), "lr": task.lr}]

    changes, main = _Changes(model), task.epochs - task.settling
    trainer.epochs(model, groups(), 0, main, task.epochs, extra, changes)
    found = {"changing": changes.late, "before": accuracy(model, task)}
    if learn:
        sizes = {n: model.get_submodule(n).parametrizations.weight.original.numel() for n in nipq.widths(model)}
        live = sum(nipq.widths(model)[n][0] * size for n, size in sizes.items()) / sum(sizes.values())
        whole = nipq.freeze(model)
        average = sum(whole[n] * size for n, size in sizes.items()) / sum(sizes.values())
        found |= {"live": live, "average": average, "least": min(whole.values()), "most": max(whole.values())}
    elif ours:
        nipq.freeze(model)
    for part in model.modules():
        if isinstance(part, MinMaxNoise):
            part.noisy = False
    trainer.epochs(model, groups(), main, task.epochs, task.epochs, None if ours else extra)
    return {**found, "accuracy": accuracy(model, task)}


def kept(task: Task, subject: str, bits: int, seed: int, *, fresh: bool) -> Score:
    """Return a training's scores, from the cache when they are there."""
    folder = cache_dir() / f"noise-{VERSION}" / f"{task.name}-{task.epochs}-{len(task.train[0])}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{subject}-{bits}-{seed}.json"
    if path.is_file() and not fresh:
        return json.loads(path.read_text(encoding="utf-8"))
    logging.getLogger("benchmarks").info("%s, %s, %d bits, seed %d", task.name, subject, bits, seed)
    if subject == "float":
        score = {"accuracy": accuracy(float_model(task, seed, folder), task)}
    else:
        score = train(task, subject, bits, seed, folder)
    write_json(path, score)
    return score


T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's quantiles by the number of seeds."""


def _rows(task: Task, found: dict[tuple[str, int], list[Score]]) -> Iterator[Row]:
    for bits in BITS:
        case, base = f"{task.name}, {bits} bits", [s["accuracy"] for s in found[BASE, bits]]
        seeds = len(base)
        note = f"Means over {seeds} seeds; {len(task.train[0])} examples, {task.epochs} epochs."
        for subject in ("float", *SUBJECTS):
            scores = found.get((subject, bits if subject != "float" else 0))
            if scores is None:
                continue
            yield Row(case, subject, "accuracy", 100 * float(np.mean([s["accuracy"] for s in scores])), "%", note=note)
            for key, metric, unit, factor in (
                ("before", "before the last phase", "%", 100), ("changing", "codes changing", "% an epoch", 100),
                ("live", "average width while learned", "bits", 1), ("average", "average width", "bits", 1),
                ("least", "least width", "bits", 1), ("most", "largest width", "bits", 1),
            ):  # fmt: skip
                if key in scores[0]:
                    yield Row(case, subject, metric, factor * float(np.mean([s[key] for s in scores])), unit)
            if "average" in scores[0]:
                gap = max(abs(s["average"] / bits - 1) for s in scores)
                yield Row(case, subject, "largest distance to the budget", 100 * gap, "%")
            if subject not in ("float", BASE):
                gaps = np.array([s["accuracy"] for s in scores]) - np.array(base)
                half = T975[seeds] * gaps.std(ddof=1) / seeds**0.5
                low, mean, high = (100 * float(v) for v in (gaps.mean() - half, gaps.mean(), gaps.mean() + half))
                yield Row(case, subject, "accuracy difference", mean, "points", BASE, low, high)


def rows(
    quick: bool,
    *,
    only: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
    **_: object,
) -> Iterator[Row]:
    """Yield accuracy, oscillation and distance to the budget for every task, width and subject.

    Args:
        quick: A quarter of the data and epochs, two seeds, waves only.
        only: Tasks to run, by a part of their name.
        fresh: Train again what the cache holds.
        skipped: Filled with what could not run, and why.
    """
    skipped = {} if skipped is None else skipped
    for make in (wave_task,) if quick else (wave_task, cifar_task):
        try:
            task = make(quick)
        except FileNotFoundError as error:
            skipped[make.__name__] = str(error)
            continue
        if only is not None and not any(part in task.name for part in only):
            continue
        seeds = range(2 if quick else SEEDS[task.name])
        wanted = [("float", 0), *((s, b) for s in SUBJECTS for b in BITS if not ("learned" in s and b == BITS[0]))]
        found: dict[tuple[str, int], list[Score]] = {pair: [] for pair in wanted}
        for seed in seeds:  # a seed at a time: what was stopped leaves whole comparisons
            for subject, bits in wanted:
                found[subject, bits].append(kept(task, subject, bits, seed, fresh=fresh))
        yield from _rows(task, found)
