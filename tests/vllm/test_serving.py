"""vLLM with the plugin, in processes of its own: the tokens are those of the reference path."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from planish.plugins.vllm import parts
from planish.quant import Affine, QLinear, export, load, quantize, rtn, save
from planish.quant.transforms import Chain, Permute, Rotate, Scale

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make vllm")
pytestmark = pytest.mark.timeout(1800)
HERE = Path(__file__).parent
PROMPTS = [[3, 5, 8, 13, 21], [100, 90, 80]]
IDS = torch.arange(64).reshape(1, 64)
TOKENS = 24
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
SETTINGS = {"quant_method": "planish", "group_size": 64}
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def serve(jobs, **env):
    """Run jobs in one process and return their results."""
    worker = subprocess.Popen(
        [sys.executable, str(HERE / "engine.py")], env={**os.environ, **QUIET, **env}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        said, told = worker.communicate(json.dumps(jobs), timeout=1500)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # its own workers too, however this ended
    assert worker.returncode == 0, said[-2000:] + told[-4000:]
    return json.loads(said.rstrip().rpartition("\n")[2])["results"]


def job(path, **llm):
    return {"model": str(path), "prompts": PROMPTS, "tokens": TOKENS, "llm": {"dtype": "float32", **llm}}


def tiny(bias=False):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=512, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, tie_word_embeddings=False,
        attention_bias=bias, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1).add_(torch.randn_like(weight) / 10 if weight.ndim == 1 else 0)
    return model


def greedy(model):
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        [0, len(ids) :].tolist()
        for ids in PROMPTS
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def own(path):
    """Write a model that only our own layout can hold, every part of a layer in it."""
    model = tiny(bias=True)
    quantize(model, [IDS], rtn(group_size=64))
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(4, 64, 64)).Q
    steps = Chain(Scale(torch.rand(256) + 0.5), Permute(torch.randperm(256)), Rotate(basis))
    first, second = (model.model.layers[i] for i in (0, 1))
    down = torch.randn(3, 256) / 50
    for name in ("q_proj", "k_proj", "v_proj"):  # a site: one transform, one way down
        old = getattr(first.self_attn, name)
        branch = (down, torch.randn(old.out_features, 3))
        new = QLinear.of(old.weight, old.bias, transform=steps, act=Affine(8, None), low_rank=branch)
        setattr(first.self_attn, name, new)
    for rank, name in ((2, "gate_proj"), (4, "up_proj")):  # branches of their own: blocks beside each other
        old = getattr(first.mlp, name)
        branch = (torch.randn(rank, 256) / 50, torch.randn(512, rank))
        setattr(first.mlp, name, QLinear.of(old.weight, low_rank=branch))
    wide = tiny(bias=True).model.layers[1].self_attn.v_proj  # another width than q and k: kept beside them
    second.self_attn.v_proj = QLinear.of(Affine(8, 32).encode(wide.weight.detach()), wide.bias.detach())
    save(model, path, layout="planish")
    return model


@pytest.fixture(scope="module")
def found(folder):
    """Everything that needs no flags of its own, in one process."""
    wanted, jobs = {}, {}
    for name, symmetric in (("ct-sym", True), ("ct-asym", False)):
        model = tiny()
        quantize(model, [IDS], rtn(group_size=64, symmetric=symmetric))
        assert save(model, folder / name) == "compressed-tensors"
        wanted[name] = greedy(model)
        jobs[name] = job(folder / name) | {"probe": "kinds"}
    export(folder / "ct-asym", folder / "awq", "awq")
    export(folder / "ct-sym", folder / "gptq", "gptq")
    for name, like in (("awq", "ct-asym"), ("gptq", "ct-sym")):  # vLLM runs these two in half precision only
        wanted[name] = greedy(load(folder / like).to(torch.float16))
        jobs[name] = job(folder / name, dtype="float16") | {"probe": "kinds"}
    wanted["own"] = greedy(own(folder / "own"))
    jobs["own"] = job(folder / "own")
    tiny().save_pretrained(folder / "float")
    wanted["at load"] = wanted["ct-asym"]
    at_load = {"quantization": "planish", "hf_overrides": {"quantization_config": SETTINGS}}
    jobs["at load"] = job(folder / "float", **at_load) | {"probe": "codes"}
    wrong = {"quantization": "planish", "hf_overrides": {"quantization_config": SETTINGS | {"grup_size": 1}}}
    jobs["misspelt"] = job(folder / "float", **wrong)
    odd = {"quantization": "planish", "hf_overrides": {"quantization_config": SETTINGS | {"group_size": 100}}}
    jobs["odd group"] = job(folder / "float", **odd)
    return wanted, dict(zip(jobs, serve(list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", ["ct-sym", "ct-asym", "awq", "gptq", "own", "at load"])
def test_the_tokens_are_those_of_the_reference_path(found, name):
    wanted, results = found
    assert "error" not in results[name], results[name]
    assert results[name]["tokens"] == wanted[name]


@pytest.mark.parametrize("name", ["ct-sym", "ct-asym", "awq", "gptq"])
def test_stock_checkpoints_run_on_our_kernel(found, name):
    assert found[1][name]["probe"] == [["PlanishLinearKernel"]]


def test_rounding_at_load_gives_the_bytes_of_rounding_first(found, folder):
    layers = {n: m for n, m in load(folder / "ct-asym").named_modules() if isinstance(m, QLinear)}
    held = found[1]["at load"]["probe"][0]
    assert len(held) == 8
    for name, digest in held.items():
        home, _, last = name.rpartition(".")
        layer = parts.join([layers[f"{home}.{part}"] for part in JOINED.get(last, (last,))])
        expected = hashlib.sha256()
        for key, tensor in sorted(layer.state_dict().items()):
            if key in ("weight_packed", "weight_scale", "weight_zero_point"):
                expected.update(key.encode() + str(tensor.dtype).encode() + tensor.contiguous().numpy().tobytes())
        assert expected.hexdigest() == digest, name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("misspelt", "must be of the settings bits, group_size, ignore, scale_dtype, symmetric; got 'grup_size'"),
        ("odd group", "512 channels cannot be split in groups of 100"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(found, name, sentence):
    assert sentence in found[1][name]["error"]


def test_two_workers_give_the_tokens_of_one(found, folder):
    wanted, _ = found
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    at_load = {"quantization": "planish", "hf_overrides": {"quantization_config": SETTINGS}}
    stock, rounded = serve([job(folder / "ct-asym", **two), job(folder / "float", **two, **at_load)])
    assert stock.get("tokens") == wanted["ct-asym"], stock
    assert rounded.get("tokens") == wanted["at load"], rounded


def test_without_avx512_the_plugin_serves_what_stock_vllm_cannot(found, folder):
    ours = serve([job(folder / "ct-asym")], AVX2_ONLY="1")[0]
    assert ours.get("tokens") == found[0]["ct-asym"], ours


def test_stock_vllm_still_fails_without_avx512(found, folder):
    """Tells when vLLM's build for processors without AVX-512 has got the operator; then the page on serving changes."""
    stock = serve([job(folder / "ct-asym")], AVX2_ONLY="1", VLLM_PLUGINS="")[0]
    assert "cpu_gemm_wna16" in stock.get("error", ""), f"vLLM has mended it: {stock}"
