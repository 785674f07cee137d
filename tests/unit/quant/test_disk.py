"""Quantizing from disk: the same bytes as in memory, in the memory of a few blocks."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from planish._support import CheckpointError
from planish.quant import Journal, SafetensorsWeights, assemble, files, open_model, quantize, rtn, save
from planish.quant.methods.smoothquant_plus import smoothquant_plus

transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=99)
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2),
    "tied": lambda: transformers.LlamaConfig(
        **SIZES, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64),
    "opt": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64, pad_token_id=0
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, intermediate_size=96, num_key_value_heads=2),
}


@pytest.fixture(autouse=True)
def _inference():
    """With gradients a layer runs on the reference, without on the compiled kernel: equal only to the last bits."""
    with torch.no_grad():
        yield


def make(path, name="llama", dtype=torch.float32, shard="50GB"):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).to(dtype).eval()
    for parameter in model.parameters():  # norms and biases that are not all ones and zeros
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(path, max_shard_size=shard)
    return path


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 99, (2, 16), generator=generator) for _ in range(2)]


METHOD = smoothquant_plus(0.5, group_size=32, scale_dtype="float32")


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_from_disk_equals_in_memory(tmp_path, name, dtype):
    make(tmp_path / "float", name, dtype, shard="100KB")
    memory = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    report = quantize(memory, batches(), METHOD)
    save(memory, tmp_path / "memory", layout="planish")

    model, weights = open_model(tmp_path / "float")
    assert all(p.device.type == "meta" for p in model.parameters())
    journal = Journal(tmp_path / "journal")
    again = quantize(model, batches(), METHOD, weights=weights, journal=journal)
    left = [n for n, p in model.named_parameters() if p.device.type != "meta"]
    blocks = [entry.name for entry in report.blocks]
    assert not [n for n in left if n.startswith(tuple(f"{b}." for b in blocks))]  # every block was let go
    assemble(journal, model, tmp_path / "disk", layout="planish")

    assert [b.to_json() for b in again.blocks] == [b.to_json() for b in report.blocks]
    assert contents(tmp_path / "disk") == contents(tmp_path / "memory")
    batch = batches()[0]
    assert torch.equal(model(batch).logits, memory(batch).logits)


def test_without_a_journal_the_quantized_model_stays_in_memory(tmp_path):
    make(tmp_path / "float")
    memory = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    quantize(memory, batches(), METHOD)
    model, weights = open_model(tmp_path / "float")
    quantize(model, batches(), METHOD, weights=weights)
    a, b = model.state_dict(), memory.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_search_from_disk_equals_in_memory(tmp_path):
    make(tmp_path / "float", "tied")
    method = smoothquant_plus(group_size=32)
    memory = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    wanted = quantize(memory, batches(), method)
    model, weights = open_model(tmp_path / "float")
    found = quantize(model, batches(), method, weights=weights)
    assert found.search == wanted.search
    assert torch.equal(model(batches()[0]).logits, memory(batches()[0]).logits)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("threshold", "share"), [("65536", 1.03), (None, 2.2)], ids=["whole pages", "glibc's own"])
def test_memory_is_three_blocks_and_inputs(tmp_path, threshold, share):
    """As it comes, glibc keeps holes of what a block's work freed until the block is let go: twice the tensors."""
    worker = Path(__file__).with_name("memory_worker.py")
    env = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}
    env |= {"MALLOC_MMAP_THRESHOLD_": threshold} if threshold else {}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, worker, tmp_path], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    whole = told["blocks"] * told["block"]
    resident, anonymous = told["quantizing"]
    # hidden states that enter and leave a block, in the float and in the quantized model: four times the inputs
    tensors = 3 * told["block"] + told["rest"] + 4 * told["inputs"]
    allowed = share * tensors  # 3 %: Python's own objects for 24 blocks, and pages begun; one block more would be 30 %
    assert max(resident, anonymous) <= allowed
    assert whole > 7 * tensors
    resident, anonymous = told["assembling"]
    assert anonymous <= told["block"]  # what is mapped from files can be dropped at any time
    assert resident <= 1.2 * told["written"]


def test_other_models_are_loaded_whole_and_the_log_says_so(tmp_path, caplog):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, intermediate_size=96, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    stored = transformers.MixtralForCausalLM(config).eval()
    stored.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "planish"):
        model, weights = open_model(tmp_path)
    assert weights is None
    assert "loaded into memory whole: its tensors are not the model's one to one" in caplog.text
    assert torch.equal(model(batches()[0]).logits, stored(batches()[0]).logits)


def test_a_quantized_checkpoint_is_loaded_whole(tmp_path, caplog):
    make(tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    quantize(model, batches(), rtn(group_size=32, symmetric=True))
    save(model, tmp_path / "small")
    pytest.importorskip("compressed_tensors")
    with caplog.at_level(logging.WARNING, "planish"):
        _, weights = open_model(tmp_path / "small")
    assert weights is None
    assert "it is quantized already" in caplog.text


def test_trunk_prefix_may_lack(tmp_path):
    """GPT-2's own checkpoint has no `transformer.` before its names."""
    make(tmp_path / "float", "gpt2")
    stored = files.map_file(tmp_path / "float" / "model.safetensors")
    cut = {name.removeprefix("transformer."): tensor.clone() for name, tensor in stored.items()}
    del stored
    (tmp_path / "float" / "model.safetensors").unlink()
    files.write_shard(tmp_path / "float" / "model.safetensors", cut)
    memory = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    model, weights = open_model(tmp_path / "float")
    assert weights is not None
    quantize(memory, batches(), METHOD)
    quantize(model, batches(), METHOD, weights=weights)
    assert torch.equal(model(batches()[0]).logits, memory(batches()[0]).logits)


class Vision(nn.Module):
    """Parameters of its own beside its blocks, and buffers of both kinds."""

    def __init__(self, device=None):
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 1, 32), 0.5, device=device))
        self.stem = nn.BatchNorm1d(8, device=device)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32, device=device), nn.GELU()) for _ in range(2))
        self.register_buffer("ramp", torch.linspace(0, 1, 32), persistent=False)

    def forward(self, x):
        x = self.stem(x) + self.token + self.ramp
        for block in self.blocks:
            x = block(input=x)
        return x


def vision(path):
    torch.manual_seed(0)
    model = Vision().eval()
    model.stem.running_mean += torch.randn(8)
    path.mkdir()
    files.write_shard(path / "model.safetensors", model.state_dict())
    return model


def test_any_module_with_buffers(tmp_path):
    stored = vision(tmp_path / "w")
    model = Vision(device="meta").eval()
    model.register_buffer("ramp", torch.linspace(0, 1, 32), persistent=False)
    weights = SafetensorsWeights(tmp_path / "w", model)
    loaded = []
    load = weights.load
    weights.load = lambda module, name, **how: loaded.append(name) or load(module, name, **how)
    x = [torch.randn(4, 8, 32)]
    quantize(model, x, rtn(group_size=32), weights=weights)
    assert loaded[:2] == ["", "stem"]  # what is not in a block, without its children
    assert model.blocks[0][0].weight_packed.device.type == "cpu"
    quantize(stored, x, rtn(group_size=32))
    assert torch.equal(model(x[0]), stored(x[0]))


def test_release_keeps_what_cannot_be_read_again(tmp_path):
    vision(tmp_path / "w")
    model = Vision(device="meta")
    model.register_buffer("ramp", torch.linspace(0, 1, 32), persistent=False)
    weights = SafetensorsWeights(tmp_path / "w", model)
    weights.load(model, "")
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    weights.release(model, "")
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert model.ramp.device.type == "cpu"
    weights.load(model, "")
    assert model.token[0, 0, 0].item() == 0.5


# refusals


def test_names_and_shapes_must_be_the_models(tmp_path):
    files.write_shard(tmp_path / "model.safetensors", {"0.weight": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match=r"`0\.bias` is in only one of the model and"):
        SafetensorsWeights(tmp_path, nn.Sequential(nn.Linear(2, 3, device="meta")))
    with pytest.raises(CheckpointError, match=r"`0\.weight` must have shape \[2, 3\]; got \[3, 2\]"):
        SafetensorsWeights(tmp_path, nn.Sequential(nn.Linear(3, 2, bias=False, device="meta")))


def test_a_file_that_shrinks_is_noticed(tmp_path):
    make(tmp_path)
    model, weights = open_model(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"only \d+ of its \d+ bytes are there"):
        weights.load(model, "")
    with pytest.raises(CheckpointError, match="tensors end at byte"):
        open_model(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights.load(model, "")


def test_quantized_layers_are_not_loaded_over(tmp_path):
    make(tmp_path / "float")
    model, weights = open_model(tmp_path / "float")
    quantize(model, batches(), METHOD, weights=weights, journal=Journal(tmp_path / "j"))
    with pytest.raises(ValueError, match=r"`module` must be a float model's; got .*q_proj.*quantized"):
        weights.load(model.model.layers[0], "model.layers.0")


def test_no_model_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json` is not there"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(CheckpointError, match="transformers cannot read its config"):
        open_model(tmp_path)


def test_an_unfinished_journal_is_not_assembled(tmp_path):
    make(tmp_path / "float")
    model, weights = open_model(tmp_path / "float")
    journal = Journal(tmp_path / "j")
    quantize(model, batches(), METHOD, weights=weights, journal=journal)
    (tmp_path / "j" / "block-00001.json").unlink()
    with pytest.raises(CheckpointError, match=r"block-00001\.json` is not there"):
        assemble(journal, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
