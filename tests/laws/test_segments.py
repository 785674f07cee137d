"""The laws of cut layers and of activations with two sides: what a cut may change, and what it may not."""

import pytest
import torch
from torch import nn

from planish.quant import load, save
from planish.quant.act_formats import Dual, Static
from planish.quant.conv import QConv
from planish.quant.formats import FP4, Affine
from planish.quant.integers import has_integers, terms
from planish.quant.layers import QLinear
from planish.quant.parts import Segments, in_place_of, quantized_layers
from planish.quant.segmenting import joined
from planish.quant.transforms import Scale

C, R = 24, 18
ROWS, COLUMNS = [(18,), (9, 9), (1, 10, 7), (3,) * 6], [(24,), (12, 12), (5, 1, 18), (4,) * 6]
CUTS = [("output", s) for s in ROWS] + [("input", s) for s in COLUMNS]
ACTS = [
    None, Affine(8, None, True, scale_dtype="float32"), Static(Affine(8, None, True, scale_dtype="float32"), -3.0, 3.0),
    Dual(8), Static(Dual(8, unsigned=True), -0.3, 3.0),
]  # fmt: skip


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(conv=False, bias=True, dtype=torch.float64):
    made = nn.Conv2d(C, R, 3, padding=1, stride=2, bias=bias) if conv else nn.Linear(C, R, bias=bias)
    made = made.to(dtype).requires_grad_(False)
    for seed, tensor in enumerate(made.parameters()):
        tensor.copy_(noise(*tensor.shape, seed=seed))
    return made


def data(conv, dtype=torch.float64):
    return noise(2, C, 6, 5, seed=9, dtype=dtype) if conv else noise(3, 4, C, seed=9, dtype=dtype)


def quantized(plain, grid, act=None, transform=None):
    """Round a float layer, or every part of a cut one."""
    if isinstance(plain, Segments):
        return Segments([quantized(part, grid, act, transform) for part in plain.parts], plain.mode)
    weight, change = plain.weight.flatten(1), transform
    if change is not None:
        weight = change.weight(weight)
    return in_place_of(plain, QLinear.of(grid.encode(weight), plain.bias, transform=change, act=act))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize(("mode", "sizes"), CUTS)
def test_a_cut_that_rounds_nothing_changes_nothing(mode, sizes, conv, bias):
    whole, x = layer(conv, bias), data(conv)
    before = {n: p.clone() for n, p in whole.named_parameters()}
    cut = Segments.split(whole, mode, sizes)
    assert torch.allclose(cut(x), whole(x), rtol=1e-12, atol=1e-12) and cut.sizes == sizes
    again = cut.dequantize(torch.float64)
    assert torch.equal(again.weight, whole.weight) and again(x).shape == whole(x).shape
    assert (again.bias is None) == (not bias) and (not bias or torch.equal(again.bias, whole.bias))
    for part in cut.parts:
        part.weight.zero_()  # of copies
    assert all(torch.equal(before[n], p) for n, p in whole.named_parameters())


@pytest.mark.parametrize("act", ACTS, ids=repr)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("mode", ["output", "input"])
def test_one_segment_is_the_layer_itself_bit_for_bit(mode, conv, act):
    whole, x = layer(conv, dtype=torch.float32), data(conv, torch.float32)
    grid = Affine(8, None, True, scale_dtype="float32", per_tensor=True)
    alone = quantized(whole, grid, act)
    cut = quantized(Segments.split(whole, mode, (R if mode == "output" else C,)), grid, act)
    assert torch.equal(cut(x), alone(x)) and joined(list(cut.parts), mode, whole) is cut.parts[0]


@pytest.mark.parametrize(("mode", "sizes"), CUTS)
def test_with_one_scale_a_tensor_no_segment_has_a_larger_step_than_the_whole(mode, sizes):
    whole, grid = layer(), Affine(4, None, True, scale_dtype="float64", per_tensor=True)
    step = grid.encode(whole.weight).scale.max()
    for part in Segments.split(whole, mode, sizes).parts:
        q = grid.encode(part.weight)
        assert (q.scale <= step).all() and len(q.scale.unique()) == 1
        assert ((q.decode() - part.weight).abs() <= q.scale / 2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("grid", [Affine(8, None, True), Affine(4, None), Affine(4, 8), FP4(8)], ids=repr)
@pytest.mark.parametrize("sizes", ROWS)
def test_with_a_scale_a_row_cuts_of_outputs_change_nothing(sizes, grid):
    """The accounting of what is cut, proved: the same codes and scales, hence the same layer."""
    whole = layer(dtype=torch.float32)
    alone = quantized(whole, grid)
    cut = quantized(Segments.split(whole, "output", sizes), grid)
    if isinstance(grid, FP4):  # shares one factor over the whole tensor
        return
    one = joined(list(cut.parts), "output", whole)
    assert isinstance(one, QLinear) and one.state_dict().keys() == alone.state_dict().keys()
    assert all(torch.equal(v, alone.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize("act", ACTS, ids=repr)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_segments_of_rows_that_share_their_input_are_one_layer_with_tied_scales(conv, act):
    whole, x = layer(conv, dtype=torch.float32), data(conv, torch.float32)
    grid = Affine(4, None, True, scale_dtype="float32", per_tensor=True)
    cut = quantized(Segments.split(whole, "output", (1, 10, 7)), grid, act)
    one = joined(list(cut.parts), "output", whole)
    assert isinstance(one, QConv if conv else QLinear)
    assert torch.allclose(one(x), cut(x), rtol=0, atol=1e-5)
    assert [len(one.weight_scale[a:b].unique()) for a, b in ((0, 1), (1, 11), (11, 18))] == [1, 1, 1]
    other = quantized(Segments.split(whole, "output", (18,)), grid, Dual(2)).parts[0]
    assert isinstance(joined([cut.parts[0], other], "output", whole), Segments)


@pytest.mark.parametrize("act", ACTS, ids=repr)
@pytest.mark.parametrize(("mode", "sizes"), [("output", (1, 10, 7)), ("input", (5, 1, 18))])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_saved_and_loaded_it_computes_the_same_bits(tmp_path, conv, mode, sizes, act):
    whole, x = layer(conv, dtype=torch.float32), data(conv, torch.float32)
    net = nn.Sequential(whole)
    transform = None if conv or mode == "input" else Scale(torch.linspace(0.5, 2, C))
    net[0] = quantized(Segments.split(whole, mode, sizes), Affine(4, None, per_tensor=True), act, transform)
    assert list(quantized_layers(net)) == ["0"] and len(quantized_layers(nn.Sequential(net))) == 1
    save(net, tmp_path / "cut")
    twin = load(tmp_path / "cut", into=nn.Sequential(layer(conv, dtype=torch.float32)))
    assert isinstance(twin[0], Segments) and torch.equal(twin(x), net(x))
    assert repr(twin) == repr(net)


# two sides

DUALS = [Dual(b, unsigned=u) for b in (2, 4, 8) for u in (False, True)]


@pytest.mark.parametrize("act", DUALS, ids=repr)
def test_two_products_of_integers_are_the_product_with_the_rounded_activation_exactly(act):
    """Steps are powers of two here, so that float64 holds every intermediate result."""
    below, above = act.last
    act = Static(act, -below / 64, above / 4)
    x, weight = (
        noise(5, C, dtype=torch.float32),
        torch.randint(-8, 8, (R, C), generator=torch.Generator().manual_seed(1)),
    )
    parts = terms(act, x)
    assert len(parts) == 2 and all(t.codes.dtype == torch.int8 for t in parts)
    total = torch.zeros(5, R, dtype=torch.float64)
    for term in parts:
        codes = term.codes.to(torch.int32) - (0 if term.zero is None else term.zero.to(torch.int32))
        assert (codes @ weight.T.to(torch.int32)).dtype == torch.int32
        total += term.scale.double() * (codes @ weight.T.to(torch.int32))
    assert torch.equal(total, act.fake(x).double() @ weight.T.double())
    ends = torch.full((R, 1), -7.5), torch.full((R, 1), 7.5)
    q = QLinear.of(Affine(4, None, True).encode(weight.float(), limits=ends), act=act)
    assert torch.equal(q.weight.decode(), weight.float()) and torch.equal(q(x).double(), total)


@pytest.mark.parametrize("act", [a for a in ACTS if a is not None] + DUALS + [Affine(4, 8), FP4(8)], ids=repr)
def test_the_terms_of_a_format_sum_to_its_values(act):
    x = noise(3, 2, C, dtype=torch.float32)
    assert has_integers(act)
    total = torch.zeros_like(x)
    for term in terms(act, x):
        size = term.group_size or C
        zero = 0.0 if term.zero is None else term.zero.float().repeat_interleave(size, -1)
        total += (term.codes.float() - zero) * term.scale.repeat_interleave(size, -1)
    assert torch.allclose(total, act.fake(x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("act", DUALS, ids=repr)
def test_the_two_sides_never_meet_and_only_share_zero(act):
    x = torch.cat([noise(4, C, dtype=torch.float32), torch.zeros(1, C)])
    values = [(t.codes.int() - (0 if t.zero is None else t.zero.int())) for t in terms(act, x)]
    assert not ((values[0] != 0) & (values[1] != 0)).any()
    assert (values[0] <= 0).all() and (values[1] >= 0).all() and not any(v[-1].any() for v in values)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("act", DUALS, ids=repr)
def test_one_sided_data_use_one_side(act, sign):
    x = noise(4, C).abs() * sign
    q = act.encode(x)
    empty, used = (0, 1) if sign > 0 else (1, 0)
    assert (q.scale[:, empty] == 1).all() and torch.isfinite(act.fake(x)).all()
    top = x.abs().amax(-1, keepdim=True)
    step = top / act.last[used]
    assert torch.allclose(act.fake(x), (x / step).round() * step, rtol=1e-12, atol=0)
    assert torch.allclose(act.fake(x).abs().amax(-1, keepdim=True), top, rtol=1e-12)


def test_the_unsigned_form_has_half_the_step_on_both_sides():
    x = noise(4, C)
    signed, unsigned = Dual(8).encode(x).scale, Dual(8, unsigned=True).encode(x).scale
    assert torch.allclose(unsigned[:, 0] * 255, signed[:, 0] * 128) and torch.allclose(
        unsigned[:, 1] * 255, signed[:, 1] * 127
    )


def test_what_is_not_finite_is_refused_where_codes_would_hide_it():
    q = QLinear.of(Affine(8, None).encode(torch.ones(2, C)), act=Static(Dual(8), -1.0, 1.0))
    with pytest.raises(ValueError, match="values must be finite"):
        q(torch.full((1, C), float("nan")))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Segments([], "input"), r"Segments: `parts` must be at least one layer"),
        (lambda: Segments([nn.Linear(2, 2)], "rows"), r"Segments: `mode` must be 'output' or 'input'; got 'rows'"),
        (lambda: Segments([nn.Linear(2, 2), nn.Linear(3, 2)], "output"), "layers of one kind with as many inputs"),
        (lambda: Segments([nn.Linear(2, 2), nn.Linear(2, 3)], "input"), "layers of one kind with as many outputs"),
        (lambda: Segments([nn.Linear(2, 2), nn.Conv2d(2, 2, 1)], "output"), "layers of one kind"),
        (lambda: Segments([nn.ReLU()], "output"), "dense layers or convolutions; got 'ReLU'"),
        (lambda: Segments.split(nn.Linear(4, 2), "input", (1, 2)), r"`sizes` must be numbers above 0 that sum to 4"),
        (lambda: Segments.split(nn.Linear(4, 2), "output", (0, 2)), "sum to 2; got "),
        (lambda: Segments.split(nn.Linear(4, 2), "both", (2,)), "`mode`"),
        (lambda: Segments.split(nn.Conv2d(4, 4, 1, groups=2), "input", (2, 2)), "whose channels are one group; got 2"),
    ],
)
def test_cuts_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
