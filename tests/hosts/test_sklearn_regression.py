"""scikit-learn's checks of an estimator, and its pipelines and searches around ours."""

import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from planish.regression import QuantileProcessRegressor

# As scikit-learn has it of its own MLPRegressor: batches and draws differ where rows are repeated or left out.
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": "sample_weight is not equivalent to removing or repeating samples",
}
SMALL = {"hidden_layer_sizes": (8,), "n_members": 2, "max_iter": 60, "learning_rate_init": 0.03, "average": 0.9}


@pytest.mark.parametrize("monotone", ["penalty", pytest.param("hard", marks=pytest.mark.slow)])
def test_check_estimator(monotone):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks fit on tables made to be warned of
        found = check_estimator(
            QuantileProcessRegressor(monotone=monotone, **SMALL), expected_failed_checks=EXPECTED, on_fail=None,
            on_skip=None,
        )  # fmt: skip
    assert [(r["check_name"], str(r["exception"])) for r in found if r["status"] == "failed"] == []
    assert len(found) > 40


def test_pipelines_searches_and_scores():
    random = np.random.default_rng(0)
    X = random.random((150, 2))
    y = X[:, 0] + 0.2 * random.standard_normal(150)
    steps = make_pipeline(StandardScaler(), QuantileProcessRegressor(random_state=0, **SMALL))
    search = GridSearchCV(steps, {"quantileprocessregressor__monotone": ["penalty", "hard"]}, cv=2).fit(X, y)
    assert search.best_score_ > 0.2
    assert search.best_estimator_.predict(X, quantiles=[0.1, 0.9]).shape == (150, 2)

    def less_crps(model, X, y):
        return -model.crps(X, y)

    scores = cross_val_score(QuantileProcessRegressor(random_state=0, **SMALL), X, y, cv=2, scoring=less_crps)
    assert (scores < 0).all() and (scores > -0.2).all()
