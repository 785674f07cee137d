"""Evol-Q against other searches over the same scales, from the same start, with the same number of evaluations.

Networks: a small vision transformer trained here at 2 and 3 bits, and published trained ones (EfficientNet-Lite0, two
CIFAR ResNets) at 3 and 4. All weights are rounded to nearest in their best range, one scale an output row. Everybody
searches on the same calibration images, drawn by the seed, must be confirmed on images held out of them, and is judged
on others: by the divergence from the float network's predictions, by accuracy where there are labels, and by agreement
with the float network. An evaluation is one look at the loss of all calibration images searched on; a gradient counts
as three.

Every piece (network, bits, method, seed) is kept in the cache as soon as it is done, and a run that was interrupted
goes on: `--models` and `--only` choose pieces, `--grids` bits.
"""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import data, evolve_data, harness
from benchmarks.harness import Row
from planish.quant import Evolve, QLinear, evol_q, evolve, quantize
from planish.quant.engine import no_refine
from planish.quant.fitness import kl
from planish.quant.methods.evol_q import published
from planish.quant.sites import weight_of

REUSE_MEMORY = True
BITS = {"vit": (2, 3), "resnet20": (3, 4), "resnet56": (3, 4), "efficientnet": (3, 4)}
BUDGET = {"vit": 640, "resnet20": 300, "resnet56": 200, "efficientnet": 160}
IMAGES = {"vit": 500, "resnet20": 200, "resnet56": 100, "efficientnet": 48}
SEEDS = 5
STEP = 0.05  # of every search that needs a first step, as a share of a scale
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's t at 97.5 %, by number of seeds


class RandomSearch:
    """Points drawn around the start of a visit, none of which learns from another."""

    def __init__(self, start: Tensor, seed: int) -> None:
        self.start, self.generator = start, torch.Generator().manual_seed(seed)

    def ask(self) -> Tensor:
        """Return one point around the start."""
        u = 2 * torch.rand(len(self.start), generator=self.generator, dtype=torch.float64) - 1
        return (self.start * (1 + STEP * u))[None]

    def tell(self, points: Tensor, fitnesses: list[float]) -> None:
        """Learn nothing."""


class OnePlusOne:
    """The (1+1) evolution strategy: a normal step from the best, its size by the rule of one fifth."""

    def __init__(self, start: Tensor, loss: float, seed: int) -> None:
        self.best, self.loss, self.step = start, loss, STEP
        self.generator = torch.Generator().manual_seed(seed)

    def ask(self) -> Tensor:
        """Return one point around the best."""
        u = torch.randn(len(self.best), generator=self.generator, dtype=torch.float64)
        return (self.best * (1 + self.step * u).clamp(min=0.1))[None]

    def tell(self, points: Tensor, fitnesses: list[float]) -> None:
        """Go to a better point."""
        won = fitnesses[0] < self.loss
        self.step = min(self.step * (1.5 if won else 1.5**-0.25), 0.2)
        if won:
            self.best, self.loss = points[0], fitnesses[0]


class Cma:
    """CMA-ES of the package `cma` on the logarithms of scales; only variances where they are many."""

    def __init__(self, start: Tensor, seed: int) -> None:
        import cma  # noqa: PLC0415

        options = {"seed": seed + 1, "verbose": -9, "CMA_diagonal": len(start) > 100}
        self.start, self.points = start, []
        self.search = cma.CMAEvolutionStrategy([0.0] * len(start), STEP, options)

    def ask(self) -> Tensor:
        """Return a generation."""
        self.points = self.search.ask()
        return self.start * torch.stack([torch.from_numpy(p) for p in self.points]).exp()

    def tell(self, points: Tensor, fitnesses: list[float]) -> None:
        """Move the distribution; what was given up counts as bad as anything can be."""
        del points
        self.search.tell(self.points, [f if math.isfinite(f) else 1e9 for f in fitnesses])


def descend(
    model: nn.Module, base: nn.Module, batches: list[Tensor], targets: list[Tensor], budget: int, codes: str
) -> int:
    """Train the logarithms of scales with Adam, straight through the rounding; keep what is best on held-out batches.

    Returns:
        Evaluations spent: three for a gradient, one for a look at a batch held out counted by its share.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
    dense, logs, pieces = copy.deepcopy(model), {}, {}
    for name, layer in layers.items():
        dense.set_submodule(name, layer.dequantize())
        scale, form = layer.weight_scale.float(), layer.format
        zero = layer.zeros().float()[..., None]
        grouped, _ = form._grouped(weight_of(base.get_submodule(name)).float())
        logs[name] = nn.Parameter(scale.log())
        pieces[name] = grouped, zero, 2**form.bits - 1, layer.weight.codes.float()
    held = round(0.2 * len(batches))
    fitted, other = range(len(batches) - held), range(len(batches) - held, len(batches))

    def weights() -> dict[str, Tensor]:
        made = {}
        for name, log in logs.items():
            scale = log.exp()[..., None]
            grouped, zero, top, fixed = pieces[name]
            if codes == "nearest":
                exact = grouped / scale
                code = (exact + (exact.round() - exact).detach() + zero).clamp(0, top)
            else:
                code = layers[name].format._grouped(fixed)[0]
            value = ((code - zero) * scale).flatten(-2)[..., : layers[name].in_features]
            made[f"{name}.weight"] = value.view_as(dense.get_submodule(name).weight)  # type: ignore[arg-type]
        return made

    def loss(i: int) -> Tensor:
        return kl(torch.func.functional_call(dense, weights(), (batches[i],)), targets[i])

    def judged() -> float:
        with torch.no_grad():
            return sum(loss(i).item() for i in other) / len(other)

    optimizer = torch.optim.Adam(list(logs.values()), lr=3e-3)
    best, least, spent = {n: p.detach().clone() for n, p in logs.items()}, judged(), 0.0
    share = 1 / len(fitted)
    while spent + 1 <= budget:
        for i in fitted:  # one step a batch; a pass over all of them costs three evaluations
            optimizer.zero_grad()
            loss(i).backward()
            optimizer.step()
            spent += 3 * share
        value, spent = judged(), spent + held * share
        if value < least:
            best, least = {n: p.detach().clone() for n, p in logs.items()}, value
    with torch.no_grad():
        for name, layer in layers.items():
            scale = best[name].exp().to(layer.weight_scale.dtype)
            _keep(layer, base.get_submodule(name), scale, codes)
    return round(spent)


def _keep(layer: QLinear, module: nn.Module, scale: Tensor, codes: str) -> None:
    from planish.quant.scales import of_layer  # noqa: PLC0415

    of_layer("", layer, None, weight_of(module).float() if codes == "nearest" else None).keep(scale.flatten())


def _settings(key: str, seed: int) -> Evolve:
    passes = {"vit": 2, "resnet20": 1, "resnet56": 1, "efficientnet": 1}[key]
    groups = {"vit": 8, "resnet20": 10, "resnet56": 28, "efficientnet": 32}[key]
    budget = BUDGET[key]
    return Evolve("kl", passes=passes, cycles=max(1, budget // (passes * groups)), budget=budget, seed=seed)


Search = Callable[[nn.Module, nn.Module, list[Tensor], list[Tensor], str, int], int]


def _ours(**changes: Any) -> Search:  # noqa: ANN401
    def run(model: nn.Module, base: nn.Module, x: list[Tensor], y: list[Tensor], key: str, seed: int) -> int:
        reference: Any = base if changes.get("codes") == "nearest" else y
        return evolve(model, x, reference, replace(_settings(key, seed), **changes)).evaluations

    return run


def _rival(make: Callable[[Tensor, float, int], Any], *, once: bool = False) -> Search:
    def run(model: nn.Module, base: nn.Module, x: list[Tensor], y: list[Tensor], key: str, seed: int) -> int:
        settings = replace(_settings(key, seed), race=None)
        if once:  # one long visit serves a search that learns a distribution better than several short ones
            settings = replace(settings, passes=1, cycles=settings.cycles * settings.passes)
        done = evolve(model, x, y, settings, optimizer=lambda name, start, loss, bounds: make(start, loss, seed))
        return done.evaluations

    return run


def _published(model: nn.Module, base: nn.Module, x: list[Tensor], y: list[Tensor], key: str, seed: int) -> int:
    passes = max(1, BUDGET[key] // (4 * 4))  # four blocks, three trials and the start
    scope = "attention" if key == "vit" else "all"
    settings = replace(published(seed=seed), passes=passes, scope=scope, budget=BUDGET[key])
    return evolve(model, x, base, settings).evaluations


SUBJECTS: dict[str, Search | None] = {
    "start": None,
    "Evol-Q": _ours(),
    "Evol-Q (codes follow)": _ours(codes="nearest"),
    "Evol-Q (infoNCE)": _ours(loss="infonce"),
    "Evol-Q (MSE)": _ours(loss="mse"),
    "Evol-Q (cosine)": _ours(loss="cosine"),
    "Evol-Q as published": _published,
    "random search": _rival(lambda start, loss, seed: RandomSearch(start, seed)),
    "(1+1)-ES": _rival(OnePlusOne),
    "CMA-ES": _rival(lambda start, loss, seed: Cma(start, seed), once=True),
    "Adam on scales": lambda m, b, x, y, key, seed: descend(m, b, x, y, BUDGET[key], "fixed"),
    "Adam on scales (codes follow)": lambda m, b, x, y, key, seed: descend(m, b, x, y, BUDGET[key], "nearest"),
    "evol_q() inside quantize": None,
}


def piece(key: str, task: evolve_data.Task, bits: int, subject: str, seed: int) -> dict[str, float]:
    """Run one method once and judge it."""
    chosen = torch.randperm(len(task.calibration), generator=torch.Generator().manual_seed(seed))
    batches = list(task.calibration[chosen[: IMAGES[key]]].split(task.batch))
    base, model = task.model, copy.deepcopy(task.model)
    start = evol_q(bits=bits, scale_dtype="float32")
    inside = subject == "evol_q() inside quantize"
    refine = Evolve(passes=2, cycles=_settings(key, seed).cycles * _settings(key, seed).passes // 2, seed=seed)
    began, spent = time.perf_counter(), 0
    quantize(model, batches, replace(start, refine=refine if inside else no_refine))
    search = SUBJECTS[subject]
    with torch.no_grad():
        targets = [base(x) for x in batches]
    if search is not None:
        began = time.perf_counter()
        spent = search(model, base, batches, targets, key, seed)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        ours, theirs = (torch.cat([m(x) for x in task.test.split(task.batch)]) for m in (model, base))
    found = {
        "KL from float": kl(ours, theirs).item(),
        "agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        "evaluations": float(spent),
        "time": seconds,
    }
    if task.labels is not None:
        found["accuracy"] = (ours.argmax(-1) == task.labels).float().mean().item()
    return found


def kept(key: str, task: evolve_data.Task, bits: int, subject: str, seed: int, *, fresh: bool) -> dict[str, float]:
    """Return a piece from the cache, or run it and keep it."""
    weights = b"".join(t.contiguous().numpy().tobytes() for t in task.model.state_dict().values())
    facts = [key, bits, subject, seed, BUDGET[key], IMAGES[key], repr(_settings(key, seed)), repr(evol_q())]
    name = sha256(weights + json.dumps(facts).encode()).hexdigest()[:16]
    path = data.cache_dir() / "benchmarks" / "evolve" / f"{key}-{bits}-{seed}-{name}.json"
    if fresh or not path.exists():
        harness.write_json(path, piece(key, task, bits, subject, seed))
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def rows(
    quick: bool,
    *,
    only: tuple[str, ...] | None = None,
    grids: tuple[tuple[int, int | None], ...] | None = None,
    models: tuple[str, ...] | None = None,
    fresh: bool = False,
    skipped: dict[str, str] | None = None,
    **_: object,
) -> Iterator[Row]:
    """Yield the mean over seeds of each figure, with its 95 % interval, by network, bits and method.

    Args:
        quick: A smaller transformer, few evaluations and methods, two seeds, nothing kept.
        only: These methods.
        grids: These bits.
        models: Networks whose key holds one of these.
        fresh: Do not use what an earlier run left in the cache.
        skipped: Filled with the networks that are not at hand, and why.
    """
    for key, make in evolve_data.TASKS.items():
        if (quick and key != "vit") or (models is not None and not any(m in key for m in models)):
            continue
        try:
            task = evolve_data.transformer(quick=True) if quick else make()
        except FileNotFoundError as error:
            if skipped is not None:
                skipped[key] = str(error)
            continue
        for bits in BITS[key][:1] if quick else BITS[key]:
            if grids is not None and bits not in {b for b, _ in grids}:
                continue
            yield from _case(key, task, bits, quick=quick, only=only, fresh=fresh)


def _case(
    key: str, task: evolve_data.Task, bits: int, *, quick: bool, only: tuple[str, ...] | None, fresh: bool
) -> Iterator[Row]:
    case = f"{task.name}, {bits} bits"
    seeds = 2 if quick else SEEDS
    with torch.no_grad():
        logits = torch.cat([task.model(x) for x in task.test.split(task.batch)])
    if task.labels is not None:
        yield Row(case, "float", "accuracy", (logits.argmax(-1) == task.labels).float().mean().item(), "")
    budgets, images = BUDGET[key], IMAGES[key]
    if quick:
        BUDGET[key], IMAGES[key] = 40, 200
    try:
        for subject in SUBJECTS:
            few = ("start", "Evol-Q", "random search", "Adam on scales")
            if (only is not None and subject not in only) or (quick and subject not in few):
                continue
            run = piece if quick else (lambda *a: kept(*a, fresh=fresh))
            pieces = [run(key, task, bits, subject, seed) for seed in range(seeds)]
            for metric in pieces[0]:
                values = [p[metric] for p in pieces]
                spread = T_QUANTILE[seeds] * statistics.stdev(values) / seeds**0.5
                mean, unit = statistics.mean(values), {"KL from float": "nats", "time": "s"}.get(metric, "")
                yield Row(case, subject, metric, mean, unit, low=mean - spread, high=mean + spread)
    finally:
        BUDGET[key], IMAGES[key] = budgets, images
