"""The digits' denoisers: planted outliers change no answer, scores see what they should, pieces are whole."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from benchmarks import diffusion, digits
from planish.diffusion import digits_dit, digits_unet
from planish.quant import QConv, QLinear


@pytest.mark.parametrize("make", [lambda: digits_dit(layers=2, heads=2), lambda: digits_unet(channels=(16, 16))])
def test_planted_outliers_change_activations_and_no_answer(make):
    model = make().double()
    for name, parameter in model.named_parameters():
        if "norm1.linear" in name:
            nn.init.normal_(parameter, std=0.1)
    x, t, y = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([9, 400, 999]), torch.tensor([1, 2, 3])
    tops, kinds = [], ("to_q", "to_out.0", "net.0.proj")

    def run():
        seen = {}
        handles = [m.register_forward_pre_hook(lambda m, a, n=n: seen.update({n: a[0].abs().amax().item()}))
                   for n, m in model.named_modules() if n.endswith(kinds)]  # fmt: skip
        with torch.no_grad():
            answer = model(x, timestep=t, class_labels=y).sample
        for handle in handles:
            handle.remove()
        tops.append(seen)
        return answer

    before = run()
    digits.plant(model)
    torch.testing.assert_close(run(), before, rtol=1e-9, atol=1e-10)
    assert tops[0].keys() == tops[1].keys() and len(tops[0]) >= 4
    assert all(tops[1][n] > 5 * tops[0][n] for n in tops[0])


def test_psnr_is_that_of_the_error():
    picture = torch.zeros(2, 1, 8, 8)
    assert digits.psnr(picture + 0.2, picture) == pytest.approx(20.0, abs=1e-5)
    assert digits.psnr(picture + 9, picture + 2) > 150  # both end at 1


def test_calls_are_recorded_by_name_and_step():
    calls = digits.record(digits_unet(channels=(8, 8)), n=10, steps=2)
    assert [sorted(c) for c in calls] == [["class_labels", "sample", "timestep"]] * 2
    assert calls[0]["sample"].shape == (20, 1, 8, 8)  # both branches of guidance
    assert calls[0]["class_labels"].tolist() == [*range(10), *[10] * 10]


def test_every_method_quantizes_both_kinds_of_denoiser():
    for key, make in (("dit", lambda: digits_dit(layers=1)), ("unet", lambda: digits_unet(channels=(16, 16)))):
        for subject, method in diffusion.SUBJECTS.items():
            if method is None or "SVD" in subject or "smoothed" in subject or diffusion.ONLY.get(subject, key) != key:
                continue
            model = make()
            diffusion.fitted(model, method(), pictures=2, steps=2)
            kinds = {type(m) for m in model.modules()}
            assert QLinear in kinds and (QConv in kinds) == (key == "unet"), subject
            found = diffusion.sizes(model)
            assert 0.1 < found["size"] < 0.4 and found["branch"] == 0
