"""The noise benchmark: its data is the same everywhere, its rivals are what they are called, stopped runs go on."""

import json

import pytest
import torch

from benchmarks import noise
from benchmarks.noise_rivals import ClippedInput, LearnedStep, MinMaxNoise, TanhWeight
from benchmarks.noise_tasks import Task, WaveNet, waves


def test_waves_are_deterministic_and_of_ten_kinds():
    (x, y), (again, _) = waves(60, 0), waves(60, 0)
    assert torch.equal(x, again) and x.shape == (60, 1, 40) and y.bincount().tolist() == [6] * 10
    assert not torch.equal(x, waves(60, 1)[0]) and abs(x.std() - 1) < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rivals_round_to_as_many_levels_and_pass_gradients(bits):
    w = torch.randn(400, requires_grad=True)
    made = [LearnedStep(w.detach(), bits, signed=True), TanhWeight(bits), MinMaxNoise(bits).eval()]
    for quantizer in made:
        q = quantizer(w)
        assert len(q.detach().mul(1e4).round().unique()) <= 2**bits
        assert len(quantizer.codes(w.detach()).unique()) <= 2**bits
        assert torch.autograd.grad(q.sum(), w)[0].abs().sum() > 0
    x = torch.randn(400).relu()
    clipped = ClippedInput(x, bits)
    assert len(clipped(x).detach().unique()) <= 2**bits
    assert torch.autograd.grad(clipped(2 * x).sum(), clipped.alpha)[0] == (2 * x >= clipped.alpha).sum()


def test_noise_of_the_rival_is_within_a_step():
    w, quantizer = torch.randn(400), MinMaxNoise(3)
    step = (w.max() - w.min()) / 7
    assert ((quantizer(w) - w).abs() <= step / 2 * 1.0001).all() and not torch.equal(quantizer(w), w)


def test_every_subject_is_trained_once_and_recalled(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path))

    def make(seed):
        torch.manual_seed(seed)
        return WaveNet()

    task = Task("MNIST-1D-like", waves(60, 0), waves(40, 1), make, 20, 1, 2, 1, 2e-3)
    first = {s: noise.kept(task, s, 3, 0, fresh=False) for s in ("float", *noise.SUBJECTS)}
    assert all(0 <= score["accuracy"] <= 1 for score in first.values())
    assert first["NIPQ, learned widths"]["average"] <= 3
    monkeypatch.setattr(noise, "train", None)
    assert {s: noise.kept(task, s, 3, 0, fresh=False) for s in first} == json.loads(json.dumps(first))
