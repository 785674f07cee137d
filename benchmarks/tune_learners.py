"""The learners that are tuned, their settings, and what one setting gives: smoothness, scores and processor time.

The same setting with the same seed is trained once, whoever asks for it; every method is charged as if it had asked
first. Times are of the processor, so that other work on the machine does not count.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.tune_data import Array, Task
from planish.tune import smoothness

SCALERS = ("normalize", "standardize", "minmax", "maxabs", "robust")  # the paper's list
SPACES: dict[str, dict[str, tuple[Any, ...]]] = {
    "logistic": {"scaler": SCALERS, "C": (0.01, 0.1, 1.0, 10.0, 100.0), "class_weight": ("none", "balanced")},
    "naive Bayes": {"scaler": SCALERS, "var_smoothing": tuple(10.0**e for e in range(-10, 0))},
    "net": {"scaler": SCALERS, "n_units": (2, 3, 4, 5, 6), "n_layers": (2, 3, 4, 5)},  # the paper's ranges
}
EPOCHS = 50  # the paper's nets train for 100; half of it keeps the benchmark within minutes
Params = dict[str, Any]


def _scaler(name: str) -> Any:  # noqa: ANN401
    from sklearn import preprocessing as p  # noqa: PLC0415

    made = {
        "normalize": p.Normalizer, "standardize": p.StandardScaler, "minmax": p.MinMaxScaler,
        "maxabs": p.MaxAbsScaler, "robust": p.RobustScaler,
    }  # fmt: skip
    return made[name]()


def _learner(kind: str, params: Params, seed: int, epochs: int, rows: int) -> Any:  # noqa: ANN401
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.naive_bayes import GaussianNB  # noqa: PLC0415
    from sklearn.neural_network import MLPClassifier  # noqa: PLC0415

    if kind == "logistic":
        weight = None if params["class_weight"] == "none" else "balanced"
        return LogisticRegression(C=params["C"], class_weight=weight, max_iter=300)
    if kind == "naive Bayes":
        return GaussianNB(var_smoothing=params["var_smoothing"])
    layers = (params["n_units"],) * params["n_layers"]
    return MLPClassifier(
        layers, solver="sgd", learning_rate_init=0.01, batch_size=min(128, rows), max_iter=epochs,
        n_iter_no_change=epochs, tol=0.0, random_state=seed,
    )  # fmt: skip


def auc(model: Any, X: Array, y: Array) -> float:  # noqa: ANN401
    """Return the area under the ROC curve, averaged over pairs of one class and the rest where there are several."""
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415

    p = model.predict_proba(X)
    return float(roc_auc_score(y, p[:, 1]) if p.shape[1] == 2 else roc_auc_score(y, p, multi_class="ovr"))


@dataclass(frozen=True)
class Probe:
    """What a probe tells, and the seconds it took."""

    smoothness: float
    validation: float
    seconds: float


@dataclass(frozen=True)
class Training:
    """What a full training tells: validation and test AUC, recall minus false alarms (NaN for several classes)."""

    validation: float
    test: float
    pd_pf: float
    seconds: float


class Bench:
    """One learner on one task with one seed: a split, and everything ever asked about a setting.

    Args:
        kind: Learner.
        task: Data.
        seed: Of the validation split (a quarter, stratified) and of the net's weights.
    """

    def __init__(self, kind: str, task: Task, seed: int) -> None:
        from sklearn.model_selection import train_test_split  # noqa: PLC0415

        self.kind, self.task, self.seed = kind, task, seed
        parts = train_test_split(task.X, task.y, test_size=0.25, stratify=task.y, random_state=seed)
        self.X, self.X_val, self.y, self.y_val = parts
        self._probes: dict[tuple[Any, ...], Probe] = {}
        self._trainings: dict[tuple[Any, ...], Training] = {}

    def probe(self, params: Params) -> Probe:
        """Return the probe of a setting."""
        return _once(self._probes, params, lambda: self._probe(params))

    def train(self, params: Params) -> Training:
        """Return the full training of a setting."""
        return _once(self._trainings, params, lambda: self._train(params))

    def _fit(self, params: Params, epochs: int) -> tuple[Any, Any]:
        from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415

        scaler = _scaler(params["scaler"]).fit(self.X)
        model = _learner(self.kind, params, self.seed, epochs, len(self.X))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(scaler.transform(self.X), self.y)
        return scaler, model

    def _probe(self, params: Params) -> Probe:
        began = time.process_time()
        scaler, model = self._fit(params, 1)
        score = smoothness(model, scaler.transform(self.X), self.y)
        seconds = time.process_time() - began
        return Probe(score, auc(model, scaler.transform(self.X_val), self.y_val), seconds)

    def _train(self, params: Params) -> Training:
        began = time.process_time()
        scaler, model = self._fit(params, EPOCHS)
        validation = auc(model, scaler.transform(self.X_val), self.y_val)
        seconds = time.process_time() - began
        X, y = scaler.transform(self.task.X_test), self.task.y_test
        alarms = float("nan")
        if len(np.unique(self.task.y)) == 2:
            says = model.predict(X)
            alarms = float((says[y == 1] == 1).mean() - (says[y == 0] == 1).mean())
        return Training(validation, auc(model, X, y), alarms, seconds)


def _once(known: dict[tuple[Any, ...], Any], params: Params, make: Callable[[], Any]) -> Any:  # noqa: ANN401
    key = tuple(sorted(params.items()))
    if key not in known:
        known[key] = make()
    return known[key]
