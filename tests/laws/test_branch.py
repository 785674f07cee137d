"""The laws of a low-rank branch beside rounded weights: what it is fitted to, never makes worse, and leaves exact."""

import math
from itertools import pairwise

import pytest
import torch

from planish.quant.formats import FP4, Affine
from planish.quant.layers import QLinear
from planish.quant.low_rank import Branch, Problem, solve
from planish.quant.spread import spread
from planish.quant.transforms import Chain, Permute, Scale, Shift

O, C, T = 24, 32, 200  # noqa: E741
GRID = Affine(4, 16, symmetric=True, scale_dtype="float64")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(outliers=10.0):
    x = noise(T, C, seed=1)
    x[:, [3, 17]] *= outliers
    return x


def problem(act=None, weigh="output", weight=None, x=None):
    x = data() if x is None else x
    weight = noise(O, C, seed=2) if weight is None else weight
    d = None if act is None else act.fake(x) - x
    cross, around = (None, None) if d is None else (x.T @ d / len(x), d.T @ d / len(x))
    return Problem(weight, x.T @ x / len(x), cross, around, weigh), x


@pytest.mark.parametrize("act", [None, GRID, FP4()], ids=repr)
def test_three_matrices_of_moments_say_the_error_over_every_token(act):
    made, x = problem(act)
    branch, rounded = Branch(noise(O, 3, seed=3), noise(3, C, seed=4)), GRID.fake(made.weight)
    q = x if act is None else act.fake(x)
    gap = x @ made.weight.T - x @ branch.values.T - q @ rounded.T
    assert made.error(branch, rounded) == pytest.approx(gap.square().sum().item() / len(x), rel=1e-9)


@pytest.mark.parametrize("act", [None, GRID], ids=repr)
def test_beside_given_codes_no_other_branch_is_better(act):
    """Against the plain way: regress on x what is missing, then cut its singular values, whitened by the inputs."""
    made, x = problem(act)
    rounded = GRID.fake(made.weight)
    q = x if act is None else act.fake(x)
    missing = torch.linalg.lstsq(x, x @ made.weight.T - q @ rounded.T).solution.T
    root = torch.linalg.cholesky(made.gram)
    u, s, v = torch.linalg.svd(missing @ root)
    best = (u[:, :4] * s[:4]) @ v[:4] @ torch.linalg.inv(root)
    up, down = made.fit(rounded, 4)
    ours = made.error(Branch(up, down), rounded)
    oracle = made.error(Branch(best, torch.eye(C, dtype=torch.float64)), rounded)
    assert ours == pytest.approx(oracle, rel=1e-3 if act else 1e-9)  # moments are damped where they are inverted
    quick = made.approach(rounded, 4, None)
    assert made.error(Branch(quick[0][:, :4], quick[1][:4]), rounded) <= 1.02 * ours
    for seed in range(5):
        other = Branch(up + 0.01 * noise(O, 4, seed=seed), down + 0.01 * noise(4, C, seed=seed + 9))
        assert made.error(other, rounded) > ours


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_published_fit_leaves_the_least_of_the_weight(rank):
    made, _ = problem(weigh="weight")
    up, down = made.fit(None, rank)
    left = (made.weight - up @ down).square().sum().item()
    assert left == pytest.approx(torch.linalg.svdvals(made.weight)[rank:].square().sum().item(), rel=1e-9)
    for seed in range(4):
        basis = torch.linalg.qr(noise(C, rank, seed=seed)).Q
        assert (made.weight - made.weight @ basis @ basis.T).square().sum() >= left


@pytest.mark.parametrize("weigh", ["output", "weight"])
@pytest.mark.parametrize("act", [None, GRID], ids=repr)
def test_turns_never_make_it_worse_and_more_than_one_is_better(weigh, act):
    made, _ = problem(act, weigh)
    found, trail = solve(made, 4, GRID.fake, iterations=12, early_stop=False)
    assert len(trail) == 12 and all(b <= a for a, b in pairwise(trail))
    assert found.error <= trail[-1] and found.error < trail[0]
    assert found.error == pytest.approx(made.error(found.branch, found.rounded), rel=1e-12)
    assert torch.equal(found.rounded, GRID.fake(made.weight - found.before.values))
    assert found.error < made.error(None, GRID.fake(made.weight))
    early = solve(made, 4, GRID.fake, iterations=12)[1]
    assert early == trail[: len(early)]


def test_a_branch_of_full_rank_leaves_nothing():
    made, _ = problem(GRID)
    found, _ = solve(made, C if C < O else O, GRID.fake, iterations=2)
    assert found.error <= 1e-9 * made.error(None, torch.zeros_like(made.weight))


def test_the_residual_holds_what_half_precision_takes_from_the_branch():
    """The codes see W minus the branch as stored; a branch that is rounded afterwards leaves its rounding behind."""
    heavy = noise(O, C, seed=2) + 100 * noise(O, 1, seed=3) @ noise(1, C, seed=4)
    made, _ = problem(weigh="weight", weight=heavy)
    fine = Affine(8, 4, symmetric=True, scale_dtype="float64")
    found, _ = solve(made, 2, fine.fake, dtype=torch.bfloat16, iterations=1)
    late = Branch.stored(*made.fit(None, 2), torch.bfloat16, "")
    exact = Branch(*made.fit(None, 2))
    assert found.error < 0.1 * made.error(late, fine.fake(made.weight - exact.values))


def test_a_large_branch_is_shared_between_its_factors():
    up, down = torch.linalg.qr(noise(O, 2)).Q.float(), 3e5 * noise(2, C).float()
    made = Branch.stored(up, down, torch.float16, "q")
    assert (made.values - up @ down).abs().max() <= 2e-3 * (up @ down).abs().max()
    with pytest.raises(ValueError, match=r"LowRank: `dtype` must be one that holds the branch of `q` \(float32\)"):
        Branch.stored(up, 1e12 * down, torch.float16, "q")


def test_the_bounds_that_motivate_it_hold():
    """|XW - Q(X)Q(W)| <= |X| |W - Q(W)| + |X - Q(X)| (|W| + |W - Q(W)|), and rounding grows with the size of R."""
    x, w = data(), noise(O, C, seed=2)
    dx, dw = (GRID.fake(x) - x).norm(), (GRID.fake(w) - w).norm()
    assert (x @ w.T - GRID.fake(x) @ GRID.fake(w).T).norm() <= x.norm() * dw + dx * (w.norm() + dw)
    whole = Affine(4, None, symmetric=True, scale_dtype="float64")
    for scale in (0.1, 1.0, 10.0):
        rows = [scale * noise(1, 2048, seed=seed) for seed in range(20)]
        lost = sum((whole.fake(r) - r).norm().item() for r in rows)
        assert lost <= math.sqrt(math.pi * math.log(2048)) / 7 * sum(r.norm().item() for r in rows)


TRANSFORMS = {
    "none": lambda: None,
    "scale": lambda: Scale(noise(C, seed=1).exp().float()),
    "shift": lambda: Chain(Shift(torch.full((C,), 0.171875)), Scale(noise(C, seed=1).exp().float())),
    "permute": lambda: Permute(torch.randperm(C, generator=torch.Generator().manual_seed(3))),
}


@pytest.mark.parametrize("act", [None, Affine(4, 16, True), FP4()], ids=repr)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("rank", [0, 3])
def test_adapters_add_their_product_and_leave_no_trace(transform, act, rank):
    t, w, b = transform(), noise(O, C, seed=5).float(), noise(O, seed=6).float()
    branch = (noise(rank, C, seed=7).half(), noise(O, rank, seed=8).half()) if rank else None
    layer = QLinear.of(
        Affine(4, 16).encode(w if t is None else t.weight(w)), b if t is None else t.bias(w, b), transform=t, act=act,
        low_rank=branch,
    )  # fmt: skip
    layer.activation_bits = None
    x = noise(7, C, seed=9).float()
    before, codes = layer(x), layer.weight_packed.clone()
    first, second = (noise(2, C, seed=10).float(), noise(O, 2, seed=11).float()), (noise(1, C), noise(O, 1))
    layer.add_lora("first", *first, scale=0.5)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(layer(x) - before, 0.5 * x @ first[0].T @ first[1].T, **tolerance)
    if act is None:
        torch.testing.assert_close(layer(x), layer.dequantize()(x), **tolerance)
    layer.add_lora("second", *second)
    both = layer(x)
    layer.set_lora_scale("first", 0.0)
    torch.testing.assert_close(layer(x) - before, x @ second[0].float().T @ second[1].float().T, **tolerance)
    layer.remove_lora("first")
    layer.add_lora("first", *first, scale=0.5)  # now in the other order
    torch.testing.assert_close(layer(x), both, **tolerance)
    layer.remove_lora("second")
    layer.remove_lora("first")
    assert torch.equal(layer(x), before) and torch.equal(layer.weight_packed, codes)
    assert set(layer.state_dict()) == set(
        QLinear.of(layer.weight, layer.bias, transform=t, low_rank=branch).state_dict()
    )


@pytest.mark.parametrize("weight", [FP4(), Affine(4, 16, True), Affine(4, 16)], ids=repr)
@pytest.mark.parametrize("act", [FP4(), Affine(4, 16, True), Affine(4, 16), None], ids=repr)
def test_the_kernels_compute_what_the_formats_say(weight, act):
    """Four-bit floats run as integers of five bits; nothing about a value changes by that."""
    q = weight.encode(noise(O, C, seed=5).float())
    down, up = noise(3, C, seed=7).half(), noise(O, 3, seed=8).half()
    layer = QLinear.of(q, noise(O, seed=6).float(), act=act, low_rank=(down, up))
    layer.activation_bits = None
    assert torch.equal(layer.weight.codes, q.codes) and torch.equal(layer.weight.decode(), q.decode())
    x = noise(3, 5, C, seed=9).float()
    seen = (x if act is None else act.fake(x)).double()
    wanted = seen @ q.decode().double().T + x.double() @ down.double().T @ up.double().T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-4)


def test_a_site_with_one_way_down_equals_its_layers_apart():
    made, x = problem(weight=noise(3 * O, C, seed=2))
    found, _ = solve(made, 4, GRID.fake, iterations=3)
    whole = QLinear.of(GRID.encode(made.weight - found.before.values), low_rank=(found.branch.down, found.branch.up))
    parts = [
        QLinear.of(GRID.encode(part), low_rank=(found.branch.down, up))
        for part, up in zip((made.weight - found.before.values).split(O), found.branch.up.split(O), strict=True)
    ]
    torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), whole(x))


@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_bought_as_well_as_they_can_be(seed):
    """Falling gains and equal prices: no other way of spending is better. Any prices: never more than the budget."""
    gains = [noise(4, seed=10 * seed + i).abs().sort(descending=True).values for i in range(3)]
    for budget in (0, 3, 7, 100):
        ranks = spread(gains, [1, 1, 1], budget)
        best = max(
            sum(float(g[:r].sum()) for g, r in zip(gains, (a, b, c), strict=True))
            for a in range(5) for b in range(5) for c in range(5) if a + b + c <= budget
        )  # fmt: skip
        assert sum(float(g[:r].sum()) for g, r in zip(gains, ranks, strict=True)) == pytest.approx(best)
        prices = [3, 5, 2]
        for step in (1, 2):
            ranks = spread(gains, prices, budget, step)
            assert sum(r * p for r, p in zip(ranks, prices, strict=True)) <= budget
            assert all(r % step == 0 and r <= 4 for r in ranks)
