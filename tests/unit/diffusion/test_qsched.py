"""Schedulers with coefficients, the search for them, and what they are mended by."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from planish._support import PlanishWarning
from planish.diffusion import JAQLoss, ReferenceLoss, measure_output_errors

diffusers = pytest.importorskip("diffusers")
import planish  # noqa: E402
from planish.diffusion import linear_coefficients, scheduler_class, tune_schedule, wrap_scheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers, at numpy 2 and torch

SHAPE = (2, 1, 4, 4)
STOCK = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
}


def output(x, t):
    return torch.sin(3 * x) * (1 + 0.1 * float(t) / 1000)


def run(scheduler, steps=4, dtype=torch.float32, seed=0):
    """Sample with a fixed function for a model; returns every state."""
    g = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=g).to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    states = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        noise = {"generator": g} if "generator" in planish_parameters(scheduler.step) else {}
        x = scheduler.step(output(scaled, t).to(dtype), t, x, **noise).prev_sample
        states.append(x)
    return states


def planish_parameters(function):
    import inspect

    return inspect.signature(function).parameters


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ones_are_the_stock_scheduler_bit_for_bit(name, dtype):
    stock = getattr(diffusers, name)(**STOCK[name])
    ours = wrap_scheduler(stock, [1.0] * 4, [1.0] * 4)
    assert isinstance(ours, type(stock)) and type(ours).__name__ == "QSched" + name
    for a, b in zip(run(stock, dtype=dtype), run(ours, dtype=dtype), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    for _ in range(2):  # the list of places begins anew
        assert torch.equal(run(ours, dtype=dtype)[-1], run(stock, dtype=dtype)[-1])


@pytest.mark.parametrize("name", STOCK)
def test_what_is_scaled_is_what_step_is_given(name):
    stock = getattr(diffusers, name)(**STOCK[name])
    ours = wrap_scheduler(stock, {"start": 0.9, "end": 1.1}, {"start": 1.2, "end": 1.0})
    mine, theirs = copy.deepcopy(ours), copy.deepcopy(stock)
    mine.set_timesteps(4)
    theirs.set_timesteps(4)
    x, m = torch.randn(2, *SHAPE)
    x = x * getattr(stock, "init_noise_sigma", 1.0)
    for i, t in enumerate(mine.timesteps):  # the history of multistep solvers included
        c_x, c_e = linear_coefficients(0.9, 1.1, 4)[i], linear_coefficients(1.2, 1.0, 4)[i]
        for scheduler in (mine, theirs):
            if hasattr(scheduler, "is_scale_input_called"):
                scheduler.scale_model_input(x, t)
        noise = [{"generator": torch.Generator().manual_seed(i)} if "generator" in planish_parameters(s.step) else {}
                 for s in (mine, theirs)]  # fmt: skip
        a = mine.step(m, t, x, **noise[0]).prev_sample
        b = theirs.step(c_e * m, t, c_x * x, **noise[1]).prev_sample
        assert torch.equal(a, b)
        x, m = a, m.roll(1)


def test_ddim_with_a_constant_scales_its_step():
    stock = diffusers.DDIMScheduler(clip_sample=False)
    ours = wrap_scheduler(stock, [0.9] * 4, [0.9] * 4)
    x, m = torch.randn(2, *SHAPE, dtype=torch.float64)
    for s in (stock, ours):
        s.set_timesteps(4)
    t = ours.timesteps[1]
    torch.testing.assert_close(ours.step(m, t, x).prev_sample, 0.9 * stock.step(m, t, x).prev_sample)
    a, b = stock.alphas_cumprod[t].double(), stock.alphas_cumprod[t - 250].double()
    clean = (0.9 * x - (1 - a).sqrt() * 0.9 * m) / a.sqrt()
    torch.testing.assert_close(
        ours.step(m, t, x).prev_sample, b.sqrt() * clean + (1 - b).sqrt() * 0.9 * m, rtol=1e-4, atol=1e-5
    )


def test_one_step_of_flow_matching():
    ours = wrap_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), [0.8], [1.1])
    ours.set_timesteps(1)
    x, v = torch.randn(2, *SHAPE)
    sigma = ours.sigmas[0]
    given = ours.step(v, ours.timesteps[0], x).prev_sample
    torch.testing.assert_close(given, 0.8 * x - sigma * 1.1 * v)


def test_half_precision_is_multiplied_in_float():
    ours = wrap_scheduler(diffusers.DDIMScheduler(clip_sample=False), [1.001], [1.0])
    ours.set_timesteps(1)
    x = torch.full(SHAPE, 3.0, dtype=torch.float16)
    seen = ours.step(torch.zeros_like(x), ours.timesteps[0], x).prev_sample
    stock = diffusers.DDIMScheduler(clip_sample=False)
    stock.set_timesteps(1)
    scaled = (1.001 * x.float()).half()
    assert torch.equal(seen, stock.step(torch.zeros_like(x), stock.timesteps[0], scaled).prev_sample)


def test_a_shift_is_taken_from_the_output_first():
    stock = diffusers.DDIMScheduler(clip_sample=False)
    ours = wrap_scheduler(stock, None, [2.0], model_shift=[[0.5]])
    for s in (stock, ours):
        s.set_timesteps(1)
    x, m = torch.randn(2, *SHAPE)
    t = ours.timesteps[0]
    torch.testing.assert_close(ours.step(m, t, x).prev_sample, stock.step(2 * (m - 0.5), t, x).prev_sample)


@pytest.mark.parametrize("name", STOCK)
def test_it_saves_and_loads(name, tmp_path):
    ours = wrap_scheduler(getattr(diffusers, name)(**STOCK[name]), {"start": 0.9, "end": 1.0}, [1.1, 1.0, 1.0, 1.0])
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    assert dict(again.config)["sample_coeff"] == {"start": 0.9, "end": 1.0}
    for a, b in zip(run(ours), run(again), strict=True):
        assert torch.equal(a, b)
    other = type(ours).from_config(ours.config, sample_coeff=None, model_coeff=None)
    assert torch.equal(run(other)[-1], run(getattr(diffusers, name)(**STOCK[name]))[-1])


def test_a_stock_pipeline_loads_it(tmp_path):
    net = diffusers.UNet2DModel(8, 1, 1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                                block_out_channels=(8,), norm_num_groups=4)  # fmt: skip
    tuned = wrap_scheduler(diffusers.DDIMScheduler(clip_sample=False), [0.9, 1.0], [1.2, 1.0], num_steps=2)
    pipe = diffusers.DDPMPipeline(net, tuned)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path).components["scheduler"]
    assert type(loaded) is planish.QSchedDDIMScheduler
    assert (loaded.config.sample_coeff, loaded.config.model_coeff) == ([0.9, 1.0], [1.2, 1.0])
    for mine, theirs in zip(run(tuned, 2), run(loaded, 2), strict=True):
        assert torch.equal(mine, theirs)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["planish", "QSchedDDIMScheduler"]


def test_classes_are_found_by_name():
    kind = planish.QSchedLCMScheduler
    assert kind is scheduler_class(diffusers.LCMScheduler) and kind is scheduler_class(kind)
    assert planish.SchedulerMixin is diffusers.SchedulerMixin and planish.ModelMixin is diffusers.ModelMixin
    for name in ("QSchedNothing", "QSchedUNet2DModel"):
        with pytest.raises(AttributeError, match=name):
            getattr(planish, name)


def test_another_number_of_steps_is_refused():
    ours = wrap_scheduler(diffusers.DDIMScheduler(clip_sample=False), [0.9] * 4)
    ours.set_timesteps(4)
    with pytest.raises(ValueError, match=r"QSchedDDIMScheduler: `sample_coeff` must be a list of 8, one a step; got 4"):
        ours.set_timesteps(8)
    ends = wrap_scheduler(ours, {"start": 0.9, "end": 1.0}, num_steps=4)
    with pytest.raises(ValueError, match=r"the coefficients are for 4 steps; got 8. Tune again, or clear them."):
        ends.set_timesteps(8)
    free = wrap_scheduler(ours, {"start": 0.9, "end": 1.0})
    for steps in (4, 8, 2):
        free.set_timesteps(steps)
        assert len(free._coeff_values) == steps and free._coeff_values[0][0] == 0.9


def test_a_run_that_begins_later_takes_the_coefficients_of_its_place():
    ours = wrap_scheduler(diffusers.DDIMScheduler(clip_sample=False), [0.5, 0.6, 0.7, 0.8])
    stock = diffusers.DDIMScheduler(clip_sample=False)
    for s in (ours, stock):
        s.set_timesteps(4)
    x, m = torch.randn(2, *SHAPE)
    t = ours.timesteps[2]  # image to image
    torch.testing.assert_close(ours.step(m, t, x).prev_sample, stock.step(m, t, 0.7 * x).prev_sample)


def test_clipping_warns():
    with pytest.warns(PlanishWarning, match="`clip_sample` clips what the coefficients do"):
        wrap_scheduler(diffusers.DDIMScheduler(), [0.9])


def ddim(**coefficients):
    return wrap_scheduler(diffusers.DDIMScheduler(clip_sample=False), **coefficients)


def untimed():
    return ddim(sample_coeff=[0.9]).step(torch.zeros(SHAPE), 1, torch.zeros(SHAPE))


def at_no_timestep():
    ours = ddim(sample_coeff=[0.9])
    ours.set_timesteps(1)
    return ours.step(torch.zeros(SHAPE), 123, torch.zeros(SHAPE))


def draws(c_x, c_e):
    return torch.zeros(20)


@pytest.mark.refuses
@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (lambda: ddim(sample_coeff=[0.0]), "`sample_coeff` must be finite numbers above 0; got [0.0]."),
        (lambda: ddim(model_coeff=[float("nan")]), "`model_coeff` must be finite numbers above 0; got [nan]."),
        (lambda: ddim(model_coeff=[]), "`model_coeff` must be finite numbers above 0; got []."),
        (lambda: ddim(model_coeff={"start": 1.0}), "`model_coeff` must be a list, or {'start': ..., 'end': ...}"),
        (untimed, "QSchedDDIMScheduler: call `set_timesteps` before `step`."),
        (at_no_timestep, "QSchedDDIMScheduler: `timestep` must be one of [0.0]; got 123.0."),
        (lambda: tune_schedule(draws, 0, abs), "tune_schedule: `steps` must be at least 1; got 0."),
        (lambda: tune_schedule(draws, 1, abs, profile="x"), "`profile` must be 'linear' or 'constant'; got 'x'."),
        (lambda: tune_schedule(draws, 1, abs, coeff_range=(1, 1)), "`coeff_range` must be two numbers above 0 in"),
        (lambda: tune_schedule(draws, 1, abs, grid=1), "tune_schedule: `grid` must be at least 2; got 1."),
        (lambda: tune_schedule(draws, 1, abs, levels=-1), "tune_schedule: `levels` must be at least 0; got -1."),
        (lambda: tune_schedule(draws, 1, abs, held_out=1), "tune_schedule: `held_out` must be in (0, 1); got 1."),
        (lambda: tune_schedule(draws, 1, abs, base=[1, 1]), "`base` must be a list of 1 numbers above 0; got [1, 1]."),
        (lambda: tune_schedule(draws, 1, lambda x: x.sum()), "`score` must be a function that gives a finite number"),
        (lambda: tune_schedule(lambda *_: torch.zeros(1), 1, abs), "`sampler` must be a function that draws enough"),
        (lambda: JAQLoss(abs, abs, None, k=-1), "JAQLoss: `k` must be at least 0; got -1."),
        (
            lambda: JAQLoss(lambda x, p: x.sum(), abs, None)(torch.zeros(3, 2)),
            "JAQLoss: `alignment` must be a function that gives 3 scores; got ().",
        ),
        (lambda: ReferenceLoss(torch.zeros(2))(torch.zeros(3)), "ReferenceLoss: `images` must be of shape (2,)"),
        (
            lambda: measure_output_errors(nn.Identity(), nn.Identity(), lambda: None),
            "`run` must be a function that calls the model; got 'one that never did'.",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(mistake, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        mistake()


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DEISMultistepScheduler"]
)
def test_a_step_of_several_evaluations_is_refused(name):
    with pytest.raises(TypeError, match=f"whose step is one evaluation of the model; got {name}"):
        wrap_scheduler(getattr(diffusers, name)())


def test_quality_alone_and_alignment_alone():
    x = torch.randn(4, 1, 2, 2)
    align, quality = (lambda x, p: x.mean((1, 2, 3)) + p), (lambda x: x.amax((1, 2, 3)))
    assert torch.equal(JAQLoss(align, quality, 1.0, k=0)(x), align(x, 1.0))
    assert torch.equal(JAQLoss(align, quality, 1.0, k=float("inf"))(x), quality(x))
    torch.testing.assert_close(JAQLoss(align, quality, 1.0)(x), align(x, 1.0) + 2 * quality(x))
