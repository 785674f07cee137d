"""SMOOTHIE's claims in miniature: what it costs, what it chooses on real defect data, and where it does not help."""

import itertools

import numpy as np
import pytest

from benchmarks.tune_data import tasks
from benchmarks.tune_learners import SPACES, Bench
from planish.tune import SmoothieSearchCV, smoothness
from planish.tune.ranking import ranked

pytest.importorskip("sklearn")

from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, RobustScaler, StandardScaler

SETTINGS = [
    (scaler, c, weight)
    for scaler in (StandardScaler, MinMaxScaler, RobustScaler, Normalizer)
    for c in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
    for weight in (None, "balanced")
]
DRAWS, CANDIDATES, FINALISTS = 400, 30, 5


def advantage(scores: list[float], validation: list[float], test: list[float], seed: int) -> float:
    """Return the test score of the winner of five chosen by smoothness, less that of five at random, over draws."""
    random = np.random.default_rng(seed)
    difference = []
    for _ in range(DRAWS):
        drawn = random.permutation(len(scores))[:CANDIDATES]
        chosen = drawn[ranked([scores[i] for i in drawn], "largest")[:FINALISTS]]
        winners = [test[max(five, key=lambda i: validation[i])] for five in (chosen, drawn[:FINALISTS])]
        difference.append(winners[0] - winners[1])
    return float(np.mean(difference))


class Watched(MLPClassifier):
    """Counts the epochs of all its trainings."""

    epochs: list = []  # noqa: RUF012

    def fit(self, X, y):
        super().fit(X, y)
        Watched.epochs.append(self.n_iter_)
        return self


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.claim("smoothie_hpo", "epochs of 30 probed nets and 5 trained, against 30 trained")
def test_what_a_search_of_nets_costs(record_claim):
    X, y = make_classification(60, 5, random_state=0)
    net = Watched(max_iter=40, n_iter_no_change=40, tol=0.0, random_state=0)
    settings = {"hidden_layer_sizes": [(n,) * k for n in (2, 3, 4, 5, 6) for k in (1, 2)], "alpha": [1e-4, 1e-2, 1.0]}
    spent = []
    for finalists in (5, 30):
        Watched.epochs.clear()
        search = SmoothieSearchCV(net, settings, n_finalists=finalists, cv=2, refit=False, random_state=0).fit(X, y)
        probes = len(search.candidates_["params"]) if finalists < 30 else 0  # a search of all needs none
        spent.append(sum(Watched.epochs) - (0 if probes else 30))
    record_claim(spent[1] / spent[0], 3.0, "times fewer epochs")


@pytest.mark.claim("smoothie_hpo", "5 of 30 settings of logistic regression chosen by smoothness, against 5 at random")
def test_what_it_chooses_on_defect_data(record_claim):
    projects = [task for task in tasks({}) if task.kind == "defects"]
    if not projects:
        pytest.skip("the shared defect data is absent (PLANISH_DATA)")
    space = SPACES["logistic"]
    settings = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    gains = []
    for task in projects:
        bench = Bench("logistic", task, 0)
        trained = [bench.train(s) for s in settings]
        scores = [bench.probe(s).smoothness for s in settings]
        gains.append(advantage(scores, [t.validation for t in trained], [t.test for t in trained], 0))
    record_claim(float(np.mean(gains)), 0.005, "test AUC, mean over projects")


def gain(flip: float, rows: int, seed: int) -> float:
    """Return the advantage on a made table: the winner is by validation, the score by many test rows."""
    X, y = make_classification(
        rows + 4000, 20, n_informative=4, n_redundant=4, flip_y=flip, class_sep=0.8, random_state=seed
    )
    X_test, y_test = X[rows:], y[rows:]
    X, X_val, y, y_val = train_test_split(X[:rows], y[:rows], test_size=0.25, stratify=y[:rows], random_state=seed)
    scores, validation, test = [], [], []
    for scaler, c, weight in SETTINGS:
        model = make_pipeline(scaler(), LogisticRegression(C=c, class_weight=weight, max_iter=1000)).fit(X, y)
        scores.append(smoothness(model[-1], model[:-1].transform(X), y))
        validation.append(roc_auc_score(y_val, model.predict_proba(X_val)[:, 1]))
        test.append(roc_auc_score(y_test, model.predict_proba(X_test)[:, 1]))
    return advantage(scores, validation, test, seed)


def test_it_harms_where_large_weights_are_right():
    """The limit: smoothness keeps small weights, whatever the data say."""
    assert np.mean([gain(flip=0.0, rows=1200, seed=seed) for seed in range(3)]) < -0.001
