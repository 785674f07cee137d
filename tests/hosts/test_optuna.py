"""Optuna's own cases for samplers, and its storages: workers in parallel, and a study that is killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")
cases = pytest.importorskip("optuna.testing.pytest_samplers")

from planish.tune import SmoothieSampler  # noqa: E402

WORKER = Path(__file__).parent / "tune_worker.py"
WAIT = 200.0  # a busy machine takes its time


def probe(params):
    return float(sum(v if isinstance(v, int | float) else len(str(v)) for v in params.values()))


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class OurSampler:
    @pytest.fixture(params=["batches", "space given", "then TPE"])
    def sampler(self, request):
        if request.param == "batches":
            return lambda: SmoothieSampler(probe, n_candidates=6, n_finalists=3)
        if request.param == "space given":
            space = {n: optuna.distributions.FloatDistribution(-10, 10) for n in ("x", "y")}
            return lambda: SmoothieSampler(probe, space, seed=1, keep="smallest")
        return lambda: SmoothieSampler(probe, n_finalists=2, then=optuna.samplers.TPESampler(n_startup_trials=2))


# The objectives of these cases change distributions of one name, which a given space cannot follow.
class TestBasic(OurSampler, cases.BasicSamplerTestCase):
    @pytest.fixture(params=["batches", "then TPE"])
    def sampler(self, request):
        then = {"n_finalists": 2, "then": optuna.samplers.TPESampler(n_startup_trials=2)}
        more = then if request.param == "then TPE" else {"n_candidates": 6, "n_finalists": 3}
        return lambda: SmoothieSampler(probe, **more)


class TestRelative(OurSampler, cases.RelativeSamplerTestCase):
    @pytest.fixture(params=["batches"])
    def sampler(self, request):
        return lambda: SmoothieSampler(probe, n_candidates=6, n_finalists=3)


class TestMultiObjective(OurSampler, cases.MultiObjectiveSamplerTestCase):
    pass


def start(storage: str, folder: Path, trials: int, pause: float) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), storage, str(folder), str(trials), str(pause)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def load(storage: str, folder: Path):
    where = f"sqlite:///{folder}/study.db"
    if storage == "journal":
        backend = optuna.storages.journal.JournalFileBackend(f"{folder}/study.log")
        where = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="job", storage=where)


def probed(folder: Path) -> Counter:
    return Counter((folder / "probes.txt").read_text().split())


def until(condition) -> None:
    ends = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < ends, "the worker did not get there"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[dict]:
    """The settings of one worker that nothing disturbs, in order."""
    folder = tmp_path_factory.mktemp("alone")
    assert start("journal", folder, 8, 0.0).wait(WAIT) == 0
    return [t.params for t in load("journal", folder).trials]


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_workers_share_probes_and_finalists(storage, alone, tmp_path):
    """Two processes at once do what one does alone: the same settings, each of them once."""
    assert start(storage, tmp_path, 0, 0.0).wait(WAIT) == 0  # Optuna's own tables are not made by two at once
    workers = [start(storage, tmp_path, 4, 0.05) for _ in range(2)]
    assert [w.wait(WAIT) for w in workers] == [0, 0]
    found = [t.params for t in load(storage, tmp_path).trials]
    assert len(found) == 8
    key = repr
    assert sorted(found, key=key) == sorted(alone, key=key)  # two whole batches of four
    counts = probed(tmp_path)
    assert len(counts) == 24  # two batches of twelve
    assert sum(counts.values()) <= 40  # a busy machine lets both end up at one candidate; apart they would make 48


def test_a_killed_study_goes_on(alone, tmp_path):
    """What was probed is not probed again, and the finalist of the killed trial is handed out again."""
    worker = start("journal", tmp_path, 8, 0.2)
    try:
        until(lambda: (tmp_path / "trials.txt").exists() and len((tmp_path / "trials.txt").read_text().split()) >= 3)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    study = load("journal", tmp_path)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    dead = [t for t in study.trials if t.state == optuna.trial.TrialState.RUNNING]
    assert len(done) >= 3 and len(done) < 8 and len(dead) <= 1
    before = probed(tmp_path)
    for trial in dead:
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    assert start("journal", tmp_path, 8 - len(done), 0.0).wait(WAIT) == 0
    study = load("journal", tmp_path)
    found = [t.params for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert found == alone
    assert all(count == 1 for count in probed(tmp_path).values()) and before == Counter(list(before))


def test_a_study_killed_while_probing_goes_on(alone, tmp_path):
    worker = start("journal", tmp_path, 8, 0.1)
    try:
        until(lambda: (tmp_path / "probes.txt").exists() and len((tmp_path / "probes.txt").read_text().split()) >= 5)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    study = load("journal", tmp_path)
    assert [t.state for t in study.trials] == [optuna.trial.TrialState.RUNNING]
    study.tell(0, state=optuna.trial.TrialState.FAIL)
    assert start("journal", tmp_path, 8, 0.0).wait(WAIT) == 0
    done = [t.params for t in load("journal", tmp_path).trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert done == alone
    counts = probed(tmp_path)
    assert len(counts) == 24 and sum(counts.values()) <= 25  # the probe that was under way was lost
