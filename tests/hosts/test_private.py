"""MNGPClassifier lives inside scikit-learn; the accountant inside Opacus."""

import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

from planish.optim import MNGPClassifier


def draw(n=4000, d=3, seed=0):
    random = np.random.default_rng(seed)
    X = random.normal(size=(n, d))
    return X, X[:, 0] + 0.3 * random.normal(size=n) > X[:, 1]


def test_scikit_learns_checks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", estimator_checks.SkipTestWarning)
        results = estimator_checks.check_estimator(MNGPClassifier(n_steps=10))
    assert {entry["status"] for entry in results} <= {"passed", "skipped"}
    assert sum(entry["status"] == "passed" for entry in results) > 40


@pytest.mark.parametrize("loss", ["logistic", "hinge", "huber"])
@pytest.mark.parametrize("normalizer", ["max1", "clip", "nsgd", "auto"])
def test_every_loss_and_normalizer_learns_within_a_budget(loss, normalizer):
    X, y = draw()
    model = MNGPClassifier(
        1.0, loss=loss, normalizer=normalizer, n_steps=30, learning_rate=2.0, average=True, random_state=0
    )
    assert model.fit(X, y).score(*draw(seed=1)) > 0.87
    assert hasattr(model, "predict_proba") == (loss == "logistic")


def test_batches_the_median_threshold_and_a_pipeline():
    X, y = draw()
    X = X * 20  # long rows: 1 is far from the norms
    model = MNGPClassifier(
        1.0, batch_size=400, n_steps=60, threshold="median", l2=0.01, learning_rate=0.1, random_state=0
    )
    scores = cross_val_score(make_pipeline(StandardScaler(), model), X, y, cv=2, error_score="raise")
    assert scores.min() > 0.85
    y = np.random.default_rng(2).random(len(y)) < 0.5  # nothing to learn, so that norms stay long
    model.set_params(learning_rate=1e-4).fit(X, y)
    norms = np.abs(model.predict_proba(X)[:, 1] - y) * np.sqrt((X**2).sum(1) + 1)
    assert model.threshold_ == pytest.approx(np.median(norms), rel=0.3) and model.threshold_ > 5


def test_several_classes_give_probabilities():
    random = np.random.default_rng(0)
    X = random.normal(size=(3000, 2))
    y = np.array(["a", "b", "c"])[X.dot([[1, -1, 0], [0, 1, -1]]).argmax(1)]
    model = MNGPClassifier(2.0, n_steps=40, random_state=0).fit(X, y)
    p = model.predict_proba(X)
    assert np.allclose(p.sum(1), 1) and (model.classes_[p.argmax(1)] == model.predict(X)).all()
    assert model.score(X, y) > 0.85


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epsilon": 0.0}, "`epsilon` must be a finite float > 0; got 0.0"),
        ({"delta": 1.0}, "`delta` must be a float in (0, 1); got 1.0"),
        ({"n_steps": 0}, "`steps` must be an integer >= 1; got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a finite float > 0; got 0.0"),
        ({"loss": "square"}, "`loss` must be 'logistic', 'hinge' or 'huber'; got 'square'"),
        ({"normalizer": "mean"}, "`normalizer` must be 'max1', 'clip', 'nsgd' or 'auto'; got 'mean'"),
        ({"threshold": 0.0}, "`threshold` must be a finite float > 0; got 0.0"),
        ({"threshold": "median", "normalizer": "auto"}, "`threshold` must be a float > 0 where normalizer='auto'"),
        ({"batch_size": 4001}, "`batch_size` must be in [1, 4000] or None; got 4001"),
        ({"l2": -1.0}, "`l2` must be a finite float >= 0; got -1.0"),
        ({"adjacency": "both"}, "`adjacency` must be 'add_remove' or 'replace'; got 'both'"),
        ({"accountant": "gdp"}, "`accountant` must be 'exact', 'prv' or 'rdp'; got 'gdp'"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError) as caught:
        MNGPClassifier(**settings).fit(*draw())
    assert sentence in str(caught.value)


def test_one_class_is_refused_and_a_large_delta_warns():
    X, y = draw()
    with pytest.raises(ValueError, match="`y` must be of at least two classes; got"):
        MNGPClassifier().fit(X, np.ones(len(X)))
    with pytest.warns(UserWarning, match="`delta` should be below 1 / 4000 samples; got 0.013"):
        MNGPClassifier(delta=0.013).fit(X, y)


def test_the_same_state_gives_the_same_bits():
    X, y = draw()
    first, second = (MNGPClassifier(batch_size=100, random_state=3).fit(X, y) for _ in range(2))
    other = MNGPClassifier(batch_size=100, random_state=4).fit(X, y)
    assert (first.coef_ == second.coef_).all() and not (first.coef_ == other.coef_).all()
