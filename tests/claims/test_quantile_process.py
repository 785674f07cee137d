"""The claims of the quantile process in miniature: few crossings, and levels drawn anew, each beside its baseline."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.quantiles_cases import LEVELS, laws
from planish.regression import QuantileProcessRegressor

LAW = next(law for law in laws() if law.name == "wave, sine")
SMALL = {"hidden_layer_sizes": (48, 48, 48), "n_members": 1, "max_iter": 250, "n_iter_no_change": 100,
         "learning_rate_init": 3e-3, "random_state": 0}  # fmt: skip


def fitted(seed, **settings):
    X, y = LAW.draw(384, np.random.default_rng(seed))
    return QuantileProcessRegressor(**SMALL, **settings).fit(X, y)


GRID = np.linspace(0, 1, 401)[:, None]


@pytest.mark.claim("quantile_process", "pairs of levels that cross with the penalty, of those that cross without")
def test_the_penalty_keeps_curves_apart(record_claim):
    paper = {"resample_levels": False, "average": 0.0}
    with_penalty = np.mean([fitted(s, **paper).crossing_rate(GRID) for s in range(2)])
    without = np.mean([fitted(s, monotone="none", **paper).crossing_rate(GRID) for s in range(2)])
    assert without > 0.002, "nothing to keep apart"
    assert with_penalty < 0.001
    record_claim(float(with_penalty / without), 0.1, "of those without", at_least=False)


@pytest.mark.claim("quantile_process", "squared distance from the true quantiles, levels drawn anew against once")
def test_levels_drawn_anew(record_claim):
    truth = LAW.quantiles(GRID)
    error = {
        anew: np.mean([((fitted(s, resample_levels=anew).predict(GRID, LEVELS) - truth) ** 2).mean() for s in range(2)])
        for anew in (True, False)
    }
    record_claim(float(error[True] / error[False]), 0.75, "of that drawn once", at_least=False)
