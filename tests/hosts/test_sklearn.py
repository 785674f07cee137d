"""SmoothRecalibrator and smooth_ece live inside scikit-learn."""

import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import cross_val_score
from sklearn.utils import estimator_checks

from planish.metrics import SmoothRecalibrator, smooth_ece


def draw(n=4000, seed=0):
    random = np.random.default_rng(seed)
    f = random.random(n)
    return f, random.random(n) < f**2


def test_scikit_learns_checks():
    # one-dimensional input, like IsotonicRegression's: scikit-learn's suite then runs what does not feed a matrix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", estimator_checks.SkipTestWarning)
        results = estimator_checks.check_estimator(SmoothRecalibrator())
    assert {entry["status"] for entry in results} == {"passed"}
    for name in (
        "check_estimator_repr",
        "check_get_params_invariance",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_set_params",
        "check_valid_tag_types",
    ):
        getattr(estimator_checks, name)("SmoothRecalibrator", SmoothRecalibrator())


def test_recalibrates_what_was_not_seen():
    f, y = draw()
    g, z = draw(seed=1)
    model = clone(SmoothRecalibrator()).fit(f, y)
    after = model.transform(g)
    assert model.bandwidth_ == pytest.approx(smooth_ece(y, f), abs=1e-12)
    assert smooth_ece(z, g) > 0.15 and smooth_ece(z, after) < 0.04
    assert np.square(after - z).mean() < np.square(g - z).mean() - 0.02
    assert (model.predict(g[:, None])[:, 0] == after).all()


def test_leaves_alone_what_is_calibrated_or_unknown():
    f = np.linspace(0.3, 0.4, 1001)
    y = np.random.default_rng(0).random(1001) < f + 0.3
    model = SmoothRecalibrator(bandwidth=0.01).fit(f, y)
    assert np.allclose(model.transform([0.0, 0.9, 1.0]), [0, 0.9, 1], atol=1e-6)


def test_bad_input_of_the_recalibrator():
    model = SmoothRecalibrator()
    for call, sentence in (
        (lambda: model.fit([0.1, 0.2], [1, 1]), "`y` must be outcomes of both classes; got '2 times the same'"),
        (lambda: model.fit([0.1, 1.2], [0, 1]), "`y_prob` must be in [0, 1]; got '1.2 at index 1'"),
        (lambda: model.fit([[0.1, 0.2]], [0]), "`X` must be probabilities of outcome 1, a vector or one column"),
        (lambda: model.fit(["a"], [0]), "`X` must be numbers"),
        (lambda: model.fit([], []), "`y_prob` must be at least one probability"),
        (lambda: model.fit([0.1, 0.2], [0, 1]).transform([2.0]), "`y_prob` must be in [0, 1]; got '2 at index 0'"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert sentence in str(caught.value)


def test_scores_in_cross_validation():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 2))
    y = random.random(300) < 1 / (1 + np.exp(-x[:, 0]))
    scorer = make_scorer(smooth_ece, greater_is_better=False, response_method="predict_proba")
    scores = cross_val_score(LogisticRegression(), x, y, scoring=scorer, cv=3, error_score="raise")
    assert ((scores < 0) & (scores > -0.3)).all()
