"""A regularized adapter makes steps of images more equal than the same adapter without the regularizer."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("sklearn")

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def found():
    """Measure, over three seeds, adapters of weight 0 and 1 on equal models, draws and noises."""
    from benchmarks.interpolation_digits import Net, adapted, measure, pretrain

    rows = {0.0: [], 1.0: []}
    for seed in SEEDS:
        state = pretrain(seed, 1000).state_dict()
        for weight, told in rows.items():
            net = Net()
            net.load_state_dict(state)
            adapted(net.eval(), seed, 300, weight)
            told.append(measure(net, 100, 300))
    return rows


def ratio(found, metric):
    """Return the largest of the seeds' ratios, regularized over not."""
    return max(one[metric] / none[metric] for none, one in zip(found[0.0], found[1.0], strict=True))


@pytest.mark.slow
@pytest.mark.claim("smooth_diffusion", "digits: ISTD of a LoRA at lambda 1 over that at lambda 0, worst of three seeds")
def test_steps_are_more_equal(found, record_claim):
    assert all(row["right class"] > 95 for rows in found.values() for row in rows)
    record_claim(ratio(found, "ISTD"), 0.9, at_least=False)


@pytest.mark.slow
@pytest.mark.claim("smooth_diffusion", "digits: std / mean step, free of scale, likewise")
def test_not_only_because_they_are_shorter(found, record_claim):
    record_claim(ratio(found, "std / mean step"), 0.93, at_least=False)


@pytest.mark.claim("smooth_diffusion", "orthogonal J: relative spread of n over noises and directions")
def test_what_the_loss_asks_for(record_claim):
    from planish.diffusion import StepwiseVariationRegularizer

    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    noise = torch.randn(32, 12, dtype=torch.float64).requires_grad_()
    abar = torch.full((32,), 0.3, dtype=torch.float64)
    reg = StepwiseVariationRegularizer(normalize_probe=True)
    _, even = reg(2 * noise @ turn, noise, abar)
    _, uneven = StepwiseVariationRegularizer(normalize_probe=True)(2 * noise.tanh() @ turn, noise, abar)
    assert uneven.std / uneven.mean > 0.05
    record_claim(even.std / even.mean, 1e-12, at_least=False)
