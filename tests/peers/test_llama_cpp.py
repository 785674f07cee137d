"""llama.cpp itself runs our GGUF files: its next-token probabilities against those of the model that was exported."""

from pathlib import Path

import pytest
import torch

from planish.quant import export, load, quantize, rtn, save, sources

xllamacpp = pytest.importorskip("xllamacpp")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("gguf")
VOCAB = 288


def tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer: 256 bytes, one merge (llama.cpp insists on some), one name."""
    bytes_ = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    merge = ("\u0120", "t")  # a space and a t
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={**bytes_, "".join(merge): 256}, merges=[merge]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>")
    fast.save_pretrained(path)


def tiny(symmetric):
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # so that some tokens are far likelier than others
        parameter.data *= 1 if parameter.ndim == 1 else 4
    model.lm_head.weight.data[256:] *= 0.01  # a text that ends at once has no probabilities to show
    ids = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(1))
    quantize(model, [ids], rtn(group_size=32, symmetric=symmetric))
    return model


def theirs(path: Path, ids: list[int], vocabulary: int) -> torch.Tensor:
    """llama.cpp's log-probabilities of the token after `ids`."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": ids, "max_tokens": 1, "logprobs": vocabulary, "temperature": 0.0, "cache_prompt": False}
    )
    scores = torch.full((vocabulary,), float("-inf"))
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        scores[entry["id"]] = entry["logprob"]
    return scores


def agree(path: Path, model: torch.nn.Module, ids: list[int], kl: float) -> None:
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    scores = theirs(path, ids, len(ours))
    known = torch.isfinite(scores)
    assert known.sum() >= 0.9 * len(ours)
    assert scores.argmax() == ours.argmax()
    gap = (ours.exp() * (ours - scores))[known].sum()
    assert abs(float(gap)) < kl
    assert float(ours.exp()[known].sum()) > 0.999


@pytest.mark.parametrize("symmetric", [True, False], ids=["Q4_0", "Q4_1"])
def test_llama_cpp_runs_our_export(tmp_path, symmetric):
    model = tiny(symmetric)
    save(model, tmp_path / "m")
    tokenizer(tmp_path / "m")
    found = export(tmp_path / "m", tmp_path / "m.gguf", "gguf", allow_rounding=not symmetric)
    assert set(found["layers"]) == {"Q4_0" if symmetric else "Q4_1"}
    ids = list(range(24))
    agree(tmp_path / "m.gguf", model, ids, kl=0.01)  # activations are rounded to 8 bits there
    other = tiny(symmetric)
    for layer in (other.model.layers[0].mlp.down_proj, other.model.layers[1].self_attn.o_proj):
        layer.weight_scale.neg_()
    with pytest.raises(AssertionError):  # the bound notices two layers of fourteen
        agree(tmp_path / "m.gguf", other, ids, kl=0.01)


@pytest.mark.slow
def test_llama_cpp_runs_the_default_model(tmp_path):
    source = sources.resolve("default")
    words, model = sources.open_tokenizer(source), sources.open_model(source)
    quantize(model, [torch.ones(1, 8, dtype=torch.int64)], rtn(group_size=32, symmetric=True))
    save(model, tmp_path / "m", tokenizer=words)
    export(tmp_path / "m", tmp_path / "m.gguf", "gguf")
    ids = words("The capital of France is the city of")["input_ids"]
    agree(tmp_path / "m.gguf", load(tmp_path / "m"), ids, kl=0.02)
