"""Layers with widths of their own, trained under noise, as stock engines read them, and as vLLM fuses them."""

import json

import pytest
import torch

from planish.quant import QLinear, nipq, quantize, save
from planish.quant.methods.nipq import attach, cost, freeze, learned, param_groups, widths

transformers = pytest.importorskip("transformers", minversion="5.16")
pytest.importorskip("compressed_tensors")
TOKENS = torch.arange(24).reshape(1, 24)
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def tiny():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=96, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def fused_alike(bits):
    for name in bits:
        parent, _, last = name.rpartition(".")
        for group in FUSED:
            if last in group and len({bits[f"{parent}.{part}"] for part in group}) != 1:
                return False
    return True


def test_a_decoder_trained_under_noise_is_read_by_stock_transformers(tmp_path):
    model = tiny().train()
    names = attach(model, {"input_ids": TOKENS}, bits=5, group_size=32, generator=torch.Generator().manual_seed(0))
    assert len(names) == 14 and "lm_head" not in names
    optimizer = torch.optim.Adam(param_groups(model, 1e-3, bits_lr=0.2))
    for _ in range(3):
        optimizer.zero_grad()
        (model(input_ids=TOKENS, labels=TOKENS).loss + cost(model)).backward()
        optimizer.step()
    assert fused_alike({name: bits for name, (bits, _) in widths(model).items()})
    assert len({round(bits, 3) for bits, _ in widths(model).values()}) == 8, "four sites in each of two blocks"
    assert all(model.get_submodule(n).parametrizations.weight.original.grad.isfinite().all() for n in names)
    bits = freeze(model, widths=(4, 8))
    assert fused_alike(bits) and set(bits.values()) == {4, 8}
    model.eval()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        report = quantize(model, [{"input_ids": TOKENS}], learned(model))
        assert all(type(model.get_submodule(n)) is QLinear for n in names) and "nipq(" in report.method
        torch.testing.assert_close(model(input_ids=TOKENS).logits, before, atol=2e-3, rtol=1e-3)
        assert save(model, tmp_path / "a") == "compressed-tensors"
        groups = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["config_groups"]
        assert sorted(g["weights"]["num_bits"] for g in groups.values()) == [4, 8]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        torch.testing.assert_close(theirs(input_ids=TOKENS).logits, before, atol=2e-3, rtol=1e-3)


def test_allocated_widths_agree_where_engines_fuse():
    model = tiny().eval()
    report = quantize(model, [{"input_ids": TOKENS}], nipq(bits=4, group_size=32))
    bits = {n: m.format.bits for n, m in model.named_modules() if isinstance(m, QLinear)}
    assert fused_alike(bits) and report.search["objective"] == "kl"
    sizes = {n: model.get_submodule(n).in_features * model.get_submodule(n).out_features for n in bits}
    assert sum(bits[n] * sizes[n] for n in bits) <= 4 * sum(sizes.values())
