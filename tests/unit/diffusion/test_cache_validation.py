"""What a cache does with a feature beside keeping it, and whether that is kept: on tiny random denoisers."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from planish._support import PlanishWarning
from planish.diffusion.correction import ChannelMap

diffusers = pytest.importorskip("diffusers")
from planish.diffusion import (  # noqa: E402
    apply_cache,
    fit_cache,
    remove_cache,
)

nets = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "cached_nets.py")))
dit = nets.dit
unet = nets.unet
call = nets.call
draw = nets.draw


def test_features_that_go_on_in_a_line_are_carried_on():
    model = dit()
    plain = draw(model)
    errors = []
    for extrapolate in (False, True):
        plan = fit_cache(model, lambda: draw(model), 2, correction=None, extrapolate=extrapolate, schedule="uniform")
        apply_cache(model, plan)
        errors.append(float((draw(model) - plain).norm()))
        remove_cache(model)
    assert errors[1] < 0.9 * errors[0]


def jumping(model, size=3.0):
    """Give a model features that jump in the middle of a run, with noise of every step's own on them."""

    def add(_module, _args, kwargs, out):
        t = float(kwargs["timestep"][0])
        noise = torch.Generator().manual_seed(int(t))
        return (
            out
            + size * (t < 50) * torch.linspace(-1, 1, out.shape[-1])
            + 0.1 * torch.randn(out.shape[1:], generator=noise)
        )

    model.transformer_blocks[1].register_forward_hook(add, with_kwargs=True)
    return model


def test_what_would_go_astray_is_not_carried_on_unless_asked_for():
    plans, ends = {}, {}
    for validate in (True, False):
        model = jumping(dit())
        plain = draw(model, n=8, seed=3)
        plans[validate] = fit_cache(
            model, lambda m=model: draw(m, n=8), 5, schedule="uniform", correction=None, validate=validate
        )
        apply_cache(model, plans[validate])
        ends[validate] = float((draw(model, n=8, seed=3) - plain).norm())
    found = plans[True].made_for
    assert not plans[True].extrapolate and plans[False].extrapolate
    assert found["kept"] == "held still" and found["error carried on"] > found["error held still"]
    assert ends[True] < ends[False]


def test_what_ends_nearer_is_kept_and_the_callers_random_numbers_are_not_touched():
    model = dit()
    plan = fit_cache(model, lambda: draw(model, n=8), 2, schedule="uniform", correction=None)
    assert plan.extrapolate and plan.made_for["kept"] == "carried on"
    assert plan.made_for["error carried on"] < plan.made_for["error held still"]

    def unseeded():
        draw(model, n=8, seed=int(torch.randint(1000, ())))

    torch.manual_seed(0)
    same = fit_cache(model, unseeded, 2, schedule="uniform", correction=None)
    after = torch.rand(())
    torch.manual_seed(0)
    fit_cache(model, unseeded, 2, schedule="uniform", correction=None, extrapolate=False)
    assert same.extrapolate and torch.equal(after, torch.rand(()))  # torch's own numbers are given again
    other = torch.Generator().manual_seed(0)
    with pytest.warns(PlanishWarning, match="`run` draws other samples at every call"):
        left = fit_cache(model, lambda: draw(model, n=8, seed=int(torch.randint(1000, (), generator=other))), 2)
    assert not left.extrapolate and not left.corrections


def test_of_a_quantized_model_the_truth_is_where_the_float_one_ends():
    reference = dit()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.ff.net[2].weight.mul_(0.7)
    run = lambda: draw(model, n=8)  # noqa: E731
    wanted = draw(reference, n=8)
    plan = fit_cache(model, run, 5, reference=reference)
    held = fit_cache(model, run, 5, correction=None, extrapolate=False)
    apply_cache(model, held)
    error = float((draw(model, n=8) - wanted).square().mean())
    assert plan.made_for["error held still"] == pytest.approx(error, rel=0.5)
    assert "forward" not in model.__dict__ or remove_cache(model)


def test_corrections_that_do_harm_in_the_end_are_left_out(monkeypatch):
    from planish.diffusion import correction

    model, good = dit(), correction.Moments.fit

    def fit(**settings):
        return fit_cache(model, lambda: draw(model), 5, check=lambda: draw(model, seed=9), **settings)

    plan = fit(extrapolate=True)
    assert plan.corrections and plan.made_for["error corrected"] < plan.made_for["error uncorrected"]

    def wrong(self, match="least_squares"):
        found = good(self, match)
        ramp = torch.linspace(-30, 30, len(found.shift))
        return ChannelMap(found.scale, found.slope, found.shift + ramp, found.kept)

    monkeypatch.setattr(correction.Moments, "fit", wrong)
    plan = fit()
    assert not plan.corrections and plan.made_for["error corrected"] > plan.made_for["error uncorrected"]
    with pytest.raises(ValueError, match="`check` must be a function that returns the same samples every time"):
        fit_cache(model, lambda: draw(model), 5, check=lambda: draw(model, seed=int(torch.randint(1000, ()))))


def test_corrections_of_a_quantized_model_aim_at_the_float_one():
    model = unet()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, m in model.named_modules():
            if name == "up_blocks.1.resnets.2.conv_shortcut":
                m.weight.mul_(0.8)  # a quantizer that shrinks: undone by a scale alone
                m.bias.mul_(0.8)
    wanted, shrunk = draw(reference, "unet"), draw(model, "unet")
    plan = fit_cache(model, lambda: draw(model, "unet"), 1, reference=reference)
    assert set(plan.outputs) == {"up_blocks.1.resnets.2.conv_shortcut"}  # the other layers compute the same
    fit = plan.outputs["up_blocks.1.resnets.2.conv_shortcut"][3]
    torch.testing.assert_close(fit.scale, torch.full_like(fit.scale, 1.25), rtol=1e-4, atol=1e-4)
    apply_cache(model, plan)
    assert (draw(model, "unet") - wanted).norm() < 1e-3 * (shrunk - wanted).norm()
