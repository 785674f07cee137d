"""The scores and the bootstrap against direct computation, on a tiny random language model."""

import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks import quality

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    # Longer than CHUNK, so that the seam between chunks is inside a window.
    return torch.randint(97, (3, quality.CHUNK + 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def moved(model):
    generator = torch.Generator().manual_seed(2)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(model.named_parameters())[name].detach()
    return {name: weight + 0.5 * torch.randn(weight.shape, generator=generator)}


def test_the_float_model_is_no_distance_from_itself(model, ids):
    scores = quality.language_scores(model, ids, quality.hidden_states(model, ids))
    assert torch.equal(scores["kl"], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(scores["hidden"], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(scores["top1"], torch.ones(3, dtype=torch.float64))
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert scores["nll"].mean().item() == pytest.approx(loss, rel=1e-6)


def test_scores_equal_those_of_whole_logits(model, ids, moved):
    reference = quality.hidden_states(model, ids)
    with torch.no_grad():
        p = F.log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)
    with quality.DenseSwap(model, moved):
        scores = quality.language_scores(model, ids, reference)
        with torch.no_grad():
            q = F.log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)
    nll = -q.gather(-1, ids[:, 1:, None])[..., 0].mean(dim=1)
    kl = (p.exp() * (p - q)).sum(dim=-1).mean(dim=1)
    top1 = (p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean(dim=1)
    torch.testing.assert_close(scores["nll"], nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores["kl"], kl, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scores["top1"], top1, rtol=0, atol=2 / ids.shape[1])
    assert (scores["hidden"] > 0).all()


def test_swap_puts_the_float_weights_back_bit_for_bit(model, moved):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with quality.DenseSwap(model, moved):
        name, weight = next(iter(moved.items()))
        assert torch.equal(dict(model.named_parameters())[name], weight)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_swap_refuses_a_name_the_model_does_not_have(model):
    with pytest.raises(ValueError, match="no parameter `nowhere`"):
        quality.DenseSwap(model, {"nowhere": torch.zeros(1)})


def test_bootstrap_interval_covers_as_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 5
    interval = quality.bootstrap(values)
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean().item(), abs=1e-12)
    assert interval.low == pytest.approx(interval.value - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.1 * half)
    assert interval == quality.bootstrap(values)


def test_pairing_makes_a_small_steady_difference_certain():
    noise = torch.randn(32, generator=torch.Generator().manual_seed(4))
    a, b = noise + 0.01, noise
    assert quality.bootstrap(a - b).low > 0
    assert quality.bootstrap(a).low < quality.bootstrap(b).value


def test_encoder_scores_notice_a_moved_embedding():
    generator = torch.Generator().manual_seed(5)
    reference = torch.randn(6, 8, 16, generator=generator)

    class Body(torch.nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            self.noise, self.row = noise, 0

        def forward(self, input_ids: torch.Tensor) -> object:
            hidden = reference[self.row : self.row + 1]
            self.row += 1
            wobble = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(self.row))
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden + self.noise * wobble)

    ids = torch.zeros(6, 8, dtype=torch.long)
    still, little, much = (quality.encoder_scores(Body(n), ids, reference) for n in (0.0, 0.1, 1.0))
    assert still["cosine"].abs().max() < 1e-6
    assert torch.equal(still["rank"], torch.ones(6, dtype=torch.float64).clamp(max=still["rank"].max()))
    for name in ("cosine", "hidden", "similarity"):
        assert still[name].mean() <= little[name].mean() < much[name].mean()
    assert still["rank"].mean() >= little["rank"].mean() > much["rank"].mean()
