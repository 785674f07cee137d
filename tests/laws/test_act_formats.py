"""The laws of formats that only activations have: ranges known beforehand, one scale a tensor."""

import pytest
import torch

from planish.quant.act_formats import Dual, Static, format_from_dict
from planish.quant.formats import FP4, Affine

ids = repr


def batch(seed: int, rows: int, channels: int) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STATIC = [
    Static(grid, low, 2.0)
    for low in (-1.5, 0.0)
    for grid in (
        Affine(8, None, True, scale_dtype="float32"), Affine(4, None, scale_dtype="float64"), Dual(8),
        Dual(4, unsigned=True),
    )
]  # fmt: skip


@pytest.mark.parametrize("form", STATIC, ids=ids)
def test_a_fixed_range_is_that_of_its_grid_with_these_limits_and_tokens_do_not_matter_to_each_other(form):
    x = batch(3, 6, 32).clamp(-1.5, 2)
    limits = torch.full((6, 1), form.low).double(), torch.full((6, 1), form.high).double()
    assert torch.equal(form.fake(x), form.grid.fake(x, limits=limits))
    q = form.encode(x)
    assert q.scale.shape[:-1] == (6,)  # stored scales decode in float32; fake multiplies in the precision of x
    assert torch.allclose(form.decode(q).to(x.dtype), form.fake(x), rtol=2**-22, atol=0)
    assert torch.equal(form.fake(x)[2:3], form.fake(x[2:3]))
    most = form.high + 0.51 * (form.high - form.low) / (2**form.bits - 1)
    assert (form.fake(torch.zeros(1, 4)) == 0).all() and form.fake(torch.full((1, 4), 99.0)).max() <= most
    assert form == format_from_dict(form.to_dict()) and hash(form) == hash(format_from_dict(form.to_dict()))


def test_one_scale_a_tensor_is_the_largest_of_its_rows():
    x = batch(4, 5, 32)
    rows, tied = (
        Affine(4, None, True, scale_dtype="float64"),
        Affine(4, None, True, scale_dtype="float64", per_tensor=True),
    )
    assert (tied.encode(x).scale == rows.encode(x).scale.max()).all() and tied.encode(x).scale.shape == (5, 1)
    assert "per_tensor" not in Affine().to_dict() and repr(tied).endswith("per_tensor=True)")
    assert tied == format_from_dict(tied.to_dict()) != rows


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Static(Affine(8, 32), -1.0, 1.0), r"Static: `grid` must be Dual, or Affine with group_size=None; got"),
        (lambda: Static(FP4(16), -1.0, 1.0), "`grid`"),
        (lambda: Static(Dual(8), 0.5, 1.0), r"Static: `low` must be finite and at most 0; got 0.5"),
        (lambda: Static(Dual(8), -1.0, float("inf")), r"Static: `high` must be finite and at least 0; got inf"),
        (lambda: format_from_dict({"kind": "Static", "grid": {"kind": "FP4"}, "low": 0.0, "high": 0.0}), "`grid`"),
        (lambda: format_from_dict({"kind": ["Dual"]}), "`description`"),
    ],
)
@pytest.mark.refuses
def test_ranges_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
