"""Discovery against the tables: what shares an input, what absorbs a scale, and that smoothing changes nothing.

Tiny random models of many families, every parameter drawn at random (norms that are all ones and biases that are zero
would hide a wrong fold). Hugging Face norms and routers compute in float32 whatever the model's precision; here they
are made to stay in float64, so that an exact fold shows as 1e-10 and a nearly right one does not.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.quant import fold, quantize, rtn
from planish.quant.experts import unfuse
from planish.quant.moments import measure
from planish.quant.sites import find_sites
from planish.quant.stream import Stream, first_tensor
from planish.quant.transforms import Scale

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA = {**COMMON, "num_key_value_heads": 4}
HEADS = {**COMMON, "head_dim": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPT = {
    "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, **IDS,
}  # fmt: skip
ENCODER = {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads",)}
SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 1, **IDS,
}  # fmt: skip

# What the tables say. One line a site, in order of execution: consumers <- producer, "*" for a map that is not one to
# one (shared heads, a slice of a fused layer), "online" where nothing can absorb a scale exactly.
ATTENTION = ["self_attn.q_proj+self_attn.k_proj+self_attn.v_proj <- input_layernorm"]
GATED = ["mlp.gate_proj+mlp.up_proj <- post_attention_layernorm", "mlp.down_proj <- mlp.up_proj"]
LLAMA = [*ATTENTION, "self_attn.o_proj <- self_attn.v_proj", *GATED]
GROUPED = [*ATTENTION, "self_attn.o_proj <- self_attn.v_proj *", *GATED]
GEMMA2 = [*GROUPED[:2], "mlp.gate_proj+mlp.up_proj <- pre_feedforward_layernorm", "mlp.down_proj <- mlp.up_proj"]

FAMILIES = {
    "Llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**MHA)), LLAMA),
    "Llama, grouped queries": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)), GROUPED),
    "Llama, one key-value head": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**COMMON, "num_key_value_heads": 1, "head_dim": 16})), GROUPED,
    ),
    "Llama, biases": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True)), GROUPED,
    ),
    "Llama, tied": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, tie_word_embeddings=True)), GROUPED),
    "Mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**COMMON)), GROUPED),
    "Qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**COMMON)), GROUPED),
    "Qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADS)), GROUPED),
    "Gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**HEADS)), GROUPED),
    "Gemma 2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**HEADS)), GEMMA2),
    "Gemma 3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**HEADS)), GEMMA2),
    "Phi": (
        lambda: hf.PhiForCausalLM(hf.PhiConfig(**MHA)),
        [
            "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj+mlp.fc1 <- input_layernorm",
            "self_attn.dense <- self_attn.v_proj",
            "mlp.fc2 online",
        ],
    ),
    "Phi-3": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**COMMON)),
        [
            "self_attn.qkv_proj <- input_layernorm",
            "self_attn.o_proj <- self_attn.qkv_proj *",
            "mlp.gate_up_proj <- post_attention_layernorm",
            "mlp.down_proj <- mlp.gate_up_proj *",
        ],
    ),
    "GPT-2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS)),
        ["attn.c_attn <- ln_1", "attn.c_proj <- attn.c_attn *", "mlp.c_fc <- ln_2", "mlp.c_proj online"],
    ),
    "GPT-NeoX": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**ENCODER)),
        [
            "attention.query_key_value <- input_layernorm",
            "attention.dense <- attention.query_key_value *",
            "mlp.dense_h_to_4h <- post_attention_layernorm",
            "mlp.dense_4h_to_h online",
        ],
    ),
    "OPT": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=32)),
        [
            "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj <- self_attn_layer_norm",
            "self_attn.out_proj <- self_attn.v_proj",
            "fc1 <- final_layer_norm",
            "fc2 <- fc1",
        ],
    ),
    "OPT, norms after": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
        [
            "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj online",
            "self_attn.out_proj <- self_attn.v_proj",
            "fc1 online",
            "fc2 <- fc1",
        ],
    ),
    "Cohere": (
        lambda: hf.CohereForCausalLM(hf.CohereConfig(**COMMON)),
        [
            "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj+mlp.gate_proj+mlp.up_proj <- input_layernorm",
            "self_attn.o_proj <- self_attn.v_proj *",
            "mlp.down_proj <- mlp.up_proj",
        ],
    ),
    "BERT": (
        lambda: hf.BertModel(hf.BertConfig(**ENCODER)),
        [
            "attention.self.query+attention.self.key+attention.self.value online",
            "attention.output.dense <- attention.self.value",
            "intermediate.dense online",
            "output.dense online",
        ],
    ),
    "ViT": (
        lambda: hf.ViTModel(hf.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
            patch_size=4,
        )),
        [
            "attention.q_proj+attention.k_proj+attention.v_proj <- layernorm_before",
            "attention.o_proj <- attention.v_proj",
            "mlp.fc1 <- layernorm_after",
            "mlp.fc2 online",
        ],
    ),
    "T5": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0,
        )),
        [
            "layer.0.SelfAttention.q+layer.0.SelfAttention.k+layer.0.SelfAttention.v <- layer.0.layer_norm",
            "layer.0.SelfAttention.o <- layer.0.SelfAttention.v",
            "layer.1.EncDecAttention.q <- layer.1.layer_norm",
            "layer.1.EncDecAttention.k+layer.1.EncDecAttention.v online",  # what they read comes from the other stack
            "layer.1.EncDecAttention.o <- layer.1.EncDecAttention.v",
            "layer.2.DenseReluDense.wi <- layer.2.layer_norm",
            "layer.2.DenseReluDense.wo <- layer.2.DenseReluDense.wi",
        ],
    ),
    "BART": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ)),
        [
            "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj online",
            "self_attn.out_proj <- self_attn.v_proj",
            "encoder_attn.q_proj online",
            "encoder_attn.k_proj+encoder_attn.v_proj online",
            "encoder_attn.out_proj <- encoder_attn.v_proj",
            "fc1 online",
            "fc2 online",
        ],
    ),
}  # fmt: skip
EXPERTS = [f"mlp.experts.{e}" for e in range(4)]
EXPERTS_IN = "+".join(f"{e}.gate_proj+{e}.up_proj" for e in EXPERTS)
EXPERTS_OUT = [f"{e}.down_proj <- {e}.up_proj" for e in EXPERTS]
QWEN_MOE = {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES = {
    "Mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**COMMON, num_local_experts=4)),
        [*GROUPED[:2], f"{EXPERTS_IN} <- post_attention_layernorm", *EXPERTS_OUT],
    ),
    "Qwen2-MoE": (
        lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**QWEN_MOE, shared_expert_intermediate_size=40)),
        [
            *GROUPED[:2],
            f"mlp.shared_expert.gate_proj+mlp.shared_expert.up_proj+{EXPERTS_IN} <- post_attention_layernorm",
            "mlp.shared_expert.down_proj <- mlp.shared_expert.up_proj",
            *EXPERTS_OUT,
        ],
    ),
    "Qwen3-MoE": (
        lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN_MOE, head_dim=8)),
        [*GROUPED[:2], f"{EXPERTS_IN} <- post_attention_layernorm", *EXPERTS_OUT],
    ),
}
FAMILIES |= MIXTURES
EACH = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with every parameter random, of a size at which neither attention nor activations saturate."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            offset = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
            spread = 0.3 if p.ndim == 1 else 1.0 / p.shape[-1] ** 0.5
            p.copy_(offset + spread * torch.randn(p.shape, generator=g))
    return model.to(dtype).eval()


def batches(family: str) -> list:
    """Two batches of different lengths, every row of the first padded on the left (some models answer NaN there)."""
    g = torch.Generator().manual_seed(2)
    if family == "ViT":
        return [torch.randn(2, 3, 16, 16, generator=g, dtype=torch.float64) for _ in range(2)]
    made = []
    for length in (9, 6):
        ids = torch.randint(3, 64, (2, length), generator=g)
        mask = torch.ones_like(ids)
        if length == 9:
            mask[0, :1], mask[1, :3] = 0, 0
        made.append({"input_ids": ids, "attention_mask": mask})
        if family in ("T5", "BART"):
            made[-1]["decoder_input_ids"] = torch.randint(3, 64, (2, length - 1), generator=g)
    return made


def answer(model: nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch) if isinstance(batch, dict) else model(batch)
    return output.logits if "logits" in output else output.last_hidden_state


def seen(batch, values: torch.Tensor) -> torch.Tensor:
    """What belongs to real tokens."""
    mask = batch.get("attention_mask") if isinstance(batch, dict) and "decoder_input_ids" not in batch else None
    return values if mask is None or mask.shape != values.shape[:2] else values[mask.bool()]


@pytest.fixture
def float64_throughout(monkeypatch):
    """Keep what Hugging Face would compute in float32 (norms, routers) in float64."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def keep(self, *args, **kwargs):
        out = to(self, *args, **kwargs)
        return self if self.dtype == torch.float64 and out.dtype == torch.float32 else out

    def keep_softmax(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to(self, torch.float32)
    )
    monkeypatch.setattr(torch.nn.functional, "softmax", keep_softmax)


def random_scale(site, seed: int) -> Scale:
    channels = next(iter(site.weights.values())).shape[1]
    g = torch.Generator().manual_seed(seed)
    return Scale(site.tied(torch.randn(channels, generator=g, dtype=torch.float64).exp()))


def line(site, folded: bool) -> str:
    return (
        f"{site.kind} <- {site.producer_name}{' *' * (site.channels is not None)}" if folded else f"{site.kind} online"
    )


@EACH
def test_sites_folds_and_an_unchanged_function(family, float64_throughout):
    model, data = build(family), batches(family)
    if family in MIXTURES:  # grouped kernels know no float64
        model.config._experts_implementation = "eager"
    before = [answer(model, batch) for batch in data]
    unfuse(model)
    stream = Stream(model, data)
    hidden, known = stream.start(), {}
    for index in range(len(stream.modules)):
        block = stream.block(index, hidden)
        sites = find_sites(block, lambda name: False, known)
        hidden = measure(block, sites)
        found = [line(site, fold.apply(block, random_scale(site, i), site)) for i, site in enumerate(sites)]
        assert found == FAMILIES[family][1], f"block {index}"
    assert len(stream.modules) == 2
    for batch, old in zip(data, before, strict=True):
        new = answer(model, batch)
        assert not torch.equal(new, old)  # it did go through other numbers
        assert torch.allclose(seen(batch, new), seen(batch, old), rtol=1e-10, atol=1e-10)


@EACH
def test_the_walk_is_the_model_s_own_forward(family):
    model, data = build(family), batches(family)
    unfuse(model)
    stream = Stream(model, data)
    hidden = stream.start()
    walked = []
    for index in range(len(stream.modules)):
        hidden = list(stream.block(index, hidden).run())
        walked.append(hidden)
    seen_by = {name: [] for name in stream.names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, n=name: seen_by[n].append(first_tensor(out)))
        for name in stream.names
    ]
    finals = [answer(model, batch) for batch in data]
    for handle in handles:
        handle.remove()
    for name, states in zip(stream.names, walked, strict=True):
        for ours, theirs in zip(states, seen_by[name], strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True), name
    for output, theirs in zip(stream.outputs(hidden), finals, strict=True):
        ours = output.logits if "logits" in output else output.last_hidden_state
        assert torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)


@EACH
def test_the_quantized_model_is_what_the_report_speaks_of(family):
    model, data = build(family, torch.float32), batches(family)
    data = [b.float() if isinstance(b, torch.Tensor) else b for b in data]
    last = Stream(model, data).names[-1]

    def states():
        kept = []
        handle = model.get_submodule(last).register_forward_hook(lambda m, a, out: kept.append(first_tensor(out)))
        for batch in data:
            answer(model, batch)
        handle.remove()
        return kept

    before = states()
    report = quantize(model, data, rtn(bits=4, group_size=8))
    after = states()
    before, after = ([seen(b, v) for b, v in zip(data, values, strict=True)] for values in (before, after))
    gap = sum((a - b).square().sum() for a, b in zip(after, before, strict=True))
    size = sum(b.square().sum() for b in before)
    assert report.blocks[-1].error == pytest.approx(float(gap / size), rel=1e-3)
    assert 1e-6 < report.blocks[-1].error < 0.2
    assert [b.sites for b in report.blocks][-2:] == [len(FAMILIES[family][1])] * 2
    inside = last.rpartition(".")[0] + "."
    small = [n for n in report.left_in_float if n.startswith(inside)]
    assert [n.split(".", 3)[-1] for n in small] == ["mlp.shared_expert_gate"] * (2 if family == "Qwen2-MoE" else 0)
    both = family in ("T5", "BART")  # the encoder's blocks, then the decoder's
    assert len(report.blocks) == (4 if both else 2)
    assert report.left_in_float == ["lm_head"] or not both


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama, tied", "Gemma 2", "GPT-2", "OPT", "BERT", "Mixtral"])
def test_half_precision_models_stay_half_and_fold_as_much(family, dtype):
    data = batches(family)

    def smooth(site, method):
        return random_scale(site, len(site.kind))

    method = replace(rtn(bits=8, group_size=8), transform=smooth)
    model, wide = build(family, dtype), build(family, dtype).float()  # the same values, stored in full
    ours, theirs = quantize(model, data, method), quantize(wide, data, method)
    expected = [not row.endswith("online") for row in FAMILIES[family][1]]
    assert [list(b.folded.values()) for b in ours.blocks] == [expected] * 2
    assert all(p.dtype == dtype for p in model.parameters())
    assert answer(model, data[0]).dtype == dtype
    # what stays in half precision is rounded once more after the fold: 2**-9 of it, for bfloat16
    assert ours.blocks[0].error == pytest.approx(theirs.blocks[0].error, rel=0.3, abs=1e-4)
