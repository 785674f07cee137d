"""One worker of a study: tune_worker.py STORAGE FOLDER TRIALS PAUSE; notes each probe and each trial in a file."""

import sys
import time
from pathlib import Path

import optuna

from planish.tune import SmoothieSampler

storage, folder, trials, pause = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
where = f"sqlite:///{folder}/study.db"
if storage == "journal":
    where = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(f"{folder}/study.log"))


def note(file: str, text: str) -> None:
    with (folder / file).open("a", encoding="utf-8") as stream:
        stream.write(text + "\n")


def probe(params: dict) -> float:
    note("probes.txt", f"{params['x']:.12f}:{params['y']}")
    time.sleep(pause)
    return -(params["x"] ** 2)


def objective(trial: optuna.Trial) -> float:
    value = trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_int("y", 0, 9)
    time.sleep(pause)
    note("trials.txt", str(trial.number))
    return value


space = {"x": optuna.distributions.FloatDistribution(-1, 1), "y": optuna.distributions.IntDistribution(0, 9)}
sampler = SmoothieSampler(probe, space, n_candidates=12, n_finalists=4, seed=0)
study = optuna.create_study(study_name="job", storage=where, sampler=sampler, load_if_exists=True)
study.optimize(objective, n_trials=trials)
