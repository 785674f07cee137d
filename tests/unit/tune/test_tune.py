"""What the tuner refuses, by its sentence, and the edges of the sampler."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from planish._support import NotConverged, PlanishWarning
from planish.tune import directional_curvature, hessian_norm, smoothness

optuna = pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from sklearn.linear_model import LogisticRegression  # noqa: E402

from planish.tune import SmoothieSampler, SmoothieSearchCV  # noqa: E402

SPACE = {"x": optuna.distributions.FloatDistribution(0, 1)}
FAIL = optuna.trial.TrialState.FAIL


def flat(params):
    return 1.0


def search(**more):
    return SmoothieSearchCV(LogisticRegression(), more.pop("param_distributions", {"C": [1.0]}), **more)


def fit(**more):
    return lambda: search(**more).fit(np.arange(8.0).reshape(-1, 1), np.arange(8) % 2)


METHODS = "last_layer, logistic, gaussian_nb, directional, hessian"
NET = nn.Linear(2, 2)
X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: SmoothieSampler(3),
         "SmoothieSampler: `probe` must be a callable that takes the parameters and returns a float; got 3."),
        (lambda: SmoothieSampler(flat, {}),
         "SmoothieSampler: `search_space` must be None or at least one distribution; got {}."),
        (lambda: SmoothieSampler(flat, n_candidates=0), "SmoothieSampler: `n_candidates` must be an int >= 1; got 0."),
        (lambda: SmoothieSampler(flat, n_candidates=4),
         "SmoothieSampler: `n_finalists` must be an int in [1, n_candidates = 4]; got 5."),
        (lambda: SmoothieSampler(flat, keep="best"),
         "SmoothieSampler: `keep` must be one of largest, smallest; got 'best'."),
        (lambda: SmoothieSampler(flat, seed=-1), "SmoothieSampler: `seed` must be None or an int >= 0; got -1."),
        (fit(n_candidates=0), "SmoothieSearchCV: `n_candidates` must be an int >= 1; got 0."),
        (fit(n_candidates=3), "SmoothieSearchCV: `n_finalists` must be an int in [1, n_candidates = 3]; got 5."),
        (fit(param_distributions={}),
         "SmoothieSearchCV: `param_distributions` must be at least one list or distribution; got {}."),
        (fit(smoothness="flat"),
         f"SmoothieSearchCV: `smoothness` must be a callable, auto or one of {METHODS}; got 'flat'."),
        (fit(keep="best"), "SmoothieSearchCV: `keep` must be auto or one of largest, smallest; got 'best'."),
        (fit(rank="both"), "SmoothieSearchCV: `rank` must be one of smoothness, combined; got 'both'."),
        (fit(rank="combined", scoring=["f1"], refit="f1"),
         "SmoothieSearchCV: `scoring` must be one score, not several, for rank='combined'; got ['f1']."),
        (fit(probe_epochs=0), "SmoothieSearchCV: `probe_epochs` must be an int >= 1; got 0."),
        (lambda: smoothness(NET, X, batch_size=0), "smoothness: `batch_size` must be an int >= 1; got 0."),
        (lambda: smoothness(NET, X, method="flat"),
         f"smoothness: `method` must be auto or one of {METHODS}; got 'flat'."),
        (lambda: smoothness(NET, torch.ones(0, 2)),
         "smoothness: `X` must be at least one row of at least one column; got (0, 2)."),
        (lambda: smoothness(nn.ReLU(), X),
         "smoothness: `model` must be a net with a linear layer for method='last_layer'; got 'ReLU'."),
        (lambda: smoothness(LogisticRegression(), X),
         "smoothness: `model` must be a fitted linear classifier for method='logistic'; got 'LogisticRegression'."),
        (lambda: smoothness(LogisticRegression(), X, method="last_layer"),
         "smoothness: `model` must be "
         "a torch module, or a fitted net of scikit-learn for method='last_layer'; got 'LogisticRegression'."),
        (lambda: smoothness(object(), X),
         "smoothness: `model` must be an estimator that predicts for method='directional'; got 'object'."),
        (lambda: smoothness(NET, X, method="gaussian_nb"),
         "smoothness: `y` must be the labels, one a row, for method='gaussian_nb'; got None."),
        (lambda: smoothness(NET, X, method="hessian"),
         "smoothness: `y` must be the labels, one a row, for method='hessian'; got None."),
        (lambda: hessian_norm(X.sum, NET.parameters(), tolerance=0),
         "hessian_norm: `tolerance` must be above 0; got 0."),
        (lambda: hessian_norm(X.sum, NET.parameters(), iterations=0),
         "hessian_norm: `iterations` must be an int >= 1; got 0."),
        (lambda: hessian_norm(X.sum, [X]),
         "hessian_norm: `parameters` must be tensors of which at least one requires a gradient; got 'none'."),
        (lambda: hessian_norm(lambda: torch.tensor(math.nan), NET.parameters()),
         "hessian_norm: `loss` must be a function that returns one finite number; got tensor(nan)."),
        (lambda: directional_curvature(torch.sum, X, step=0), "directional_curvature: `step` must be above 0; got 0."),
        (lambda: directional_curvature(torch.sum, torch.ones(0, 2)),
         "directional_curvature: `points` must be a matrix of at least one row and column; got (0, 2)."),
        (lambda: directional_curvature(torch.sum, X),
         "directional_curvature: `function` must be one that gives 3 numbers; got ()."),
    ],
)  # fmt: skip
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == sentence


def test_an_eigenvalue_that_is_not_found_is_said_so():
    n = 400
    spread = torch.linspace(0.9, 1, n, dtype=torch.float64)
    x = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotConverged, match="3 iterations left a residual") as error:
        hessian_norm(lambda: (spread * x**2).sum() / 2, [x], tolerance=1e-12, iterations=3)
    assert 0.9 < error.value.best <= 1


def study_of(sampler, trials, objective=lambda t: t.suggest_float("x", 0, 1), **more):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=trials, **more)
    return study


def test_finalists_come_best_first_and_carry_their_score():
    seen = []

    def probe(params):
        seen.append(params["x"])
        return params["x"]

    study = study_of(SmoothieSampler(probe, SPACE, n_candidates=12, n_finalists=4, seed=5), 8)
    xs = [t.params["x"] for t in study.trials]
    assert len(seen) == 24 and len(set(seen)) == 24
    assert xs[:4] == sorted(seen[:12], reverse=True)[:4] and xs[4:] == sorted(seen[12:], reverse=True)[:4]
    assert [t.user_attrs["smoothness"] for t in study.trials] == xs
    again = study_of(SmoothieSampler(probe, SPACE, n_candidates=12, n_finalists=4, seed=5, keep="smallest"), 4)
    assert [t.params["x"] for t in again.trials] == sorted(seen[:12])[:4]


def test_threads_share_a_batch():
    sampler = SmoothieSampler(lambda p: p["x"], SPACE, n_candidates=12, n_finalists=4, seed=5)
    alone = {
        t.params["x"]
        for t in study_of(SmoothieSampler(lambda p: p["x"], SPACE, n_candidates=12, n_finalists=4, seed=5), 8).trials
    }
    study = study_of(sampler, 8, n_jobs=4)
    assert len(study.trials) == 8 and {t.params["x"] for t in study.trials} == alone


def test_failed_probes_are_skipped_and_zeros_come_last():
    scores = iter([math.nan, 0.0, -5.0, math.inf, -7.0, math.nan])
    order = []

    def probe(params):
        order.append(params["x"])
        return next(scores)

    sampler = SmoothieSampler(probe, SPACE, n_candidates=6, n_finalists=3, seed=0)
    with pytest.warns(PlanishWarning, match="the candidate is skipped"):
        study = study_of(sampler, 3)
    assert [t.params["x"] for t in study.trials] == [order[2], order[4], order[1]]


def test_a_probe_that_never_works_is_refused():
    sampler = SmoothieSampler(lambda p: math.nan, SPACE, n_candidates=2, n_finalists=1, seed=1)
    with (
        pytest.warns(PlanishWarning),
        pytest.raises(ValueError, match="finite score to at least one candidate; got 'none among 2'"),
    ):
        study_of(sampler, 1)


def test_all_zero_scores_give_a_random_order():
    study = study_of(SmoothieSampler(lambda p: 0.0, SPACE, n_candidates=6, n_finalists=6, seed=2), 6)
    xs = [t.params["x"] for t in study.trials]
    assert len(set(xs)) == 6 and xs not in (sorted(xs), sorted(xs, reverse=True))


def test_a_finalist_whose_trial_failed_is_tried_once_more():
    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        if x == best:
            raise RuntimeError("this setting cannot be trained")
        return x

    make = {"n_candidates": 6, "n_finalists": 3, "seed": 0}
    best = study_of(SmoothieSampler(lambda p: p["x"], SPACE, **make), 1).trials[0].params["x"]
    study = study_of(SmoothieSampler(lambda p: p["x"], SPACE, **make), 4, objective, catch=(RuntimeError,))
    xs = [t.params["x"] for t in study.trials]
    assert xs[:2] == [best, best] and [t.state for t in study.trials[:2]] == [FAIL, FAIL]
    assert best not in xs[2:] and xs[2] > xs[3]


def test_a_small_space_is_used_up_and_drawn_again():
    space = {
        "a": optuna.distributions.CategoricalDistribution(("u", "v")),
        "b": optuna.distributions.IntDistribution(0, 1),
    }
    probes = []
    sampler = SmoothieSampler(lambda p: probes.append(p) or 1.0, space, seed=0)
    study = study_of(sampler, 4, lambda t: t.suggest_int("b", 0, 1) + len(t.suggest_categorical("a", ["u", "v"])))
    assert len(probes) == 4 and len({tuple(sorted(t.params.items())) for t in study.trials}) == 4


def test_another_sampler_goes_on_after_the_finalists():
    class Fixed(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, param_name, param_distribution):
            return 0.125

    probes = []
    sampler = SmoothieSampler(
        lambda p: probes.append(p) or p["x"], SPACE, n_candidates=5, n_finalists=2, then=Fixed(), seed=0
    )
    xs = [t.params["x"] for t in study_of(sampler, 5).trials]
    assert 0.125 not in xs[:2] and xs[2:] == [0.125] * 3 and len(probes) == 5


def test_asked_and_told():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=SmoothieSampler(lambda p: p["x"], SPACE, n_candidates=9, n_finalists=3, seed=0))
    trials = [study.ask(SPACE) for _ in range(3)]
    xs = [t.params["x"] for t in trials]
    assert xs == sorted(xs, reverse=True) and len(set(xs)) == 3
    for trial in trials:
        study.tell(trial, 1.0)
    assert all("smoothness" in t.user_attrs for t in study.trials)


def test_without_a_seed_workers_of_one_study_agree():
    def settings(name):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(study_name=name, sampler=SmoothieSampler(lambda p: p["x"], SPACE))
        study.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=2)
        return [t.params for t in study.trials]

    assert settings("one") == settings("one") != settings("another")
