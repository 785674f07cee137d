"""The search for a scheduler's coefficients, what starts it, and what it keeps."""

import pytest
import torch
from torch import nn

from planish.diffusion import JAQLoss, OutputErrors, ReferenceLoss, TunedSchedule, measure_output_errors

diffusers = pytest.importorskip("diffusers")
from planish.diffusion import tune_schedule, wrap_scheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers, at numpy 2 and torch


def output(x, t):
    return torch.sin(3 * x) * (1 + 0.1 * float(t) / 1000)


GAIN = 0.8  # of a "quantized" model: 1 / 1.25, on the lattice of the search


def toy(steps=4):
    labels = torch.arange(40) % 4
    start = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def sampler(gain):
        def draw(c_x, c_e):
            s = wrap_scheduler(diffusers.DDIMScheduler(clip_sample=False), c_x, c_e)
            s.set_timesteps(steps)
            x = start
            for t in s.timesteps:
                x = s.step(gain * output(x, t), t, x).prev_sample
            return x

        return draw

    return sampler, labels


def test_a_known_gain_is_found_exactly():
    sampler, _ = toy()
    ones = [1.0] * 4
    wanted = sampler(1.0)(ones, ones)
    found = tune_schedule(sampler(GAIN), 4, ReferenceLoss(wanted), profile="constant")
    assert found.sample_coeff == ones and found.model_coeff == pytest.approx([1.25] * 4, abs=1e-9)
    assert found.widened and found.gained and found.score == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(sampler(GAIN)(found.sample_coeff, found.model_coeff), wanted, rtol=1e-4, atol=1e-4)


def test_a_known_gain_on_the_sample_is_found_exactly():
    def draw(c_x, c_e):
        return (torch.arange(20.0) % 10 - 4.5)[:, None] * (0.9 * c_x[0]) - c_e[0]

    wanted = (torch.arange(20.0) % 10 - 4.5)[:, None] * 0.9 * 1.05 - 1.1
    found = tune_schedule(draw, 1, ReferenceLoss(wanted))
    assert (found.sample_coeff, found.model_coeff) == (pytest.approx([1.05]), pytest.approx([1.1]))


def test_a_known_gain_is_found_through_alignment_and_quality():
    sampler, labels = toy()
    ones = [1.0] * 4
    wanted = sampler(1.0)(ones, ones)

    def alignment(x, p):
        return -(x - wanted).square().mean((1, 2, 3)) - 0 * p

    loss = JAQLoss(alignment, lambda x: -(x - wanted).abs().amax((1, 2, 3)), labels, k=0.5)
    found = tune_schedule(sampler(GAIN), 4, loss, profile="constant")
    assert found.model_coeff == pytest.approx([1.25] * 4, abs=1e-9)


class Shrunk(nn.Module):
    def __init__(self, gain=1.0, shift=0.0):
        super().__init__()
        self.gain, self.shift = gain, shift

    def forward(self, x, t):
        return self.gain * output(x, t) + self.shift


def test_the_closed_form_finds_a_gain_without_a_search():
    x = torch.randn(8, 1, 4, 4)

    def sample():
        for t in (900, 600, 300):
            model(x, t)

    model = Shrunk(GAIN)
    errors = measure_output_errors(model, Shrunk(), sample)
    assert errors.gain == pytest.approx([1.25] * 3) and errors.slope == pytest.approx([-0.2] * 3)
    assert errors.residual == pytest.approx([0] * 3, abs=1e-9) and errors.closed_form() == {"model_coeff": errors.gain}
    model = Shrunk(0.5, 0.3)
    errors = measure_output_errors(model, Shrunk(), sample)
    told = errors.ptqd()
    mended = (model(x, 600) - told["model_shift"][1][0]) * told["model_coeff"][1]
    torch.testing.assert_close(mended, Shrunk()(x, 600), rtol=1e-5, atol=1e-5)
    assert isinstance(errors, OutputErrors)


def test_a_base_is_searched_around():
    sampler, _ = toy()
    ones = [1.0] * 4
    wanted = sampler(1.0)(ones, ones)
    found = tune_schedule(sampler(GAIN), 4, ReferenceLoss(wanted), base=[1.25] * 4)
    assert (found.best.sample_start, found.best.model_start) == (1, 1) and not found.widened
    assert found.model_coeff == pytest.approx([1.25] * 4)


def test_nothing_gained_keeps_ones():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(3))

    def draw(c_x, c_e):
        shuffled = noise.roll(round(1000 * c_x[0] + 7000 * c_e[0]))
        return shuffled

    found = tune_schedule(draw, 4, lambda x: x)
    assert found.best.score > noise[:200].mean()  # the search fooled itself
    assert not found.gained and found.sample_coeff == found.model_coeff == [1.0] * 4
    assert "not kept" in str(found) and "how much of the gain mends quantization is not known" in str(found)


def test_the_float_model_is_tuned_beside_it():
    sampler, _ = toy()
    ones = [1.0] * 4
    wanted = sampler(1.0)(ones, ones)
    found = tune_schedule(
        sampler(GAIN), 4, ReferenceLoss(wanted), profile="constant", float_sampler=sampler(1.0), levels=1
    )
    assert isinstance(found.float_tuned, TunedSchedule) and not found.float_tuned.gained
    assert "in float" in str(found) and found.float_tuned.score == 0


def test_a_stopped_search_goes_on(tmp_path):
    sampler, _ = toy()
    wanted, drawn, told, limit = sampler(1.0)([1.0] * 4, [1.0] * 4), [], [], [20]

    def draw(c_x, c_e):
        if len(drawn) == limit[0]:
            raise InterruptedError
        drawn.append((c_x, c_e))
        return sampler(GAIN)(c_x, c_e)

    settings = {"profile": "constant", "levels": 1, "store": tmp_path / "points.json", "name": "toy"}
    with pytest.raises(InterruptedError):
        tune_schedule(draw, 4, ReferenceLoss(wanted), **settings)
    drawn_before = len(drawn)
    drawn.clear()
    limit[0] = 1000
    found = tune_schedule(draw, 4, ReferenceLoss(wanted), **settings, progress=lambda *a: told.append(a))
    whole = tune_schedule(sampler(GAIN), 4, ReferenceLoss(wanted), profile="constant", levels=1, name="toy")
    assert (found.points, found.model_coeff) == (whole.points, whole.model_coeff)
    assert drawn_before == 20 and len(drawn) == len(whole.points) + 1 - 20 and len(told) == len(drawn)
    with pytest.raises(ValueError, match="`store` must be of this search"):
        tune_schedule(draw, 4, ReferenceLoss(wanted), **{**settings, "name": "other"})


def test_wrapping_what_was_tuned():
    sampler, _ = toy()
    found = tune_schedule(
        sampler(GAIN), 4, ReferenceLoss(sampler(1.0)([1.0] * 4, [1.0] * 4)), profile="constant", levels=0
    )
    tuned = found.wrap(diffusers.DDIMScheduler(clip_sample=False))
    assert tuned.config.model_coeff == found.model_coeff and tuned.config.coeff_num_steps == 4


def test_a_guard_keeps_out_what_single_scores_cannot_see():
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0))

    def draw(c_x, c_e):
        return c_x[0] * noise

    def nearness(x):
        return -x.abs()  # of single images, better the less they differ

    def narrowness(x):
        return abs(float(x.std()) - float(noise[:30].std()))

    free = tune_schedule(draw, 1, nearness)
    assert free.gained and free.best.sample_start == pytest.approx(0.4)  # as far as it goes
    near = tune_schedule(draw, 1, nearness, widen=False)
    assert near.best.sample_start == 0.8 and not near.widened
    guarded = tune_schedule(draw, 1, nearness, guard=narrowness)
    assert guarded.best.sample_start == 1 and guarded.sample_coeff == [1.0]
