"""The native decoder against the model itself: logits, text, batches, samples, and what it leaves to transformers."""

import runpy
import threading
import warnings
from pathlib import Path

import pytest
import torch

from planish import _support
from planish.kernels import placing
from planish.quant import Decoder, evaluate, quantize, rtn
from planish.quant.decoder import CHUNK

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()

pytestmark = [
    pytest.mark.skipif(bool(placing.absence()), reason=f"no compiled module: {placing.absence()}"),
    pytest.mark.filterwarnings("ignore:.*max_length.*:UserWarning"),
]

FAMILIES = runpy.run_path(str(Path(__file__).parents[2] / "decoders.py"))
NATIVE, STOCK, small, prompt = (FAMILIES[name] for name in ("NATIVE", "STOCK", "small", "prompt"))


@pytest.fixture(scope="module")
def llama():
    model = small(NATIVE["Llama"])
    return model, Decoder(model)


def near(ours, stock):
    return float((ours - stock).abs().max()) <= 2e-3 * float(stock.abs().max())


@pytest.mark.parametrize("family", NATIVE)
def test_logits_and_text_are_those_of_the_model(family):
    model = small(NATIVE[family])
    decoder = Decoder(model)
    assert decoder.path == "native", decoder.why
    ids = prompt(tokens=40)
    with torch.no_grad():
        assert near(decoder(ids)["logits"], model(input_ids=ids, use_cache=False).logits)
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    assert torch.equal(decoder.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("family", STOCK)
def test_other_families_run_as_transformers_runs_them_and_say_why(family):
    make, why = STOCK[family]
    model = small(make)
    _support._warned.clear()
    with pytest.warns(_support.PlanishWarning, match="runs as transformers runs it, since"):
        decoder = Decoder(model)
    assert decoder.path == "stock" and why in decoder.why, decoder.why
    assert decoder.why in str(decoder)
    ids = prompt(tokens=8)
    with torch.no_grad():
        assert torch.equal(decoder(ids)["logits"], model(input_ids=ids, use_cache=False).logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(decoder.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.train(), "training mode"),
        (lambda m: m.model.layers[1].self_attn.__setattr__("scaling", 1.0), "differ in heads, scale"),
        (lambda m: m.model.norm.register_forward_hook(lambda _m, _a, y: y * 1.5), "no root-mean-square norm"),
        (lambda m: m.lm_head.register_forward_hook(lambda _m, _a, y: y + y.abs()), "logits in a prompt differ"),
    ],
)
def test_what_does_not_fit_is_left_to_transformers(change, why):
    model = small(NATIVE["Llama"])
    change(model)
    with warnings.catch_warnings(action="ignore"):
        decoder = Decoder(model)
    assert decoder.path == "stock" and why in decoder.why, decoder.why


def test_eight_bits_stay_with_transformers():
    with warnings.catch_warnings(action="ignore"):
        assert "not plainly 4-bit" in Decoder(small(NATIVE["Llama"], bits=8)).why


def test_a_float_model_stays_with_transformers():
    with warnings.catch_warnings(action="ignore"):
        assert Decoder(NATIVE["Llama"]().eval()).why == "it holds no 4-bit layers"


@pytest.mark.parametrize("family", ["Llama", "Mistral, window", "Gemma 3"])
def test_prompts_longer_than_a_chunk(family):
    model = small(NATIVE[family])
    decoder = Decoder(model)
    ids = prompt(2, CHUNK + 37)
    with torch.no_grad():
        assert near(decoder(ids)["logits"], model(input_ids=ids, use_cache=False).logits)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(decoder.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("batch", [3, 11])
def test_a_padded_batch_equals_its_rows_one_by_one(llama, batch):
    model, decoder = llama
    lengths = [5 + 7 * i % 23 for i in range(batch)]
    rows = [prompt(1, n, seed=n) for n in lengths]
    width = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(r[0], (width - r.shape[1], 0)) for r in rows])
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": [7, 9]}
    together = decoder.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(together, model.generate(ids, attention_mask=mask, **settings))
    for row, n, made in zip(rows, lengths, together, strict=True):
        alone = decoder.generate(row, **settings)[0, n:]
        assert torch.equal(made[width : width + len(alone)], alone)


def test_right_padding_is_left_out_of_logits(llama):
    model, decoder = llama
    ids = prompt(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    logits = decoder(ids, mask)["logits"]
    with torch.no_grad():
        assert near(logits[1, :7], model(input_ids=ids[1:, :7], use_cache=False).logits[0])
    assert not logits[1, 7:].any()


PROCESSORS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top-k, top-p": {"top_k": 20, "top_p": 0.8},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "temperature": 1.2},
    "min-p, forbidden": {"min_p": 0.05, "bad_words_ids": [[5], [6, 7]]},
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("batch", [1, 3])
def test_samples_are_those_of_transformers_for_the_same_generator(llama, name, batch):
    model = llama[0]
    decoder = Decoder(model, head="exact")
    settings = {"top_k": 0, "max_new_tokens": 24, "do_sample": True, "eos_token_id": None, **PROCESSORS[name]}
    ids = prompt(batch)
    torch.manual_seed(11)
    stock = model.generate(ids, **settings)
    state = torch.get_rng_state()
    ours = decoder.generate(ids, generator=torch.Generator().manual_seed(11), **settings)
    assert torch.equal(ours, stock)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone


def test_greedy_text_with_processors_is_that_of_transformers(llama):
    model, decoder = llama
    settings = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.5, "min_new_tokens": 20}
    assert torch.equal(decoder.generate(prompt(), **settings), model.generate(prompt(), **settings))


def test_stop_tokens_strings_and_streams(llama):
    _, decoder = llama
    free = decoder.generate(prompt(), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 20:].tolist()
    stop = free[4]
    made = decoder.generate(prompt(), max_new_tokens=12, do_sample=False, eos_token_id=[stop, 66])
    assert made[0, 20:].tolist() == free[: free.index(stop) + 1]

    class Kept:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    kept = Kept()
    decoder.generate(prompt(), max_new_tokens=12, do_sample=False, eos_token_id=None, streamer=kept)
    assert kept.pieces == [prompt()[0].tolist(), *([token] for token in free)] and kept.ended

    class After(hf.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 25)

    criteria = hf.StoppingCriteriaList([After()])
    made = decoder.generate(prompt(), max_new_tokens=12, do_sample=False, eos_token_id=None, stopping_criteria=criteria)
    assert made[0, 20:].tolist() == free[:5]


def test_beams_run_as_transformers_runs_them_and_say_so(llama):
    model, decoder = llama
    _support._warned.clear()
    with pytest.warns(_support.PlanishWarning, match="beam_search"):
        ours = decoder.generate(prompt(), max_new_tokens=6, num_beams=2, do_sample=False)
    assert torch.equal(ours, model.generate(prompt(), max_new_tokens=6, num_beams=2, do_sample=False))


def test_the_int8_head_names_the_token_of_the_exact_one():
    model = small(NATIVE["Llama"])
    model.lm_head.weight.data[8] = model.lm_head.weight.data[7] * (1 + 1e-4)  # rounding to int8 cannot tell these apart
    model.lm_head.weight.data[9] = model.lm_head.weight.data[7] * (1 - 1e-4)
    rounded, exact = Decoder(model), Decoder(model, head="exact")
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) + 4 * model.lm_head.weight.data[7]
    for row in hidden:
        assert rounded._native.best(row) == exact._native.best(row) == int((model.lm_head.weight @ row).argmax())
    logits = rounded._native.logits(hidden, span=1.0)
    truth = hidden @ model.lm_head.weight.T
    kept = truth >= truth.amax(1, keepdim=True) - 1.0
    assert torch.allclose(logits[kept], truth[kept].detach(), rtol=1e-5, atol=1e-4)
    assert (logits - truth).abs().max() < 0.1 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision(dtype):
    model = small(NATIVE["Llama, biases, tied"]).to(dtype)
    decoder = Decoder(model)
    assert decoder.path == "native", decoder.why
    ids = prompt(tokens=12)
    with torch.no_grad():
        stock = model.float()(input_ids=ids, use_cache=False).logits
    assert near(decoder(ids)["logits"], stock)


def test_a_cache_in_half_precision_and_narrow_activations(llama):
    model, exact = llama
    ids = prompt(tokens=30)
    full = exact(ids)["logits"]
    for settings, most in (({"cache_dtype": torch.float16}, 5e-3), ({"activation_bits": 8}, 0.1)):
        decoder = Decoder(model, **settings)
        assert decoder.path == "native"
        gap = float((decoder(ids)["logits"] - full).abs().max() / full.abs().max())
        assert 0 < gap < most


def test_layers_left_in_float_run_beside_quantized_ones():
    torch.manual_seed(0)
    model = NATIVE["Llama"]().eval()
    quantize(
        model, [torch.randint(3, 67, (2, 16))], rtn(group_size=16), skip=("lm_head", "q_proj", "up_proj", "*.1.mlp.*")
    )
    decoder = Decoder(model)
    assert decoder.path == "native", decoder.why
    ids = prompt(tokens=40)
    with torch.no_grad():
        assert near(decoder(ids)["logits"], model(input_ids=ids, use_cache=False).logits)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(decoder.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_text_does_not_depend_on_threads(threads):
    model = small(NATIVE["Llama"])
    alone = Decoder(model)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    wanted = alone.generate(prompt(), **settings)
    made = Decoder(model, threads=threads)
    assert torch.equal(made.generate(prompt(), **settings), wanted)
    assert near(made(prompt(2, 33))["logits"], alone(prompt(2, 33))["logits"])


def test_two_threads_of_the_program_may_use_two_decoders():
    model = small(NATIVE["Llama"])
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    decoders = [Decoder(model, threads=2) for _ in range(2)]
    wanted = decoders[0].generate(prompt(), **settings)
    found = [None, None]

    def run(i):
        found[i] = decoders[i].generate(prompt(), **settings)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made, wanted) for made in found)


def test_an_interrupted_generation_leaves_nothing_broken(llama):
    _, decoder = llama

    class Breaks:
        def put(self, value):
            if value.numel() == 1:
                raise KeyboardInterrupt

        def end(self):
            raise AssertionError

    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    wanted = decoder.generate(prompt(), **settings)
    with pytest.raises(KeyboardInterrupt):
        decoder.generate(prompt(1, 30, seed=4), streamer=Breaks(), **settings)
    assert torch.equal(decoder.generate(prompt(), **settings), wanted)


def test_it_is_evaluated_in_the_models_place(llama):
    model, decoder = llama
    windows = [{"input_ids": prompt(1, 24, seed=i)} for i in range(9)]
    ours, stock = evaluate(decoder, windows), evaluate(model, windows)
    assert ours.bytes == stock.bytes
    assert ours.perplexity.value == pytest.approx(stock.perplexity.value, rel=1e-3)
    ids = windows[0]["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert float(decoder.nll(ids)) == pytest.approx(float(loss), rel=1e-3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda d: d.generate(None), "`input_ids` must be a matrix of at least one token id"),
        (lambda d: d.generate(torch.zeros(1, 0, dtype=torch.long)), "`input_ids` must be a matrix of at least one"),
        (lambda d: d.generate(torch.tensor([1, 2])), "`input_ids` must be a matrix"),
        (lambda d: d(torch.tensor([[1, 67]])), r"`input_ids` must be in \[0, 67\)"),
        (lambda d: d(torch.tensor([[1, -1]])), r"`input_ids` must be in \[0, 67\)"),
        (lambda d: d(torch.ones(1, 641, dtype=torch.long)), "at most 640 tokens, the model's context; got 641"),
        (lambda d: d.generate(torch.ones(1, 641, dtype=torch.long), max_new_tokens=1), "at most 640 tokens"),
        (lambda d: d.generate(prompt(1, 630), max_new_tokens=30), "`max_new_tokens` must be at most"),
        (lambda d: d(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]])), "row of padding only"),
        (lambda d: d(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4)), "`attention_mask` must be of the shape"),
        (lambda d: Decoder(d.model, head="int4"), "`head` must be 'int8' or 'exact'"),
        (lambda d: Decoder(d.model, cache_dtype=torch.int8), "`cache_dtype` must be torch.float32 or torch.float16"),
        (lambda d: Decoder(d.model, activation_bits=4), "`activation_bits` must be 16 or 8"),
        (lambda d: Decoder(d.model, threads=0), "`threads` must be an int between 1 and 64"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(llama, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(llama[1])


def test_logits_that_are_no_numbers_are_refused():
    model = small(NATIVE["Llama"])
    decoder = Decoder(model)
    model.model.embed_tokens.weight.data[5] = float("nan")  # the compiled side reads the same memory
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        decoder.generate(torch.tensor([[5]]), max_new_tokens=2, do_sample=False)
