"""What stays in float is stored in half precision where its source was no finer, and only where that is exact."""

import json

import pytest
import torch
from torch import nn

from planish._support import CheckpointError
from planish.quant import Journal, assemble, export, inspect, load, quantize, round_kept, rtn, save, sources

TOKENS = torch.arange(24).reshape(2, 12)


def llama(**other):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True, **other)
    return transformers.LlamaForCausalLM(config).eval()


def small():
    model = llama()
    quantize(model, [TOKENS], rtn(group_size=32, symmetric=True))
    return model


@torch.no_grad()
@pytest.mark.parametrize("layout", ["compressed-tensors", "planish"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_on_disk_float32_in_every_reader(tmp_path, dtype, layout):
    model = small()
    save(model, tmp_path / "wide", layout=layout)
    exact = model(TOKENS).logits
    round_kept(model, dtype)
    rounded = model(TOKENS).logits
    assert not torch.equal(rounded, exact) and torch.allclose(rounded, exact, atol=0.02)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save(model, tmp_path / "narrow", layout=layout, kept=dtype)
    wide, narrow = (inspect(tmp_path / name)["bytes"] for name in ("wide", "narrow"))
    assert wide - narrow == 96 * 64 * 2  # the one embedding; norms stay as they are
    again = load(tmp_path / "narrow")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again(TOKENS).logits, rounded)
    into = load(tmp_path / "narrow", into=llama())
    assert torch.equal(into(TOKENS).logits, rounded)
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        transformers = pytest.importorskip("transformers")
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
        assert {p.dtype for p in stock.parameters() if p.is_floating_point()} <= {torch.float32, torch.float16}
        assert stock.model.embed_tokens.weight.dtype == torch.float32
        # ours rounds activations to 16 bits
        torch.testing.assert_close(stock(TOKENS).logits, rounded, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_any_module(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    model, x = net(), torch.ones(1, 64)
    quantize(model, [x], rtn(group_size=32), skip=("2",))
    with pytest.raises(CheckpointError, match=r"`2\.weight`.*float16.*not all its values are; round_kept") as refused:
        save(model, tmp_path / "a", kept=torch.float16)
    assert refused.value.reason == "lossy" and not (tmp_path / "a").exists()
    round_kept(model, torch.float16)
    save(model, tmp_path / "a", kept=torch.float16)
    assert torch.equal(load(tmp_path / "a", into=net())(x), model(x))


def test_half_precision_models_are_left_alone(tmp_path):
    model = llama().bfloat16()
    quantize(model, [TOKENS], rtn(group_size=32, symmetric=True, scale_dtype="bfloat16"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    round_kept(model, torch.float16)
    save(model, tmp_path / "a", kept=torch.float16)
    assert all(torch.equal(t, before[n]) for n, t in load(tmp_path / "a").state_dict().items())


@torch.no_grad()
def test_a_gguf_source_says_so(tmp_path, monkeypatch):
    """Expanded once, with a word of where it came from; the job stores the embedding at half the size."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    save(small(), tmp_path / "a")
    export(tmp_path / "a", tmp_path / "m.gguf", "gguf")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda **_: _NoTokenizer())
    source = sources.expand(tmp_path / "m.gguf")
    assert json.loads((source / "expanded.json").read_text()) == {"gguf": "m.gguf"}
    assert sources.kept_dtype(source) is torch.float16
    assert sources.kept_dtype(tmp_path / "a") is None
    (source / "expanded.json").unlink()  # a cache from before that file was written
    assert sources.expand(tmp_path / "m.gguf") == source and sources.kept_dtype(source) is torch.float16

    model, journal = sources.open_model(source), Journal(tmp_path / "journal")
    quantize(model, [TOKENS], rtn(group_size=32), journal=journal)
    assemble(journal, model, tmp_path / "b", kept=sources.kept_dtype(source))
    assert torch.equal(load(tmp_path / "b")(TOKENS).logits, model(TOKENS).logits)
    told = sources.stored(tmp_path / "b", sources.kept_dtype(source))
    assert told["bytes_stored"] == (tmp_path / "b" / "model.safetensors").stat().st_size
    assert "float16" in told["stored_as"]


class _NoTokenizer:
    def save_pretrained(self, path):
        """Write nothing."""


@pytest.mark.refuses
def test_refusals(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    quantize(model, [torch.ones(1, 64)], rtn(group_size=32), skip=("1",))
    with pytest.raises(ValueError, match=r"save: `kept` must be torch.float16, torch.bfloat16 or None; got torch.int8"):
        save(model, tmp_path / "a", kept=torch.int8)
    with pytest.raises(ValueError, match="round_kept: `dtype` must be torch.float16 or torch.bfloat16"):
        round_kept(model, torch.float64)
    before = model[1].weight.detach().clone()
    model[1].weight.data[0, 0] = 1e6
    with pytest.raises(
        ValueError, match=r"`model` must be one whose values fit float16; got 'larger ones in `1.weight`"
    ):
        round_kept(model, torch.float16)
    assert torch.equal(model[1].weight[1:], before[1:])
