"""One quantized checkpoint, four engines: compressed-tensors, AWQ, GPTQ and GGUF hold the same weights, bit for bit.

The tiny model and its tokenizer are made here; any directory that `planish.save` or `planish quantize` wrote will do.
"""

import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import planish
from planish.quant import export, inspect, smoothquant_plus

words = ByteLevelBPETokenizer()
words.train_from_iterator(["smooth it, then make it small"] * 8, vocab_size=270, show_progress=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, eos_token="!", bos_token="!", unk_token="!")
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, bos_token_id=0, eos_token_id=0)).eval()
tokens = tokenizer("smooth it, then make it small", return_tensors="pt")["input_ids"]

# symmetric weights, since GPTQ's first version and GGUF's Q4_0 have no room for every zero point
report = planish.quantize(model, [{"input_ids": tokens}], smoothquant_plus(0.5, group_size=32, symmetric=True))
with tempfile.TemporaryDirectory() as home:
    source = Path(home) / "small"
    print("saved as", planish.save(model, source, tokenizer=tokenizer, report=report))
    for layout in ("awq", "gptq", "gguf"):
        out = source.with_name(f"small.{layout}")
        told = export(source, out, layout)
        print(f"{layout:<5} largest change of a weight {told['largest_change']}")
        if out.is_dir():
            twin = planish.load(out)
            print("      same logits:", torch.equal(twin(tokens).logits, planish.load(source)(tokens).logits))
    print("formats:", inspect(source)["formats"])
