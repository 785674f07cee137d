"""Q-Sched's claims in miniature: a quantized sampler is mended from its scheduler alone."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from planish.diffusion import ReferenceLoss, measure_output_errors, tune_schedule, wrap_scheduler  # noqa: E402

STEPS, GAIN = 4, 0.8
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


class Oracle(torch.nn.Module):
    """The exact noise of data on a Gaussian of spread 1/2, times a gain: what a quantizer that shrinks leaves."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain
        self.alphas = diffusers.DDIMScheduler(clip_sample=False).alphas_cumprod

    def forward(self, x, t):
        a = self.alphas[int(t)]
        return self.gain * (1 - a).sqrt() * x / (a / 4 + 1 - a)


def draw(model, c_x, c_eps, n=200, seed=0):
    scheduler = wrap_scheduler(diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), c_x, c_eps)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


ONES = [1.0] * STEPS


@pytest.mark.claim("qsched", "a known gain of the output is found by the search: relative error of what is left")
def test_a_known_gain_is_found(record_claim):
    small, wanted = Oracle(GAIN), draw(Oracle(), ONES, ONES)
    found = tune_schedule(lambda x, e: draw(small, x, e), STEPS, ReferenceLoss(wanted), profile="constant")
    before = (draw(small, ONES, ONES, seed=5) - draw(Oracle(), ONES, ONES, seed=5)).norm()
    after = (draw(small, found.sample_coeff, found.model_coeff, seed=5) - draw(Oracle(), ONES, ONES, seed=5)).norm()
    record_claim(float(after / before), 0.01, at_least=False)


@pytest.mark.claim("qsched", "no float model at hand: error of the spread of samples, tuned over untouched")
def test_without_a_reference(record_claim):
    small = Oracle(GAIN)

    def spread(pictures):  # of the data, known to a user as statistics of it
        return -(pictures.square().flatten(1).mean(1).sqrt() - 0.5).abs()

    found = tune_schedule(lambda x, e: draw(small, x, e), STEPS, spread)
    errors = [
        abs(float(draw(small, *c, seed=7).std()) - 0.5) for c in ((found.sample_coeff, found.model_coeff), (ONES, ONES))
    ]
    assert found.gained
    record_claim(errors[0] / errors[1], 0.2, at_least=False)


@pytest.mark.claim("qsched", "a float model at hand: the closed form finds the gain without a search: relative error")
def test_the_closed_form(record_claim):
    small = Oracle(GAIN)
    errors = measure_output_errors(small, Oracle(), lambda: draw(small, ONES, ONES))
    record_claim(max(abs(g * GAIN - 1) for g in errors.gain), 1e-6, at_least=False)
