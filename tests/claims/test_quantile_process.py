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
PAPER = {"resample_levels": False, "average": 0.0, "start": "random"}


@pytest.fixture(scope="module")
def runs():
    """Crossings and squared distance from the truth: ours, the paper's way, and that without its penalty."""
    truth, found = LAW.quantiles(GRID), {}
    for name, settings in (("ours", {}), ("paper", PAPER), ("without", {**PAPER, "monotone": "none"})):
        models = [fitted(seed, **settings) for seed in range(2)]
        away = np.mean([((model.predict(GRID, LEVELS) - truth) ** 2).mean() for model in models])
        found[name] = float(np.mean([model.crossing_rate(GRID) for model in models])), float(away)
    assert found["without"][0] > 0.005, "without the penalty nothing crosses: this shows nothing"
    return found


@pytest.mark.claim("quantile_process", "pairs of levels that cross with the paper's penalty, of those that do without")
def test_the_penalty_keeps_curves_apart(runs, record_claim):
    record_claim(runs["paper"][0] / runs["without"][0], 0.5, "of those without", at_least=False)


@pytest.mark.claim("quantile_process", "pairs of levels that cross, levels drawn anew and the penalty between samples")
def test_next_to_nothing_crosses(runs, record_claim):
    record_claim(runs["ours"][0], 0.001, "of all pairs", at_least=False)


@pytest.mark.claim(
    "quantile_process", "squared distance from the true quantiles, levels drawn anew, of that drawn once"
)
def test_levels_drawn_anew_are_better(runs, record_claim):
    record_claim(runs["ours"][1] / runs["paper"][1], 0.75, "of that drawn once", at_least=False)


def of_eight(name, n=256, **settings):
    """Return the mean distance from the true quantiles, and crossings, on fresh rows of eight features."""
    law = next(law for law in laws() if law.name == name)
    random = np.random.default_rng(0)
    X, y = law.draw(n, random)
    fresh = random.random((1000, 8))
    model = QuantileProcessRegressor(**{**SMALL, "max_iter": 120, "n_iter_no_change": 60} | settings).fit(X, y)
    return float(np.abs(model.predict(fresh, LEVELS) - law.quantiles(fresh)).mean()), model.crossing_rate(fresh)


@pytest.mark.claim("quantile_process", "distance from the true quantiles, eight features, of that from a random start")
def test_a_linear_start_keeps_noise_out(record_claim):
    found = [of_eight("single index of 8, t(3)", start=start)[0] for start in ("linear", "random")]
    record_claim(found[0] / found[1], 0.5, "of that from a random start", at_least=False)


@pytest.mark.claim("quantile_process", "pairs of levels that cross on fresh rows of eight features")
def test_next_to_nothing_crosses_off_the_rows(record_claim):
    assert of_eight("linear of 8, exp", monotone="none", start="random")[1] > 0.005, (
        "nothing crosses: this shows nothing"
    )
    record_claim(of_eight("linear of 8, exp")[1], 0.001, "of all pairs", at_least=False)
