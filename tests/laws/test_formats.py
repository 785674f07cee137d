"""The laws of every format: what rounding may do to a number, and what it may not."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.quant.act_formats import Dual, format_from_dict
from planish.quant.formats import FP4, Affine, QTensor
from planish.quant.packing import n_words, pack, unpack

EXACT = [Affine(b, g, s, scale_dtype="float64") for b in (1, 2, 3, 4, 5, 8) for g in (8, None) for s in (False, True)]
STORED = [
    Affine(b, 8, s, scale_dtype=d) for b in (2, 4, 8) for s in (False, True) for d in ("float16", "bfloat16", "float32")
]
RAGGED = [Affine(4, 8, ragged=True), Affine(3, 16, symmetric=True, ragged=True, scale_dtype="float32")]
AFFINE = EXACT + STORED + RAGGED
TIED = [Affine(8, None, True, scale_dtype="float32", per_tensor=True), Affine(4, 8, per_tensor=True)]
FORMATS = [*AFFINE, *TIED, FP4(16), FP4(8), Dual(8), Dual(2), Dual(4), Dual(8, unsigned=True), Dual(3, unsigned=True)]
ids = repr


def batch(seed: int, rows: int, channels: int, kind: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=g, dtype=torch.float64)
    match kind:
        case "outliers":
            x[:, 0] *= 300.0
        case "positive":
            x = x.abs() + 0.1
        case "negative":
            x = -x.abs() - 0.1
        case "small":
            x *= 1e-3
        case "constant":
            x = torch.full_like(x, 0.7)
        case "zero":
            x.zero_()
        case "one":
            x.zero_()
            x[0, -1] = -3.0
    return x.to(dtype)


KINDS = ("normal", "outliers", "positive", "negative", "small", "constant", "zero", "one")
inputs = st.builds(
    batch, st.integers(0, 2**16), st.integers(1, 4), st.sampled_from([16, 48]), st.sampled_from(KINDS),
    st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip


def steps(form, q):
    """The distance between neighbouring codes at each value: twice the largest error inside the range."""
    size = q.shape[-1]
    if isinstance(form, Dual):
        return torch.where(q.decode() < 0, q.scale[..., :1], q.scale[..., 1:]), q.scale.double()
    width = form.group_size or size
    scale = q.scale.double().repeat_interleave(width, -1)[..., :size]
    return scale * (2 if isinstance(form, FP4) else 1), scale  # between 4 and 6 the codes of e2m1 lie 2 apart


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@settings(max_examples=25)
@given(x=inputs)
def test_the_error_is_at_most_half_a_step_inside_the_range(form, x):
    q = form.encode(x)
    value = form.decode(q).double()
    lattice = representable(form, q)
    inside = x.double().clamp(lattice[0], lattice[1])
    if isinstance(form, Dual):  # the two sides have their own steps
        step = torch.where(x < 0, q.scale[..., :1], q.scale[..., 1:]).double()
    else:
        step, _ = steps(form, q)
    assert ((inside - value).abs() <= step * (0.5 + 1e-5)).all()


def representable(form, q):
    """Lowest and highest value the codes of each element's group can stand for."""
    if isinstance(form, Dual):
        below, above = form.last
        return -below * q.scale[..., :1].double(), above * q.scale[..., 1:].double()
    _, scale = steps(form, q)
    if isinstance(form, FP4):
        return -6 * scale, 6 * scale
    zero = torch.full_like(q.scale, form.middle) if q.zero is None else q.zero
    width = form.group_size or q.shape[-1]
    zero = zero.double().repeat_interleave(width, -1)[..., : q.shape[-1]]
    return -zero * scale, (2**form.bits - 1 - zero) * scale


@pytest.mark.parametrize("form", AFFINE, ids=ids)
@settings(max_examples=25)
@given(x=inputs)
def test_the_data_leaves_the_range_by_half_a_step_and_the_rounding_of_the_scale_at_most(form, x):
    q = form.encode(x)
    low, high = representable(form, q)
    _, scale = steps(form, q)
    loss = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 0.0}[form.scale_dtype]
    slack = scale * (0.5 + 1e-5 + 2**form.bits * loss * 1.01)
    if form.bits == 1 and form.symmetric:
        slack = scale  # the codes are -scale and 0: nothing above zero can be told
    assert (x - high <= slack).all() and (low - x <= slack).all()


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@settings(max_examples=25)
@given(x=inputs)
def test_zero_is_represented_exactly(form, x):
    x = x.clone()
    x[..., ::3] = 0.0
    assert (form.fake(x)[..., ::3] == 0).all()


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@settings(max_examples=25)
@given(x=inputs)
def test_fake_is_encode_then_decode(form, x):
    there_and_back = form.decode(form.encode(x)).to(x.dtype)
    if x.dtype == torch.float64 and there_and_back.dtype != form.encode(x).scale.dtype:
        # stored scales decode in float32; fake multiplies in the precision of x
        assert torch.allclose(form.fake(x), there_and_back, rtol=2**-23, atol=0)
    else:
        assert torch.equal(form.fake(x), there_and_back)
    assert form.fake(x).dtype == x.dtype


def limits_of(form, x):
    if isinstance(form, Dual):
        return x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    return (Affine(4, form.group_size) if isinstance(form, FP4) else form).ranges(x)


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@settings(max_examples=25)
@given(x=inputs)
def test_idempotent_on_its_own_grid(form, x):
    limits = limits_of(form, x)
    once = form.encode(x, limits=limits)
    again = form.encode(form.decode(once), limits=limits)
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.scale, again.scale)


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@settings(max_examples=25)
@given(x=inputs)
def test_the_data_s_own_extremes_are_the_default_limits(form, x):
    assert torch.equal(form.fake(x), form.fake(x, limits=limits_of(form, x)))


@pytest.mark.parametrize("form", EXACT, ids=ids)
@settings(max_examples=25)
@given(x=inputs, seed=st.integers(0, 99))
def test_rows_may_be_scaled_before_or_after(form, x, seed):
    x = x.double()
    factor = torch.rand(x.shape[0], 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 30 + 0.01
    # a value half way between two codes may fall to either side: such ties are left out, not the rows that hold them
    ratio = x / steps(form, form.encode(x))[1]
    tie = ((ratio - ratio.floor()) - 0.5).abs() < 1e-9
    zero_tie = torch.zeros_like(tie)
    if not form.symmetric:
        low, _ = form.ranges(x)
        start = low / form.scales(form.ranges(x))[0]
        zero_tie = (((start - start.floor()) - 0.5).abs() < 1e-9).repeat_interleave(form.group_size or x.shape[-1], -1)
    scaled, plain = form.fake(x * factor), form.fake(x) * factor
    free = ~(tie | zero_tie)
    assert torch.allclose(scaled[free], plain[free], rtol=1e-12, atol=0)
    two = form.fake(x * 4.0)  # a power of two commutes with everything
    assert torch.equal(two, form.fake(x) * 4.0)


@given(
    bits=st.integers(1, 8), rows=st.integers(0, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**16)
)  # fmt: skip
def test_unpack_undoes_pack(bits, rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, n_words(columns, bits)) and packed.dtype == torch.int32
    assert torch.equal(unpack(packed, bits, columns), codes)


@given(bits=st.integers(1, 8), columns=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_codes_lie_in_the_row_s_bit_stream(bits, columns, seed):
    """Against a second reading of the layout, in Python's big integers."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (1, columns), generator=g, dtype=torch.uint8)
    stream = sum(int(c) << (bits * i) for i, c in enumerate(codes[0].tolist()))
    words = [int(w) & 0xFFFFFFFF for w in pack(codes, bits)[0].tolist()]
    assert sum(w << (32 * i) for i, w in enumerate(words)) == stream


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_leading_axes_are_rows(form):
    x = batch(1, 12, 48, "normal").float()
    q = form.encode(x.reshape(2, 3, 2, 48))
    assert q.shape == (2, 3, 2, 48)
    assert q.codes.dtype == (torch.int16 if getattr(form, "unsigned", False) else torch.uint8)  # nine bits
    assert torch.equal(q.codes.reshape(12, 48), form.encode(x).codes)
    assert torch.equal(form.decode(q).reshape(12, 48), form.decode(form.encode(x)))


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(form, value):
    x = torch.ones(2, 16)
    x[1, 3] = value
    for act in (form.encode, form.fake):
        with pytest.raises(ValueError, match=r"Format.encode: values must be finite; got .* at \[1"):
            act(x)


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_no_rows_is_fine_and_no_channels_is_refused(form):
    assert form.fake(torch.ones(0, 48)).shape == (0, 48)
    with pytest.raises(ValueError, match="at least one channel"):
        form.encode(torch.ones(3, 0))


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(form, dtype):
    x = batch(3, 4, 48, "normal").to(dtype)
    assert torch.equal(form.encode(x).codes, form.encode(x.float()).codes)
    assert form.fake(x).dtype == dtype


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_a_format_is_a_value(form):
    assert form == format_from_dict(form.to_dict())
    assert hash(form) == hash(format_from_dict(form.to_dict()))


@pytest.mark.parametrize(("form", "channels"), [(Affine(4, 128), 576), (FP4(16), 40)], ids=["affine", "fp4"])
def test_groups_must_divide_the_channels(form, channels):
    with pytest.raises(ValueError, match=f"{channels} channels cannot be split in groups of {form.group_size}"):
        form.encode(torch.ones(1, channels))


def test_the_sentence_of_a_group_size_that_does_not_divide_names_one_that_does():
    with pytest.raises(ValueError, match=r"576 = 4 x 128 \+ 64\); use group_size=64, None, or ragged=True"):
        Affine(4, 128).n_groups(576)
    with pytest.raises(ValueError, match=r"use group_size=None or ragged=True"):
        Affine(4, 16).n_groups(7)
    with pytest.raises(ValueError, match=r"^FP4: 40 .* \(40 = 2 x 16 \+ 8\); use group_size=a divisor of 40\.$"):
        FP4(16).encode(torch.ones(1, 40))
    with pytest.raises(ValueError, match=r"^FP4: 48 .*; use group_size=16 or a divisor of 48\.$"):
        FP4(32).decode(QTensor(torch.zeros(1, 48, dtype=torch.uint8), torch.ones(1, 2), None, FP4(32)))
    assert Affine(4, 128, ragged=True).n_groups(576) == 5


@settings(max_examples=25)
@given(x=inputs, channels=st.integers(1, 15))
def test_a_ragged_last_group_is_rounded_as_if_it_were_a_row(x, channels):
    form = Affine(4, 16, ragged=True)
    tail = form.fake(x)[..., :channels]
    assert tail.shape[-1] == min(channels, x.shape[-1])
    wide = torch.cat([x[..., :16], x[..., :channels]], -1)
    assert torch.equal(form.fake(wide)[..., 16:], Affine(4, None).fake(x[..., :channels]))


def test_a_scale_that_overflows_half_precision_is_refused():
    x = torch.tensor([[4e6, 0.0]])
    with pytest.raises(ValueError, match=r"a scale of .* does not fit float16; use scale_dtype='float32'"):
        Affine(4, 2).encode(x)
    assert Affine(4, 2, scale_dtype="float32").fake(x)[0, 0] == pytest.approx(4e6, rel=1e-6)
    assert Affine(4, 2, scale_dtype="bfloat16").fake(x)[0, 0] == pytest.approx(4e6, rel=2**-8)


def test_scales_are_never_subnormal_and_never_zero():
    q = Affine(8, 2).encode(torch.tensor([[1e-9, -1e-9], [0.0, 0.0]]))
    assert (q.scale >= torch.finfo(torch.float16).smallest_normal).all()


@pytest.mark.parametrize("form", [f for f in AFFINE if not f.ragged], ids=ids)
def test_limits_of_one_sign_are_widened_to_zero(form):
    x = batch(5, 2, 16, "positive")
    groups = 16 // (form.group_size or 16)
    low, high = torch.full((2, groups), 0.5).double(), torch.full((2, groups), 2.0).double()
    assert torch.equal(form.fake(x, limits=(low, high)), form.fake(x, limits=(torch.zeros_like(low), high)))


def test_dual_limits_of_one_sign_are_widened_to_zero():
    x = batch(5, 2, 16, "normal")
    low, high = torch.full((2, 1), 0.5).double(), torch.full((2, 1), 2.0).double()
    assert torch.equal(Dual().fake(x, limits=(low, high)), Dual().fake(x, limits=(torch.zeros_like(low), high)))


def test_tighter_limits_clip():
    x = torch.tensor([[-1.0, 0.0, 1.0, 8.0]])
    limits = torch.tensor([[-1.0]]), torch.tensor([[2.0]])
    assert Affine(4, 4).fake(x, limits=limits)[0, 3] <= 2.1
    assert Dual().fake(x, limits=limits)[0, 3] <= 2.0
    assert FP4(4).fake(x, limits=limits)[0, 3] <= 2.2


CLIPPED = [Affine(4, g, s, ragged=True, scale_dtype=d, clip=0.8) for g in (None, 8) for s in (False, True)
           for d in ("float16", "float32")]  # fmt: skip


@pytest.mark.parametrize("form", CLIPPED, ids=ids)
@given(inputs)
def test_a_share_of_the_range_is_the_range_with_nearer_limits(form, x):
    whole = dataclasses.replace(form, clip=1.0)
    nearer = tuple(end * 0.8 for end in whole.ranges(x))
    q = form.encode(x)
    assert torch.equal(form.fake(x), whole.fake(x, limits=nearer))
    codes = whole.encode(x, limits=nearer)
    assert torch.equal(codes.codes, q.codes) and torch.equal(codes.scale, q.scale)


def test_a_clip_of_one_is_not_spoken_of():
    assert repr(Affine(3, 64)) == "Affine(bits=3, group_size=64, symmetric=False, ragged=False, scale_dtype='float16')"
    assert "clip" not in Affine().to_dict() and repr(Affine(clip=0.9)).endswith("clip=0.9)")
    assert format_from_dict(Affine(clip=0.9).to_dict()) == Affine(clip=0.9) != Affine()


def test_more_bits_never_cost_accuracy():
    x = batch(11, 16, 64, "normal")
    errors = [(Affine(b, 16, scale_dtype="float64").fake(x) - x).square().mean() for b in range(1, 9)]
    assert all(later < sooner / 2 for sooner, later in itertools.pairwise(errors))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Affine(0), r"Affine: `bits` must be an integer from 1 to 8; got 0"),
        (lambda: Affine(9), "`bits`"),
        (lambda: Affine(4.0), "`bits`"),
        (lambda: Affine(True), "`bits`"),
        (lambda: Affine(4, 0), r"`group_size` must be a positive integer or None"),
        (lambda: Affine(4, True), "`group_size`"),
        (lambda: Affine(4, 2.0), "`group_size`"),
        (lambda: Affine(4, scale_dtype="int8"), r"`scale_dtype` must be one of float16, bfloat16, float32, float64"),
        (lambda: Affine(clip=0), r"Affine: `clip` must be a float in \(0, 1\]; got 0"),
        (lambda: Affine(clip=1.5), "`clip`"),
        (lambda: Affine(clip=True), "`clip`"),
        (lambda: Affine(clip="0.9"), "`clip`"),
        (lambda: FP4(0), r"FP4: `group_size` must be a positive integer; got 0"),
        (lambda: Dual(1), r"Dual: `bits` must be an integer from 2 to 8; got 1"),
        (lambda: Dual(9), "`bits`"),
        (lambda: format_from_dict({"kind": "NF4"}), "`description` must be what Format.to_dict returns"),
        (lambda: format_from_dict({"kind": "Affine", "spin": 1}), "`description`"),
        (lambda: format_from_dict([]), "`description`"),
        (lambda: pack(torch.tensor([[4]], dtype=torch.uint8), 2), r"pack: `codes` must be below 4 for 2 bits; got 4"),
        (lambda: pack(torch.tensor([[4]], dtype=torch.uint8), 9), "pack: `bits`"),
        (lambda: unpack(torch.zeros(1, 2, dtype=torch.int32), 4, 8), r"unpack: `packed` must be \(rows, 1\) for"),
        (lambda: unpack(torch.zeros(1, 1, dtype=torch.int32), 0, 8), "unpack: `bits`"),
    ],
)  # fmt: skip
@pytest.mark.refuses
def test_bad_arguments(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("channels", [8, 11])
def test_values_of_a_ragged_group_lie_side_by_side(channels):
    """A weight whose rows are apart by the padding sends oneDNN's products down a path a hundred times slower."""
    grid, x = Affine(4, 8, ragged=True), torch.randn(3, channels)
    q = grid.encode(x)
    assert q.codes.is_contiguous() and q.decode().is_contiguous() and grid.fake(x).is_contiguous()
