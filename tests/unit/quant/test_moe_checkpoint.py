"""Mixtures of experts on disk: the names of stock engines, one set of tensors a linear, and the way back."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish._support import CheckpointError
from planish.quant import QLinear, export, load, quantize, rtn, save
from planish.quant.experts import Experts, fused_experts
from planish.quant.files import read_tensors
from planish.quant.naming import renamed, stock_names
from planish.quant.transforms import Scale

hf = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN = {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OWN = "model.layers.{n}.mlp.experts.{e}.{p}"
FAMILIES = {
    "Mixtral": SimpleNamespace(
        make=lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**COMMON, num_local_experts=4)),
        expert="model.layers.{n}.block_sparse_moe.experts.{e}.{p}",
        parts=("w1", "w3", "w2"),
        routers=["model.layers.{n}.block_sparse_moe.gate"],
    ),
    "Qwen3-MoE": SimpleNamespace(
        make=lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN, head_dim=8)),
        expert=OWN,
        parts=("gate_proj", "up_proj", "down_proj"),
        routers=["model.layers.{n}.mlp.gate"],
    ),
    "Qwen2-MoE": SimpleNamespace(
        make=lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=40)),
        expert=OWN,
        parts=("gate_proj", "up_proj", "down_proj"),
        routers=["model.layers.{n}.mlp.shared_expert_gate", "model.layers.{n}.mlp.gate"],
    ),
}
EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
TOKENS = torch.randint(3, 64, (4, 30), generator=torch.Generator().manual_seed(0))


def small(family, **method):
    model = family.make().eval()
    quantize(model, [{"input_ids": TOKENS}], rtn(**{"group_size": 8, "scale_dtype": "float32", **method}))
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def described(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


@EACH
def test_every_expert_has_tensors_under_the_name_that_stock_engines_read(family, tmp_path):
    model = small(family)
    assert save(model, tmp_path / "m") == "compressed-tensors"
    stored = read_tensors(tmp_path / "m")
    for n in range(2):
        for e in range(4):
            for ours, theirs in zip(("gate_proj", "up_proj", "down_proj"), family.parts, strict=True):
                layer = model.get_submodule(OWN.format(n=n, e=e, p=ours))
                name = family.expert.format(n=n, e=e, p=theirs)
                for key, tensor in layer.state_dict().items():
                    assert torch.equal(stored[f"{name}.{key}"], tensor), f"{name}.{key}"
    family_s_own = family.make().eval()
    family_s_own.save_pretrained(tmp_path / "float")  # by transformers: what its readers look for
    theirs = {name.rpartition(".")[0] for name in read_tensors(tmp_path / "float")}
    assert {name.rpartition(".")[0] for name in stored} == theirs
    routers = {name.format(n=n) for n in range(2) for name in family.routers}
    assert set(described(tmp_path / "m")["ignore"]) == {"lm_head", *routers}


@EACH
@pytest.mark.parametrize("layout", ["compressed-tensors", "planish"])
def test_what_was_saved_comes_back_bit_for_bit(family, layout, tmp_path):
    model = small(family)
    save(model, tmp_path / "m", layout=layout)
    again, into = load(tmp_path / "m"), load(tmp_path / "m", into=family.make().eval())
    for twin in (again, into):
        assert torch.equal(logits(twin), logits(model))
        ours, theirs = model.state_dict(), twin.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert save(again, tmp_path / "again", layout=layout) == layout
    first, second = read_tensors(tmp_path / "m"), read_tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@EACH
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_stock_transformers_reads_the_experts(family, tmp_path):
    pytest.importorskip("compressed_tensors", minversion="0.15")
    model = small(family, symmetric=True)
    save(model, tmp_path / "m")
    config = hf.CompressedTensorsConfig(dequantize=True)
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config)
    for n in range(2):
        fused, ours = stock.model.layers[n].mlp.experts, model.model.layers[n].mlp.experts
        for e, expert in enumerate(ours.children()):
            dense = {part: getattr(expert, part).dequantize().weight for part in ("gate_proj", "up_proj", "down_proj")}
            assert torch.equal(fused.gate_up_proj[e], torch.cat([dense["gate_proj"], dense["up_proj"]]))
            assert torch.equal(fused.down_proj[e], dense["down_proj"])


@EACH
def test_experts_in_float_beside_rounded_attention(family, tmp_path):
    model = family.make().eval()
    skip = ("lm_head", "*.experts.*")
    quantize(model, [{"input_ids": TOKENS}], rtn(group_size=8, scale_dtype="float32"), skip=skip)
    assert save(model, tmp_path / "m") == "compressed-tensors"
    assert f"{family.expert.format(n=0, e=3, p=family.parts[2])}.weight" in read_tensors(tmp_path / "m")
    assert family.expert.format(n=1, e=0, p=family.parts[0]) in described(tmp_path / "m")["ignore"]
    assert torch.equal(logits(load(tmp_path / "m")), logits(model))


@EACH
def test_a_float_model_whose_experts_were_taken_apart_is_an_ordinary_one_on_disk(family, tmp_path):
    model = small(family)
    before = logits(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QLinear):
            model.set_submodule(name, layer.dequantize())
    assert save(model, tmp_path / "m", rounded=False) == "float"
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert fused_experts(stock)
    torch.testing.assert_close(logits(stock), before)
    assert torch.equal(logits(load(tmp_path / "m")), logits(model))


@EACH
def test_our_own_layout_keeps_the_model_s_names_and_transformers_reads_it_by_the_plugin(family, tmp_path):
    import planish.plugins.transformers  # noqa: F401

    model = small(family)
    channels = model.model.layers[0].mlp.experts.get_submodule("2.down_proj").in_features
    model.model.layers[0].mlp.experts.get_submodule("2.down_proj").transform = Scale(torch.rand(channels) + 0.5)
    save(model, tmp_path / "m", layout="planish")
    assert torch.equal(logits(load(tmp_path / "m")), logits(model))
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(theirs), logits(model))
    theirs.save_pretrained(tmp_path / "again")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    headless = hf.AutoModel.from_pretrained(tmp_path / "m")
    assert torch.equal(headless(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


@EACH
def test_transcoding_changes_the_names_with_the_layout(family, tmp_path):
    model = small(family)
    save(model, tmp_path / "own", layout="planish")
    save(model, tmp_path / "stock")
    export(tmp_path / "own", tmp_path / "a", "compressed-tensors")
    export(tmp_path / "stock", tmp_path / "b", "planish")
    for made, wanted in (("a", "stock"), ("b", "own")):
        ours, theirs = read_tensors(tmp_path / made), read_tensors(tmp_path / wanted)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert described(tmp_path / made) == described(tmp_path / wanted)


def test_a_checkpoint_that_does_not_fit_leaves_the_experts_as_they_were(tmp_path):
    family = FAMILIES["Qwen3-MoE"]
    save(small(family), tmp_path / "m")
    other = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**QWEN, "num_experts": 5}, head_dim=8))
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"`model\.layers\.0\.mlp\..*is missing|must have shape"):
        load(tmp_path / "m", into=other)
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_one_part_under_two_names_is_refused():
    model = small(FAMILIES["Mixtral"])
    names = {stock: own for own, stock in stock_names(model).items()}
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    from planish.quant.directory import Checkpoint

    both = ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight")
    with pytest.raises(CheckpointError, match="holds a part twice"):
        renamed(Checkpoint({}, {}, {name: torch.zeros(4, 32) for name in both}), names)


def test_models_without_experts_keep_their_names():
    assert stock_names(nn.Sequential(nn.Linear(16, 16))) == {}
    assert stock_names(hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON))) == {}
