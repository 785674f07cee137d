"""Layers cut over workers and joined as vLLM joins them, without vLLM: laws, and what is refused."""

import pytest
import torch

from planish.plugins.vllm import parts
from planish.quant import FP4, Affine, Dual, QLinear
from planish.quant.transforms import Chain, Permute, Rotate, Scale, Shift

FORMATS = [Affine(4, 32), Affine(4, None), Affine(3, 16, symmetric=True), Affine(8, 32, scale_dtype="float32")]


def layer(out=24, inp=128, format=FORMATS[0], **more):
    return QLinear.of(format.encode(torch.randn(out, inp)), **more)


def branch(out, inp, rank):
    return torch.randn(rank, inp), torch.randn(out, rank)


def rich(out=24, inp=128, format=FORMATS[0], rank=3):
    """A layer whose every part can be cut at multiples of 64."""
    within = torch.cat([torch.randperm(64), 64 + torch.randperm(64)])
    basis = torch.linalg.qr(torch.randn(2, 64, 64)).Q
    steps = Chain(Scale(torch.rand(inp) + 0.5), Permute(within), Shift(torch.randn(inp)), Rotate(basis))
    return layer(out, inp, format, transform=steps, act=Affine(8, 32), low_rank=branch(out, inp, rank))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_are_those_of_the_whole(format):
    whole = layer(format=format, bias=torch.randn(24), low_rank=branch(24, 128, 2))
    x, spans = torch.randn(5, 128), [(8, 16), (0, 3)]
    picked = parts.take_rows(whole, spans)
    torch.testing.assert_close(picked(x), torch.cat([whole(x)[:, a:b] for a, b in spans], 1), rtol=1e-5, atol=1e-5)
    assert parts.take_rows(whole, [(0, 24)]) is whole


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_workers_outputs_add_up(format):
    whole, x = rich(format=format), torch.randn(5, 128)
    halves = [parts.take_columns("down", whole, a, a + 64) for a in (0, 64)]
    added = sum(half(x[:, a : a + 64]) for half, a in zip(halves, (0, 64), strict=True))
    torch.testing.assert_close(added, whole(x), rtol=1e-4, atol=1e-4)
    assert parts.take_columns("down", whole, 0, 128) is whole


def test_codes_are_cut_and_never_rounded_again():
    whole = layer()
    left = parts.take_columns("o", whole, 0, 64)
    assert torch.equal(left.weight.codes, whole.weight.codes[:, :64])
    assert torch.equal(left.zeros(), whole.zeros()[:, :2])


def test_cutting_before_rounding_is_cutting_after():
    weight = torch.randn(24, 128)
    after = parts.take_columns("o", QLinear.of(Affine(4, 32).encode(weight)), 64, 128)
    before = QLinear.of(Affine(4, 32).encode(weight[:, 64:]))
    assert all(
        torch.equal(a, b) for a, b in zip(after.state_dict().values(), before.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_joined_layers_are_one_and_give_the_same(format):
    x = torch.randn(5, 128)
    pieces = [layer(out, format=format) for out in (24, 8, 8)]
    one = parts.join(pieces)
    assert isinstance(one, QLinear)
    torch.testing.assert_close(one(x), torch.cat([p(x) for p in pieces], 1), rtol=1e-5, atol=1e-5)


def test_branches_stand_in_blocks_or_share_the_way_down():
    x, own = torch.randn(5, 128), [rich(rank=r) for r in (2, 5)]
    own[1].transform = own[0].transform
    bare = layer(transform=own[0].transform, act=own[0].act)
    one = parts.join([own[0], bare, own[1]])
    assert isinstance(one, QLinear)
    assert one.down.shape == (7, 128)
    assert one.up.shape == (72, 7)
    torch.testing.assert_close(one(x), torch.cat([p(x) for p in (own[0], bare, own[1])], 1), rtol=1e-4, atol=1e-4)
    down = torch.randn(3, 128)
    site = [layer(low_rank=(down, torch.randn(24, 3))) for _ in "qkv"]
    assert parts.join(site).down.shape == (3, 128)


def test_layers_that_differ_stand_beside_each_other():
    x = torch.randn(5, 128)
    for pieces in ([layer(), layer(format=FORMATS[3])], [rich(), rich()], [layer(), layer(act=Affine(8, None))]):
        both = parts.join(pieces)
        assert isinstance(both, parts.Beside)
        torch.testing.assert_close(both(x), torch.cat([p(x) for p in pieces], 1))


def test_half_precision_is_computed_in_float32():
    one, x = layer(), torch.randn(5, 128, dtype=torch.bfloat16)
    assert torch.equal(parts.run(one, x), one(x.float()).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: layer(format=Affine(4, 128)), "inputs 0 to 64 do not end where groups of 128 do"),
        (lambda: layer(act=Affine(8, None)), "its rounding of inputs to .* reaches past the inputs 0 to 64"),
        (lambda: layer(act=Dual(8)), "its rounding of inputs to .* reaches past"),
        (lambda: layer(transform=Permute(torch.arange(128).flip(0))), "its Permute reaches past the inputs 0 to 64"),
        (lambda: layer(transform=Chain(Rotate(torch.eye(128)[None]))), "its Rotate reaches past the inputs 0 to 64"),
    ],
)
def test_what_reaches_across_workers_is_refused(made, sentence):
    with pytest.raises(ValueError, match=f"^`o_proj`: .*{sentence}"):
        parts.take_columns("o_proj", made(), 0, 64)


def test_inputs_that_share_a_scale_over_requests_are_refused():
    with pytest.raises(ValueError, match="`q`: inputs rounded to FP4.* change each other's answers"):
        parts.check_servable("q", layer(act=FP4(16)))
    with pytest.raises(ValueError, match="join: `parts` must be layers that read one input"):
        parts.join([layer(), layer(inp=64)])


def test_without_vllm_the_plugin_does_nothing(monkeypatch):
    import importlib.util

    from planish.plugins import vllm

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    vllm.register()


@pytest.mark.parametrize(("value", "bits"), [(None, 16), ("16", 16), ("8", 8)])
def test_activations_are_rounded_as_the_environment_says(monkeypatch, value, bits):
    monkeypatch.delenv("PLANISH_ACTIVATION_BITS", raising=False)
    if value is not None:
        monkeypatch.setenv("PLANISH_ACTIVATION_BITS", value)
    made = torch.nn.Sequential(layer(), layer())
    parts.set_activation_bits(made)
    assert [part.activation_bits for part in made] == [bits, bits]


def test_another_width_of_activations_is_refused(monkeypatch):
    monkeypatch.setenv("PLANISH_ACTIVATION_BITS", "4")
    with pytest.raises(ValueError, match="`PLANISH_ACTIVATION_BITS` must be 8 or 16; got '4'"):
        parts.set_activation_bits(layer())
