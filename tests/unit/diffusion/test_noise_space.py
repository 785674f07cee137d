"""Walks between noises, inversion and editing: batches, forms of outputs; and the sentence of each refused argument."""

import re
from types import SimpleNamespace

import pytest
import torch

from planish.diffusion import (
    NullTextInversion,
    NullTextInverter,
    ddim_invert,
    ddim_sample,
    edit_by_prompt_switch,
    interpolate,
    istd,
    predict_x0,
    slerp,
)


class Schedule:
    def __init__(self, count=20, **config):
        self.config = {"num_train_timesteps": count, "prediction_type": "epsilon", **config}
        self.alphas_cumprod = torch.linspace(0.98, 0.05, count)
        self.timesteps = torch.arange(count).flip(0)

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(steps).flip(0) * (len(self.alphas_cumprod) // steps)


def told(z, t):
    return 0.3 * z


def test_bad_input_of_walks():
    a, b = torch.randn(2, 1, 4)
    with pytest.raises(ValueError, match="`b` must be no opposite of `a`"):
        slerp(a, -2 * a, 0.5)
    with pytest.raises(ValueError, match="`a and b` must be finite and not zero"):
        slerp(a, 0 * b, 0.5)
    with pytest.raises(ValueError, match=re.escape("`b` must be of the shape of `a`, (batch, ...)")):
        slerp(a, torch.randn(2, 4), 0.5)
    with pytest.raises(ValueError, match="`t` must be a number or a vector"):
        slerp(a, b, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="`num_frames` must be at least 2; got 1"):
        interpolate(torch.sin, a, b, num_frames=1)
    with pytest.raises(ValueError, match="`b` must be different from `a` in every pair"):
        interpolate(torch.sin, a, a)
    pairs = torch.randn(2, 3, 4)
    for changed, sentence in (
        ({"pairs": pairs[0]}, "`pairs` must be of shape (2, pairs, ...)"),
        ({"pairs": pairs[:1].expand(2, 3, 4)}, "`b` must be different from `a`"),
        ({"num_points": 2}, "`num_points` must be at least 3; got 2"),
        ({"data_range": 0}, "`data_range` must be > 0; got 0"),
        ({"pairs_per_call": 0}, "`pairs_per_call` must be at least 1; got 0"),
        ({"conditions": [1]}, "`conditions` must be one a pair (3); got 1"),
        ({"sample_fn": lambda z: z[:1]}, "`sample_fn` must be returning an image for each of 11 noises; got 1"),
        ({"sample_fn": lambda z: z / 0}, "`sample_fn` must be returning finite images"),
        ({"sample_fn": torch.zeros_like}, "`sample_fn` must be returning images that depend on the noise"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            istd(**{"sample_fn": torch.sin, "pairs": pairs, **changed})


def test_istd_gives_each_frame_its_condition():
    pairs = torch.randn(2, 5, 4)
    shift = torch.arange(5.0)
    by_pair = istd(lambda z, c: z * (1 + c[:, None]), pairs, shift)
    at_once = istd(lambda z, c: z * (1 + c[:, None]), pairs, shift, pairs_per_call=3)
    names = istd(lambda z, c: z * (1 + torch.tensor([float(x) for x in c])[:, None]), pairs, list("01234"))
    assert torch.allclose(by_pair.per_pair, at_once.per_pair) and torch.allclose(by_pair.per_pair, names.per_pair)
    told = []
    istd(torch.sin, pairs, pairs_per_call=2, progress=lambda *x: told.append(x))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_interpolation_in_parts_is_the_same():
    a, b = torch.randn(2, 3, 4)
    whole = interpolate(torch.sin, a, b, num_frames=5)
    assert whole.shape == (5, 3, 4)
    assert torch.equal(whole, interpolate(torch.sin, a, b, num_frames=5, batch_size=2))


def test_bad_input_of_inversion():
    x0 = torch.ones(2, 8)
    for verb in (ddim_invert, ddim_sample):
        name = verb.__name__
        with pytest.raises(ValueError, match=re.escape(f"{name}: `steps` must be in [1, 20]")):
            verb(told, x0, Schedule(), steps=21)
        with pytest.raises(ValueError, match=f"{name}: `null_cond` must be given, for guidance_scale is 2"):
            verb(told, x0, Schedule(), steps=5, guidance_scale=2)
        with pytest.raises(ValueError, match=re.escape(f"{name}: `model` must be predicting (2, 8); got (2, 3)")):
            verb(lambda z, t: z[:, :3], x0, Schedule(), steps=5)
        with pytest.raises(TypeError, match=f"{name}: `model` must return a tensor"):
            verb(lambda z, t: "no", x0, Schedule(), steps=5)
    with pytest.raises(
        ValueError, match="`scheduler` must be with final_alpha_cumprod < 1 where samples are predicted"
    ):
        ddim_invert(told, x0, Schedule(prediction_type="sample"), steps=5)
    dark = Schedule()
    dark.alphas_cumprod[15] = 0
    with pytest.raises(ValueError, match="`scheduler` must be one with signal at every time if noise is predicted"):
        ddim_invert(told, x0, dark, steps=4)  # visits 15, 10, 5, 0


def test_bad_input_of_predict_x0():
    z, t = torch.ones(2, 8), torch.tensor([0, 1])
    dark = Schedule()
    dark.alphas_cumprod[-1] = 0
    for args, sentence in (
        ((z[:1], z, t, Schedule()), "`model_output` must be of the sample's shape (2, 8)"),
        ((z, z, torch.zeros(3), Schedule()), "`t` must be one time or 2; got (3,)"),
        ((z, z, 20, Schedule()), "`t` must be in [0, 19]; got [20]"),
        ((z, z, t, Schedule(prediction_type="score")), "`prediction_type` must be one of epsilon"),
        ((z, z, 19, dark), "`scheduler` must be one with signal at every time"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            predict_x0(*args)


def test_bad_input_of_null_text():
    def model(z, t, e):
        return z + e

    for settings, sentence in (
        ({"guidance_scale": 1}, "`guidance_scale` must be > 1"),
        ({"inner_steps": -1}, "`inner_steps` must be at least 0; got -1"),
        ({"lr": 0}, "`lr` must be > 0; got 0"),
        ({"tolerance": 0}, "`tolerance` must be > 0; got 0"),
        ({"steps": 21}, "`steps` must be in [1, 20]"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            NullTextInverter(model, Schedule(), **{"steps": 5, "key": "e", **settings})
    inverter, x0, cond = (
        NullTextInverter(model, Schedule(), steps=5, key="e"),
        torch.ones(2, 8),
        {"e": torch.ones(2, 8)},
    )
    with pytest.raises(ValueError, match="`null_cond` must be a float tensor under 'e'"):
        inverter.invert(x0, cond, {"label": 1})
    with pytest.raises(ValueError, match="`null_cond` must be of 1 or 2 rows under 'e'; got 3"):
        inverter.invert(x0, cond, {"e": torch.zeros(3, 8)})
    with pytest.raises(ValueError, match="`x0` must be an image whose inversion is finite"):
        inverter.invert(x0 / 0, cond, {"e": torch.zeros(2, 8)})
    found = NullTextInversion(torch.zeros(4, 2, 8), torch.zeros(3, 2, 8), torch.zeros(3))
    with pytest.raises(ValueError, match="`inversion` must be of 5 steps; got 3"):
        inverter.reconstruct(found, cond)
    with pytest.raises(ValueError, match=re.escape("`switch_at` must be in [0, 1]; got 2")):
        edit_by_prompt_switch(inverter, found, cond, cond, switch_at=2)


def test_schedulers_that_visit_a_time_twice_are_refused():
    twice = Schedule()
    twice.set_timesteps = lambda steps: None
    with pytest.raises(ValueError, match="`scheduler` must be one that visits each time once"):
        ddim_sample(told, torch.ones(1, 8), twice, steps=5)


def test_outputs_of_every_form_are_understood():
    from planish.diffusion.prediction import ask

    z = torch.randn(2, 3, 4)
    for made in (z, (z, "more"), SimpleNamespace(sample=z), torch.cat([z, z], 1)):
        assert torch.equal(ask(lambda x, t, made=made: made, z, 3), z)


class Pipe:
    """What a pipeline shows of itself, and what it was asked."""

    scheduler, components = None, None

    def __init__(self):
        self.asked = []

    def __call__(self, prompt=None, latents=None, output_type="pil", guidance_scale=1.0):
        self.asked.append((prompt, len(latents), output_type, guidance_scale))
        return SimpleNamespace(images=latents[:, :3].numpy())


def test_pipelines_are_asked_for_tensors_by_prompt():
    pipe, (a, b) = Pipe(), torch.randn(2, 1, 4, 2, 2)
    frames = interpolate(pipe, a, b, "a cat", num_frames=5, batch_size=3, guidance_scale=7.5)
    assert pipe.asked == [(["a cat"] * 3, 3, "pt", 7.5), (["a cat"] * 2, 2, "pt", 7.5)]
    assert torch.equal(frames[0, 0], a[0, :3]) and frames.shape == (5, 1, 3, 2, 2)
