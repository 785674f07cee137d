"""transformers' own verbs on our checkpoints: from_pretrained, generate, save_pretrained, dequantize."""

import importlib
import json

import pytest
import torch

from planish._support import CheckpointError, PlanishWarning
from planish.quant import FP4, Affine, QLinear, load, quantize, rtn, save
from planish.quant.transforms import Chain, Permute, Rotate, Scale, Shift

transformers = pytest.importorskip("transformers", minversion="5.16")
TOKENS = torch.arange(24).reshape(1, 24)


@pytest.fixture(scope="module")
def plugin():
    return importlib.import_module("planish.plugins.transformers")


def tiny(dtype=torch.float32, tie=True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=96, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, tie_word_embeddings=tie, dtype=dtype,
    )  # fmt: skip
    return transformers.LlamaForCausalLM._from_config(config).eval()


def rich(dtype=torch.float32, tie=True):
    """A quantized model with every part that a layer can have."""
    model = tiny(dtype, tie)
    quantize(model, [TOKENS], rtn(group_size=32))
    old = model.model.layers[0].self_attn.q_proj
    basis = torch.linalg.qr(torch.randn(2, 32, 32)).Q
    steps = Chain(Scale(torch.rand(64) + 0.5), Permute(torch.randperm(64)), Shift(torch.randn(64)), Rotate(basis))
    branch = (torch.randn(3, 64), torch.randn(64, 3))
    made = QLinear.of(old.weight, old.bias, transform=steps, act=Affine(8, None), low_rank=branch)
    made.add_lora("style", torch.randn(2, 64).half(), torch.randn(64, 2), 0.5)
    model.model.layers[0].self_attn.q_proj = made
    dense = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = QLinear.of(FP4().encode(dense.weight.decode()), act=FP4())
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tie", [True, False])
def test_from_pretrained_generate_save_pretrained(tmp_path, plugin, dtype, tie):
    model = rich(dtype, tie)
    save(model, tmp_path / "a", layout="planish")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert theirs.dtype == dtype
    assert same(theirs, model)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(theirs.generate(TOKENS, **options), model.generate(TOKENS, **options))
    theirs.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert same(again, model)
    ours = load(tmp_path / "b")
    assert same(ours, model)
    ours.save_pretrained(tmp_path / "c")
    assert torch.equal(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")(TOKENS).logits, model(TOKENS).logits
    )


def test_a_model_without_its_head(tmp_path, plugin):
    model = rich()
    save(model, tmp_path / "a", layout="planish")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "a")
    assert torch.equal(theirs(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


def test_load_needs_no_plugin_and_keeps_ties(tmp_path):
    model = rich()
    save(model, tmp_path / "a", layout="planish")
    ours = load(tmp_path / "a")
    assert same(ours, model)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert not ours.training
    assert torch.equal(ours(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("symmetric", [True, False])
def test_stock_compressed_tensors_become_our_layers(tmp_path, symmetric):
    """A checkpoint that compressed-tensors itself packed, read by `load`."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    model = tiny()
    quantize(model, [TOKENS], rtn(group_size=32, symmetric=symmetric))
    save(model, tmp_path / "a")
    (tmp_path / "a" / "planish.json").unlink()
    writer = pytest.importorskip("safetensors.torch")
    tensors = writer.load_file(tmp_path / "a" / "model.safetensors")
    for name, layer in model.named_modules():
        if isinstance(layer, QLinear):
            tensors[f"{name}.weight_packed"] = helpers.pack_to_int32(layer.weight.codes.to(torch.int8) - 8, 4)
            if not symmetric:
                zeros = layer.zeros().to(torch.int8) - 8
                tensors[f"{name}.weight_zero_point"] = helpers.pack_to_int32(zeros, 4, packed_dim=0).contiguous()
    writer.save_file(tensors, tmp_path / "a" / "model.safetensors")
    assert torch.equal(load(tmp_path / "a")(TOKENS).logits, model(TOKENS).logits)


def test_dequantize_gives_an_ordinary_model(tmp_path, plugin):
    model = tiny()
    quantize(model, [TOKENS], rtn(group_size=32))
    save(model, tmp_path / "a", layout="planish")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").dequantize()
    assert not any(isinstance(m, QLinear) for m in theirs.modules())
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits)
    theirs.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_dequantize_refuses_rounded_inputs(tmp_path, plugin):
    save(rich(), tmp_path / "a", layout="planish")
    with pytest.raises(ValueError, match=r"`model.layers.0.self_attn.q_proj` rounds its inputs"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").dequantize()


def test_the_plugin_may_be_imported_again(plugin):
    importlib.reload(plugin)


def test_damaged_descriptions_are_refused(tmp_path, plugin):
    save(rich(), tmp_path / "a", layout="planish")
    path = tmp_path / "a" / "config.json"
    whole = json.loads(path.read_text())
    name = "model.layers.0.mlp.up_proj"
    for change, match in [
        (lambda q: q.update(format_version=2), "format_version must be 1; got 2"),
        (lambda q: q["layers"].update({"model.nowhere": q["layers"][name]}), "the model has no such layer"),
        (lambda q: q["layers"][name].update({"in": 32}), "the model has 64 -> 128 there, the checkpoint 32 -> 128"),
        (lambda q: q["layers"][name].update({"weight": {"kind": "Dual"}}), "a weight is Affine or FP4"),
    ]:
        config = json.loads(json.dumps(whole))
        change(config["quantization_config"])
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=match):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_a_model_read_from_gguf_is_saved_as_an_ordinary_one(tmp_path):
    """transformers marks such models as quantized and refuses to save them; `save` does not."""
    pytest.importorskip("gguf")
    from planish.quant import export

    model = tiny()
    quantize(model, [TOKENS], rtn(group_size=32, symmetric=True))
    save(model, tmp_path / "a")
    export(tmp_path / "a", tmp_path / "m.gguf", "gguf")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert save(dense, tmp_path / "b", rounded=False) == "float"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again(TOKENS).logits, dense(TOKENS).logits)


def test_transposed_dense_layers_go_to_our_layout(tmp_path):
    """GPT-2's Conv1D: stock readers of compressed-tensors expect nn.Linear."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, vocab_size=96)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    quantize(model, [TOKENS], rtn(group_size=32))
    with pytest.raises(CheckpointError, match=r"something other than nn.Linear"):
        save(model, tmp_path / "a", layout="compressed-tensors")
    save(model, tmp_path / "a", layout="planish")
    assert torch.equal(load(tmp_path / "a")(TOKENS).logits, model(TOKENS).logits)


def test_a_layer_kept_in_our_layout_is_announced(tmp_path):
    model = tiny()
    quantize(model, [TOKENS], rtn(group_size=32))
    model.model.layers[0].mlp.up_proj.transform = Scale(torch.ones(64))
    with pytest.warns(PlanishWarning, match="`model.layers.0.mlp.up_proj`: a transform stays online"):
        assert save(model, tmp_path / "m") == "planish"
