"""The output head: not run while blocks are recorded, stopped in front of where only its input is asked for."""

import pytest
import torch
from torch import nn

from planish.quant import quantize, rtn, search, smoothquant_plus
from planish.quant.candidates import loss, losses
from planish.quant.engine import Walk, trial
from planish.quant.heads import before_head, head_of
from planish.quant.moments import measure

hf = pytest.importorskip("transformers")


def llama():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=83, initializer_range=0.2,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def batches(rows=3):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 83, (2, rows, 12), generator=g)
    mask = torch.ones_like(ids[0])
    mask[0, :4] = 0
    return [{"input_ids": part, "attention_mask": mask} for part in ids]


def runs_of_head(model):
    count = []
    head_of(model).register_forward_hook(lambda *_: count.append(1))
    return count


def test_blocks_are_recorded_without_the_head():
    model = llama()
    count = runs_of_head(model)
    quantize(model, batches(), rtn(group_size=16))
    search(llama(), batches(), [rtn(group_size=16)])
    assert not count
    model(**batches()[0])
    assert count


def test_the_head_is_found_or_not():
    model = llama()
    assert head_of(model) is model.lm_head
    assert head_of(model.model) is None and head_of(nn.Linear(2, 2)) is None
    assert head_of(hf.ViTModel(hf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                            intermediate_size=8, image_size=32, patch_size=16))) is None  # fmt: skip


def test_a_call_ends_in_front_of_the_head_and_the_hook_goes():
    model, batch = llama(), batches()[0]
    with before_head(model) as seen:
        model(**batch)
        raise AssertionError("the call went on")
    wanted = model.model(**batch).last_hidden_state
    assert len(seen) == 1 and torch.equal(seen[0], wanted)
    assert model(**batch).logits.shape[-1] == 83
    with pytest.raises(RuntimeError, match="other"), before_head(model):
        raise RuntimeError("other")


@torch.no_grad()
@pytest.mark.parametrize("objective", ["hidden_mse", "kl", "nll"])
def test_losses_of_many_are_those_of_each_and_of_the_model_itself(objective):
    """Rows scored one at a time, all candidates beside one float answer, add up to what whole batches say."""
    model = llama()
    walk = Walk(model, batches())
    stream = walk.stream
    clean = stream.start()
    methods = [rtn(bits=3, group_size=16), smoothquant_plus(0.5, bits=3, group_size=16)]
    states = [clean, clean]
    for index in range(len(stream.modules)):
        with stream.looking(index, clean) as block:
            sites = walk.sites(block)
            after = measure(block, sites)
            states = [trial(block, sites, hidden, method) for hidden, method in zip(states, methods, strict=True)]
            clean = after
    together = losses(stream, clean, states, objective)
    assert together == [loss(stream, clean, hidden, objective) for hidden in states]
    for method, found in zip(methods, together, strict=True):
        quantized = llama()
        quantize(quantized, batches(), method)
        total, count = 0.0, 0
        for batch in batches():
            ids = batch["input_ids"]
            if objective == "hidden_mse":
                p, q = (m.model(**batch).last_hidden_state for m in (model, quantized))
                total, count = total + (p - q).square().sum().item(), count + p.numel()
                continue
            p, q = (m(**batch).logits.log_softmax(-1) for m in (model, quantized))
            if objective == "kl":
                total, count = total + (p.exp() * (p - q)).sum().item(), count + ids.numel()
            else:
                total -= q[:, :-1].gather(-1, ids[:, 1:, None]).sum().item()
                count += ids[:, 1:].numel()
        assert found == pytest.approx(total / count, rel=2e-5)
