"""The method of segments: what it proposes, tries, keeps and says; files, journals and bad input."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.quant import (
    METHODS,
    Journal,
    LowRank,
    QConv,
    QLinear,
    Segment,
    Segmented,
    Segments,
    Static,
    inspect,
    load,
    quantize,
    save,
    segquant,
)  # fmt: skip
from planish.quant.act_formats import Dual
from planish.quant.formats import Affine
from planish.quant.methods.gptq import Compensate
from planish.quant.methods.segquant import FindCuts, SmoothAlpha
from planish.quant.segmenting import fixed, sided
from planish.quant.transforms import Scale

C = 32


class Block(nn.Module):
    """Rows that differ by ten, columns that differ by ten, two activations."""

    def __init__(self):
        super().__init__()
        self.norm, self.ada, self.up = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(C, 2 * C)
        self.join, self.down = nn.Linear(2 * C, C), nn.Linear(2 * C, C)
        with torch.no_grad():
            self.ada.weight[C:] *= 10
            self.join.weight[:, C:] /= 10

    def forward(self, x):
        shift, scale = self.ada(F.silu(x)).chunk(2, -1)
        y = self.norm(x) * (1 + scale) + shift
        y = self.join(torch.cat([y, 10 * x], -1))
        return x + self.down(F.gelu(self.up(y)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.spare = nn.Linear(C, C)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(24, 32, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        y = self.b(torch.cat([F.silu(self.a(x)) / 8, x * 8], 1))
        one, two = y.chunk(2, 1)
        return self.c(F.gelu(one)) * two


def net():
    return Net().eval().requires_grad_(False)


def data(seed=1, batches=2):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 20, C, generator=g) for _ in range(batches)]


def lost(model, method, batches=None):
    wanted = model(data(9)[0])
    small = copy.deepcopy(model)
    report = quantize(small, batches or data(), method)
    return ((small(data(9)[0]) - wanted).square().mean() / wanted.square().mean()).item(), small, report


def test_defaults_are_the_published_eight_bits_and_parts_can_be_changed():
    made = segquant()
    assert made.weight == Affine(8, None, True, scale_dtype="float32", per_tensor=True)
    assert (
        made.act == Affine(8, None, True, scale_dtype="float32")
        and made.round.static
        and METHODS["segquant"] is segquant
    )
    assert isinstance(made.round.inner, Compensate) and made.round.smooth == made.transform == SmoothAlpha(static=True)
    four = segquant(bits=4, optimizer="svd", rank=8, calibrator="amax", act_bits=None)
    assert not four.weight.per_tensor and not four.round.static and four.act is None
    assert isinstance(four.round.inner, LowRank) and four.round.inner.rank == 8
    assert segquant(optimizer="none").round.smooth is None and segquant(alpha=0.5).transform.strengths() == [0.5]
    assert sided(Affine(4, None, True), "asymmetric") == Affine(4, None) and sided(Dual(8), "signed") is None
    assert (
        fixed(Affine(8, None), False, torch.ones(1), torch.ones(1)) == Affine(8, None)
        and fixed(None, True, *[torch.ones(1)] * 2) is None
    )


def test_what_pays_is_kept_and_the_report_says_what_it_costs():
    base, _, plain = lost(net(), segquant(patterns=(), sides="off"))
    ours, small, report = lost(net(), segquant())
    assert ours < 0.88 * base and not plain.blocks[0].notes
    notes = report.blocks[0].notes
    assert set(notes) == {"ada", "join", "down"} and json.loads(json.dumps(report.to_json()))
    assert notes["ada"]["form"].startswith("output") and notes["ada"]["reads"] == "silu"
    assert notes["join"]["form"] == "input" and notes["join"]["cut"] == "blocks.0.join: input in 32 + 32 (cat)"
    assert notes["join"]["input_roundings"] == 2 and notes["join"]["errors"]["input"] < notes["join"]["errors"]["whole"]
    assert notes["down"]["form"] == "unsigned inputs" and notes["down"]["products"] == 2
    assert isinstance(small.blocks[0].join, Segments) and isinstance(small.blocks[0].down.act, Static)
    assert small.blocks[0].down.act.grid == Dual(8, unsigned=True)
    assert report.search["cuts"]["how"] == "export" and "spare" in report.search["cuts"]["unseen"]


def test_what_does_not_pay_is_not_kept():
    _, small, report = lost(net(), segquant(pays=0.99))
    assert not any(isinstance(m, Segments) for m in small.modules())
    assert {n["form"] for b in report.blocks for n in b.notes.values()} == {"whole"}


def test_outputs_with_one_smoothing_stay_one_layer_and_with_their_own_become_parts():
    choice = {"sides": "off", "patterns": ("chunk",), "pays": 0.0}
    _, small, report = lost(net(), segquant(optimizer="none", **choice))
    assert isinstance(small.blocks[0].ada, QLinear) and report.blocks[0].notes["ada"]["form"] == "output, shared"
    assert len(small.blocks[0].ada.weight_scale.unique()) == 2
    _, small, report = lost(net(), segquant(shared=False, alpha=0.5, **choice))
    parts = small.blocks[0].ada.parts
    assert len(parts) == 2 and all(isinstance(p.transform, Scale) for p in parts)
    assert report.blocks[0].notes["ada"]["input_roundings"] == 2
    assert not torch.equal(parts[0].transform.scale, parts[1].transform.scale)


@pytest.mark.parametrize(
    "choice",
    [
        {"calibrator": "amax"}, {"optimizer": "none", "sides": "signed"}, {"bits": 4, "optimizer": "svd", "rank": 4},
        {"sides": "asymmetric"}, {"act_bits": None}, {"bits": 4, "group_size": 16}, {"granularity": "row"},
        {"bits": 4, "granularity": "tensor", "shared": False, "act_bits": 4, "symmetric": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_choice_runs_and_survives_a_file(tmp_path, choice):
    dtype = torch.bfloat16 if choice.get("sides") else torch.float32
    model = net().to(dtype)
    batches = [x.to(dtype) for x in data()]
    report = quantize(model, batches, segquant(pays=0.0, **choice))
    y = model(batches[0])
    assert torch.isfinite(y).all() and y.dtype == dtype
    save(model, tmp_path / "small", report=report)
    twin = load(tmp_path / "small", into=net().to(dtype))
    assert torch.equal(twin(batches[0]), y)
    assert inspect(tmp_path / "small")


@pytest.mark.parametrize("optimizer", ["none", "svd"])
def test_convolutions_are_cut_too(tmp_path, optimizer):
    model = Pixels().eval().requires_grad_(False)
    x = [torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    wanted = model(x[0])
    errors = {}
    for name, choice in {"base": {"patterns": (), "sides": "off"}, "cut": {}}.items():
        small = copy.deepcopy(model)
        report = quantize(small, x, segquant(convolutions=True, optimizer=optimizer, **choice))
        errors[name] = ((small(x[0]) - wanted).square().mean() / wanted.square().mean()).item()
    assert errors["cut"] < 0.7 * errors["base"]
    assert isinstance(small.b, Segments) and all(isinstance(p, QConv) for p in small.b.parts)
    assert (
        report.blocks[0].notes["b"]["form"] == "input"
        and "b: output in 16 + 16 (chunk)" in report.blocks[0].notes["b"]["cuts"]
    )
    save(small, tmp_path / "small")
    twin = load(tmp_path / "small", into=Pixels().eval())
    assert torch.equal(twin(x[0]), small(x[0])) and isinstance(twin.b.parts[0], QConv)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path):
    whole = net()
    report = quantize(whole, data(), segquant())

    class StoppedError(Exception):
        pass

    def stop(stage, done, total):
        raise StoppedError

    model = net()
    with pytest.raises(StoppedError):
        quantize(model, data(), segquant(), journal=Journal(tmp_path / "j"), progress=stop)
    again = quantize(model, data(), segquant(), journal=Journal(tmp_path / "j"))
    assert torch.equal(model(data()[0]), whole(data()[0]))
    assert again.blocks[0].notes == report.blocks[0].notes and isinstance(model.blocks[0].join, Segments)


def test_a_cut_of_the_user_s_own_replaces_what_is_found():
    given = [Segment("blocks.0.join", "input", (8, 24, 32)), Segment("blocks.0.ada", "output", (2 * C,))]
    _, small, report = lost(net(), segquant(cuts=given, pays=0.0, optimizer="none"))
    assert small.blocks[0].join.sizes == (8, 24, 32) and report.blocks[0].notes["ada"]["cuts"] == []
    assert small.blocks[1].join.sizes == (32, 32)


@torch.no_grad()
def test_a_fused_projection_stored_the_other_way_round_is_cut(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=48, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn.weight[:, 96:] *= 30
    batches = [{"input_ids": torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(s))} for s in (1, 2)]
    wanted = model(**batches[0]).logits
    report = quantize(model, batches, segquant(pays=0.0, shared=False, alpha=0.5))
    assert isinstance(model.transformer.h[0].attn.c_attn, Segments)
    got = model(**batches[0]).logits
    assert (got - wanted).square().mean() < 1e-3 * wanted.square().mean()
    save(model, tmp_path / "gpt", layout="planish", report=report)
    assert torch.equal(load(tmp_path / "gpt")(**batches[0]).logits, got)


@torch.no_grad()
def test_transformers_reads_cut_layers_through_our_plugin(tmp_path):
    transformers = pytest.importorskip("transformers")
    import planish.plugins.transformers  # noqa: F401

    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).eval().requires_grad_(False)
    batches = [{"input_ids": torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(s))} for s in (1, 2)]
    report = quantize(model, batches, segquant(pays=0.0, shared=False))
    assert any(n["form"] != "whole" for b in report.blocks for n in b.notes.values())
    assert any(isinstance(m, Segments) for m in model.modules())
    save(model, tmp_path / "phi", layout="planish", report=report)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "phi")
    assert torch.equal(twin(**batches[0]).logits, model(**batches[0]).logits)


def test_stock_layouts_refuse_a_cut_layer(tmp_path):
    from planish._support import CheckpointError
    from planish.plugins.vllm.parts import check_servable

    model = nn.Sequential(nn.Linear(C, C))
    model[0] = Segments([QLinear.of(Affine(4, 16).encode(torch.randn(C, 16))) for _ in range(2)], "input")
    with pytest.raises(
        CheckpointError, match="`0` cannot be written as compressed-tensors without loss: it is cut into"
    ):
        save(model, tmp_path / "x", layout="compressed-tensors")
    with pytest.raises(ValueError, match="`q`: it is cut into segments"):
        check_servable("q", model[0])


def test_damaged_descriptions_of_cut_layers_are_refused():
    from planish._support import CheckpointError
    from planish.quant.schemes import describe, empty_layer

    part = describe("x", QLinear.of(Affine(4, 16).encode(torch.randn(C, 16))))
    assert isinstance(empty_layer("x", {"mode": "input", "parts": [part, part]}), Segments)
    for entry in (
        {"mode": "rows", "parts": [part]}, {"mode": "input", "parts": []}, {"mode": "input", "parts": 3},
        {"mode": ["input"], "parts": [part]}, {"mode": "input", "parts": [{"mode": "input", "parts": [part]}]},
        {"mode": "output", "parts": [part, {**part, "in": 32}]}, {"mode": "input", "parts": "ab"},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="`x"):
            empty_layer("x", entry)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: segquant(optimizer="adam"),
            "segquant: `optimizer` must be one of 'none', 'smooth', 'svd'; got 'adam'.",
        ),
        (lambda: segquant(calibrator="mse"), "`calibrator` must be one of 'amax', 'gptq'"),
        (lambda: segquant(granularity="head"), "`granularity`"),
        (lambda: segquant(sides="both"), "`sides` must be one of 'unsigned', 'signed', 'asymmetric', 'off'"),
        (lambda: segquant(alpha="auto"), "`alpha` must be 'search' or a float in"),
        (lambda: segquant(alpha=1.5), r"`alpha` must be None or a float in \[0, 1\]; got 1.5"),
        (lambda: segquant(group_size=32), "`group_size` must be None with one scale a tensor; got 32"),
        (lambda: segquant(patterns=("gather",)), "`patterns` must be of chunk, split, cat, stack, heads; got 'gather'"),
        (lambda: segquant(pays=1.0), r"Segmented: `pays` must be a float in \[0, 1\); got 1.0"),
        (lambda: Segmented(rows=0), "`rows` must be at least 1"),
        (lambda: Segmented(sides="none"), "`sides`"),
        (lambda: SmoothAlpha(steps=1), "`steps` must be at least 2"),
        (lambda: SmoothAlpha(tokens=0), "`tokens` must be at least 1"),
        (lambda: FindCuts(("rows",)), "`patterns`"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("segment", "sentence"),
    [
        (
            Segment("blocks.0.ada", "output", (5, 6)),
            r"segquant, `blocks.0.ada`: `sizes` must be numbers above 0 that sum to 64",
        ),
        (
            Segment("blocks.0.norm", "output", (5, 6)),
            "`cuts` must be of dense layers and convolutions of the model; got 'blocks.0.norm'",
        ),
        (Segment("nowhere", "output", (5, 6)), "got 'nowhere'"),
        (Segment("spare", "output", (16, 16)), "`cuts` must be of layers that the model calls; got 'spare'"),
    ],
)
def test_cuts_that_do_not_fit_the_model_are_refused(segment, sentence):
    with pytest.raises(ValueError, match=sentence):
        quantize(net(), data(), segquant(cuts=[segment]))


def test_a_branch_that_does_not_fit_a_given_part_is_refused_and_a_found_part_is_left_whole():
    method = segquant(bits=4, optimizer="svd", rank=20, sides="off")
    with pytest.raises(ValueError, match="`rank` must be at most 8 at `blocks.0.join.parts.0`"):
        quantize(net(), data(), replace(method, plan=FindCuts((), (Segment("blocks.0.join", "input", (8, 56)),))))
    method = segquant(bits=4, optimizer="svd", rank=32, sides="off", patterns=("cat", "chunk"), pays=0.0)
    narrow = replace(method, round=replace(method.round, inner=LowRank(33)), plan=FindCuts(("cat",)))
    with pytest.raises(ValueError, match="at most 32 at"):  # what stays whole is too narrow as well
        quantize(net(), data(), narrow)
    _, _, report = lost(net(), method)
    assert all({"input", "output, own"} & set(n["errors"]) for n in report.blocks[0].notes.values())
    found = Segment("x", "input", (8, 56), "cat")
    site = SimpleNamespace(convolution=False)
    assert method.round._forms(found, site) == [] and method.round._forms(replace(found, reason="given"), site) == [
        "input"
    ]
