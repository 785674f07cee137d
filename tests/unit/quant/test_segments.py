"""Where layers may be cut: every pattern, what lies between, what is no cut, and models that cannot be exported."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish import _support
from planish.quant import Segment, detect_segments, graph
from planish.quant.segments import Cuts

B, T, C = 2, 3, 12


class Net(nn.Module):
    """Layers by name, and the function that joins them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, made in layers.items():
            setattr(self, name, made)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.1)
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


def lin(inp=C, out=C):
    return nn.Linear(inp, out)


def total(parts):
    return sum(p.mean() for p in parts)


@pytest.fixture(params=["export", "run"])
def found(request, monkeypatch):
    """Detection by either way; both must see the same."""
    if request.param == "run":
        monkeypatch.setattr(graph, "exported", lambda *_: (_ for _ in ()).throw(RuntimeError("no export")))
    _support._warned.clear()

    def detect(forward, x=None, **layers):
        model = Net(forward, **layers)
        args = torch.randn(B, T, C) if x is None else x
        if request.param == "run":
            with pytest.warns(_support.PlanishWarning, match="Net cannot be exported"):
                cuts = detect_segments(model, args)
        else:
            cuts = detect_segments(model, args)
        assert cuts.how == request.param and model.training
        return cuts

    return detect


OUTPUTS = {
    "positional dim": (lambda m, x: total(m.a(x).chunk(3, 2)), (4, 4, 4), "chunk"),
    "dim=-1": (lambda m, x: total(m.a(x).chunk(3, dim=-1)), (4, 4, 4), "chunk"),
    "dim=ndim-1": (lambda m, x: total(torch.chunk(m.a(x), 3, dim=x.ndim - 1)), (4, 4, 4), "chunk"),
    "a remainder": (lambda m, x: total(m.a(x).chunk(5, -1)), (3, 3, 3, 3), "chunk"),
    "split by size": (lambda m, x: total(m.a(x).split(5, -1)), (5, 5, 2), "split"),
    "split by list": (lambda m, x: total(torch.split(m.a(x), [1, 8, 3], dim=2)), (1, 8, 3), "split"),
    "between": (lambda m, x: total(m.drop(m.a(x)).to(torch.float64).contiguous().chunk(2, -1)), (6, 6), "chunk"),
    "new axes": (lambda m, x: total(m.a(x[:, 0])[:, :, None, None].chunk(2, 1)), (6, 6), "chunk"),
    "flat rows": (lambda m, x: total(m.a(x.reshape(-1, C)).reshape(B, T, C).chunk(2, -1)), (6, 6), "chunk"),
    "a wrong dim": (lambda m, x: total(m.a(x).chunk(3, 1)), None, None),
    "only looked at": (lambda m, x: m.a(x)[..., :3].mean() + total(x.chunk(2, -1)), None, None),
    "after a function": (lambda m, x: total(F.relu(m.a(x)).chunk(2, -1)), None, None),
    "twice, alike": (lambda m, x: total(m.a(x).chunk(2, -1)) + total(m.a(x + 1).chunk(2, -1)), (6, 6), "chunk"),
    "twice, not alike": (lambda m, x: total(m.a(x).chunk(2, -1)) + total(m.a(x + 1).chunk(3, -1)), None, None),
    "twice, once cut": (lambda m, x: total(m.a(x).chunk(2, -1)) + m.a(x + 1).mean(), None, None),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_that_are_taken_apart(found, case):
    forward, sizes, reason = OUTPUTS[case]
    cuts = found(forward, a=lin())
    assert cuts.segments == (() if sizes is None else (Segment("a", "output", sizes, reason),))


def attention(m, x):
    q = x.reshape(B, T, 3, 4).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(B, T, C)
    return m.a(m.drop(y.to(x.dtype)))


def old_attention(m, x):
    q = x.reshape(B, T, 3, 4).permute(0, 2, 1, 3).reshape(B * 3, T, 4)
    y = torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q)
    return m.a(y.reshape(B, 3, T, 4).permute(0, 2, 1, 3).reshape(B, T, C))


INPUTS = {
    "cat, unequal": (lambda m, x: m.a(torch.cat([x[..., :5], x[..., :7]], dim=-1)), (5, 7), "cat"),
    "cat, positional": (lambda m, x: m.a(torch.cat((x[..., :4], x[..., :4], x[..., :4]), 2)), (4, 4, 4), "cat"),
    "the same one twice": (lambda m, x: m.a(torch.cat([x[..., :6]] * 2, -1)), (6, 6), "cat"),
    "between": (lambda m, x: m.a(m.drop(torch.cat([x[..., :5], x[..., :7]], -1)).to(x.dtype)), (5, 7), "cat"),
    "cat of rows": (lambda m, x: m.a(torch.cat([x, x], 1)), None, None),
    "stack": (lambda m, x: m.a(torch.stack([x[:, 0, i] for i in range(C)], dim=1)), (1,) * C, "stack"),
    "stack, later flat": (lambda m, x: m.a(torch.stack([x[..., :6]] * 2, -2).flatten(-2)), None, None),
    "heads": (attention, (4, 4, 4), "heads"),
    "heads, batched": (old_attention, (4, 4, 4), "heads"),
    "pixels": (lambda m, x: m.a(x.reshape(B, T, 3, 4).reshape(B, T, C)), None, None),
    "after a function": (lambda m, x: m.a(torch.cat([x[..., :5], x[..., :7]], -1).tanh()), None, None),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_were_put_together(found, case):
    forward, sizes, reason = INPUTS[case]
    cuts = found(forward, a=lin())
    assert cuts.segments == (() if sizes is None else (Segment("a", "input", sizes, reason),))


def test_convolutions_are_cut_at_their_channels(found):
    image = torch.randn(2, 8, 5, 5)

    def forward(m, x):
        one = m.a(torch.cat([x, x[:, :2]], 1))
        two = m.b(torch.cat([x, x], 1))
        return total(one.chunk(2, dim=1)) + total(two.chunk(2, dim=2)) + m.c(torch.cat([x, x], 1)).mean()

    cuts = found(forward, image, a=nn.Conv2d(10, 6, 3), b=nn.Conv2d(16, 6, 1), c=nn.Conv2d(16, 4, 1, groups=2))
    assert cuts.segments == (
        Segment("a", "output", (3, 3), "chunk"), Segment("a", "input", (8, 2), "cat"),
        Segment("b", "input", (8, 8), "cat"),
    )  # fmt: skip


def test_a_fused_projection_of_gpt2_is_cut():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=1, n_head=3)
    cuts = detect_segments(transformers.GPT2LMHeadModel(config).eval(), {"input_ids": torch.arange(6)[None]})
    assert Segment("transformer.h.0.attn.c_attn", "output", (24, 24, 24), "split") in cuts.segments
    assert Segment("transformer.h.0.attn.c_proj", "input", (8, 8, 8), "heads") in cuts.segments


ACTIVATIONS = {
    "module": (lambda m, x: m.a(m.act(x)), "gelu"),
    "functional": (lambda m, x: m.a(F.silu(x)), "silu"),
    "in place": (lambda m, x: m.a(F.silu(x + 1, inplace=True)), "silu"),
    "between": (lambda m, x: m.a(m.drop(F.mish(x)).to(x.dtype)), "mish"),
    "swiglu": (lambda m, x: m.a(x * F.silu(m.b(x))), "gated silu"),
    "geglu": (lambda m, x: m.a(F.gelu(m.b(x)) * x), "gated gelu"),
    "relu": (lambda m, x: m.a(F.relu(x)), None),
    "a norm after it": (lambda m, x: m.a(F.layer_norm(F.silu(x), (C,))), None),
    "one call of two": (lambda m, x: m.a(F.silu(x)) + m.a(x), None),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_functions_with_two_sides(found, case):
    forward, name = ACTIVATIONS[case]
    layers = {"a": lin()} | ({"b": lin()} if "m.b" in case or "glu" in case else {})
    assert found(forward, **layers).activations == ({} if name is None else {"a": name})


def test_stock_denoisers_show_the_same_cuts_to_export_and_to_a_run():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    batch = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([1, 9])}
    ops = graph.ran(unet.eval(), batch)
    cuts = detect_segments(unet, batch)
    assert cuts.how == "export" and not cuts.unseen
    kinds = [(s.mode, s.reason) for s in cuts.segments]
    assert kinds.count(("output", "chunk")) == 8 and kinds.count(("input", "heads")) == 4
    assert Segment("up_blocks.0.resnets.1.conv_shortcut", "input", (16, 8), "cat") in cuts.segments
    assert len(cuts.activations) == 26 and set(cuts.activations.values()) == {"silu"}
    assert {op.layer for op in ops if op.layer} == {op.layer for op in graph.exported(unet, batch) if op.layer}


def test_what_export_cannot_follow_is_followed_in_a_run_and_named():
    def forward(m, x):
        y = m.a(x)
        return total(y.chunk(2, -1)) if float(x.sum()) > -1e9 else m.b(y)

    with pytest.warns(_support.PlanishWarning, match=r"Net cannot be exported \(.*\); one run .*; nothing .* of b\."):
        cuts = detect_segments(Net(forward, a=lin(), b=lin()), torch.ones(B, C))
    assert cuts.how == "run" and cuts.unseen == ("b",) and len(cuts.segments) == 1


def test_a_model_that_cannot_be_followed_at_all_is_said_to_be_uncut():
    def forward(m, x):
        raise KeyError("its own data")

    with pytest.warns(_support.PlanishWarning, match="its own data.*; it is not cut anywhere; nothing is known of a"):
        cuts = detect_segments(Net(forward, a=lin()), torch.ones(B, C))
    assert (cuts.how, cuts.segments, cuts.unseen) == ("nothing", (), ("a",))


def test_a_model_on_the_meta_device_is_followed():
    with torch.device("meta"):
        model = Net(lambda m, x: total(m.a(x).chunk(2, -1)), a=lin())
    assert detect_segments(model, torch.ones(B, C)).segments == (Segment("a", "output", (6, 6), "chunk"),)


def test_patterns_are_chosen_and_findings_are_printed_and_written():
    model = Net(lambda m, x: m.b(attention(m, x).chunk(2, -1)[0]), a=lin(), b=lin(6))
    cuts = detect_segments(model, torch.randn(B, T, C))
    assert str(cuts) == "a: output in 6 + 6 (chunk)\na: input in 4 + 4 + 4 (heads)"
    assert detect_segments(model, torch.randn(B, T, C), patterns=("heads",)).segments == cuts.segments[1:]
    assert detect_segments(model, torch.randn(B, T, C), patterns=()).segments == ()
    assert json.loads(json.dumps(cuts.to_json()))["segments"][0]["sizes"] == [6, 6]
    assert str(Segment("x", "output", (3,) * 6)) == "x: output in 6 x 3 (given)" and Cuts(()).of("x") == []


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: detect_segments(nn.Linear(2, 2), torch.ones(1, 2), patterns=("gather",)),
            "`patterns` must be of chunk",
        ),
        (lambda: Segment("a", "rows", (1, 1)), "Segment: `mode` must be 'output' or 'input'; got 'rows'"),
        (lambda: Segment("a", "input", (1, 0)), r"Segment: `sizes` must be integers above 0; got \(1, 0\)"),
        (lambda: Segment("a", "input", ()), "`sizes`"),
    ],
)
def test_bad_input(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
