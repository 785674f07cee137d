import copy
import math

import pytest
import torch
from torch import nn

import planish
from planish.metrics import smooth_ece
from planish.quant import compare, evaluate, quantize, rtn, scores
from planish.quant.evaluation import Evaluation
from planish.quant.intervals import Estimate, Resamples

transformers = pytest.importorskip("transformers")
VOCAB = 40


def llama(seed=0, layers=2):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def text(rows=12, length=24, seed=1):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def directly(model, base, ids):
    """The figures, all logits at once, in float64."""
    with torch.no_grad():
        log_p, log_q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (model, base))
    aim = ids[:, 1:, None]
    nll_p, nll_q = -log_p.gather(2, aim)[..., 0], -log_q.gather(2, aim)[..., 0]
    hit = log_p.argmax(-1) == ids[:, 1:]
    return {
        "perplexity": nll_p.mean().exp().item(),
        "difference": (nll_p - nll_q).mean().item(),
        "kl": (log_q.exp() * (log_q - log_p)).sum(-1).mean().item(),
        "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(),
        "smooth_ece": smooth_ece(hit.flatten(), log_p.exp().amax(-1).flatten()).item(),
    }


def test_figures_equal_a_direct_computation():
    base, model, ids = llama(0), llama(0), text()
    quantize(model, [ids], rtn(bits=3, group_size=32))
    got = evaluate(model, [{"input_ids": ids[:5]}, {"input_ids": ids[5:]}], base)
    want = directly(model, base, ids)
    for name, value in want.items():
        found = getattr(got, name)
        assert (found.value if isinstance(found, Estimate) else found) == pytest.approx(value, rel=1e-4), name
    assert got.kl.low < got.kl.value < got.kl.high
    assert (got.windows, got.tokens) == (12, 12 * 23)
    assert got.bytes < evaluate(base, [ids]).bytes


def test_windows_longer_than_what_is_held_at_a_time_are_resampled_whole():
    model, ids = llama(0), text(rows=3, length=60)
    whole = evaluate(model, [ids], llama(1))
    scores.CHUNK, kept = 16, scores.CHUNK
    try:
        pieces = evaluate(model, [ids], llama(1))
    finally:
        scores.CHUNK = kept
    assert (pieces.windows, pieces.tokens) == (3, 3 * 59)
    assert pieces.calibration.ece == pytest.approx(whole.calibration.ece, rel=1e-9)
    assert (pieces.calibration.low, pieces.calibration.high) == pytest.approx(
        (whole.calibration.low, whole.calibration.high), rel=1e-9
    )


def test_loss_is_seen_on_the_text_of_the_base():
    base, model = llama(0), llama(0)
    ids = text(rows=24, length=1)
    for _ in range(20):
        nexts = base(ids).logits[:, -1].softmax(-1)
        drawn = torch.multinomial(nexts, 1, generator=torch.Generator().manual_seed(ids.shape[1]))
        ids = torch.cat([ids, drawn], 1)
    quantize(model, [ids], rtn(bits=2, group_size=32))
    got = evaluate(model, [ids], base)
    assert 0 < got.difference.low < got.difference.value < got.difference.high
    assert not got.lossless and "not shown to be lossless" in str(got)


def test_padding_is_left_out():
    model, ids = llama(), text(rows=2)
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    short["attention_mask"][1, 10:] = 0
    got = evaluate(model, [short])
    whole, part = (evaluate(model, [i]).perplexity.value for i in (ids[:1], ids[1:, :10]))
    assert got.tokens == 23 + 9
    mean = (23 * math.log(whole) + 9 * math.log(part)) / 32
    assert got.perplexity.value == pytest.approx(math.exp(mean), rel=1e-5)


def test_the_same_model_is_lossless_and_says_so():
    model = llama()
    got = evaluate(model, [text()], copy.deepcopy(model))
    assert got.lossless and "lossless: the interval contains zero" in str(got)
    assert got.difference == (0, 0, 0) and got.agreement.value == 1 and abs(got.kl.value) < 1e-6


@pytest.mark.parametrize(
    ("difference", "lossless"),
    [((0.01, -0.01, 0.03), True), ((0.01, 0.001, 0.02), False), ((-0.02, -0.03, -0.01), False),
     ((0.0, math.nan, math.nan), False), (None, False)],
)  # fmt: skip
def test_lossless_only_when_the_interval_contains_zero(difference, lossless):
    difference = difference and Estimate(*difference)
    got = Evaluation(9, 9, 1, 1.0, 0.95, Estimate(5.0, 4.0, 6.0), difference)
    assert got.lossless is lossless
    assert ("lossless: " in str(got)) is lossless
    assert got.to_json()["lossless"] is lossless


def test_compare_runs_the_base_once_a_window_and_agrees_with_evaluate():
    base, ids = llama(0), text(rows=9)
    models = {"near": copy.deepcopy(base), "far": llama(1)}
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    both = compare(base, models, [ids])
    assert len(calls) == 9 + 2  # two tell whether it predicts the next token
    assert list(both) == ["base", "near", "far"]
    alone = evaluate(models["far"], [ids], base)
    assert both["far"].difference == alone.difference and both["far"].kl == alone.kl
    assert both["base"].difference.value == 0
    ratio = both["far"].perplexity.value / both["base"].perplexity.value
    assert both["far"].difference.value == pytest.approx(math.log(ratio), rel=1e-4)


def test_few_windows_have_no_interval():
    got = evaluate(llama(0), [text(rows=7)], llama(1))
    assert math.isnan(got.kl.low) and math.isnan(got.difference.high)
    assert not got.lossless and "[" not in str(got).split("\n")[1]
    assert got.to_json()["kl"][1:] == [None, None]


def test_an_encoder_is_judged_by_its_outputs():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    base = transformers.BertForMaskedLM(config).eval()  # has logits, but sees what comes later
    model = copy.deepcopy(base)
    ids = text(rows=8)
    quantize(model, [{"input_ids": ids}], rtn(group_size=32))
    got = evaluate(model, [{"input_ids": ids}], base)
    assert got.perplexity is None and not got.lossless
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits.double() for m in (model, base))
    error = (ours - theirs).square().sum() / theirs.square().sum()
    assert got.relative_error.value == pytest.approx(error.item(), rel=1e-4)
    cosine = torch.cosine_similarity(ours, theirs, dim=-1).mean()
    assert got.cosine.value == pytest.approx(cosine.item(), rel=1e-6)
    with pytest.raises(ValueError, match="evaluate: `against` must be the float model"):
        evaluate(model, [{"input_ids": ids}])


def test_models_come_back_as_they_were():
    model = llama().train()
    model.lm_head.eval()
    evaluate(model, [text(rows=2)])
    assert model.training and not model.lm_head.training


def test_same_figures_every_time_and_with_a_generator():
    base, model, ids = llama(0), llama(1), text()
    first = evaluate(model, [ids], base)
    assert first.kl == evaluate(model, [ids], base).kl
    seeded = [evaluate(model, [ids], base, generator=torch.Generator().manual_seed(s)).kl for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_intervals_cover_what_they_promise():
    """Windows of skewed, unequal sums: 95 % intervals of 12 windows hold the truth about as often as they say."""
    generator = torch.Generator().manual_seed(0)
    held, runs = 0, 400
    for _ in range(runs):
        tokens = torch.randint(20, 40, (12,), generator=generator).double()
        mean = 0.3 + 0.2 * (torch.rand(12, generator=generator).double() ** 2 - 1 / 3)
        got = Resamples(12, confidence=0.95, n_bootstrap=400, generator=generator).ratio(mean * tokens, tokens)
        held += got.low <= 0.3 <= got.high
    assert 0.92 <= held / runs <= 0.98


def test_intervals_follow_student():
    scipy = pytest.importorskip("scipy.stats")
    from planish.quant.intervals import _student

    for degrees in (7, 12, 50):
        for level in (0.9, 0.95, 0.99):
            want = scipy.t.ppf((1 - level) / 2, degrees)
            assert _student(scipy.norm.ppf((1 - level) / 2), degrees) == pytest.approx(want, rel=5e-3)


def test_progress_counts_windows():
    seen = []
    evaluate(llama(), [text(rows=3)], progress=lambda *step: seen.append(step))
    assert seen == [("evaluate", i, 3) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batches": []}, "evaluate: `batches` must be at least one batch of what the model takes; got []."),
        ({"confidence": 1.0}, "evaluate: `confidence` must be a float in (0, 1); got 1.0."),
        ({"n_bootstrap": 10}, "evaluate: `n_bootstrap` must be an int >= 100; got 10."),
    ],
)
def test_bad_input(options, sentence):
    with pytest.raises(ValueError) as caught:
        planish.evaluate(**{"model": llama(), "batches": [text(rows=1)], **options})
    assert str(caught.value) == sentence


def test_broken_models_are_refused():
    model = llama()
    with pytest.raises(ValueError, match="named otherwise than 'base'"):
        compare(model, {"base": model}, [text(rows=1)])
    nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="evaluate, model: its outputs for window 0 hold NaN or Inf"):
        evaluate(model, [text(rows=1)], llama())
    with pytest.raises(ValueError, match=r"evaluate, model: outputs \(4,\) against \(3,\) of the base"):
        evaluate(nn.Linear(2, 4), [torch.ones(1, 2)], nn.Linear(2, 3))
