"""Which method loses least? A small language model of bytes is trained here on Python's own reference, then quantized.

Two heads, three blocks, a few seconds of training, 2 bits: enough to see that methods differ. Which of them wins on a
model that matters is another question; put that model in the place of this one.
"""

import copy
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish.quant import awq, compare, gptq, rtn, smoothquant_plus

generator = torch.Generator().manual_seed(0)
text = torch.tensor(list("\n".join(topics.values()).encode()))
learnt, held = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 256}
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
for _ in range(300):
    starts = torch.randint(len(learnt) - 64, (16,), generator=generator)
    rows = torch.stack([learnt[i : i + 64] for i in starts])
    loss = model(input_ids=rows, labels=rows).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()

calibration = [{"input_ids": rows} for rows in learnt[: 128 * 128].reshape(-1, 16, 128)]
evaluation = [{"input_ids": rows} for rows in held[: 64 * 128].reshape(-1, 16, 128)]
grid = {"bits": 2, "group_size": 32}
methods = {
    "rtn": rtn(**grid),
    "awq": awq(**grid),
    "gptq": gptq(**grid),
    "smoothquant+": smoothquant_plus(**grid),
    "best": planish.quant.best(**grid),
}
small = {}
for name, method in methods.items():
    small[name] = copy.deepcopy(model)
    planish.quantize(small[name], calibration, method)
for name, found in compare(model, small, evaluation).items():
    divergence = "" if name == "base" else f"  KL from float {found.kl.value:.3f}"
    print(f"{name:<13} perplexity of bytes {found.perplexity.value:6.3f}{divergence}")
