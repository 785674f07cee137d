"""Laws of diffusion over tokens: levels, solvers, invariances, and states that stream over the vocabulary."""

import math

import pytest
import torch

pytest.importorskip("diffusers")

from torch.utils._python_dispatch import TorchDispatchMode

from planish.diffusion import (
    EmbeddingGaussianScheduler,
    EmbeddingSpace,
    SimplexScheduler,
    SmoothieScheduler,
)
from planish.diffusion.token_state import TokenState

V, D = 23, 7
WIDTHS = {0: 1.209, 0.05: 3.147, 0.1: 4.119, 0.2: 5.676, 0.3: 7.117, 0.5: 10.32, 0.7: 15.16, 0.9: 28.11, 1: 116.6}
SCHEDULERS = [SmoothieScheduler, EmbeddingGaussianScheduler, SimplexScheduler]
SOLVERS = ["fresh", "ddpm", "ddim"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def space():
    return EmbeddingSpace(draw(V, D), ignore_ids=[5, 11])


IDS = torch.tensor([[3, 0, 22, 7], [1, 1, 9, 14]])


@pytest.mark.parametrize("t", WIDTHS)
def test_levels_are_those_of_the_paper(t):
    mu, nu = (float(x) for x in SmoothieScheduler().level(t))
    assert mu**-0.5 == pytest.approx(WIDTHS[t], rel=5e-4)
    assert nu == pytest.approx((1 - WIDTHS[t] ** -4) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_noise_grows_and_signal_shrinks(kind):
    mu, nu = kind().level(torch.linspace(0.001, 0.999, 200, dtype=torch.float64))
    assert (mu.diff() < 0).all()
    assert (nu.diff() > 0).all()
    scale = {SimplexScheduler: 5.0}.get(kind, 1.0)
    torch.testing.assert_close(mu**2 + (nu / scale) ** 2, torch.ones_like(mu), rtol=0, atol=1e-12)


def test_delta_scales_the_noise_alone():
    times = torch.linspace(0, 1, 9, dtype=torch.float64)
    one, three = SmoothieScheduler().level(times), SmoothieScheduler(delta=3).level(times)
    torch.testing.assert_close(three[0], one[0], rtol=0, atol=0)
    torch.testing.assert_close(three[1], 3 * one[1], rtol=1e-15, atol=0)


def test_a_level_stands_for_a_wider_kernel(space):
    scheduler = SmoothieScheduler(sigma_min=0.7, delta=0).set_space(space)
    mu = float(scheduler.level(0.3)[0])
    wide = -space.distances(space.encode(IDS)) / (2 * 0.7**2 / mu)
    torch.testing.assert_close(scheduler.corrupt(IDS, 0.3).dense(), wide, rtol=0, atol=1e-10)


def test_separated_tokens_start_as_one_hot():
    space = EmbeddingSpace(torch.eye(V, dtype=torch.float64))
    scheduler = SmoothieScheduler(delta=0).set_space(space)
    p = scheduler.corrupt(IDS, 0.0).dense().softmax(-1)
    torch.testing.assert_close(p, torch.nn.functional.one_hot(IDS, V).double(), rtol=0, atol=1e-6)


def test_distances_are_those_of_cdist(space):
    e = draw(2, 4, D, seed=1)
    expected = torch.cdist(e, space.weight, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    torch.testing.assert_close(space.distances(e), expected, rtol=0, atol=1e-10)


def test_the_nearest_token_is_itself(space):
    used = torch.arange(V)[~space.ignored]
    for chunk in (1, 4, 100):
        assert torch.equal(space.nearest(space.encode(used), chunk), used)
    assert not torch.isin(space.nearest(space.weight), torch.tensor([5, 11])).any()


def test_a_constant_on_all_tokens_is_not_seen(space):
    scheduler = SmoothieScheduler().set_space(space)
    x = draw(2, 4, V, seed=2)
    shifted = x + draw(2, 4, 1, seed=3)
    torch.testing.assert_close(scheduler.scale_model_input(x), scheduler.scale_model_input(shifted), rtol=0, atol=1e-12)


def test_tokens_may_be_numbered_differently(space):
    order = torch.randperm(V, generator=torch.Generator().manual_seed(4))
    other = EmbeddingSpace(space.weight[order], standardize=None)
    mine, theirs = (SmoothieScheduler(sigma_min=1.0).set_space(s) for s in (space, other))
    e = draw(2, 4, D, seed=5)
    torch.testing.assert_close(theirs.original(e), mine.original(e)[..., order], rtol=0, atol=1e-12)


def test_positions_and_samples_do_not_meet(space):
    scheduler = SmoothieScheduler(delta=0).set_space(space)
    whole = scheduler.scale_model_input(scheduler.corrupt(IDS, torch.tensor([0.2, 0.4], dtype=torch.float64)))
    for i, t in enumerate((0.2, 0.4)):
        for j in range(IDS.shape[1]):
            alone = scheduler.scale_model_input(scheduler.corrupt(IDS[i : i + 1, j : j + 1], t))
            torch.testing.assert_close(alone[0, 0], whole[i, j], rtol=0, atol=1e-12)


def test_a_blur_without_noise_leaves_nothing_to_chance(space):
    scheduler = SmoothieScheduler(delta=0).set_space(space)
    scheduler.set_timesteps(4)
    runs = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        state = scheduler.prior((2, 4), generator)
        for t in scheduler.timesteps:
            e = scheduler.scale_model_input(state, t)
            state = scheduler.step(e, t, state, generator).prev_sample
        runs.append(state.dense())
    assert torch.equal(*runs)


def test_one_hot_embeddings_give_the_simplex():
    k, sigma = 5.0, 0.8
    space = EmbeddingSpace(math.sqrt(2 * k) * sigma * torch.eye(V, dtype=torch.float64), standardize=None)
    smooth = SmoothieScheduler(sigma_min=sigma).set_space(space)
    simplex = SimplexScheduler(k=k).set_space(space)
    away = smooth.original(space.encode(IDS)) - simplex.original(space.encode(IDS))
    torch.testing.assert_close(away, away[..., :1].expand_as(away), rtol=0, atol=1e-10)
    noise = draw(2, 4, V, seed=6)
    mu, nu = 0.3, 0.9  # the same level in both
    torch.testing.assert_close(
        smooth.scale_model_input(mu * smooth.original(space.encode(IDS)) + nu * noise),
        simplex.scale_model_input(mu * simplex.original(space.encode(IDS)) + nu * noise),
        rtol=0, atol=1e-12,
    )  # fmt: skip


def test_the_mean_of_distances_is_the_distance_of_the_mean(space):
    """Why a network may predict embeddings: up to a constant, D is affine."""
    scheduler = SmoothieScheduler(sigma_min=1.0).set_space(space)
    e, p = draw(1, 6, D, seed=7), draw(6, seed=8).softmax(0)
    mean = (p[:, None] * scheduler.original(e)[0]).sum(0)
    of_mean = scheduler.original((p[:, None] * e[0]).sum(0)[None, None])[0, 0]
    torch.testing.assert_close(mean.softmax(0), of_mean.softmax(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("now", "later"), [(1.0, 0.9), (0.6, 0.1), (0.05, 0.0)])
def test_a_perfect_step_keeps_the_marginal(kind, solver, now, later):
    """x_now ~ N(mu x_0, nu^2) and the true x_0 give x_later ~ N(mu' x_0, nu'^2), for every solver."""
    scheduler = kind(solver=solver)
    a, b, c = scheduler.coefficients(now, later)
    (mu, nu), (mu_, nu_) = scheduler.level(now), scheduler.level(later)
    assert a * mu + b == pytest.approx(float(mu_), abs=1e-12)
    assert a**2 * nu**2 + c**2 == pytest.approx(float(nu_) ** 2, abs=1e-12)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_ddpm_is_the_posterior(kind):
    (mu, nu), (mu_, nu_) = kind().level(0.6), kind().level(0.4)
    ratio = mu / mu_
    between = ratio * nu_**2  # covariance of x_now and x_later, given x_0
    a, b, c = kind(solver="ddpm").coefficients(0.6, 0.4)
    assert a == pytest.approx(float(between / nu**2), abs=1e-12)
    assert b == pytest.approx(float(mu_ - a * mu), abs=1e-12)
    assert c**2 == pytest.approx(float(nu_**2 - between**2 / nu**2), abs=1e-12)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_perfect_network_gives_the_data(kind, solver, space):
    scheduler, generator = kind(solver=solver).set_space(space), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(5)
    state = scheduler.prior((2, 4), generator)
    for t in scheduler.timesteps:
        out = scheduler.step(space.encode(IDS), t, state, generator)
        state = out.prev_sample
    assert torch.equal(space.nearest(out.pred_original_sample), IDS)
    if kind is not SimplexScheduler:  # its noise at t = 0 is not small
        assert torch.equal(space.nearest(scheduler.scale_model_input(state, 0.0)), IDS)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_ddim_in_many_steps_is_ddim_in_one(kind, space):
    x0 = space.encode(IDS)
    ends = []
    for steps in (1, 8):
        scheduler = kind(solver="ddim").set_space(space)
        scheduler.set_timesteps(steps)
        state = scheduler.prior((2, 4), torch.Generator().manual_seed(3))
        for t in scheduler.timesteps:
            state = scheduler.step(x0, t, state).prev_sample
        ends.append(state.dense() if isinstance(state, TokenState) else state)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)


def test_fresh_noise_has_the_stated_moments():
    space, draws = EmbeddingSpace(draw(4, 3)), 10_000
    scheduler = SmoothieScheduler(sigma_min=1.0, delta=0.7).set_space(space)
    scheduler.set_timesteps(4)
    ids = torch.tensor([[2]]).expand(draws, 1)
    state = scheduler.prior((draws, 1), torch.Generator().manual_seed(0))
    after = scheduler.step(space.encode(ids), 0.5, state, torch.Generator().manual_seed(1)).prev_sample.dense()
    mu, nu = (float(x) for x in scheduler.level(0.25))
    error = after - mu * scheduler.original(space.encode(ids[:1]))
    assert (error.mean(0).abs() < 4.5 * nu / draws**0.5).all()
    assert ((error.var(0) / nu**2 - 1).abs() < 4.5 * (2 / draws) ** 0.5).all()
    correlation = torch.corrcoef(error[:, 0].T) - torch.eye(4)
    assert correlation.abs().max() < 4.5 / draws**0.5


@pytest.mark.parametrize("kind", [SmoothieScheduler, SimplexScheduler])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("chunk", [1, 5, V, 1000])
def test_streamed_states_are_those_held_whole(kind, solver, chunk, space):
    scheduler = kind(solver=solver, chunk_size=chunk).set_space(space)
    scheduler.set_timesteps(5)
    t = torch.tensor([0.9, 0.5], dtype=torch.float64)
    state = scheduler.corrupt(IDS, t, torch.Generator().manual_seed(0))
    whole = state.dense()
    torch.testing.assert_close(state.mix(), scheduler.scale_model_input(whole), rtol=0, atol=1e-10)
    for now in (0.6, 0.4):
        e = space.weight[IDS] + 0.3 * draw(2, 4, D, seed=9)
        seeded = torch.Generator().manual_seed(7)
        streamed = scheduler.step(e, now, state, seeded).prev_sample
        a, b, c = scheduler.coefficients(now, now - 0.2)
        noise = streamed.noise[-1][1] if c else 0
        alone = TokenState(space, (2, 4), chunk_size=chunk).plus_noise(c, noise).dense()
        whole = a * whole + b * scheduler.original(e) + alone
        torch.testing.assert_close(streamed.dense(), whole, rtol=0, atol=1e-10)
        torch.testing.assert_close(streamed.mix(), scheduler.scale_model_input(whole), rtol=0, atol=1e-10)
        state = streamed


def test_the_probability_of_a_token_is_its_softmax(space):
    state = SmoothieScheduler(chunk_size=6).set_space(space).corrupt(IDS, 0.2, torch.Generator().manual_seed(0))
    p = state.dense().masked_fill(space.ignored, -math.inf).softmax(-1)
    torch.testing.assert_close(state.probability(IDS), p.gather(-1, IDS[..., None])[..., 0], rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """Keep the size of the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and not getattr(func, "is_view", False):
                self.size = max(self.size, one.numel())
        return out


@pytest.mark.parametrize("kind", [SmoothieScheduler, SimplexScheduler])
@pytest.mark.parametrize("solver", ["fresh", "ddim"])
def test_no_tensor_grows_with_the_vocabulary(kind, solver):
    sizes = []
    for tokens in (256, 4096):
        space = EmbeddingSpace(torch.randn(tokens, 8))
        scheduler = kind(solver=solver, chunk_size=64).set_space(space)
        scheduler.set_timesteps(4)
        with Largest() as seen:
            state = scheduler.prior((2, 3), torch.Generator().manual_seed(0))
            for t in scheduler.timesteps:
                e = scheduler.scale_model_input(state, t)
                state = scheduler.step(e, t, state, torch.Generator().manual_seed(0)).prev_sample
            space.nearest(e, 64)
        sizes.append(seen.size)
    assert sizes[0] == sizes[1] < 256 * 6


@pytest.mark.parametrize("tokens", [10, 200, 3000])
@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_the_automatic_width_does_not_know_units(tokens, dim, scale):
    weight = draw(tokens, dim)
    widths = [
        SmoothieScheduler().set_space(EmbeddingSpace(s * weight, standardize=None)).sigma_min for s in (1.0, scale)
    ]
    assert widths[1] == pytest.approx(scale * widths[0], rel=1e-6)
