"""Laws of caching a denoiser's features: the optimal cut, the corrections, and what a cached call computes."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from planish.diffusion import StepDistances, dps_schedule, fold_correction, schedule_cost, steps_mask, uniform_schedule
from planish.diffusion.correction import ChannelMap, Moments

F64 = torch.float64


def distances(steps, seed, size=5):
    x = np.random.default_rng(seed).standard_normal((steps, size)).cumsum(0)
    return abs(x[:, None] - x[None]).sum(-1)


def lengths(schedule, steps):
    return np.diff([*schedule, steps])


def admissible(steps, groups, low, high):
    for cuts in itertools.combinations(range(1, steps), groups - 1):
        if all(low <= n <= high for n in lengths([0, *cuts], steps)):
            yield [0, *cuts]


@pytest.mark.parametrize("steps", range(1, 13))
def test_the_schedule_is_the_best_of_all(steps):
    for interval in range(1, 6):
        table, low = distances(steps, steps), -(-interval // 2)
        groups = -(-steps // interval)
        if groups * low > steps:
            with pytest.raises(ValueError, match=r"dps_schedule: 1 group of \d to \d+ steps cannot make up \d"):
                dps_schedule(table, interval)
            continue
        best = min(schedule_cost(table, s) for s in admissible(steps, groups, low, 2 * interval))
        found = dps_schedule(table, interval)
        assert schedule_cost(table, found) == pytest.approx(best, rel=1e-12)
        uniform = uniform_schedule(steps, interval)
        if lengths(uniform, steps).min() >= low:
            assert schedule_cost(table, found) <= schedule_cost(table, uniform) + 1e-12


@pytest.mark.parametrize(
    ("steps", "interval"), [(40, 5), (41, 5), (44, 5), (7, 5), (100, 20), (50, 1), (13, 4), (9, 9)]
)
def test_groups_start_at_the_first_step_and_keep_their_bounds(steps, interval):
    found = dps_schedule(distances(steps, 1), interval)
    sizes = lengths(found, steps)
    assert found[0] == 0 and sizes.sum() == steps and len(found) == -(-steps // interval)
    assert sizes.min() >= -(-interval // 2) and sizes.max() <= 2 * interval
    assert sum(steps_mask(found, steps)) == len(found)


@pytest.mark.parametrize(("steps", "groups"), [(12, 3), (20, 4), (15, 5)])
def test_features_on_a_line_are_cut_in_equal_parts(steps, groups):
    t = np.arange(steps, dtype=float)
    found = dps_schedule(abs(t - t[:, None]), n_groups=groups, min_len=1, max_len=steps)
    assert set(lengths(found, steps)) == {steps // groups}


def test_distances_as_they_come_are_those_of_features_kept():
    features = torch.randn(12, 3, 4, dtype=F64).cumsum(0)
    seen = StepDistances(5)
    for x in features:
        seen.add(x)
    whole = (features[:, None] - features).abs().sum((-2, -1)).numpy()
    known = np.isfinite(seen.matrix())
    back = np.subtract.outer(np.arange(12), np.arange(12)).T
    assert (known == ((back >= 0) & (back < 5))).all()
    np.testing.assert_allclose(seen.matrix()[known], whole[known], rtol=1e-12)
    assert dps_schedule(seen.matrix(), 2, max_len=5) == dps_schedule(whole, 2, max_len=5)


def pairs(correlation=0.8, samples=12):
    x = torch.randn(samples, 7, 3, dtype=F64) * torch.tensor([1.0, 5.0, 0.1])
    return x, correlation * x + 0.4 * torch.randn_like(x) + torch.tensor([0.0, 3.0, -1.0])


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_fit_is_never_worse_than_none_where_it_was_fitted(axis):
    x, y = pairs()
    if axis == 1:
        x, y = x.movedim(-1, 1), y.movedim(-1, 1)
    sums = Moments()
    sums.add(x, y, axis=axis)
    fit = sums.fit()
    other = [i for i in range(3) if i != axis % 3]
    measured = (y - fit(x, None, axis=axis)).square().mean(other)
    torch.testing.assert_close(sums.error(fit), measured)
    torch.testing.assert_close(sums.error(), (y - x).square().mean(other))
    assert (sums.error(fit) <= sums.error() + 1e-12).all() and 0 < fit.kept <= 1


def test_an_affine_relation_is_found_exactly():
    x = torch.randn(6, 5, 3, dtype=F64)
    scale, shift = torch.tensor([2.0, -0.5, 1.0], dtype=F64), torch.tensor([0.0, 1.0, -3.0], dtype=F64)
    sums = Moments(3)
    sums.add(x[:2], scale * x[:2] + shift, axis=-1)
    sums.add(x[2:], scale * x[2:] + shift, axis=-1)
    fit = sums.fit()
    torch.testing.assert_close(fit.scale, scale)
    torch.testing.assert_close(fit.shift, shift)
    assert fit.kept == pytest.approx(1) and sums.error(fit).max() < 1e-12


def test_a_feature_that_goes_on_as_it_went_is_found_exactly():
    before, x = torch.randn(2, 6, 5, 3, dtype=F64)
    sums = Moments()
    sums.add(x, x + 0.7 * (x - before) + 2, x - before, axis=-1)
    fit = sums.fit()
    torch.testing.assert_close(fit.slope, torch.full((3,), 0.7, dtype=F64))
    torch.testing.assert_close(fit.scale, torch.ones(3, dtype=F64))


def test_noise_alone_is_shrunk_to_the_identity():
    x = torch.randn(4, 3, 50, dtype=F64)
    sums = Moments()
    sums.add(x, x + torch.randn_like(x), axis=-1)
    assert sums.fit().kept < 0.1
    same = Moments()
    same.add(x, x, axis=-1)
    fit = same.fit()
    torch.testing.assert_close(fit.scale, torch.ones(50, dtype=F64))
    assert fit.shift.abs().max() < 1e-12


def test_the_share_that_is_kept_is_the_best_on_the_parts_left_out():
    x, y = pairs(0.9, 8)
    sums = Moments()
    sums.add(x, y, axis=-1)
    halves = [Moments(), Moments()]
    for i, half in enumerate(halves):
        half.add(x[i::2], y[i::2], axis=-1)

    def left_out(kept):
        error = 0.0
        for fitted, judged in (halves, halves[::-1]):
            full = fitted.sums.sum(0)
            mean, mean_y = full[:, 0, 1] / full[:, 0, 0], full[:, 0, 3] / full[:, 0, 0]
            scale = (full[:, 1, 3] / full[:, 0, 0] - mean * mean_y) / (full[:, 1, 1] / full[:, 0, 0] - mean**2)
            shift = mean_y - scale * mean
            shrunk = ChannelMap(1 + kept * (scale - 1), 0 * scale, kept * shift)
            error += float((judged.error(shrunk) * judged.sums.sum(0)[:, 0, 0]).sum())
        return error

    best = sums.fit().kept
    assert all(left_out(best) <= left_out(k) + 1e-9 for k in (0.0, 0.5, 1.0, min(best + 0.05, 1), best - 0.05))


def test_matched_variance_keeps_mean_and_spread():
    x, y = pairs(0.3, 400)
    sums = Moments()
    sums.add(x, y, axis=-1)
    full = ChannelMap(*[v.double() for v in _unshrunk(sums, "variance")])
    z = full(x, None, axis=-1)
    torch.testing.assert_close(z.mean((0, 1)), y.mean((0, 1)))
    torch.testing.assert_close(z.var((0, 1)), y.var((0, 1)))
    narrow = ChannelMap(*[v.double() for v in _unshrunk(sums, "least_squares")])(x, None, axis=-1)
    assert (narrow.var((0, 1)) < y.var((0, 1))).all()


def _unshrunk(sums, match):
    fit = sums.fit(match)
    return 1 + (fit.scale - 1) / fit.kept, fit.slope / fit.kept, fit.shift / fit.kept


@pytest.mark.parametrize("match", ["least_squares", "variance"])
def test_a_channel_that_does_not_vary_is_only_shifted(match):
    x = torch.full((4, 3, 2), 3.0, dtype=F64)
    sums = Moments()
    sums.add(x, x + 1, axis=-1)
    fit = sums.fit(match)
    assert fit.scale.tolist() == [1, 1] and fit.shift.tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Conv2d(6, 4, 3)])
@pytest.mark.parametrize("part", [None, slice(0, 2)])
def test_a_correction_folded_into_a_layer_is_one_applied_outside(layer, part):
    layer = layer.double()
    x = torch.randn(5, 6, dtype=F64) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 5, 5, dtype=F64)
    view = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
    scale, shift = torch.rand(4, dtype=F64) + 0.5, torch.randn(4, dtype=F64)
    with torch.no_grad():
        before = layer(x)
        if part is None:
            wanted = before * scale.view(view) + shift.view(view)
        else:  # the bias is scaled in neither half: no (1 - a2) bias is left over
            cached = torch.zeros_like(x)
            cached[:, part] = x[:, part]
            own = layer(cached) - layer(torch.zeros_like(x))
            wanted = before + own * (scale.view(view) - 1) + shift.view(view)
        fold_correction(layer, scale, shift, channels=part)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
