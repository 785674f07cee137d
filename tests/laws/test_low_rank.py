"""The low-rank correction is the one over the root, reaches the bound, and needs no inverse."""

import numpy as np
import pytest
import torch

from planish.linalg import low_rank, low_rank_correction


def layer(spread, rows=1024, dead=0, seed=0):
    """An error of rounding to 3 bits in groups of 64, and the second moment of inputs with four large channels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 256, generator=g, dtype=torch.float64)
    x *= torch.logspace(0, -spread, 256, dtype=torch.float64)[torch.randperm(256, generator=g)]
    x[:, torch.randperm(256, generator=g)[:4]] *= 30
    x[:, :dead] = 0
    w = torch.randn(192, 4, 64, generator=g, dtype=torch.float64)
    step = w.abs().amax(-1, keepdim=True) / 3.5
    return (w - step * (w / step).round().clamp(-4, 3)).reshape(192, 256), x.T @ x / rows


def left(error, moment, correction):
    rest = error - correction
    return torch.einsum("oi,ij,oj->", rest, moment, rest).item()


def root(moment):
    values, vectors = np.linalg.eigh(moment.numpy())
    return torch.from_numpy(vectors * np.sqrt(values.clip(0)) @ vectors.T)


def eckart_young(error, moment, rank):
    """The least that a correction of this rank can leave."""
    return torch.linalg.svdvals(error @ root(moment))[rank:].square().sum().item()


def over_the_root(error, moment, rank):
    """QERA's path: truncate E S, then undo S, which must have an inverse."""
    u, s, v = torch.linalg.svd(error @ root(moment))
    return (u[:, :rank] * s[:rank]) @ torch.linalg.solve(root(moment), v[:rank].T).T


CASES = {
    "condition 1e4": layer(0.5),
    "condition 3e6": layer(2),
    "dead channels": layer(1, dead=20),
    "fewer rows than channels": layer(1, rows=100),
}


@pytest.mark.parametrize("direct", [True, False], ids=["whole", "subspace"])
@pytest.mark.parametrize("case", CASES)
def test_reaches_the_bound(case, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(low_rank, "_DIRECT", 0)
    error, moment = CASES[case]
    up, down = low_rank_correction(error, moment, 16)
    torch.testing.assert_close(up.T @ up, torch.eye(16, dtype=torch.float64))
    bound = eckart_young(error, moment, 16)
    assert left(error, moment, up @ down) == pytest.approx(bound, rel=1e-10 if direct else 1e-3)
    up, down = low_rank_correction(error.float(), moment.float(), 16)
    assert left(error, moment, up.double() @ down.double()) == pytest.approx(bound, rel=1e-2)


@pytest.mark.parametrize("case", ["condition 1e4", "condition 3e6"])
def test_equals_the_path_over_the_root(case):
    error, moment = CASES[case]
    up, down = low_rank_correction(error, moment, 16)
    expected = over_the_root(error, moment, 16)
    torch.testing.assert_close(up @ down, expected, rtol=0, atol=1e-8)


def test_the_root_fails_where_the_inputs_do_not_span_their_space():
    _, moment = CASES["dead channels"]
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(moment)


@pytest.mark.parametrize("case", CASES)
def test_no_other_correction_of_the_rank_is_better(case):
    error, moment = CASES[case]
    ours = left(error, moment, torch.matmul(*low_rank_correction(error, moment, 16)))
    diagonal = moment.diagonal().sqrt()
    for scale in (torch.ones(256, dtype=torch.float64), diagonal):
        u, s, v = torch.linalg.svd(error * scale)
        other = (u[:, :16] * s[:16]) @ v[:16] / scale.clamp(min=1e-12)
        assert ours <= left(error, moment, other) * (1 + 1e-9)
    assert ours < 0.9 * left(error, moment, 0 * error)


def test_a_batch_is_its_members_and_scale_is_nothing():
    pairs = [layer(s, seed=s) for s in (0, 1)]
    error, moment = (torch.stack(part) for part in zip(*pairs, strict=True))
    up, down = low_rank_correction(error, moment * 7, 3)
    for i, (one, other) in enumerate(pairs):
        torch.testing.assert_close(up[i] @ down[i], torch.matmul(*low_rank_correction(one, other, 3)))


def test_a_batch_in_the_subspace(monkeypatch):
    monkeypatch.setattr(low_rank, "_DIRECT", 0)
    error, moment = layer(1)
    up, down = low_rank_correction(error.expand(2, 1, -1, -1), moment.expand(2, 1, -1, -1), 3)
    assert up.shape == (2, 1, 192, 3) and down.shape == (2, 1, 3, 256)
    assert torch.equal(up[0], up[1])
    assert torch.equal(up[0, 0], low_rank_correction(error, moment, 3)[0])  # the same bits every time


def test_full_rank_takes_all_and_nothing_needs_nothing():
    error, moment = layer(1)
    wide = error[:8]
    torch.testing.assert_close(torch.matmul(*low_rank_correction(wide, moment, 8)), wide)
    for e, r in ((0 * error, moment), (error, 0 * moment)):
        up, down = low_rank_correction(e, r, 4)
        torch.testing.assert_close(up.T @ up, torch.eye(4, dtype=torch.float64))
        assert torch.isfinite(down).all()


def test_half_precision_comes_back_as_it_came():
    error, moment = layer(1)
    up, down = low_rank_correction(error.half(), moment.float(), 4)
    assert up.dtype == down.dtype == torch.float16
    best = left(error, moment, torch.matmul(*low_rank_correction(error, moment, 4)))
    assert left(error, moment, up.double() @ down.double()) == pytest.approx(best, rel=1e-2)


def test_what_does_not_settle_is_handed_over(monkeypatch):
    monkeypatch.setattr(low_rank, "_DIRECT", 0)
    monkeypatch.setattr(low_rank, "_ROUNDS", 1)
    error, moment = CASES["condition 1e4"]
    with pytest.raises(low_rank.NotConverged, match="rank 16 did not settle") as caught:
        low_rank_correction(error, moment, 16)
    up, down = caught.value.best
    assert left(error, moment, up @ down) < left(error, moment, 0 * error)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rank": 0}, "`rank` must be an int from 1 to 3; got 0."),
        ({"rank": 4}, "`rank` must be an int from 1 to 3; got 4."),
        ({"rank": True}, "`rank` must be an int from 1 to 3; got True."),
        ({"error": torch.ones(3, 4, dtype=torch.int64)}, "`error` must be a tensor of real floats; got torch.int64."),
        ({"error": torch.full((3, 4), torch.nan)}, "`error` must be finite; got 'NaN or infinity'."),
        ({"error": torch.ones(4)}, r"`error` must be of shape \(\*b, out, in\), none of them 0; got \(4,\)."),
        ({"second_moment": torch.eye(3)}, r"`second_moment` must be of shape \(4, 4\), as `error` has it; got \(3, 3"),
        ({"second_moment": torch.eye(4).triu() + torch.ones(4, 4).triu()}, "`second_moment` must be symmetric; got"),
        ({"second_moment": -torch.eye(4)}, "`second_moment` must be positive semidefinite; got '-1 on its diagonal'."),
    ],
)
def test_bad_input(change, sentence):
    given = {"error": torch.ones(3, 4), "second_moment": torch.eye(4), "rank": 2} | change
    with pytest.raises(ValueError, match="^low_rank_correction: " + sentence):
        low_rank_correction(**given)
