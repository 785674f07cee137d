"""Bad input of private training, and its bookkeeping."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from planish.optim import audit_epsilon, calibrate_noise, privacy_spent


def test_bad_budgets():
    for call, sentence in (
        (lambda: calibrate_noise(0.0, 1e-5, 10), "calibrate_noise: `epsilon` must be a finite float > 0; got 0.0."),
        (lambda: calibrate_noise(-1, 1e-5, 10), "`epsilon` must be a finite float > 0; got -1"),
        (lambda: calibrate_noise(math.nan, 1e-5, 10), "`epsilon` must be a finite float > 0; got nan"),
        (lambda: calibrate_noise(1.0, 0.0, 10), "`delta` must be a float in (0, 1); got 0.0"),
        (lambda: calibrate_noise(1.0, 1e-5, 0), "`steps` must be an integer >= 1; got 0"),
        (lambda: calibrate_noise(1.0, 1e-5, 2.5), "`steps` must be an integer >= 1; got 2.5"),
        (lambda: calibrate_noise(1.0, 1e-5, 10, 0.0), "`sample_rate` must be a float in (0, 1]; got 0.0"),
        (lambda: calibrate_noise(1.0, 1e-5, 10, 1.5), "`sample_rate` must be a float in (0, 1]; got 1.5"),
        (lambda: calibrate_noise(1.0, 1e-5, 10, accountant="gdp"), "`accountant` must be 'exact', 'prv' or 'rdp'"),
        (lambda: calibrate_noise(1.0, 1e-5, 10, adjacency="x"), "`adjacency` must be 'add_remove' or 'replace'"),
        (
            lambda: calibrate_noise(1.0, 1e-5, 10, adjacency="replace", accountant="rdp"),
            "`adjacency` must be 'add_remove' where accountant='rdp'; got 'replace'",
        ),
        (lambda: privacy_spent([(-1.0, 0.1, 3)], 1e-5), "`history` must be noise multipliers >= 0; got -1.0"),
        (lambda: calibrate_noise(1.0, 1e-16, 10, 0.5), "`delta` must be large enough to be told from 0"),
        (lambda: audit_epsilon([0.0] * 19, [0.0] * 30, 1e-5), "`inside` must be a vector of at least 20 finite scores"),
        (lambda: audit_epsilon([0.0] * 30, [math.nan] * 30, 1e-5), "`outside` must be a vector of at least 20"),
        (lambda: audit_epsilon([0.0] * 30, [0.0] * 30, 2.0), "`delta` must be a float in (0, 1); got 2.0"),
        (lambda: audit_epsilon([0.0] * 30, [0.0] * 30, 0.1, confidence=1.0), "`confidence` must be a float in (0.5"),
        (lambda: audit_epsilon([0.0] * 30, [0.0] * 30, 0.1, tradeoff="x"), "`tradeoff` must be 'gaussian' or 'any'"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert sentence in str(caught.value)


def made(module=None, batch=10, n=40, loader=None, **settings):
    pytest.importorskip("opacus")
    from planish.optim import make_private_mngp

    module = nn.Linear(3, 2) if module is None else module
    data = TensorDataset(torch.randn(n, 3), torch.randint(2, (n,)))
    loader = DataLoader(data, batch) if loader is None else loader
    return make_private_mngp(module, torch.optim.SGD(module.parameters(), 0.1), loader, **settings)


BUDGET = {"target_epsilon": 1.0, "target_delta": 1e-3, "epochs": 2}


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(10, 3))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "`target_epsilon` must be given, or else `noise_multiplier`, not both; got None"),
        ({**BUDGET, "noise_multiplier": 1.0}, "`target_epsilon` must be given, or else `noise_multiplier`, not both"),
        ({**BUDGET, "target_epsilon": 0.0}, "`epsilon` must be a finite float > 0; got 0.0"),
        ({**BUDGET, "epochs": 0}, "`epochs` must be an integer >= 1; got 0"),
        ({**BUDGET, "epochs": None}, "`epochs` must be given with `target_epsilon`; got None"),
        ({**BUDGET, "target_delta": None}, "`target_delta` must be given with `target_epsilon`; got None"),
        ({**BUDGET, "poisson_sampling": False}, "`poisson_sampling` must be True, or the loader of one batch; got"),
        ({"noise_multiplier": 0.0}, "`noise_multiplier` must be a float > 0; got 0.0"),
        ({**BUDGET, "accountant": "gdp"}, "`accountant` must be 'exact', 'prv' or 'rdp'; got 'gdp'"),
        ({"noise_multiplier": 1.0, "accountant": "gdp"}, "`accountant` must be 'exact', 'prv' or 'rdp'; got 'gdp'"),
        ({"noise_multiplier": 1.0, "accountant": "rdp", "adjacency": "replace"}, "`adjacency` must be 'add_remove'"),
        ({"noise_multiplier": 1.0, "adjacency": "x"}, "`adjacency` must be 'add_remove' or 'replace'; got 'x'"),
        ({**BUDGET, "normalizer": "mean"}, "`normalizer` must be 'max1', 'clip', 'nsgd' or 'auto'; got 'mean'"),
        ({**BUDGET, "threshold": -1.0}, "`threshold` must be a finite float > 0; got -1.0"),
        (
            {**BUDGET, "module": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))},
            "`module` must be of layers that keep samples apart; got",
        ),
        ({**BUDGET, "loader": DataLoader(Endless(), 5)}, "`data_loader` must be over a data set that has a length"),
    ],
)
def test_bad_settings_leave_the_module_as_it_was(settings, sentence):
    module = settings.get("module", nn.Linear(3, 2))
    with pytest.raises(ValueError) as caught:
        made(**{**settings, "module": module})
    assert sentence in str(caught.value)
    assert not any(hasattr(p, "grad_sample") or hasattr(p, "summed_grad") for p in module.parameters())


def test_bad_settings_of_the_optimizer():
    pytest.importorskip("opacus")
    from planish.optim import MNGPOptimizer

    w = nn.Parameter(torch.zeros(2))
    plain = {"noise_multiplier": 1.0, "expected_batch_size": 2}
    for settings, sentence in (
        ({"noise_multiplier": -1.0}, "`noise_multiplier` must be a float >= 0; got -1.0"),
        ({"expected_batch_size": 0}, "`expected_batch_size` must be > 0; got 0"),
        ({"normalizer": "x"}, "`normalizer` must be"),
    ):
        with pytest.raises(ValueError) as caught:
            MNGPOptimizer(torch.optim.SGD([w], 0.1), **{**plain, **settings})
        assert sentence in str(caught.value)
    optimizer = MNGPOptimizer(torch.optim.SGD([w], 0.1), **plain)
    with pytest.raises(ValueError, match="`accountant` must be there: use make_private_mngp"):
        optimizer.get_epsilon(1e-5)
    w.grad_sample = [torch.zeros(1, 2), torch.zeros(1, 2)]
    with pytest.raises(ValueError, match="`grad_sample` must be of one backward pass"):
        optimizer.step()


def test_a_large_delta_warns_and_a_small_one_does_not():
    with pytest.warns(UserWarning, match="`target_delta` should be below 1 / 40 samples; got 0.0251"):
        made(**{**BUDGET, "target_delta": 0.0251})


def test_a_budget_is_spent_in_its_epochs_with_every_accountant():
    for accountant in ("exact", "rdp"):
        module, optimizer, loader = made(**BUDGET, accountant=accountant)
        for x, y in [batch for _ in range(2) for batch in loader]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
        assert 0.97 < optimizer.get_epsilon(1e-3) <= 1.0
    _, optimizer, loader = made(batch=40, **BUDGET, poisson_sampling=False, adjacency="replace")
    assert optimizer.noise_multiplier == pytest.approx(calibrate_noise(1.0, 1e-3, 2, adjacency="replace"))
    assert len(loader) == 1 and optimizer.expected_batch_size == 40


def test_the_same_generator_gives_the_same_noise():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        module, optimizer, loader = made(**BUDGET, generator=torch.Generator().manual_seed(5))
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)


def test_an_audit_of_what_tells_nothing_finds_nothing():
    random = np.random.default_rng(0)
    for tradeoff in ("gaussian", "any"):
        assert audit_epsilon(random.normal(size=500), random.normal(size=500), 1e-5, tradeoff=tradeoff) < 0.5
        assert audit_epsilon(random.normal(size=500) + 9, random.normal(size=500), 1e-5, tradeoff=tradeoff) > 3.5
