"""scikit-learn's checks of an estimator, and `RandomizedSearchCV` as the case that both share."""

import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.datasets import load_iris, make_classification
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import RandomizedSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import check_estimator

from planish._support import PlanishWarning
from planish.tune import SmoothieSearchCV, smoothness

FEW = {"cv": 2, "error_score": "raise", "random_state": 0}
# What scikit-learn itself expects its own searches to fail.
EXPECTED = {
    "check_supervised_y_2d": "DataConversionWarning not caught",
    "check_requires_y_none": "Doesn't fail gracefully",
}


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        (Ridge(), {"alpha": [0.1, 1.0]}),
        (LogisticRegression(), {"C": [0.1, 1.0]}),
        (Pipeline([("pca", PCA()), ("ridge", Ridge())]), {"ridge__alpha": [0.1, 1.0]}),
        (Pipeline([("pca", PCA()), ("clf", LogisticRegression())]), {"clf__C": [0.1, 1.0]}),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("rank", ["smoothness", "combined"])
def test_check_estimator(estimator, settings, rank):
    search = SmoothieSearchCV(estimator, settings, n_candidates=2, n_finalists=1, rank=rank, **FEW)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks fit on tables made to be warned of
        found = check_estimator(search, expected_failed_checks=EXPECTED, on_fail=None, on_skip=None)
        theirs = check_estimator(RandomizedSearchCV(estimator, settings, n_iter=2, **FEW),
                                 expected_failed_checks=EXPECTED, on_fail=None, on_skip=None)  # fmt: skip
    assert [r["check_name"] for r in found if r["status"] == "failed"] == []
    status = [(r["check_name"], r["status"]) for r in found]
    assert status == [(r["check_name"], r["status"]) for r in theirs] and len(status) > 40


C = {"C": np.logspace(-3, 2, 12).tolist(), "class_weight": [None, "balanced"]}


def logistic():
    return LogisticRegression(max_iter=2000)


def table():
    return make_classification(120, 8, n_informative=4, flip_y=0.2, random_state=0)


def test_all_finalists_is_randomized_search():
    X, y = table()
    ours = SmoothieSearchCV(logistic(), C, n_candidates=7, n_finalists=7, random_state=3).fit(X, y)
    theirs = RandomizedSearchCV(logistic(), C, n_iter=7, random_state=3).fit(X, y)
    assert ours.best_params_ == theirs.best_params_ and ours.best_score_ == theirs.best_score_
    assert ours.cv_results_["params"] == theirs.cv_results_["params"]
    np.testing.assert_array_equal(ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"])
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


class Counting(LogisticRegression):
    """Counts its fits: number and rows."""

    fits: list = []  # noqa: RUF012

    def fit(self, X, y, sample_weight=None):
        Counting.fits.append((len(X), sample_weight is not None))
        return super().fit(X, y, sample_weight)


def test_number_of_trainings():
    X, y = table()
    Counting.fits.clear()
    search = SmoothieSearchCV(Counting(max_iter=2000), C, n_candidates=9, n_finalists=2, cv=3, random_state=0).fit(X, y)
    assert len(Counting.fits) == 9 + 2 * 3 + 1  # probes, finalists by folds, the last on all rows
    assert [rows for rows, _ in Counting.fits[:9]] == [80] * 9  # a probe sees the first split's training part only
    assert search.candidates_["is_finalist"].sum() == 2 == len(search.cv_results_["params"])


def test_finalists_are_those_with_the_largest_score():
    X, y = table()
    search = SmoothieSearchCV(logistic(), C, n_candidates=10, n_finalists=3, random_state=0).fit(X, y)
    known = search.candidates_
    expected = set(np.argsort(-known["smoothness"], kind="stable")[:3].tolist())
    assert set(np.flatnonzero(known["is_finalist"]).tolist()) == expected
    train, _ = next(iter(search._checked_cv_orig.split(X, y)))
    first = known["params"][0]
    model = LogisticRegression(max_iter=2000, **first).fit(X[train], y[train])
    assert known["smoothness"][0] == pytest.approx(smoothness(model, X[train], y[train]), rel=1e-9)
    assert -1 <= search.rank_correlation_ <= 1
    np.testing.assert_array_equal(search.cv_results_["smoothness"], known["smoothness"][known["is_finalist"]])
    smallest = SmoothieSearchCV(logistic(), C, n_candidates=10, n_finalists=3, keep="smallest", random_state=0).fit(
        X, y
    )
    assert set(np.flatnonzero(smallest.candidates_["is_finalist"]).tolist()) == set(
        np.argsort(known["smoothness"], kind="stable")[:3].tolist()
    )


def test_seeds_are_reproducible_and_processes_change_nothing():
    X, y = table()
    settings = {"hidden_layer_sizes": [(3,), (4, 4)], "alpha": [1e-4, 1e-2, 1.0]}
    net = MLPClassifier(max_iter=20, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # twenty epochs do not converge
        runs = [
            SmoothieSearchCV(net, settings, n_candidates=5, n_finalists=2, cv=2, random_state=1, n_jobs=jobs).fit(X, y)
            for jobs in (None, None, 2)
        ]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.candidates_["smoothness"], runs[0].candidates_["smoothness"])
        assert run.best_params_ == runs[0].best_params_ and run.best_score_ == runs[0].best_score_


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_net_is_probed_for_its_epochs_only():
    seen = []

    def watch(model, X, y):
        seen.append(model.n_iter_)
        return smoothness(model, X, y)

    X, y = table()
    net, settings = MLPClassifier(max_iter=30, random_state=0), {"alpha": [1e-4, 1e-2, 1.0]}
    search = SmoothieSearchCV(net, settings, n_candidates=3, n_finalists=1, smoothness=watch, probe_epochs=2, cv=2)
    assert search.fit(X, y).best_estimator_.max_iter == 30 and seen == [2, 2, 2]
    regression = SmoothieSearchCV(MLPRegressor(max_iter=5), settings, n_candidates=2, n_finalists=1, cv=2).fit(
        X, y * 1.0
    )
    assert (regression.candidates_["smoothness"] > 0).all()


@pytest.mark.parametrize("rank", ["smoothness", "combined"])
def test_learners_of_every_kind(rank):
    X, y = load_iris(return_X_y=True)
    few = {"n_candidates": 3, "n_finalists": 2, "cv": 2, "random_state": 0, "rank": rank}
    bayes = SmoothieSearchCV(
        make_pipeline(StandardScaler(), GaussianNB()), {"gaussiannb__var_smoothing": [1e-9, 0.1, 1.0]}, **few
    )
    assert bayes.fit(X, y).score(X, y) > 0.9 and (bayes.candidates_["smoothness"] < 0).all()
    tree = SmoothieSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [1, 2, 5]}, **few).fit(X, y)
    assert np.isfinite(tree.candidates_["smoothness"]).all() and tree.best_score_ > 0.5
    assert np.isfinite(tree.candidates_["probe_score"]).all() == (rank == "combined")


def test_sample_weights_reach_probes_and_finalists():
    X, y = table()
    Counting.fits.clear()
    search = SmoothieSearchCV(Counting(max_iter=2000), C, n_candidates=3, n_finalists=1, cv=2, random_state=0)
    search.fit(X, y, sample_weight=np.ones(len(y)))
    assert len(Counting.fits) == 3 + 2 + 1 and all(weighted for _, weighted in Counting.fits)


def test_a_probe_that_fails_loses_its_candidate():
    X, y = table()
    settings = {"C": [1.0, -1.0, 10.0], "max_iter": [2000]}
    few = {"n_candidates": 3, "n_finalists": 2, "cv": 2, "random_state": 0}
    with pytest.warns(PlanishWarning, match="1 of 3 probes failed, their candidates are skipped; the first said: Inv"):
        search = SmoothieSearchCV(LogisticRegression(), settings, **few).fit(X, y)
    assert {p["C"] for p in search.cv_results_["params"]} == {1.0, 10.0}
    with pytest.raises(ValueError, match="'C' parameter of LogisticRegression must be"):
        SmoothieSearchCV(LogisticRegression(), settings, error_score="raise", **few).fit(X, y)
    with pytest.raises(ValueError, match="all 2 probes failed; the first said: .*must be a float"):
        SmoothieSearchCV(LogisticRegression(), {"C": [-1.0, -2.0]}, n_candidates=2, n_finalists=1).fit(X, y)


def test_several_scores_and_no_refit():
    X, y = table()
    search = SmoothieSearchCV(
        logistic(), C, n_candidates=4, n_finalists=3, cv=2, scoring=["accuracy", "roc_auc"], refit="roc_auc",
        random_state=0,
    ).fit(X, y)  # fmt: skip
    assert -1 <= search.rank_correlation_ <= 1 and search.best_score_ == search.cv_results_["mean_test_roc_auc"].max()
    search = SmoothieSearchCV(logistic(), C, n_candidates=4, n_finalists=3, cv=2, scoring=["accuracy", "roc_auc"],
                              refit=False, random_state=0).fit(X, y)  # fmt: skip
    assert np.isnan(search.rank_correlation_)
