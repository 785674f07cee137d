"""Private training: sensitivities, noise, and what they cost, to the digit where there is a closed form."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from planish.optim import calibrate_noise, privacy_spent
from planish.optim.noise import gaussian_delta, gaussian_epsilon
from planish.optim.per_sample import bound, factors
from planish.optim.privacy_loss import _loss, _where, compose

f64 = torch.float64
NORMALIZERS = [("max1", 1.0), ("max1", 0.3), ("clip", 1.0), ("clip", 4.0), ("nsgd", 0.5), ("auto", 1.0)]
each = pytest.mark.parametrize(("normalizer", "threshold"), NORMALIZERS)


def scaled(g, normalizer="max1", threshold=1.0):
    return g * factors(g.norm(dim=1), normalizer, threshold)[:, None]


def draw(n, p=7, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(n, 1, dtype=f64, generator=generator))
    return torch.randn(n, p, dtype=f64, generator=generator) * sizes


@each
def test_no_sample_is_longer_than_the_bound_and_directions_stay(normalizer, threshold):
    g = torch.cat([draw(500), draw(3) * 1e12, torch.zeros(1, 7, dtype=f64)])
    out = scaled(g, normalizer, threshold)
    limit = bound(normalizer, threshold)
    assert float(out.norm(dim=1).max()) <= limit * (1 + 1e-12)
    assert float(out.norm(dim=1).max()) >= 0.999 * limit  # and the bound is reached
    assert torch.allclose(out * g.norm(dim=1, keepdim=True), g * out.norm(dim=1, keepdim=True))


def test_short_gradients_stay_as_they_are_and_max1_is_clipping_at_1():
    g = draw(500)
    short = g.norm(dim=1) <= 1
    assert 0 < int(short.sum()) < 500
    assert torch.equal(scaled(g)[short], g[short])
    assert torch.allclose(scaled(g), scaled(g, "clip", 1.0), rtol=1e-14)
    assert torch.allclose(scaled(g, "max1", 0.3) * 0.3, scaled(g, "clip", 0.3), rtol=1e-14)


def worst(total):
    """Return by how much adversarial samples move a sum, added and replaced."""
    g = draw(40)
    added = replaced = 0.0
    for size in (0.1, 1.0, 1e3, 1e9):
        for v in draw(20, spread=0.0, seed=1):
            v = size * v / v.norm()  # noqa: PLW2901
            with_v, with_other = total(torch.cat([g, v[None]])), total(torch.cat([g, -v[None]]))
            added = max(added, float((with_v - total(g)).norm()))
            replaced = max(replaced, float((with_v - with_other).norm()))
    return added, replaced


def test_a_sample_moves_the_sum_by_one_and_a_replaced_one_by_two():
    added, replaced = worst(lambda g: scaled(g).sum(0))
    assert added == pytest.approx(1.0, abs=1e-9) and replaced == pytest.approx(2.0, abs=1e-9)


def test_normalizing_the_mean_instead_has_no_such_bound():
    def wrong(g):
        mean = g.mean(0)
        return mean / mean.norm().clamp(min=1.0) * len(g)

    added, replaced = worst(wrong)
    assert added > 2 and replaced > 10


# the exact formula, solved again by other means: mpmath at 40 digits
@pytest.mark.parametrize("adjacency", ["add_remove", "replace"])
@pytest.mark.parametrize(
    ("epsilon", "delta", "steps"), [(0.5, 1e-5, 50), (1.0, 1e-5, 50), (4.0, 1e-9, 7), (20.0, 0.01, 1)]
)
def test_full_batches_take_exactly_the_noise_of_the_formula(epsilon, delta, steps, adjacency):
    mpmath = pytest.importorskip("mpmath")
    z = calibrate_noise(epsilon, delta, steps, adjacency=adjacency)
    with mpmath.workdps(40):

        def spent(mu):
            near, far = mpmath.ncdf(mu / 2 - epsilon / mu), mpmath.ncdf(-mu / 2 - epsilon / mu)
            return mpmath.log(near - mpmath.exp(epsilon) * far) - mpmath.log(delta)

        guess = mpmath.mpf((1 if adjacency == "add_remove" else 2) * math.sqrt(steps) / z)
        mu = mpmath.findroot(spent, (guess * 0.9, guess * 1.1), solver="anderson", tol=1e-20)
        exact = (1 if adjacency == "add_remove" else 2) * mpmath.sqrt(steps) / mu
    assert z == pytest.approx(float(exact), rel=1e-6)
    assert privacy_spent([(z, 1.0, steps)], delta, adjacency=adjacency) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize("pair", ["remove", "replace"])
@pytest.mark.parametrize("q", [1.0, 0.5, 0.01])
def test_the_loss_and_its_inverse(pair, q):
    x = torch.linspace(-3, 5, 41, dtype=f64)
    loss = _loss(x, 0.8, q, pair)
    assert bool((loss.diff() > 0).all())
    back = _loss(_where(loss, 0.8, q, pair), 0.8, q, pair)
    assert torch.allclose(back, loss, rtol=1e-9, atol=1e-12)


def divergence(z, q, pair, epsilon):
    """Integrate max(0, P - e^epsilon Q) for one step on a fine grid of x."""
    x = torch.linspace(-14 * z - 1, 14 * z + 1, 2_000_001, dtype=f64)

    def normal(m):
        return torch.exp(-0.5 * ((x - m) / z) ** 2) / (z * math.sqrt(2 * math.pi))

    mixture = (1 - q) * normal(0.0) + q * normal(1.0)
    other = (1 - q) * normal(0.0) + q * normal(-1.0) if pair == "replace" else normal(0.0)
    P, Q = (other, mixture) if pair == "add" else (mixture, other)
    return float(torch.trapezoid((P - math.exp(epsilon) * Q).clamp(min=0), x))


@pytest.mark.parametrize("pair", ["remove", "add", "replace"])
@pytest.mark.parametrize(("z", "q", "epsilon"), [(0.8, 0.2, 0.3), (2.0, 1.0, 0.5), (0.6, 0.01, 0.1)])
def test_one_step_is_bounded_from_above_and_tightly(pair, z, q, epsilon):
    true = divergence(z, q, pair, epsilon)
    found = compose([(z, q, 1)], pair, 1e-6).delta(epsilon)
    assert true - 1e-12 <= found <= 1.01 * true + 2e-9


@pytest.mark.parametrize("steps", [1, 50, 3000])
def test_composition_on_the_grid_is_the_gaussian_one(steps):
    z = 2.0 * math.sqrt(steps)
    for pair, mu in (("remove", 0.5), ("add", 0.5), ("replace", 1.0)):
        true = gaussian_delta(mu, 1.0)
        assert true <= compose([(z, 1.0, steps)], pair, 1e-6).delta(1.0) <= 1.005 * true


def test_replacing_one_lies_between_adding_one_and_both_in_turn():
    # q = 1: exactly twice the noise. q < 1: at most what group privacy gives.
    assert calibrate_noise(1.0, 1e-5, 9, adjacency="replace") == pytest.approx(2 * calibrate_noise(1.0, 1e-5, 9))
    one = calibrate_noise(1.0, 1e-5, 500, 0.02)
    other = calibrate_noise(1.0, 1e-5, 500, 0.02, adjacency="replace")
    twice = calibrate_noise(0.5, 1e-5 / (1 + math.e**0.5), 500, 0.02)
    assert one < other < twice


def test_opposite_samples_are_the_worst_replacement():
    # contributions u and u' of any lengths and angle, against the pair that is claimed to be the worst
    generator = torch.Generator().manual_seed(0)
    z, q, epsilon = 0.9, 0.4, 0.2
    axis = torch.linspace(-8, 8, 401, dtype=f64)
    x = torch.cartesian_prod(axis, axis)
    area = float(axis[1] - axis[0]) ** 2

    def normal(m):
        return torch.exp(-0.5 * ((x - m) / z).square().sum(1)) / (2 * math.pi * z * z)

    def between(u, v):
        base = (1 - q) * normal(torch.zeros(2, dtype=f64))
        gap = base + q * normal(u) - math.exp(epsilon) * (base + q * normal(v))
        return float(gap.clamp(min=0).sum()) * area

    claimed = divergence(z, q, "replace", epsilon)
    east = torch.tensor([1.0, 0.0], dtype=f64)
    assert between(east, -east) == pytest.approx(claimed, rel=1e-4)
    for _ in range(12):
        u, v = torch.randn(2, 2, dtype=f64, generator=generator)
        assert between(u / u.norm().clamp(min=1), v / v.norm().clamp(min=1)) <= claimed * (1 + 1e-4)


def test_noise_grows_with_steps_and_rate_and_falls_with_the_budget():
    z = [calibrate_noise(1.0, 1e-5, steps, 0.05) for steps in (20, 80, 320)]
    assert z == sorted(z)
    z = [calibrate_noise(1.0, 1e-5, 100, q) for q in (0.001, 0.05, 0.5, 0.999, 1.0)]
    assert z == sorted(z)
    z = [calibrate_noise(e, 1e-5, 100, 0.05) for e in (8.0, 2.0, 0.5)]
    assert z == sorted(z)


def test_two_runs_cost_what_one_long_run_costs_and_more_than_either():
    whole = privacy_spent([(1.2, 0.02, 300)], 1e-5)
    assert privacy_spent([(1.2, 0.02, 100), (1.2, 0.02, 200)], 1e-5) == pytest.approx(whole, rel=2e-3)
    mixed = privacy_spent([(1.2, 0.02, 300), (9.0, 1.0, 5)], 1e-5)
    alone = gaussian_epsilon(math.sqrt(5) / 9, 1e-5)
    assert max(whole, alone) < mixed < whole + alone
    assert privacy_spent([], 1e-5) == 0 and privacy_spent([(0.0, 0.1, 1)], 1e-5) == math.inf


def problem(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=f64))
    return model, TensorDataset(torch.randn(n, 4, dtype=f64, generator=generator) * 5, torch.arange(n) % 3)


def private(model, data, batch, generator=None, **settings):
    pytest.importorskip("opacus")
    from planish.optim import make_private_mngp

    sgd = torch.optim.SGD(model.parameters(), 0.5)
    settings = {"noise_multiplier": 1e-9, **settings}
    return make_private_mngp(model, sgd, DataLoader(data, batch), generator=generator, **settings)


def backward(model, optimizer, batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()


@each
def test_the_step_is_that_of_a_loop_over_samples_in_any_order(normalizer, threshold):
    model, data = problem()
    plain = copy.deepcopy(model)
    wrapped, optimizer, _ = private(
        model, data, 12, generator=torch.Generator().manual_seed(0), normalizer=normalizer, threshold=threshold
    )
    optimizer.noise_multiplier = 0.0
    rows = []
    for x, y in data:
        plain.zero_grad()
        nn.functional.cross_entropy(plain(x[None]), y[None]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in plain.parameters()]))
    g = torch.stack(rows)
    want = torch.cat([p.detach().flatten() for p in plain.parameters()]) - 0.5 * scaled(g, normalizer, threshold).mean(
        0
    )
    shuffled = torch.randperm(12)
    backward(wrapped, optimizer, data[shuffled])
    optimizer.step()
    assert torch.allclose(torch.cat([p.detach().flatten() for p in model.parameters()]), want, rtol=1e-10)


def test_it_is_opacus_flat_clipping_at_1():
    opacus = pytest.importorskip("opacus")
    model, data = problem()
    other = copy.deepcopy(model)
    wrapped, optimizer, _ = private(model, data, 12)
    optimizer.noise_multiplier = 0.0
    theirs = opacus.GradSampleModule(other)
    sgd = torch.optim.SGD(other.parameters(), 0.5)
    flat = opacus.optimizers.DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=12)
    backward(wrapped, optimizer, data[:])
    backward(theirs, flat, data[:])
    optimizer.step()
    flat.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-9)


def test_noise_has_the_stated_deviation_whatever_the_batch_and_the_divisor_is_expected():
    pytest.importorskip("opacus")
    from planish.optim import MNGPOptimizer

    n, z = 100_000, 2.5
    for samples in (0, 1, 9):
        w = nn.Parameter(torch.zeros(n, dtype=f64))
        optimizer = MNGPOptimizer(
            torch.optim.SGD([w], 1.0), noise_multiplier=z, expected_batch_size=4,
            generator=torch.Generator().manual_seed(samples),
        )  # fmt: skip
        w.grad_sample = torch.ones(samples, n, dtype=f64)
        optimizer.step()
        noise = -4 * w.detach() - samples / math.sqrt(n)
        chi = float(noise.square().sum()) / z**2
        assert abs(chi - n) < 4 * math.sqrt(2 * n)
        assert abs(float(noise.mean())) < 4 * z / math.sqrt(n)


def test_a_sample_that_is_not_finite_counts_as_nothing_and_is_counted():
    pytest.importorskip("opacus")
    from planish.optim import MNGPOptimizer

    w, v = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))  # a number has a norm, too
    optimizer = MNGPOptimizer(torch.optim.SGD([w, v], 1.0), noise_multiplier=0.0, expected_batch_size=1)
    w.grad_sample = torch.tensor([[0.3, 0.4], [math.nan, 1.0], [1.0, 1.0], [3e30, 4e30]])
    v.grad_sample = torch.tensor([0.0, 1.0, math.inf, 0.0])
    optimizer.step()
    assert optimizer.nonfinite_samples == 2
    assert torch.allclose(w.detach(), -torch.tensor([0.9, 1.2])) and float(v.detach()) == 0.0


def test_resumed_from_its_state_it_goes_on_and_knows_what_was_spent():
    model, data = problem(40)
    wrapped, optimizer, loader = private(model, data, 10, noise_multiplier=1.5)
    for batch in loader:
        backward(wrapped, optimizer, batch)
        optimizer.step()
    spent = optimizer.get_epsilon(1e-3)
    assert spent == pytest.approx(privacy_spent([(1.5, 0.25, 4)], 1e-3))
    fresh, _ = problem(40)
    again = private(fresh, data, 10, noise_multiplier=1.5)[1]
    assert again.get_epsilon(1e-3) == 0
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.get_epsilon(1e-3) == spent
    with pytest.raises(ValueError, match="with what was spent"):
        again.load_state_dict(torch.optim.SGD(fresh.parameters(), 0.5).state_dict())


def test_large_batches_split_by_opacus_are_one_step():
    pytest.importorskip("opacus")
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    model, data = problem(40)
    wrapped, optimizer, loader = private(model, data, 20, noise_multiplier=1.5)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=7, optimizer=optimizer) as small:
        for batch in small:
            backward(wrapped, optimizer, batch)
            optimizer.step()
    assert len(optimizer.accountant) == 2


def test_empty_batches_are_noise_alone():
    model, data = problem(30)
    before = [p.detach().clone() for p in model.parameters()]
    wrapped, optimizer, _ = private(model, data, 5, noise_multiplier=1.5)
    backward(wrapped, optimizer, data[:2])
    optimizer.zero_grad()
    (wrapped(data[:0][0]).sum() * 0).backward()
    optimizer.step()
    assert all(
        not torch.equal(p, q) and bool(p.isfinite().all()) for p, q in zip(model.parameters(), before, strict=True)
    )


def test_the_classifier_takes_the_optimizers_steps():
    pytest.importorskip("sklearn")
    from planish.optim import MNGPClassifier

    random = np.random.default_rng(0)
    X, y = random.normal(size=(60, 4)) * 4, random.integers(0, 3, 60)
    fitted = MNGPClassifier(epsilon=1e9, delta=1e-3, n_steps=5, learning_rate=0.7, random_state=0).fit(X, y)
    assert fitted.noise_multiplier_ == 0.05
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(y))
    wrapped, optimizer, _ = private(model, data, 60)
    optimizer.noise_multiplier = 0.0
    for _ in range(5):
        backward(wrapped, optimizer, data[:])
        for group in optimizer.param_groups:
            group["lr"] = 0.7
        optimizer.step()
    # 5 steps of noise 0.05 / 60 each
    assert np.abs(fitted.coef_ - model.weight.detach().numpy()).max() < 0.7 * 0.05 / 60 * math.sqrt(5) * 5
    assert np.abs(fitted.intercept_ - model.bias.detach().numpy()).max() < 0.7 * 0.05 / 60 * math.sqrt(5) * 5
