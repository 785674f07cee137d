"""The smooth calibration error equals its definition, and has the symmetries and gradients that follow from it."""

import itertools
import math

import numpy as np
import pytest
import torch

from benchmarks.calibration import cases, quadrature
from planish.metrics import SmoothECE, reflected, smooth_ece

CASES = list(cases(200))
Y, F = CASES[1][1:]


@pytest.mark.parametrize(("y", "f"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_equals_the_definition(y, f):
    s = smooth_ece(y, f)
    assert quadrature(y, f, s) == pytest.approx(s, abs=1e-6)  # it is the fixed point of the definition itself
    for fixed in (0.05, 1.0):
        assert smooth_ece(y, f, bandwidth=fixed) == pytest.approx(quadrature(y, f, fixed), abs=1e-6)


@pytest.mark.claim("smooth_ece", "equals the definition to 1e-6 on all cases, also at large errors")
def test_claim_exact(record_claim):
    record_claim(
        max(abs(quadrature(y, f, s) - s) for _, y, f in CASES for s in [smooth_ece(y, f)]), 1e-6, at_least=False
    )


def test_falls_with_the_bandwidth():
    errors = [smooth_ece(Y, F, bandwidth=s) for s in np.geomspace(1e-3, 1, 30)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(errors))


def test_smoothing_twice_is_smoothing_once_by_both():
    c = reflected.coefficients(reflected.host(reflected.deposit(torch.tensor(F), torch.tensor(Y))))[0]
    k = np.arange(len(c))
    once = c * np.exp(-((math.pi * 0.03 * k) ** 2) / 2)
    assert reflected.error(once, 0.04) == pytest.approx(reflected.error(c, 0.05), rel=1e-9)


def test_population_with_residuals_of_one_sign():
    f = (np.arange(200_000) + 0.5) / 200_000
    for bandwidth in ("auto", 0.01, 0.3):
        assert smooth_ece(f**1.3, f, bandwidth=bandwidth) == pytest.approx(1 / 2 - 1 / 2.3, abs=1e-8)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.95])
def test_constant_predictor(rate):
    y = np.arange(100) < round(100 * rate)
    assert smooth_ece(y, np.full(100, 0.2)) == pytest.approx(abs(rate - 0.2), abs=1e-9)


def test_ends_of_the_scale():
    assert smooth_ece([1, 1], [0, 0]) == 1
    assert smooth_ece([0, 1], [0, 1]) == 0
    assert smooth_ece([1], [0.25]) == pytest.approx(0.75)
    assert smooth_ece([1], torch.tensor([1.0])) == 0


def test_invariances():
    whole = smooth_ece(Y, F)
    order = np.random.default_rng(0).permutation(len(F))
    times = np.random.default_rng(0).integers(0, 4, len(F))
    assert smooth_ece(Y[order], F[order]) == pytest.approx(whole, abs=1e-12)
    assert smooth_ece(np.tile(Y, 3), np.tile(F, 3)) == pytest.approx(whole, abs=1e-12)
    assert smooth_ece(1 - Y, 1 - F) == pytest.approx(whole, abs=1e-12)
    assert smooth_ece(Y, F, sample_weight=times) == pytest.approx(
        smooth_ece(Y.repeat(times), F.repeat(times)), abs=1e-12
    )
    assert smooth_ece(Y, F, sample_weight=np.full(len(F), 1e-200)) == pytest.approx(whole, abs=1e-12)


def test_kinds_of_input_agree():
    y, f = torch.tensor(Y), torch.tensor(F)
    whole = smooth_ece(Y, F)
    for other in (smooth_ece(y, f), smooth_ece(y.bool(), f), smooth_ece(Y.astype(np.int8), F), smooth_ece([*Y], [*F])):
        assert float(other) == pytest.approx(whole, abs=1e-12)
    single = smooth_ece(Y, F.astype(np.float32))
    assert single == pytest.approx(whole, abs=1e-5) and single == pytest.approx(
        float(smooth_ece(y, f.float())), abs=1e-12
    )
    backwards = smooth_ece(Y[::-1], F[::-1])
    F.flags.writeable = False
    assert backwards == pytest.approx(whole, abs=1e-12) and smooth_ece(Y, F) == whole
    F.flags.writeable = True


def test_lipschitz_in_the_predictions():
    y = np.repeat([1.0, 0.0], 500)
    for gap in (1e-3, 1e-5):  # a binned error jumps from 0 to 1/2 here
        below = smooth_ece(y, np.repeat([0.5 - gap, 0.5 + gap], 500))
        above = smooth_ece(y, np.repeat([0.5 + gap, 0.5 - gap], 500))
        assert abs(below - above) <= 2 * gap * (1 + 0.8 / max(below, above))


def test_bounded_by_the_distance_to_calibration():
    """SmCE <= 2 dCE <= 4 smECE, the left side a linear program over 1-Lipschitz weights."""
    linprog = pytest.importorskip("scipy.optimize").linprog
    for _, outcomes, predictions in CASES:
        order = np.argsort(predictions)
        y, f = outcomes[order], predictions[order]
        step = np.diff(np.eye(len(f)), axis=0)
        limits = np.concatenate([step, -step]), np.tile(np.diff(f), 2)
        found = linprog(-(y - f) / len(f), *limits, bounds=(-1, 1))
        assert -found.fun <= 4 * smooth_ece(y, f) + 1e-9


@pytest.mark.parametrize("cells", [1 << 13, 1 << 16])
def test_small_errors_are_resolved(cells):
    random = np.random.default_rng(5)
    f = random.beta(0.3, 0.05, 200_000)
    y = random.random(200_000) < f
    assert smooth_ece(y, f, n_grid=cells) == pytest.approx(smooth_ece(y, f, n_grid=1 << 20), abs=1e-6)


@pytest.mark.parametrize("bandwidth", ["auto", 0.05])
def test_gradient(bandwidth):
    random = np.random.default_rng(2)
    f = torch.tensor(random.uniform(0.05, 0.95, 12), requires_grad=True)
    y = torch.tensor(random.random(12), requires_grad=True)
    w = torch.tensor(random.uniform(0.5, 2, 12), requires_grad=True)

    def error(f, y, w):
        return smooth_ece(y, f, sample_weight=w, bandwidth=bandwidth)

    assert torch.autograd.gradcheck(error, (f, y, w), eps=1e-7, atol=2e-5, rtol=1e-3)


def test_gradient_lowers_the_error():
    f = torch.tensor(F, requires_grad=True)
    smooth_ece(torch.tensor(Y), f).backward()
    with torch.no_grad():
        moved = (f - 2 * len(F) * 1e-3 * f.grad).clamp(0, 1)
    assert smooth_ece(Y, moved) < smooth_ece(Y, f).detach() - 1e-4


def test_stream_equals_one_call():
    weights = np.random.default_rng(3).random(len(F))
    whole = smooth_ece(Y, F, sample_weight=weights)
    parts = [SmoothECE() for _ in range(3)]
    for i, rows in enumerate(np.array_split(np.arange(len(F)), 7)):
        parts[i % 3].update(F[rows], Y[rows], weights[rows])
    parts[0].merge_state(parts[1:])
    assert float(parts[0].compute()) == pytest.approx(whole, abs=1e-12)


def test_batches_larger_than_a_chunk():
    n = 3 * reflected.CHUNK + 17
    random = np.random.default_rng(4)
    f = random.random(n)
    y = random.random(n) < f
    metric = SmoothECE()
    for part in np.array_split(np.arange(n), 11):
        metric.update(torch.tensor(f[part]), torch.tensor(y[part]))
    assert float(metric.compute()) == pytest.approx(smooth_ece(y, f), abs=1e-12)
