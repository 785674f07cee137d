"""Quantize a language model of your own: `python quantize_a_model.py [MODEL_DIRECTORY [TEXT_FILE]]`.

Without arguments it makes a tiny random Llama, so that it runs anywhere in seconds; its words mean nothing then, the
steps are the same.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import planish
from planish.quant import smoothquant_plus


def windows(name: str, text: str, length: int = 512, count: int = 32) -> list[dict[str, torch.Tensor]]:
    ids = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return [{"input_ids": part} for part in ids.split(length, 1)[:count] if part.shape[1] == length]


if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    text = Path(sys.argv[2]).read_text(encoding="utf-8") if len(sys.argv) > 2 else planish.__doc__ * 2000
    batches = windows(sys.argv[1], text)
else:
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 256}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 256, (4, 64), generator=generator)} for _ in range(8)]
model.eval()

report = planish.quantize(model, batches, smoothquant_plus(group_size=64))  # in place
print(report)
print("alpha that the whole model likes best:", report.search["alpha"])

with tempfile.TemporaryDirectory() as home:
    layout = planish.save(model, f"{home}/small", report=report)
    twin = planish.load(f"{home}/small")
    same = torch.equal(twin(**batches[0]).logits, model(**batches[0]).logits)
    print(f"saved as {layout}; read back, it computes {'the same bits' if same else 'something else'}")
