"""Saving and loading: laws of the round trip, then behaviour, faults of the disk, bad input."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import planish
from planish._support import CheckpointError
from planish.quant import Affine, QLinear, files, inspect, load, quantize, rtn, save
from planish.quant.transforms import Chain, Permute, Rotate, Scale, Shift


def net(dtype=torch.float32):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4))
    return made.to(dtype)


def small(**method):
    model = net()
    quantize(model, [torch.randn(8, 64)], rtn(**{"group_size": 32, **method}), skip=("4",))
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


TRANSFORMS = {
    "none": lambda: None,
    "scale": lambda: Scale(torch.rand(32) + 0.5),
    "shift": lambda: Shift(torch.randn(32)),
    "permute": lambda: Permute(torch.randperm(32)),
    "rotate": lambda: Rotate(torch.linalg.qr(torch.randn(2, 16, 16)).Q),
    "one rotation": lambda: Rotate(torch.linalg.qr(torch.randn(1, 8, 8)).Q),
    "chain": lambda: Chain(Scale(torch.rand(32) + 0.5), Chain(Permute(torch.randperm(32)), Shift(torch.randn(32)))),
    "half": lambda: Scale((torch.rand(32) + 0.5).half()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("act", [None, Affine(8, None), Affine(4, 16, symmetric=True)], ids=str)
@pytest.mark.parametrize(
    "weight", [Affine(4, 16), Affine(3, 20, ragged=True), Affine(1, None), Affine(8, 32, symmetric=True)], ids=str
)
def test_a_saved_layer_comes_back_bit_for_bit(tmp_path, weight, act, rank, transform):
    model = net()
    made = TRANSFORMS[transform]()
    dense = model[2].weight.detach()
    branch = (torch.randn(rank, 32).bfloat16(), torch.randn(32, rank).bfloat16()) if rank else None
    bias = model[2].bias if rank else None
    model[2] = QLinear.of(weight.encode(dense), bias, transform=made, act=act, low_rank=branch)
    assert save(model, tmp_path / "m") == "planish"
    twin = load(tmp_path / "m", into=net())
    assert same(twin, model)
    assert (twin[2].format, twin[2].act) == (weight, act)
    x = torch.randn(3, 64)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_scales_keep_their_precision(tmp_path, scale_dtype):
    model = net()
    model[0] = QLinear.of(Affine(4, 32, scale_dtype=scale_dtype).encode(model[0].weight.detach()))
    save(model, tmp_path / "m")
    assert same(load(tmp_path / "m", into=net()), model)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = small()
    for name in "ab":
        save(model, tmp_path / name)
    for file in sorted(p.name for p in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_many_shards_are_one_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 600)
    model = small()
    save(model, tmp_path / "m")
    names = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert same(load(tmp_path / "m", into=net()), model)
    (tmp_path / "m" / names[1]).unlink()
    with pytest.raises(CheckpointError, match=names[1]):
        load(tmp_path / "m", into=net())


def test_safetensors_own_reader_agrees(tmp_path):
    reader = pytest.importorskip("safetensors.torch")
    model = small()
    save(model, tmp_path / "m", layout="compressed-tensors")
    theirs = reader.load_file(tmp_path / "m" / "model.safetensors")
    ours = model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)


def test_files_of_other_writers_need_not_be_aligned(tmp_path):
    reader = pytest.importorskip("safetensors.torch")
    tensors = {"odd": torch.tensor([1, 2, 3], dtype=torch.uint8), "wide": torch.tensor([1.5, -2.0])}
    raw = reader.save(tensors)
    start = 8 + int.from_bytes(raw[:8], "little")
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "wide": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    head = json.dumps(header).encode()
    odd_first = bytes(tensors["odd"].tolist()) + tensors["wide"].numpy().tobytes()
    assert len(raw) - start == len(odd_first)
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + odd_first)
    found = files.read_tensors(tmp_path)
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)


def test_mapped_matrices_are_aligned(tmp_path):
    """The order in which a product is summed may depend on alignment; a loaded model gives the saved one's bits."""
    model = small()
    save(model, tmp_path / "m")
    twin = load(tmp_path / "m", into=net())
    assert all(t.data_ptr() % 64 == 0 for t in twin.state_dict().values() if t.ndim == 2 and t.nbytes % 64 == 0)
    x = torch.randn(5, 64)
    assert torch.equal(twin(x), model(x))


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 32)
            self.inner = nn.Linear(32, 32)
            self.head = nn.Linear(32, 8, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    model.inner = QLinear.of(Affine(4, 32).encode(model.inner.weight.detach()), model.inner.bias)
    save(model, tmp_path / "m")
    twin = load(tmp_path / "m", into=Tied())
    assert same(twin, model)
    assert twin.head.weight is twin.embed.weight
    assert "head.weight" not in files.read_tensors(tmp_path / "m")


def test_a_float_model_is_saved_as_an_ordinary_directory(tmp_path):
    model = net(torch.bfloat16)
    assert save(model, tmp_path / "m", rounded=False) == "float"
    assert same(load(tmp_path / "m", into=net()), model)
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_report_method_and_facts_are_kept(tmp_path):
    model = net()
    report = quantize(model, [torch.randn(8, 64)], rtn(group_size=32), skip=("4",))
    planish.save(model, tmp_path / "m", report=report)
    facts = inspect(tmp_path / "m")
    assert facts["method"] == report.method == "rtn(" + repr(rtn(group_size=32)).partition("(")[2]
    assert facts["checked"] is True
    assert facts["float_layers"] == ["4"]
    assert facts["formats"] == {str(Affine(4, 32)): 2}
    assert facts["parameters"] == sum(p.numel() for p in net().parameters()) - 64  # less the biases of quantized layers
    assert json.loads((tmp_path / "m" / "report.json").read_text())["method"] == report.method
    (tmp_path / "m" / "planish.json").unlink()
    assert inspect(tmp_path / "m")["checked"] is False


def test_a_reader_of_the_directory_never_touches_the_source(tmp_path):
    """Weights are mapped privately: changing the loaded model leaves the file alone."""
    save(small(), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    twin = load(tmp_path / "m", into=net())
    with torch.no_grad():
        twin[4].weight.fill_(7)
        twin[0].weight_packed.fill_(7)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


# ------------------------------------------------------------------------------------------------- faults of the disk


def leftovers(path):
    return sorted(p.name for p in path.iterdir())


def test_an_existing_target_is_left_alone(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("m", "file"):
        with pytest.raises(CheckpointError, match="exists already") as caught:
            save(small(), tmp_path / name)
        assert caught.value.reason == "exists"
    assert (tmp_path / "m" / "precious").read_text() == "x"
    assert leftovers(tmp_path) == ["file", "m"]


def test_an_empty_target_is_taken(tmp_path):
    (tmp_path / "m").mkdir()
    save(small(), tmp_path / "m")
    assert same(load(tmp_path / "m", into=net()), small())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    class Full:
        def __init__(self, stream):
            self.stream, self.room = stream, 2000

        def write(self, raw):
            self.room -= len(raw)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(raw)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

    plain = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *a, **k: Full(plain(self, mode)) if mode == "wb" else plain(self, mode, *a, **k),
    )
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save(small(), tmp_path / "m")
    assert caught.value.reason == "unwritable"
    assert leftovers(tmp_path) == []


def test_a_file_size_limit_is_a_sentence(tmp_path):
    """The system's own refusal, in a process of its own: `ulimit -f`."""
    program = """
import resource, signal, sys, torch
from planish._support import CheckpointError
from planish.quant import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Linear(256, 256)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(model, sys.argv[1], rounded=False)
except CheckpointError as error:
    sys.exit(f"{error.reason}: {error}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "m")], capture_output=True, text=True, check=False
    )
    assert done.stderr.startswith("unwritable: ")
    assert "cannot be written: File too large." in done.stderr
    assert leftovers(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        save(small(), tmp_path / "no" / "such" / "m")
    assert caught.value.reason == "unwritable"


def test_a_read_only_disk(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    with pytest.raises(CheckpointError, match="cannot be written: Read-only file system") as caught:
        save(small(), tmp_path / "m")
    assert caught.value.reason == "unwritable"


def test_a_killed_save_leaves_no_final_name(tmp_path):
    program = """
import sys, time, torch
from planish.quant import files, save
plain = files.digest
def slow(name, tensor):
    print("writing", flush=True)
    time.sleep(0.2)
    return plain(name, tensor)
files.digest = slow
save(torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(50)]), sys.argv[1], rounded=False)
"""
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "m")], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"writing\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "m").exists()
    assert all(name.startswith(".m.partial-") for name in leftovers(tmp_path))
    save(small(), tmp_path / "m")  # what was left behind is in nobody's way
    load(tmp_path / "m", into=net())
