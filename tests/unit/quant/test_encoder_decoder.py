"""Models of two stacks: both are walked, the decoder with what the encoder makes in each model."""

import pytest
import torch
from torch import nn

from planish.quant import Journal, assemble, best, load, open_model, quantize, rtn, save, smoothquant_plus
from planish.quant.stacks import find_stacks
from planish.quant.stream import Stream

hf = pytest.importorskip("transformers")
KINDS = {
    "T5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0,
        )
    ),
    "BART": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        )
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("kind", KINDS)


def make(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    for parameter in model.parameters():  # one draw for all would leave next to nothing to get wrong
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batches():
    g = torch.Generator().manual_seed(1)
    made = []
    for length in (9, 6):
        ids = torch.randint(3, 64, (2, length), generator=g)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        target = torch.randint(3, 64, (2, length - 1), generator=g)
        made.append({"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target})
    return made


@torch.no_grad()
def logits(model):
    return torch.cat([model(**batch).logits.flatten() for batch in batches()])


@EACH
def test_the_decoder_is_walked_with_the_encoders_answer(kind):
    """Streams of the float model, one after the other, give the model's own logits, up to float32's rounding."""
    model = make(kind)
    assert [len(names) for names, _ in find_stacks(model)] == [2, 3]
    before = []
    for number in range(2):
        stream = Stream(model, batches(), stack=number)
        hidden = stream.start(before)
        for index in range(len(stream.modules)):
            with stream.looking(index, hidden) as block:
                hidden = list(block.run())
        before.append((stream, hidden))
    ours = torch.cat([output.logits.flatten() for output in stream.outputs(hidden)])
    torch.testing.assert_close(ours, logits(model))


@EACH
def test_both_stacks_are_quantized_and_the_second_corrects_for_the_first(kind):
    reports = {}
    for method in (rtn(bits=3, group_size=16), best(bits=3, group_size=16)):
        model = make(kind)
        exact = logits(model)
        report = reports[method.name] = quantize(model, batches(), method)
        assert len(report.blocks) == 5 and report.left_in_float == ["lm_head"]
        gap = float((logits(model) - exact).norm() / exact.norm())
        assert 1e-3 < gap < 1
    assert reports["best"].blocks[-1].error < reports["rtn"].blocks[-1].error


@EACH
def test_a_search_over_a_model_of_two_stacks(kind):
    model = make(kind)
    report = quantize(model, batches(), smoothquant_plus(group_size=16))
    assert len(report.blocks) == 5 and report.search["loss"] > 0


@torch.no_grad()
@EACH
def test_saved_and_loaded(kind, tmp_path):
    model = make(kind)
    quantize(model, batches(), rtn(group_size=16))
    save(model, tmp_path / "a", layout="planish")
    assert torch.equal(logits(load(tmp_path / "a")), logits(model))


class StoppedError(Exception):
    """Raised by `progress`."""


@torch.no_grad()
@EACH
@pytest.mark.parametrize("at", [1, 2, 4])
def test_interrupted_from_disk_and_ended_with_the_same_bits(kind, at, tmp_path):
    method = best(bits=3, group_size=16)
    make(kind).save_pretrained(tmp_path / "float")
    memory = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "float").eval()
    wanted = quantize(memory, batches(), method)
    told = []

    def stop(stage, done, total):
        told.append((stage, done, total))
        if done == at and len(told) == at:
            raise StoppedError

    model, weights = open_model(tmp_path / "float")
    assert weights is not None
    where = {"weights": weights, "progress": stop}
    with pytest.raises(StoppedError):
        quantize(model, batches(), method, journal=Journal(tmp_path / "j"), **where)
    assert not [n for n, m in model.named_modules() if type(m) is not nn.Linear and n.endswith(("wi", "fc1"))]
    journal = Journal(tmp_path / "j")
    report = quantize(model, batches(), method, journal=journal, **where)
    assert told[at:] == [("quantize", n, 5) for n in range(1, 6)]
    assert [b.to_json() for b in report.blocks] == [b.to_json() for b in wanted.blocks]
    assemble(journal, model, tmp_path / "small", layout="planish")
    assert torch.equal(logits(model), logits(memory))
    assert torch.equal(logits(load(tmp_path / "small")), logits(memory))
