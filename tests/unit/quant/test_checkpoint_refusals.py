"""What `save`, `load` and `export` refuse, and in which words."""

import pytest
import torch
from torch import nn

from planish._support import CheckpointError
from planish.quant import Affine, QLinear, export, inspect, load, quantize, rtn, save
from planish.quant.transforms import Scale


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4))


def small(**method):
    model = net()
    quantize(model, [torch.randn(8, 64)], rtn(**{"group_size": 32, **method}), skip=("4",))
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def leftovers(path):
    return sorted(p.name for p in path.iterdir())


def test_a_model_that_does_not_fit_is_not_touched(tmp_path):
    save(small(), tmp_path / "m")
    wrong = {
        "name": nn.Sequential(nn.Linear(64, 32)),
        "shape": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4)),
        "missing": nn.Sequential(*net(), nn.Linear(4, 4)),
        "dtype": net(),
    }
    wrong["dtype"][3].weight = nn.Parameter(torch.zeros(32, dtype=torch.int64), requires_grad=False)
    for reason, model in wrong.items():
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "m", into=model)
        assert caught.value.reason == reason
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_layer_that_is_no_dense_layer_is_refused(tmp_path):
    save(small(), tmp_path / "m")
    model = net()
    model[0] = nn.Conv1d(64, 32, 1)
    with pytest.raises(CheckpointError, match="the model has Conv1d there, not a dense layer"):
        load(tmp_path / "m", into=model)


LAYOUTS = "compressed-tensors, awq, gptq, gguf, planish"
SENTENCES = {
    "save: `layout` must be one of auto, compressed-tensors, planish; got 'zip'.": lambda p: save(
        small(), p, layout="zip"
    ),
    "save: `model` must be a model with QLinear layers (quantize it first, or pass rounded=False); got 'Sequential'.": (
        lambda p: save(net(), p)
    ),
    "save: `model` must be a float model when rounded=False; got 'Sequential'.": lambda p: save(
        small(), p, rounded=False
    ),
    "save: `model` must be a module that holds layers; got 'a single layer; put it into a Sequential'.": (
        lambda p: save(small()[0], p)
    ),
    f"export: `layout` must be one of {LAYOUTS}; got 'zip'.": lambda p: export(p, p, "zip"),
    "`{}` is not a directory.": load,
    "`{}` is not a directory. ": inspect,
}


@pytest.mark.parametrize(("sentence", "call"), SENTENCES.items(), ids=range(len(SENTENCES)))
def test_bad_arguments(tmp_path, sentence, call):
    with pytest.raises(ValueError) as caught:
        call(tmp_path / "m")
    assert str(caught.value) == sentence.strip().format(tmp_path / "m")


def odd(change):
    model = small()
    change(model)
    return model


def online(model):
    model[0].transform = Scale(torch.ones(64))


def ragged(model):
    model[0] = QLinear.of(Affine(4, 48, ragged=True).encode(torch.randn(32, 64)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (online, "`0` cannot be written as compressed-tensors without loss: a transform stays online."),
        (lambda m: setattr(m[0], "act", Affine(8, None)), "its inputs are rounded to"),
        (lambda m: setattr(m[0], "down", torch.zeros(1, 64)), "it has a low-rank branch"),
        (ragged, "64 inputs leave a shorter last group of 48"),
        (lambda m: (m[3].bfloat16(), m[4].bfloat16()), "readers cast float16 scales to the model's bfloat16"),
    ],
)
def test_the_common_layout_refuses_what_it_cannot_hold(tmp_path, change, why):
    model = odd(change)
    model[0].weight_scale = model[0].weight_scale.half()
    with pytest.raises(CheckpointError) as caught:
        save(model, tmp_path / "m", layout="compressed-tensors")
    assert why in str(caught.value)
    assert caught.value.reason == "lossy"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("layout", "method", "why"),
    [
        ("awq", {"bits": 8}, "AWQ has 4 bits, the layer 8"),
        ("awq", {"scale_dtype": "float32"}, "its float32 scales are not all float16 values"),
        ("gptq", {"bits": 3}, "GPTQ has 2, 4 or 8 bits, the layer 3"),
        ("gguf", {}, "model_type must be one of llama, mistral, qwen2; got 'planish'"),
    ],
)
def test_export_refuses_what_would_change_a_weight(tmp_path, layout, method, why):
    save(small(**method), tmp_path / "m")
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path / "m", tmp_path / "out", layout)
    assert why in str(caught.value)
    assert leftovers(tmp_path) == ["m"]


def test_gptq_refuses_zero_points_of_zero(tmp_path):
    model = net()
    model[0] = QLinear.of(Affine(4, 32).encode(torch.rand(32, 64) + 1))
    save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="a zero point is 0"):
        export(tmp_path / "m", tmp_path / "out", "gptq")


def test_export_goes_around_in_a_circle(tmp_path):
    """compressed-tensors -> AWQ -> compressed-tensors -> planish: the same layers throughout."""
    model = small()
    save(model, tmp_path / "a", layout="compressed-tensors")
    for source, target, layout in [("a", "b", "awq"), ("b", "c", "compressed-tensors"), ("c", "d", "planish")]:
        export(tmp_path / source, tmp_path / target, layout)
        assert same(load(tmp_path / target, into=net()), model)
