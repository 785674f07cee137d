"""CacheQuant's claims on a small trained transformer: the schedule, the corrections, cache and bits together."""

import copy
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
from planish.diffusion import (
    apply_cache,
    digits_dit,
    fit_cache,
    multiply_adds,
    remove_cache,
    sample,
    schedule_cost,
    train_denoiser,
    uniform_schedule,
)
from planish.diffusion.cache_fitting import Watched, observe
from planish.diffusion.cache_hooks import find_cut
from planish.diffusion.cache_session import Session
from planish.quant import Affine, quantize, rtn

STEPS, N = 40, 5


@pytest.fixture(scope="module")
def model():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    net = digits_dit(layers=4, heads=2, head_dim=16, classes=10)
    train_denoiser(net, images, torch.tensor(bunch.target), steps=250, batch_size=64, lr=3e-3)
    return net.requires_grad_(False)


def draw(net, n=32, seed=0):
    return sample(net, torch.arange(n) % 10, steps=STEPS, seed=seed)


def drawn(net, plan):
    apply_cache(net, plan)
    pictures = draw(net)
    remove_cache(net)
    return pictures


def psnr(a, b):
    return 10 * math.log10(4 / float((a.clamp(-1, 1) - b.clamp(-1, 1)).double().square().mean()))


@pytest.fixture(scope="module")
def plans(model):
    uniform = fit_cache(model, lambda: draw(model, seed=1), N, schedule="uniform", correction=None, extrapolate=False)
    best = fit_cache(model, lambda: draw(model, seed=1), N)
    return {"uniform": uniform, "dps": replace(best, corrections=(), extrapolate=False), "ours": best}


@pytest.mark.slow
@pytest.mark.claim("cachequant", "the schedule found is never worse than the uniform one by its own objective: ratio")
def test_the_schedule_is_never_worse_than_uniform(model, record_claim):
    ratios = []
    for interval in (2, 3, 5, 8, 10, 20):
        watched = Watched(2 * interval)
        observe(model, lambda: draw(model, 8, seed=1), find_cut(model), Session(watch=watched.feature), watched)
        table = watched.distances[0].matrix()
        from planish.diffusion import dps_schedule

        found = schedule_cost(table, dps_schedule(table, interval))
        ratios.append(found / schedule_cost(table, uniform_schedule(STEPS, interval)))
    record_claim(max(ratios), 1.0, at_least=False)


@pytest.mark.slow
@pytest.mark.claim("cachequant", "one call in five in full, carried on and corrected (ours): PSNR over a uniform cache")
def test_ours_is_better_than_uniform(model, plans, record_claim):
    plain = draw(model)
    gain = psnr(drawn(model, plans["ours"]), plain) - psnr(drawn(model, plans["uniform"]), plain)
    record_claim(gain, 1.4, "dB")


@pytest.mark.slow
@pytest.mark.claim("cachequant", "carried on and corrected (ours): PSNR over the schedule alone")
def test_carrying_on_is_better_still(model, plans, record_claim):
    plain = draw(model)
    gain = psnr(drawn(model, plans["ours"]), plain) - psnr(drawn(model, plans["dps"]), plain)
    record_claim(gain, 2.0, "dB")


@pytest.mark.slow
@pytest.mark.claim("cachequant", "cache and W4A8 together, corrected: error over the sum of both alone")
def test_together_they_err_less_than_their_sum(model, plans, record_claim):
    plain, small = draw(model), copy.deepcopy(model)
    method = replace(rtn(bits=4, group_size=None), act=Affine(8, group_size=None))
    quantize(small, [{"hidden_states": torch.randn(32, 1, 8, 8), "timestep": torch.full((32,), 500),
                      "class_labels": torch.arange(32) % 10}], method)  # fmt: skip
    plan = fit_cache(small, lambda: draw(small, seed=1), N, reference=model)

    def error(pictures):
        return float((pictures - plain).double().square().mean())

    together = error(drawn(small, plan))
    record_claim(together / (error(draw(small)) + error(drawn(model, plans["dps"]))), 1.0, at_least=False)


@pytest.mark.slow
@pytest.mark.claim("cachequant", "multiply-adds left at one call in five in full: share")
def test_work_that_is_left(model, plans, record_claim):
    full = multiply_adds(model, lambda: draw(model, 2))
    apply_cache(model, plans["dps"])
    left = multiply_adds(model, lambda: draw(model, 2))
    remove_cache(model)
    record_claim(left / full, 0.45, at_least=False)
