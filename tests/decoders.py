"""Tiny random decoders of many families: what the native decoder runs, and what it leaves to transformers."""

import pytest
import torch

from planish.quant import quantize, rtn

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()

COMMON = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 640, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {**COMMON, "head_dim": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 160}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
NATIVE = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)),
    "Llama, one key-value head": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**COMMON, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 24})
    ),
    "Llama, biases, tied": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "Llama, gelu": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, hidden_act="gelu")),
    "Llama 3's positions": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, rope_parameters=LLAMA3)),
    "yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, rope_parameters=YARN)),
    "linear": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON, rope_parameters=LINEAR)),
    "Mistral, window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**COMMON, sliding_window=9)),
    "Qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**COMMON)),
    "Qwen2, window in some layers": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=9, max_window_layers=1)
    ),
    "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADS)),
    "Gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**HEADS)),
    "Gemma 2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **HEADS, sliding_window=9, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
        )
    ),
    "Gemma 3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**HEADS, sliding_window=9)),
    "Phi-3, part of each head turned": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(
            **COMMON, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        )
    ),
    "SmolLM3, a layer without positions": lambda: hf.SmolLM3ForCausalLM(
        hf.SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1])
    ),
}
STOCK = {
    "GPT-2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, **IDS)),
        "turns positions in 0 modules",
    ),
    "OPT": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=67, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, word_embed_proj_dim=32, **IDS,
            )
        ),
        "turns positions in 0 modules",
    ),
    "GPT-NeoX": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{k: v for k, v in COMMON.items() if "key_value" not in k})),
        "widths of a block",
    ),
    "Mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**COMMON)), "linear layers"),
    "OLMo 2": (lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**COMMON)), "norms 32 channels together"),
    "Granite": (
        lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**COMMON, residual_multiplier=0.3)), "logits in a prompt differ",
    ),
    "Cohere": (lambda: hf.CohereForCausalLM(hf.CohereConfig(**COMMON)), "neighbouring channels"),
    "positions that depend on the length": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
        ),
        "depend on the length",
    ),
}  # fmt: skip


def small(make, *, bits=4, group_size=16):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
        else:
            parameter.data.normal_(1, 0.2)
    quantize(model, [torch.randint(3, 67, (2, 16))], rtn(bits=bits, group_size=group_size))
    return model


def prompt(batch=1, tokens=20, seed=1):
    return torch.randint(3, 67, (batch, tokens), generator=torch.Generator().manual_seed(seed))
