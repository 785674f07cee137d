"""Gaps of sensor networks: GraphTRSS, the learned prior and TimeGNN beside interpolation, on real tables.

At each time a fraction m of the nodes is sampled; errors are over all other valid entries, five draws each. "GraphTRSS,
published" has its authors' weights; "chosen" chooses alpha by hidden samples. What learns is tried at some densities.
The selection ("auto") was designed on draws below 5; the draws here are others.
"""

import hashlib
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import cache_dir
from benchmarks.graphs_cases import Table, tables
from benchmarks.harness import Row, write_json
from planish.graphs import (
    GraphSignalImputer,
    LaplacianPower,
    TimeGNNTraining,
    fit_timegnn,
    graph_trss,
    hide,
    interpolate_neighbours,
    interpolate_time,
    laplacian,
    random_mask,
)

logger = logging.getLogger("benchmarks")
DRAWS = range(10, 15)
NETWORKS = {
    "sea surface temperature": (0.1, 0.3, 0.5), "PM2.5": (0.1, 0.3, 0.45), "Intel Lab temperature": (0.1, 0.3, 0.5),
}  # fmt: skip
LEARNED = {
    "sea surface temperature": (0.1, 0.3, 0.5, 0.7, 0.9), "PM2.5": (0.1, 0.2, 0.3, 0.45),
    "Intel Lab temperature": (0.1, 0.3, 0.5, 0.7, 0.9), "Pacific winters": (0.1, 0.3, 0.5),
}  # fmt: skip
TRSS, FIXED, PRIOR, AUTO = "GraphTRSS, chosen", ("GraphTRSS, published", "GraphTRSS, alpha"), "learned prior", "auto"
Scores = dict[str, dict[str, float]]
QUADRATIC = ("adjacency", "blocks", "masks", "recovery", "sobolev", "time")
SOURCES = (*QUADRATIC, "imputer", "prior", "selection")
NETWORK = (*QUADRATIC, "chebconv", "timegnn")


def _kept(what: str, sources: tuple[str, ...], make: Callable[[], Any], fresh: bool) -> Any:  # noqa: ANN401
    """Return a result of an earlier run of the same code, or make and keep it."""
    folder = Path(__file__).resolve().parent.parent / "src" / "planish" / "graphs"
    code = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in sources)
    key = hashlib.sha256((what + code).encode()).hexdigest()[:24]
    path = cache_dir() / "graphs" / f"{key}.json"
    if path.exists() and not fresh:
        return json.loads(path.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    made = make()
    write_json(path, made)
    return made


def _score(table: Table, mask: Tensor, fill: Tensor) -> dict[str, float]:
    miss = (fill - table.x)[table.valid & ~mask]
    return {"RMSE": float(miss.square().mean().sqrt()), "MAE": float(miss.abs().mean())}


def draw(table: Table, density: float, seed: int) -> Tensor:
    return random_mask(table.valid, density, generator=torch.Generator().manual_seed(seed))


def quadratic(table: Table, density: float, seed: int) -> Scores:
    """Score interpolation and GraphTRSS with its published weights."""
    mask, power = draw(table, density, seed), LaplacianPower(laplacian(table.graph), table.epsilon)
    fills = {
        "linear in time": interpolate_time(table.x, mask),
        "neighbours": interpolate_neighbours(table.x, mask, table.graph),
        "GraphTRSS, published": graph_trss(table.x, mask, power, alpha=table.alpha, tol=1e-7),
    }
    return {name: _score(table, mask, fill) for name, fill in fills.items()}


def learned(table: Table, density: float, seed: int) -> Scores:
    """Score what chooses by hidden samples: one imputer makes three fills."""
    mask = draw(table, density, seed)
    gaps = torch.where(mask, table.x, math.nan).numpy()
    began = time.process_time()
    imputer = GraphSignalImputer(graph=table.graph, axis=0, epsilon=table.epsilon, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a node never observed at a low density
        auto = torch.as_tensor(imputer.fit_transform(gaps))
    seconds = time.process_time() - began
    power = LaplacianPower(laplacian(table.graph), table.epsilon)
    found = {
        TRSS: _score(table, mask, graph_trss(table.x, mask, power, alpha=imputer.alpha_, tol=1e-7)),
        PRIOR: _score(table, mask, imputer.prior_.fill(table.x, mask, power, tol=1e-7)),
        AUTO: _score(table, mask, auto),
    }
    found[AUTO] |= {"seconds": seconds, "share": imputer.weight_}
    found[PRIOR] |= {"seasons": float(len(imputer.prior_.periods))}
    return found


def tikhonov_and_rival(table: Table, density: float, seed: int) -> Scores:
    """Score Tikhonov's recovery, its weight chosen, and scikit-learn's nearest neighbours among times."""
    from sklearn.impute import KNNImputer  # noqa: PLC0415

    mask = draw(table, density, seed)
    gaps = torch.where(mask, table.x, math.nan).numpy()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = GraphSignalImputer("tikhonov", graph=table.graph, axis=0, random_state=seed).fit_transform(gaps)
        theirs = KNNImputer(n_neighbors=10, keep_empty_features=True).fit_transform(gaps.T).T
    for name, fill in (("Tikhonov in space and time, chosen", ours), ("scikit-learn KNNImputer", theirs)):
        found[name] = _score(table, mask, torch.as_tensor(fill))
    return found


def network(table: Table, density: float, seed: int, kind: str, quick: bool) -> Scores:
    """Score one form of TimeGNN: the epoch is chosen on hidden samples, then all samples train it."""
    mask = draw(table, density, seed)
    power = LaplacianPower(laplacian(table.graph), table.epsilon)
    zero = TimeGNNTraining(start="zero", epochs=300, learning_rate=5e-3)
    forms = {"published": TimeGNNTraining.published(300), "preconditioned": TimeGNNTraining()}
    training = forms.get(kind, zero)
    if quick:
        training = replace(training, epochs=5)
    hidden = hide(mask, 0.2, generator=torch.Generator().manual_seed(seed))
    alpha = 0.0 if "no Sobolev" in kind else table.alpha
    fit = partial(fit_timegnn, table.x, mask, power, alpha=alpha, training=training)
    began = time.process_time()
    first = fit(hidden=hidden, generator=torch.Generator().manual_seed(seed))
    last = first
    if kind == "preconditioned":
        last = fit(stop_after=first.best_epoch, generator=torch.Generator().manual_seed(seed))
    score = _score(table, mask, last.fill.double())
    return {f"TimeGNN, {kind}": score | {"seconds": time.process_time() - began}}


def _jobs(table: Table, density: float, seed: int, quick: bool) -> list[tuple[str, partial[Scores]]]:
    jobs: list[tuple[str, partial[Scores]]] = [
        ("quadratic", partial(quadratic, table, density, seed)),
        ("rival", partial(tikhonov_and_rival, table, density, seed)),
    ]
    if quick or density in LEARNED[table.name]:
        jobs.append(("learned", partial(learned, table, density, seed)))
    if density in NETWORKS.get(table.name, ()):
        for kind in ("preconditioned", "from zero", "from zero, no Sobolev term", "published"):
            if kind != "published" or seed == DRAWS[0]:
                jobs.append((kind, partial(network, table, density, seed, kind, quick)))
    return jobs


def _done(
    table: Table, density: float, seed: int, name: str, job: partial[Scores], quick: bool, fresh: bool
) -> Scores:  # fmt: skip
    logger.info("%s, m = %g, draw %d: %s", table.name, density, seed, name)
    sources = {network: NETWORK, quadratic: QUADRATIC}.get(job.func, SOURCES)
    found: Scores = _kept(f"{table.name} {density} {seed} {name} {quick}", sources, job, fresh)
    return found


def rows(
    quick: bool, *, only: tuple[str, ...] | None = None, models: tuple[str, ...] | None = None, fresh: bool = False,
    skipped: dict[str, str] | None = None, **_: object,
) -> Iterator[Row]:  # fmt: skip
    """Yield errors of every method on every table; what was measured is kept.

    Args:
        quick: One density and draw of each table; networks hardly train.
        only: Tables by their names, to fill what is kept.
        models: Tables by a part of their names; the others are told to be left out.
        fresh: Measure again.
        skipped: Filled with what could not run, and why.
    """
    skipped = {} if skipped is None else skipped
    skipped["pypots (SAITS, BRITS)"] = "heavier than this benchmark's budget"
    skipped["natural neighbours in space and time"] = "needs coordinates, which the published tables leave out"
    for table in tables(skipped):
        if only is not None and table.name not in only:
            continue
        if models is not None and not any(part in table.name for part in models):
            skipped[table.name] = "left out of this run (--models)"
            continue
        densities = table.densities[2:3] if quick else table.densities
        found: dict[float, dict[str, list[dict[str, float]]]] = {}
        for density in densities:
            for seed in DRAWS[:1] if quick else DRAWS:
                for name, job in _jobs(table, density, seed, quick):
                    scores = _done(table, density, seed, name, job, quick, fresh)
                    for subject, score in scores.items():
                        if subject == "GraphTRSS, published" and not table.published:
                            subject = f"GraphTRSS, alpha = {table.alpha:g}"  # noqa: PLW2901
                        found.setdefault(density, {}).setdefault(subject, []).append(score)
        yield from _told(table, found)


def _told(table: Table, found: dict[float, dict[str, list[dict[str, float]]]]) -> Iterator[Row]:
    for metric, published in (("RMSE", table.published), ("MAE", table.published_mae)):
        case = f"{table.name}, {table.x.shape[0]} x {table.x.shape[1]}, {metric}"
        names = list(dict.fromkeys(name for scores in found.values() for name in scores))
        for name in names:
            for m, scores in found.items():
                if name in scores:
                    values = [score[metric] for score in scores[name]]
                    note = (
                        "m of the nodes are sampled at each time; mean of 5 draws, the network's published form of 1."
                    )
                    yield Row(case, name, f"m = {m:g}", float(np.mean(values)), "", note=note)
        for m, value in zip(table.densities, published, strict=False):
            if m in found:
                yield Row(case, "GraphTRSS, as its authors report", f"m = {m:g}", value, "")
    for weight, baseline in (("a chosen", TRSS), ("a fixed", FIXED)):
        case = f"{table.name}: against GraphTRSS with {weight} weight"
        for name in (PRIOR, AUTO, "TimeGNN, preconditioned"):
            ratio = [
                mine["RMSE"] / theirs["RMSE"]
                for scores in found.values()
                for mine, theirs in zip(
                    scores.get(name, []), next((scores[n] for n in scores if n.startswith(baseline)), []), strict=False
                )
            ]
            if ratio:
                yield Row(case, name, "mean ratio of RMSE", float(np.mean(ratio)), "")
                yield Row(case, name, "worst ratio", max(ratio), "")
                worse = float(sum(r > 1.001 for r in ratio))
                yield Row(case, name, "worse by more than a thousandth", worse, f"of {len(ratio)}")
    case = f"{table.name}: against GraphTRSS with a chosen weight"
    chosen = [score for scores in found.values() for score in scores.get(AUTO, [])]
    yield Row(case, AUTO, "mean share of the prior", float(np.mean([s["share"] for s in chosen])), "")
    yield Row(case, AUTO, "processor time", float(np.median([s["seconds"] for s in chosen])), "s")
    nets = [s["seconds"] for scores in found.values() for s in scores.get("TimeGNN, preconditioned", [])]
    if nets:
        yield Row(case, "TimeGNN, preconditioned", "processor time", float(np.median(nets)), "s")
