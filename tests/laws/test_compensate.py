"""Rounding that compensates: what each pass promises about the one quadratic that all of them lower."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planish.quant import compensate
from planish.quant.compensate import Grid, damped, descend, greedy, output_loss, refit
from planish.quant.formats import Affine

FORMATS = [
    Affine(4, 16),
    Affine(3, 8, symmetric=True),
    Affine(2, None),
    Affine(4, 16, ragged=True),
    Affine(3, 8, scale_dtype="float32"),
]


def problem(seed: int, rows: int = 12, channels: int = 32, tokens: int = 200):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels**0.5
    inputs = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mix
    inputs[:, 3] *= 8
    return weight, damped(inputs.T @ inputs / tokens, 0.01)


def nearest(weight, grid):
    scale, zero = grid.scale[:, grid.group], grid.zero[:, grid.group]
    return (torch.round(weight / scale) + zero).clamp(0, grid.top)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("channels", [32, 40])
def test_each_pass_lowers_the_output_error(format, channels):
    if channels % (format.group_size or channels) and not format.ragged:
        pytest.skip("the groups do not divide these channels; the ragged format covers them")
    for seed in range(4):
        weight, gram = problem(seed, channels=channels)
        grid = Grid(format, format.ranges(weight), channels)
        plain = output_loss(weight, grid.values(nearest(weight, grid)), gram).sum()
        codes = greedy(weight, gram, grid)
        first = output_loss(weight, grid.values(codes), gram)
        assert first.sum() < 0.8 * plain
        moved = descend(weight, gram, grid, codes, sweeps=2)
        second = output_loss(weight, grid.values(moved), gram)
        assert (second <= first * (1 + 1e-9)).all()  # row by row, and never up
        refit(weight, gram, grid, moved)
        third = output_loss(weight, grid.values(moved), gram)
        assert (third <= second * (1 + 1e-9)).all()


@given(st.integers(0, 10_000), st.integers(2, 40), st.sampled_from(FORMATS[:2]))
def test_codes_stay_on_the_grid_and_blocks_change_nothing(seed, block, format):
    weight, gram = problem(seed)
    grid = Grid(format, format.ranges(weight), 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    codes = greedy(weight, gram, grid, order, block=block)
    assert torch.equal(codes, greedy(weight, gram, grid, order, block=32))
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= grid.top
    moved = descend(weight, gram, grid, codes, block=block)
    assert torch.equal(moved, descend(weight, gram, grid, codes, block=32))
    assert torch.equal(grid.quantized(moved).decode().double(), grid.values(moved))


def test_without_correlation_compensation_is_rounding_to_nearest():
    weight, _ = problem(0)
    grid = Grid(Affine(4, 16), Affine(4, 16).ranges(weight), 32)
    gram = torch.diag(torch.rand(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1)
    codes = greedy(weight, gram, grid)
    assert torch.equal(codes, nearest(weight, grid))
    assert torch.equal(descend(weight, gram, grid, codes), codes)


def test_greedy_follows_the_published_recursion():
    """Step by step with explicit inverses, as the paper derives it: remove a column, update the rest by (3)."""
    weight, gram = problem(5, rows=3, channels=8)
    grid = Grid(Affine(3, 4), Affine(3, 4).ranges(weight), 8)
    work, free = weight.clone(), list(range(8))
    expected = torch.empty_like(weight)
    while free:
        inverse = torch.linalg.inv(gram[free][:, free])
        q = free[0]
        expected[:, q] = grid.codes(work[:, q], q)
        error = (work[:, q] - grid.values(expected)[:, q]) / inverse[0, 0]
        work[:, free] -= error[:, None] * inverse[0]
        free.pop(0)
    assert torch.equal(greedy(weight, gram, grid), expected)


def test_descent_ends_where_no_single_code_can_be_better():
    weight, gram = problem(2, rows=2, channels=6)
    grid = Grid(Affine(2, 6), Affine(2, 6).ranges(weight), 6)
    codes = descend(weight, gram, grid, greedy(weight, gram, grid), sweeps=50)
    best = output_loss(weight, grid.values(codes), gram)
    for column, code in itertools.product(range(6), range(4)):
        other = codes.clone()
        other[:, column] = code
        assert (output_loss(weight, grid.values(other), gram) >= best - 1e-12).all()


def test_refitted_scales_are_stationary_when_stored_exactly():
    weight, gram = problem(3)
    grid = Grid(Affine(3, 16, scale_dtype="float64"), Affine(3, 16).ranges(weight), 32)
    codes = greedy(weight, gram, grid)
    refit(weight, gram, grid, codes)
    scale = grid.scale.clone().requires_grad_(True)
    values = (codes - grid.zero[:, grid.group]) * scale[:, grid.group]
    (slope,) = torch.autograd.grad(output_loss(weight, values, gram).sum(), scale)
    before = output_loss(weight, weight * 0, gram).sum()
    assert slope.abs().max() < 1e-4 * before


def test_damping_must_be_positive():
    with pytest.raises(ValueError, match="damped: `damping` must be above zero; got 0."):
        compensate.damped(torch.eye(2), 0.0)
