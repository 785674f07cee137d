"""Does the smoothness of the loss choose settings? SMOOTHIE beside random search, Optuna's TPE and Hyperopt.

Each method sees a validation AUC (a quarter of the training rows) for the settings it asks for and names its best; the
test AUC of that one is its result. `NAME n` trains n settings in full. SMOOTHIE probes 30 first; what that costs is in
its seconds. With 5 trainings TPE and Hyperopt are still in their random start, as their defaults have it.

Over tables: the mean difference to `random 5`, its interval from a bootstrap of tables and of seeds within them, and
tables won or lost, those whose own interval of paired differences leaves out zero.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import Row
from benchmarks.tune_data import Array, Task, tasks
from benchmarks.tune_learners import SPACES, Bench, Params
from planish.tune import SmoothieSampler
from planish.tune.learners import KEEP
from planish.tune.ranking import combined, rank_correlation

BASE = "random 5"
CANDIDATES, FINALISTS = 30, 5
SEEDS = {"logistic": 10, "naive Bayes": 10, "net": 10}
FEW_NETS = ("ivy", "lucene", "synapse", "velocity", "derby", "breast_cancer", "wine", "digits")  # nets take longest
METHODS_OF = {"logistic": "logistic", "naive Bayes": "gaussian_nb", "net": "last_layer"}
SAMPLES = 2000
Found = tuple[list[Params], float]
"""Settings trained in full, and the processor seconds of everything else: probes and the method's own."""


def _space(kind: str) -> dict[str, Any]:
    import optuna  # noqa: PLC0415

    return {name: optuna.distributions.CategoricalDistribution(c) for name, c in SPACES[kind].items()}


def _optuna(bench: Bench, sampler: Any, n: int) -> Found:  # noqa: ANN401
    import optuna  # noqa: PLC0415

    asked: list[Params] = []
    spent = 0.0

    def objective(trial: Any) -> float:  # noqa: ANN401
        nonlocal spent
        params = {name: trial.suggest_categorical(name, list(c)) for name, c in SPACES[bench.kind].items()}
        asked.append(params)
        began = time.process_time()
        value = bench.train(params).validation
        spent += time.process_time() - began  # not the method's: a training is charged by its own clock
        return value

    began = time.process_time()
    optuna.create_study(direction="maximize", sampler=sampler).optimize(objective, n_trials=n)
    return asked, time.process_time() - began - spent


def _random(bench: Bench, n: int) -> Found:
    import optuna  # noqa: PLC0415

    return _optuna(bench, optuna.samplers.RandomSampler(seed=bench.seed), n)


def _tpe(bench: Bench, n: int) -> Found:
    import optuna  # noqa: PLC0415

    return _optuna(bench, optuna.samplers.TPESampler(seed=bench.seed), n)


def _hyperopt(bench: Bench, n: int) -> Found:
    import hyperopt  # noqa: PLC0415

    asked: list[Params] = []
    spent = 0.0

    def loss(params: Params) -> float:
        nonlocal spent
        asked.append(dict(params))
        began = time.process_time()
        value = -bench.train(params).validation
        spent += time.process_time() - began
        return value

    space = {name: hyperopt.hp.choice(name, list(c)) for name, c in SPACES[bench.kind].items()}
    began = time.process_time()
    hyperopt.fmin(
        loss, space, hyperopt.tpe.suggest, n, rstate=np.random.default_rng(bench.seed), show_progressbar=False,
        verbose=False,
    )  # fmt: skip
    return asked, time.process_time() - began - spent


def _smoothie(bench: Bench, *, rank: str = "smoothness") -> Found:
    keep = KEEP[METHODS_OF[bench.kind]]
    probes: list[Params] = []
    spent = 0.0

    def probe(params: Params) -> float:
        nonlocal spent
        began = time.process_time()
        score = bench.probe(params).smoothness
        spent += time.process_time() - began
        probes.append(params)
        return score

    sampler = SmoothieSampler(
        probe, _space(bench.kind), n_candidates=CANDIDATES, n_finalists=FINALISTS, keep=keep, seed=bench.seed
    )
    asked, own = _optuna(bench, sampler, FINALISTS)
    own += sum(bench.probe(p).seconds for p in probes) - spent
    if rank == "combined":
        known = [bench.probe(p) for p in probes]
        order = combined([p.smoothness for p in known], [p.validation for p in known], keep)
        asked = [probes[i] for i in order[:FINALISTS]]
    elif rank == "all":
        return probes, 0.0
    return asked, own


METHODS: dict[str, Callable[[Bench], Found]] = {
    "SMOOTHIE 30 -> 5": _smoothie,
    "SMOOTHIE 30 -> 5, combined": partial(_smoothie, rank="combined"),
    "its 30 candidates": partial(_smoothie, rank="all"),
    "random 5": partial(_random, n=5),
    "random 30": partial(_random, n=30),
    "Optuna TPE 5": partial(_tpe, n=5),
    "Optuna TPE 30": partial(_tpe, n=30),
    "Hyperopt 5": partial(_hyperopt, n=5),
    "Hyperopt 30": partial(_hyperopt, n=30),
}
COSTLY = {"random 30", "Optuna TPE 30", "Hyperopt 30"}  # left out for nets, where its 30 candidates stand for them


def _run(kind: str, task: Task, seeds: int, methods: dict[str, Callable[[Bench], Found]]) -> dict[str, Array]:
    """Return for each method an array [seeds, (test AUC, pd - pf, seconds)]; and what S tells, under ''."""
    out: dict[str, list[tuple[float, ...]]] = {name: [] for name in (*methods, "")}
    for seed in range(seeds):
        bench = Bench(kind, task, seed)
        for name, method in methods.items():
            asked, own = method(bench)
            trained = [bench.train(params) for params in asked]
            best = max(trained, key=lambda t: t.validation)
            out[name].append((best.test, best.pd_pf, own + sum(t.seconds for t in trained)))
        pool, _ = _smoothie(bench, rank="all")
        sign = 1.0 if KEEP[METHODS_OF[kind]] == "largest" else -1.0
        scores = [sign * bench.probe(p).smoothness for p in pool]
        out[""].append((rank_correlation(scores, [bench.train(p).test for p in pool]),))
    return {name: np.array(rows) for name, rows in out.items()}


def interval(values: Array, random: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, by bootstrap over the first axis."""
    draws = random.integers(0, len(values), (SAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _nested(differences: list[Array], random: np.random.Generator) -> tuple[float, float]:
    means = []
    for _ in range(SAMPLES):
        tables = random.integers(0, len(differences), len(differences))
        means.append(np.mean([random.choice(differences[t], len(differences[t])).mean() for t in tables]))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _one_table(case: str, found: dict[str, Array], random: np.random.Generator) -> Iterator[Row]:
    for name, results in found.items():
        if name:
            auc, alarms, seconds = results.mean(0)
            yield Row(case, name, "test AUC", float(auc), "", None, *interval(results[:, 0], random))
            if np.isfinite(alarms):
                yield Row(case, name, "test pd - pf", float(alarms), "")
            yield Row(case, name, "processor time", float(seconds), "s")
    known = found[""][np.isfinite(found[""]).all(1), 0]
    if len(known):
        yield Row(case, "smoothness", "rank correlation with test AUC", float(known.mean()), "")


def _all_tables(case: str, group: list[dict[str, Array]], random: np.random.Generator) -> Iterator[Row]:
    from scipy.stats import friedmanchisquare, rankdata  # noqa: PLC0415

    names = [name for name in group[0] if name]
    means = np.array([[table[name][:, 0].mean() for name in names] for table in group])
    ranks = np.array([rankdata(-row) for row in means]).mean(0)
    for i, name in enumerate(names):
        yield Row(case, name, "test AUC", float(means[:, i].mean()), "")
        alarms = [table[name][:, 1].mean() for table in group]
        if np.isfinite(alarms).all():
            yield Row(case, name, "test pd - pf", float(np.mean(alarms)), "")
        yield Row(case, name, "mean rank", float(ranks[i]), "1 is best")
        yield Row(case, name, "processor time", float(np.mean([t[name][:, 2].mean() for t in group])), "s a table")
    if len(group) > 2:
        p = float(friedmanchisquare(*means.T).pvalue)
        yield Row(case, "all methods", "Friedman p", p, "")
    known = [table[""][np.isfinite(table[""]).all(1), 0] for table in group]
    known = [values for values in known if len(values)]
    if known:
        mean = float(np.mean([values.mean() for values in known]))
        yield Row(case, "smoothness", "rank correlation with test AUC", mean, "", None, *_nested(known, random))
    for name in names:
        if name == BASE:
            continue
        differences = [table[name][:, 0] - table[BASE][:, 0] for table in group]
        bounds = [interval(d, random) for d in differences]
        mean = float(np.mean([d.mean() for d in differences]))
        yield Row(case, name, "test AUC difference", mean, "", BASE, *_nested(differences, random))
        yield Row(case, name, "tables won", float(sum(low > 0 for low, _ in bounds)), f"of {len(group)}", BASE)
        yield Row(case, name, "tables lost", float(sum(high < 0 for _, high in bounds)), f"of {len(group)}", BASE)


def rows(quick: bool, *, skipped: dict[str, str] | None = None, **_: object) -> Iterator[Row]:
    """Yield scores and seconds for every learner and table, and the comparison over the tables of one kind.

    Args:
        quick: Two tables of each kind and two seeds.
        skipped: Filled with what could not run, and why.
    """
    import optuna  # noqa: PLC0415

    skipped = {} if skipped is None else skipped
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("hyperopt").setLevel(logging.WARNING)
    methods = dict(METHODS)
    try:
        import hyperopt  # noqa: F401, PLC0415
    except ImportError as error:
        skipped["Hyperopt"] = str(error)
        methods = {name: method for name, method in methods.items() if not name.startswith("Hyperopt")}
    everything = tasks(skipped)
    for kind, seeds in SEEDS.items():
        random = np.random.default_rng(0)
        entering = {n: m for n, m in methods.items() if kind != "net" or n not in COSTLY}
        chosen = [t for t in everything if kind != "net" or t.name in FEW_NETS]
        found: dict[str, dict[str, Array]] = {}
        for task in _first(chosen, 2) if quick else chosen:
            logging.getLogger("benchmarks").info("%s, %s", kind, task.name)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="hyperopt")
                found[task.name] = _run(kind, task, 2 if quick else seeds, entering)
            yield from _one_table(f"{kind}, {task.name}", found[task.name], random)
        for title, kinds in (("software analytics", {"defects", "warnings"}), ("standard tables", {"standard"})):
            group = [found[t.name] for t in chosen if t.kind in kinds and t.name in found]
            if group:
                yield from _all_tables(f"{kind}, {title}", group, random)


def _first(found: list[Task], n: int) -> list[Task]:
    return [t for kind in ("defects", "standard") for t in [t for t in found if t.kind == kind][:n]]
