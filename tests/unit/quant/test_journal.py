"""A journal: killed anywhere, a run goes on and ends with the same bytes; what is not its own it refuses."""

import errno
import fcntl
import importlib
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish._support import CheckpointError, PlanishWarning
from planish.quant import Journal, quantize, rtn
from planish.quant.engine import Walk

runs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("journal_runs.py"))))
METHODS, StopError, batches, interrupted, net, same = (
    runs.METHODS, runs.StopError, runs.batches, runs.interrupted, runs.net, runs.same,
)  # fmt: skip


# laws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_interrupted_equals_uninterrupted(tmp_path, name, dtype):
    whole = net(dtype)
    wanted = quantize(whole, batches(), METHODS[name])
    for blocks in (1, 3):
        path = tmp_path / str(blocks)
        interrupted(path, METHODS[name], blocks, dtype)
        again = net(dtype)
        report = quantize(again, batches(), METHODS[name], journal=Journal(path))
        assert same(whole, again)
        assert [b.to_json() for b in report.blocks] == [b.to_json() for b in wanted.blocks]
        assert torch.equal(again(batches(3)[0]), whole(batches(3)[0]))


def test_journal_changes_nothing(tmp_path):
    plain, kept = net(), net()
    quantize(plain, batches(), METHODS["search"])
    quantize(kept, batches(), METHODS["search"], journal=Journal(tmp_path / "j"))
    assert same(plain, kept)


@pytest.mark.parametrize("blocks", [1, 2])
def test_search_goes_on_where_it_stood(tmp_path, blocks, monkeypatch):
    search = importlib.import_module("planish.quant.candidates")
    whole = net()
    quantize(whole, batches(), METHODS["search"])
    interrupted(tmp_path / "j", METHODS["search"], blocks, stage="search")
    tried = []
    trial = search.trial
    monkeypatch.setattr(search, "trial", lambda *a, **k: tried.append(a[0].name) or trial(*a, **k))
    again = net()
    quantize(again, batches(), METHODS["search"], journal=Journal(tmp_path / "j"))
    assert same(whole, again)
    assert set(tried) == {f"blocks.{i}" for i in range(blocks, 3)}
    assert not list((tmp_path / "j").glob("search-*"))


def test_finished_search_is_not_repeated(tmp_path, monkeypatch):
    search = importlib.import_module("planish.quant.candidates")
    interrupted(tmp_path / "j", METHODS["search"], 1)
    monkeypatch.setattr(search, "trial", None)  # calling it would fail
    again, whole = net(), net()
    quantize(again, batches(), METHODS["search"], journal=Journal(tmp_path / "j"))
    monkeypatch.undo()
    quantize(whole, batches(), METHODS["search"])
    assert same(whole, again)


def test_crash_at_every_step_of_writing(tmp_path, monkeypatch):
    """Every rename that a run makes is once the last thing that happens, cleaning up included."""
    whole = net()
    quantize(whole, batches(), METHODS["smooth"])
    rename, remove, count = Path.rename, shutil.rmtree, [0]

    def run(limit, path):
        count[0] = 0

        def counted(self, target):
            count[0] += 1
            if count[0] == limit:
                raise StopError
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", counted)
        monkeypatch.setattr(shutil, "rmtree", lambda p, **k: None if count[0] == limit else remove(p, **k))
        try:
            quantize(net(), batches(), METHODS["smooth"], journal=Journal(path))
        finally:
            monkeypatch.undo()

    run(0, tmp_path / "count")
    steps = count[0]
    assert steps == 1 + 3 * 2  # the header; for each block its tensors and its description
    for limit in range(1, steps + 1):
        path = tmp_path / str(limit)
        with pytest.raises(StopError):
            run(limit, path)
        again = net()
        quantize(again, batches(), METHODS["smooth"], journal=Journal(path))
        assert same(whole, again)
        assert not list(path.glob(".*"))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("method", ["smooth", "search"])
def test_killed_at_random_moments(tmp_path, method, kills):
    """SIGKILL; then the same command again: every file of the output is what an uninterrupted run writes."""
    pytest.importorskip("transformers")
    worker = Path(__file__).with_name("kill_worker.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, worker, tmp_path, method, str(kills)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["repeatable"]
    assert all(run["identical"] for run in told["runs"])
    assert not any(run["half"] for run in told["runs"])
    if kills >= 20:  # most of them must have hit a run at work
        assert sum(run["killed"] for run in told["runs"]) >= 14
        assert any(run["blocks"] or run["searching"] for run in told["runs"])


# refusals


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("weights", {"model": lambda: net(seed=5)}),
        ("weights", {"model": lambda: net(torch.float16)}),
        ("batches", {"batches": lambda: batches(seed=9)}),
        ("batches", {"batches": lambda: batches()[:1]}),
        ("method", {"method": lambda: rtn(group_size=16)}),
        ("skip", {"skip": lambda: ("head", "blocks.0.up")}),
    ],
)
def test_another_run_is_refused_and_says_why(tmp_path, what, change):
    interrupted(tmp_path / "j", METHODS["rtn"], 1)
    made = {"model": net, "batches": batches, "method": lambda: METHODS["rtn"], "skip": lambda: ("lm_head",)} | change
    left = {p.name: p.read_bytes() for p in (tmp_path / "j").iterdir() if p.name != "lock"}

    def again(**where):
        values = {k: v() for k, v in made.items()}
        model = values["model"]
        quantize(
            model, values["batches"], values["method"], skip=values["skip"], journal=Journal(tmp_path / "j", **where)
        )
        return model

    with pytest.raises(ValueError, match=rf"belongs to another run, which differs in {what}.*fresh=True"):
        again()
    assert {p.name: p.read_bytes() for p in (tmp_path / "j").iterdir() if p.name != "lock"} == left
    plain = made["model"]()
    quantize(plain, made["batches"](), made["method"](), skip=made["skip"]())
    assert same(plain, again(fresh=True))


def test_structure_is_part_of_the_run(tmp_path):
    interrupted(tmp_path / "j", METHODS["rtn"], 1)
    other = net()
    other.blocks[1].norm.eps = 1e-3
    with pytest.raises(ValueError, match="differs in model;"):
        quantize(other, batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))


def test_threads_are_part_of_the_run(tmp_path):
    threads = torch.get_num_threads()
    interrupted(tmp_path / "j", METHODS["rtn"], 1)
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match=r"differs in machine .*'threads'"):
            quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))
    finally:
        torch.set_num_threads(threads)


def test_damaged_header_is_refused(tmp_path):
    interrupted(tmp_path / "j", METHODS["rtn"], 1)
    header = tmp_path / "j" / "journal.json"
    header.write_text(header.read_text().replace('"rtn(', '"ntr('))
    with pytest.raises(ValueError, match=r"journal.json` is not what was written.*fresh=True"):
        quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_with_other_files_is_refused(tmp_path, fresh):
    (tmp_path / "thesis.txt").write_text("do not lose")
    with pytest.raises(ValueError, match=r"`path` must be an empty directory or a journal; got .*thesis.txt"):
        quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path, fresh=fresh))
    assert (tmp_path / "thesis.txt").read_text() == "do not lose"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_damaged_block_is_done_again(tmp_path, damage, suffix):
    whole = net()
    quantize(whole, batches(), METHODS["smooth"], journal=Journal(tmp_path / "j"))
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "j").iterdir()}
    damage(tmp_path / "j" / f"block-00001.{suffix}")
    again = net()
    if suffix == "json" and damage is Path.unlink:  # never finished: nothing to warn of
        quantize(again, batches(), METHODS["smooth"], journal=Journal(tmp_path / "j"))
    else:
        with pytest.warns(PlanishWarning, match=r"Journal: block blocks\.1 is done again"):
            # one warning a message and process: the path is part of some messages, not of all
            from planish import _support

            _support._warned.clear()
            quantize(again, batches(), METHODS["smooth"], journal=Journal(tmp_path / "j"))
    assert same(whole, again)
    assert {p.name: p.read_bytes() for p in (tmp_path / "j").iterdir()} == wanted


def test_damaged_decision_is_found_again(tmp_path):
    journal = Journal(tmp_path)
    with journal.opened(Walk(net(), batches()), METHODS["rtn"]):
        assert journal.recall("alpha") is None
        journal.remember("alpha", [0.5, {"none": 1e-300}])
        journal.remember("alpha", [0.25, {"none": 1 / 3}])
        assert journal.recall("alpha") == [0.25, {"none": 1 / 3}]
        flip(next(tmp_path.glob("decision-*")))
        with pytest.warns(PlanishWarning, match="what was found for alpha is searched again"):
            assert journal.recall("alpha") is None
        assert not list(tmp_path.glob("decision-*"))


def test_one_process_at_a_time(tmp_path):
    holder = (
        "import fcntl,sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    interrupted(tmp_path / "j", METHODS["rtn"], 1)
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "j" / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(RuntimeError, match="is in use by process"):
            quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))
        other.stdin.write("\n")
        other.stdin.flush()
        other.wait(10)
    quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path):
    with Journal(tmp_path).opened(Walk(net(), batches()), METHODS["rtn"]):
        with pytest.raises(RuntimeError, match=f"is in use by process {os.getpid()}"):
            quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path))
    handle = os.open(tmp_path / "lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again
    os.close(handle)


def full_after(monkeypatch, calls):
    fsync, count = os.fsync, [0]

    def counted(handle):
        count[0] += 1
        if count[0] > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", counted)


@pytest.mark.parametrize("calls", [0, 4, 11])
def test_full_disk(tmp_path, monkeypatch, calls):
    whole = net()
    quantize(whole, batches(), METHODS["rtn"])
    full_after(monkeypatch, calls)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device") as caught:
        quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))
    assert caught.value.reason == "unwritable"
    monkeypatch.undo()
    assert not list((tmp_path / "j").glob(".*"))  # no half-written file is left
    again = net()
    quantize(again, batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))
    assert same(whole, again)


def test_writes_that_the_kernel_refuses(tmp_path):
    whole = net()
    quantize(whole, batches(), METHODS["rtn"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # the header fits, a block does not
    try:
        with pytest.raises(CheckpointError, match=r"block-00000.safetensors` cannot be written: File too large"):
            quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = net()
    quantize(again, batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))
    assert same(whole, again)


def test_place_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: (Not a directory|File exists)"):
        quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path / "file"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path):
    (tmp_path / "j").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
        quantize(net(), batches(), METHODS["rtn"], journal=Journal(tmp_path / "j"))


def test_layers_that_cannot_be_kept_are_refused(tmp_path):
    walk = Walk(net(), batches())
    journal = Journal(tmp_path)
    with journal.opened(walk, METHODS["rtn"]):
        block = walk.stream.block(0, walk.stream.start())
        block.module.up = nn.Bilinear(2, 2, 2)
        with pytest.raises(TypeError, match=r"`blocks\.0\.up\.bias` was not in the float block and cannot be kept"):
            journal.store(0, block, None)
        block.module.norm.register_forward_pre_hook(lambda module, args: args)
        with pytest.raises(TypeError, match=r"`blocks\.0\.norm` applies a transform outside a quantized layer"):
            journal.store(0, block, None)


def test_a_model_that_was_processed_whole_is_attached(tmp_path):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])

        def forward(self, x):
            return sum(head(x) for head in self.heads)

    torch.manual_seed(0)
    model, x = Heads(), torch.randn(8, 32)
    float_weights = {k: v.clone() for k, v in model.state_dict().items()}
    quantize(model, [x], rtn(group_size=16), journal=Journal(tmp_path))
    twin = Heads()
    twin.load_state_dict(float_weights)
    Journal(tmp_path).attach(twin)
    assert torch.equal(twin(x), model(x))
