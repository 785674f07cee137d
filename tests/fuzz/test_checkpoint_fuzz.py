"""Damaged and hostile checkpoints: one CheckpointError each, never a crash, a hang, a wrong load or a touched model."""

import json
import random
import shutil
import struct
import time

import pytest
import torch
from torch import nn

from planish._support import CheckpointError
from planish.quant import Affine, QLinear, export, inspect, load, save
from planish.quant.transforms import Chain, Permute, Rotate, Scale

PATIENCE = 5.0  # seconds for one file; a sound one takes a few milliseconds


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    net.register_buffer("steps", torch.tensor([3]))
    return net


def quantized():
    net = model()
    basis = torch.linalg.qr(torch.randn(2, 16, 16)).Q
    transform = Chain(Scale(torch.rand(32) + 0.5), Permute(torch.randperm(32)), Rotate(basis))
    branch = (torch.randn(2, 32), torch.randn(16, 2))
    first = Affine(4, 32).encode(net[0].weight.detach())
    net[0] = QLinear.of(first, net[0].bias)
    second = Affine(3, 32, symmetric=True).encode(transform.weight(net[2].weight.detach()))
    net[2] = QLinear.of(second, net[2].bias, transform=transform, act=Affine(8, None), low_rank=branch)
    return net


def plain():
    net = model()
    net[0] = QLinear.of(Affine(4, 32).encode(net[0].weight.detach()), net[0].bias)
    net[2] = QLinear.of(Affine(4, 32).encode(net[2].weight.detach()), net[2].bias)
    return net


def content(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Sound checkpoints: ours with its manifest, and the stock layouts without one."""
    home = tmp_path_factory.mktemp("sound")
    save(quantized(), home / "planish")
    save(plain(), home / "compressed", layout="compressed-tensors")
    for layout in ("awq", "gptq"):
        export(home / "compressed", home / layout, layout)
    for stock in ("compressed", "awq", "gptq"):
        (home / stock / "planish.json").unlink()
    return home


# ------------------------------------------------------------------------------------------------------------ mutations


def flip(raw, rng):
    made = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def cut(raw, rng):
    return raw[: rng.randrange(len(raw))]


def splice(raw, rng):
    a, b = sorted(rng.randrange(len(raw)) for _ in range(2))
    return raw[:a] + rng.randbytes(rng.choice([0, 1, 8, b - a])) + raw[b:]


HOSTILE = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**62, 2**63, 2**80, 1e300, -0.5, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "/etc/passwd", "\0", "\ud800", "F64", "F4", "I32", "BF16", "group", "re:(a+)+$"),
    *([], [0], [0, 0], [-1, 4], [2**62, 2**62, 4], [[]], {}, {"a": {}}, {"kind": "Affine"}, {"kind": []}),
]


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def retype(value, rng):
    """Replace, remove, rename or move one part of a JSON value."""
    path = rng.choice([p for p in places(value) if p] or [()])
    if not path:
        return rng.choice(HOSTILE)
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    action = rng.choice(["replace", "replace", "replace", "remove", "rename", "swap"])
    if action == "remove":
        del owner[path[-1]]
    elif action == "rename" and isinstance(owner, dict):
        owner[rng.choice(["", "0.weight", "x", str(path[-1]) + "x", "__metadata__"])] = owner.pop(path[-1])
    elif action == "swap" and len(owner) > 1:
        other = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        owner[path[-1]], owner[other] = owner[other], owner[path[-1]]
    else:
        owner[path[-1]] = rng.choice(HOSTILE)
    return value


def deep(raw, rng):
    depth = rng.choice([900, 100_000])
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def json_mutation(raw, rng):
    if rng.random() < 0.02:
        return deep(raw, rng)
    value = json.loads(raw)
    for _ in range(rng.choice([1, 1, 2])):
        value = retype(value, rng)
    return json.dumps(value).encode()


def header_mutation(raw, rng):
    length = struct.unpack("<Q", raw[:8])[0]
    head, body = raw[8 : 8 + length], raw[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 10**8, 2**31, 2**63, 2**64 - 1])) + raw[8:]
    if kind < 0.25:  # a name twice
        text = head.decode().rstrip()
        head = (text[:-1] + "," + text[1:]).encode()
    elif kind < 0.4:  # offsets that overlap, run past the end or leave a gap
        value = json.loads(head)
        entry = value[rng.choice([k for k in value if k != "__metadata__"])]
        entry["data_offsets"] = [n + rng.choice([-8, -4, 0, 4, 8, 2**40]) for n in entry["data_offsets"]]
        head = json.dumps(value).encode()
    else:
        head = json_mutation(head, rng)
    return struct.pack("<Q", len(head)) + head + body


def mutate(directory, rng):
    """Damage one file of a directory and say how."""
    file = rng.choice(sorted(p.name for p in directory.iterdir() if p.suffix in (".json", ".safetensors")))
    path = directory / file
    ways = [flip, flip, cut, splice, json_mutation if path.suffix == ".json" else header_mutation]
    way = rng.choice([*ways, ways[-1], ways[-1]])
    if rng.random() < 0.01:
        path.unlink()
        return f"{file} removed"
    path.write_bytes(way(path.read_bytes(), rng))
    return f"{file} by {way.__name__}"


def attack(source, place, seed, whole):
    """Load a damaged copy; return the reason of its refusal, or None where it did no harm."""
    rng = random.Random(seed)
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(source, place)
    how = mutate(place, rng)
    target = model()
    before = content(target)
    began = time.perf_counter()
    try:
        load(place, into=target)
        reason = None
    except CheckpointError as error:
        reason = error.reason
        assert same(content(target), before), f"seed {seed}, {how}: refused, but the model was touched"
    assert time.perf_counter() - began < PATIENCE, f"seed {seed}, {how}: took too long"
    if reason is None and whole is not None:
        assert same(content(target), whole), f"seed {seed}, {how}: loaded something else than was saved"
    return reason


def run(sources, place, name, seeds):
    whole = content(load(sources / name, into=model())) if name == "planish" else None  # only a manifest can vouch
    return [attack(sources / name, place, seed, whole) for seed in seeds]


@pytest.mark.parametrize("name", ["planish", "compressed", "awq", "gptq"])
def test_damaged_files_are_refused(sources, tmp_path, name):
    reasons = run(sources, tmp_path / "copy", name, range(250))
    refused = [r for r in reasons if r is not None]
    assert len(refused) > (220 if name == "planish" else 100)
    assert len(set(refused)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planish", "compressed", "awq", "gptq"])
def test_ten_thousand_damaged_files_are_refused(sources, tmp_path, name):
    count = 4000 if name == "planish" else 2000
    assert run(sources, tmp_path / "copy", name, range(10_000, 10_000 + count)).count(None) < count // 2


def test_every_flipped_bit_of_every_tensor_is_noticed(sources, tmp_path):
    """With the manifest, and without: one flip in each 64 bytes of data."""
    raw = (sources / "planish" / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    shutil.copytree(sources / "planish", tmp_path / "m")
    for at in range(start, len(raw), 64):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "m" / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            inspect(tmp_path / "m")
        assert caught.value.reason in ("checksum", "range")


# ------------------------------------------------------------------------------------------ attacks with a purpose


def rewrite_header(path, edit):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + length :])


def edit_json(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def stock(sources, tmp_path):
    shutil.copytree(sources / "compressed", tmp_path / "stock")
    return tmp_path / "stock"


def refuse(path, reason, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path, into=model())
    assert caught.value.reason == reason


def test_shapes_whose_product_overflows(stock):
    rewrite_header(stock / "model.safetensors", lambda h: h["0.bias"].update(shape=[2**61, 2**61]))
    refuse(stock, "shape", "does not take")


def test_overlapping_tensors(stock):
    rewrite_header(
        stock / "model.safetensors", lambda h: h["0.bias"].update(data_offsets=h["2.bias"]["data_offsets"], shape=[16])
    )
    refuse(stock, "unreadable", "overlap")


def test_bytes_that_no_tensor_owns(stock):
    with (stock / "model.safetensors").open("ab") as file:
        file.write(b"hidden")
    refuse(stock, "unreadable", "end at byte")


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/secret.safetensors", ".safetensors", "a\\b.safetensors", 3]
)
def test_an_index_that_leaves_the_directory(stock, target):
    (stock / "model.safetensors").rename(stock.parent / "secret.safetensors")
    (stock / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"0.bias": target}}))
    refuse(stock, "name", "plain name")


def test_a_manifest_that_leaves_the_directory(sources, tmp_path):
    shutil.copytree(sources / "planish", tmp_path / "m")
    edit_json(tmp_path / "m" / "planish.json", lambda m: m["files"].update({"../x": "0"}))
    refuse(tmp_path / "m", "checksum", "planish.json")


def test_regular_expressions_of_a_config_are_not_run(stock):
    def edit(config):
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:(0+)+$" * 50]

    edit_json(stock / "config.json", edit)
    net = model()
    load(stock, into=net)
    assert isinstance(net[0], QLinear)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_cannot_be(sources, tmp_path, value):
    net = plain()
    net[0].weight_scale[0, 0] = value
    save(net, tmp_path / "m")
    refuse(tmp_path / "m", "range", "0.weight_scale")


def test_a_config_that_would_build_for_ever(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    save(transformers.LlamaForCausalLM(config), tmp_path / "m", rounded=False)
    (tmp_path / "m" / "planish.json").unlink()
    for key, value, reason in [
        ("num_hidden_layers", 10**9, "range"), ("num_labels", 10**9, "range"), ("hidden_size", "x", "unsupported"),
        ("architectures", ["Path"], "unsupported"), ("architectures", ["os.system"], "unsupported"),
        ("model_type", "../x", "unsupported"), ("rope_parameters", 3, "unsupported"), ("vocab_size", 9, "shape"),
    ]:  # fmt: skip
        shutil.copytree(tmp_path / "m", tmp_path / "bad")
        edit_json(tmp_path / "bad" / "config.json", lambda c, key=key, value=value: c.update({key: value}))
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "bad")
        assert caught.value.reason == reason, key
        shutil.rmtree(tmp_path / "bad")


def hub_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**sizes, vocab_size=8))
    for name in ("q_proj", "o_proj"):
        dense = getattr(net.model.layers[0].self_attn, name)
        setattr(net.model.layers[0].self_attn, name, QLinear.of(Affine(4, 32).encode(dense.weight.detach())))
    return net


def test_damaged_configs_of_transformers(tmp_path):
    """Without a manifest, so that every mutation reaches the builder: refused, or a model of the file's own tensors."""
    net = hub_model()
    save(net, tmp_path / "m")
    (tmp_path / "m" / "planish.json").unlink()
    raw = (tmp_path / "m" / "config.json").read_bytes()
    whole = content(net)
    refused = 0
    for seed in range(200):
        (tmp_path / "m" / "config.json").write_bytes(json_mutation(raw, random.Random(seed)))
        began = time.perf_counter()
        try:
            assert same(content(load(tmp_path / "m")), whole), seed
        except CheckpointError:
            refused += 1
        assert time.perf_counter() - began < PATIENCE, seed
    assert refused > 40
