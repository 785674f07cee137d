"""SMOOTHIE's claim in miniature: five trainings chosen by smoothness, beside five chosen at random, and its limit."""

import numpy as np
import pytest

from planish.tune import smoothness
from planish.tune.ranking import ranked

pytest.importorskip("sklearn")

from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, RobustScaler, StandardScaler

SETTINGS = [
    (scaler, c, weight)
    for scaler in (StandardScaler, MinMaxScaler, RobustScaler, Normalizer)
    for c in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
    for weight in (None, "balanced")
]
DRAWS, CANDIDATES, FINALISTS = 400, 30, 5


def gain(flip: float, rows: int, seed: int) -> float:
    """Return the test AUC that five chosen by smoothness have over five at random; the winner is by validation."""
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
    random = np.random.default_rng(seed)
    difference = []
    for _ in range(DRAWS):
        drawn = random.permutation(len(SETTINGS))[:CANDIDATES]
        chosen = drawn[ranked([scores[i] for i in drawn], "largest")[:FINALISTS]]
        winners = [test[max(five, key=lambda i: validation[i])] for five in (chosen, drawn[:FINALISTS])]
        difference.append(winners[0] - winners[1])
    return float(np.mean(difference))


@pytest.mark.claim(
    "smoothie_hpo", "5 settings of logistic regression chosen by smoothness beat 5 random (noisy tables)"
)
def test_smoothness_chooses_where_noise_rules(record_claim):
    gains = [gain(flip=0.4, rows=120, seed=seed) for seed in range(10)]
    record_claim(float(np.mean(gains)), 0.001, "test AUC")


def test_and_not_where_large_weights_are_right():
    """The limit: smoothness keeps small weights, whatever the data say; on clean tables it chooses no better."""
    gains = [gain(flip=0.0, rows=1200, seed=seed) for seed in range(3)]
    assert np.mean(gains) < 0.001
