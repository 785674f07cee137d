"""Shapes, streams, learning and pictures of the room; models of `particles`; bad input."""

import math
import re

import pytest
import torch
from torch.distributions import Independent, Normal, Uniform

from planish._support import NotConverged
from planish.statespace import (
    ChaoticRNN,
    FiniteHMM,
    FromParticles,
    LinearGaussian,
    Paris,
    ParisianGibbs,
    StateSpaceModel,
    StochasticVolatility,
    estimate_score,
    ffbs,
    fit_mle,
    forward_backward,
    kalman,
    paris,
    parisian_gibbs,
    particle_filter,
    simulate,
)

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def total(t, before, x):
    return x[..., 0]


def line():
    return LinearGaussian(0.9, 0.25).double()


Y = torch.ones(6, 1, dtype=F64)


@pytest.mark.parametrize("smooth", [paris, ffbs])
def test_functionals_by_name_and_of_any_size(smooth):
    def both(t, before, x):
        return torch.cat([x, x**2], -1)

    def moved(t, before, x):
        return torch.zeros_like(x[..., 0]) if before is None else (x - before)[..., 0]

    found = smooth(line(), Y.expand(3, 6, 1), 30, additive={"sums": both, "way": moved, "first": total})
    assert {name: tuple(value.shape) for name, value in found.mean.items()} == {
        "sums": (3, 2), "way": (3,), "first": (3,)
    }  # fmt: skip
    torch.testing.assert_close(found.mean["sums"][:, 0], found.mean["first"])
    assert found.ess.shape == (3, 6) and found.loglik.shape == (3,)


def test_a_stream_is_the_same_as_a_pass():
    model = StochasticVolatility().double()
    y = simulate(model, 12, generator=seeded())[1]
    smoother = Paris(model, 25, additive=total, generator=seeded(5))
    kept = []
    for value in y:
        smoother.update(value)
        kept.append(smoother.mean)
    whole = paris(model, y, 25, additive=total, generator=seeded(5))
    assert torch.equal(smoother.mean, whole.mean) and torch.equal(smoother.loglik, whole.loglik)
    assert smoother.trials == whole.trials
    half = paris(model, y[:6], 25, additive=total, generator=seeded(5))
    assert torch.equal(kept[5], half.mean)


def test_chains_series_and_warm_starts():
    model, y = line(), Y.expand(2, 6, 1)
    found = parisian_gibbs(model, y, 10, 4, 1, additive=total, n_chains=3, generator=seeded())
    assert found.per_sweep.shape == (4, 3, 2) and found.mean.shape == found.stderr.shape == (2,)
    assert found.path.shape == (3, 2, 6, 1) and found.loglik.shape == (3, 2) and found.renewal.shape == (6,)
    torch.testing.assert_close(found.mean, found.per_sweep[1:].mean((0, 1)))
    again = parisian_gibbs(model, y, 10, 2, 0, additive=total, n_chains=3, path=found.path, generator=seeded(1))
    assert again.loglik.isnan().all() and again.burn_in == 0
    steps = ParisianGibbs(model, y, 10, additive=total, n_chains=3, path=found.path, generator=seeded(1))
    torch.testing.assert_close(steps.split(steps.sweep().mean)[..., 0], again.per_sweep[0])


def test_smoothed_states_are_those_of_kalman():
    y = simulate(line(), 8, generator=seeded())[1]
    found = parisian_gibbs(line(), y, 40, 6, 2, additive=total, n_chains=60, generator=seeded())
    exact = kalman(line(), y)
    assert (found.state_mean - exact.mean).abs().max() < 0.06
    assert (found.state_std - exact.cov[..., 0].sqrt()).abs().max() < 0.05
    single = parisian_gibbs(line(), y, 20, 9, 0, additive=total, generator=seeded())
    assert single.stderr > 0 and parisian_gibbs(line(), y, 20, 1, 0, additive=total).stderr.isnan()


def test_progress_and_a_picture():
    import matplotlib as mpl

    mpl.use("Agg")
    told = []
    found = parisian_gibbs(line(), Y, 10, 3, 1, additive=total, n_chains=4, progress=told.append)
    assert told == [1, 2, 3]
    figure = found.plot(truth=3.0)
    assert [axis.get_xlabel() for axis in figure.axes] == ["sweep", "time"]
    with pytest.raises(ValueError, match="`name` must be that of one number for one series; got None"):
        parisian_gibbs(line(), Y, 10, 1, 0, additive={"a": total, "b": total}).plot()


@pytest.mark.parametrize("estimator", ["ppg", "paris", "path"])
def test_learning_moves_towards_the_data(estimator):
    y = simulate(StochasticVolatility(mu=1.5).double(), 25, generator=seeded())[1]
    model, told = StochasticVolatility(mu=-1.0).double(), []
    model.log_sigma.requires_grad_(False)
    found = fit_mle(
        model, y, n_steps=8, n_particles=20, estimator=estimator, generator=seeded(), average=0,
        progress=lambda *args: told.append(args),
    )  # fmt: skip
    assert found.names == ("mu", "atanh_rho") and found.parameters.shape == (9, 2)
    assert model.mu.item() == found.parameters[-1, 0] > -0.8
    assert [step for step, _ in told] == list(range(1, 9)) and math.isfinite(told[-1][1])
    assert found.path.shape == (1, 25, 1)


def test_a_score_keeps_gradients_and_takes_any_length_of_graph(monkeypatch):
    model = StochasticVolatility().double()
    y = simulate(model, 10, 2, generator=seeded())[1]
    y[0, 3] = math.nan
    model.mu.grad = torch.tensor(7.0, dtype=F64)
    whole = estimate_score(model, y, 15, 2, generator=seeded(3), n_chains=2)
    monkeypatch.setattr("planish.statespace.learning._ELEMENTS", 1)
    parts = estimate_score(model, y, 15, 2, generator=seeded(3), n_chains=2)
    assert model.mu.grad == 7.0 and model.log_sigma.grad is None
    for name, value in whole.gradients.items():
        torch.testing.assert_close(value, parts.gradients[name])


def test_the_network_and_the_chain_have_laws_of_their_own():
    model = ChaoticRNN.random(4, noise=0.2, generator=seeded()).double()
    x, y = simulate(model, 5, 2, generator=seeded())
    assert x.shape == y.shape == (2, 5, 4)
    law = model.transition(1, x[:, 0])
    assert law.log_prob(law.mode).allclose(model.log_transition_bound(1, x))
    found = fit_mle(model, y, n_steps=2, n_particles=10, generator=seeded())
    assert len(found.names) == 17 and found.names[-1] == "log_noise"
    probs = torch.tensor([0.25, 0.75], dtype=F64)
    chain = FiniteHMM(probs, probs.expand(2, 2), torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    found = forward_backward(chain, torch.zeros(3, 4, 1, dtype=F64))
    assert found.loglik.shape == (3,)
    torch.testing.assert_close(found.marginals, probs.expand(3, 4, 2))


def test_laws_of_other_kinds_draw_from_the_generator_and_leave_the_global_state():
    model = ChaoticRNN.random(3, generator=seeded())
    before = torch.random.get_rng_state()
    first, second = (simulate(model, 4, generator=seeded(8))[1] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(before, torch.random.get_rng_state())


class Flat(StateSpaceModel):
    """Moves within half of where it is: no density beyond."""

    def initial(self):
        return Independent(Uniform(torch.zeros(1, dtype=F64), 1.0), 1)

    def transition(self, t, x):
        return Independent(Uniform(x - 0.5, x + 0.5, validate_args=False), 1)

    def observation(self, t, x):
        return Independent(Normal(x, 1.0), 1)


def test_a_law_without_a_mode_is_weighed_exactly_or_refused():
    found = paris(Flat(), Y, 20, additive=total, backward="exact", generator=seeded())
    assert found.mean.isfinite()
    with pytest.raises(ValueError, match=r"Flat: `log_transition_bound` must be defined for rejection, or backward="):
        paris(Flat(), Y, 200, additive=total, backward="rejection", generator=seeded())


def test_too_low_a_bound_and_hopeless_rejection_are_told(monkeypatch):
    class Low(LinearGaussian):
        def log_transition_bound(self, t, x):
            return super().log_transition_bound(t, x) - 1

    with pytest.raises(ValueError, match="paris|Paris: `log_transition_bound` must be a bound"):
        paris(Low(0.9, 0.25), Y.float(), 200, additive=total, backward="rejection")
    monkeypatch.setattr("planish.statespace.backward._PATIENCE", 1)
    with pytest.raises(NotConverged, match=r"Paris: \d+ draws were rejected 1 times at t = 1; take backward='hybrid'."):
        paris(line(), Y, 50, additive=total, backward="rejection")


def test_models_of_particles():
    pytest.importorskip("numba")
    dists = pytest.importorskip("particles.distributions")
    models = pytest.importorskip("particles.state_space_models")

    class Walk(models.StateSpaceModel):
        def PX0(self):  # noqa: N802
            return dists.Normal(scale=0.5 / math.sqrt(1 - 0.81))

        def PX(self, t, xp):  # noqa: N802
            return dists.Normal(loc=0.9 * xp, scale=0.5)

        def PY(self, t, xp, x):  # noqa: N802
            return dists.Normal(loc=x)

        def upper_bound_log_pt(self, t):
            return -math.log(0.5 * math.sqrt(2 * math.pi))

    model, x = FromParticles(Walk()), torch.randn(3, 4, 1, dtype=F64)
    for t in (1, 2):
        torch.testing.assert_close(
            model.transition(t, x[:, :, None]).log_prob(x[:, None]),
            line().transition(t, x[:, :, None]).log_prob(x[:, None]),
        )
    found = paris(model, Y.expand(100, 6, 1), 30, additive=total, generator=seeded()).mean
    again = paris(model, Y.expand(100, 6, 1), 30, additive=total, generator=seeded()).mean
    assert torch.equal(found, again)
    truth = kalman(line(), Y).mean.sum()
    assert abs(float((found.mean() - truth).detach())) < 4 * float(found.std()) / 100**0.5 + 0.06


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda m: paris(m, Y, 1, additive=total), "Paris: `n_particles` must be an int >= 2; got 1."),
        (lambda m: paris(m, Y, 5, 0, additive=total), "Paris: `n_backward` must be an int >= 1; got 0."),
        (lambda m: paris(m, Y, 5, additive=3), "Paris: `additive` must be a function of (t, before, x)"),
        (lambda m: paris(m, Y, 5, additive=lambda t, b, x: x.sum()), "`additive` must be a function that gives (1, 5)"),
        (
            lambda m: paris(m, Y, 5, additive=lambda t, b, x: x.repeat(*[1] * (x.ndim - 1), t + 1)),
            "`additive` must be of the same size at all times, [1]; got 'another at t = 1'.",
        ),
        (
            lambda m: paris(m, Y, additive=total, backward="fast"),
            "`backward` must be one of hybrid, exact, rejection, mcmc",
        ),
        (lambda m: paris(m, Y, additive=total, max_trials=0), "`max_trials` must be an int >= 1; got 0."),
        (lambda m: paris(m, Y, additive=total, mcmc_steps=0), "`mcmc_steps` must be an int >= 1; got 0."),
        (lambda m: paris(m, Y[:0], additive=total), "paris: `y` must be a float tensor (n_steps, dy)"),
        (lambda m: paris(m, Y / 0, additive=total), "paris: `y` must be finite, or NaN where missing; got 'inf'."),
        (
            lambda m: kalman(m, torch.tensor([[1.0, math.nan]])),
            "kalman: `y` must be missing in whole rows; got 'a row with both numbers and NaN'.",
        ),
        (lambda m: Paris(m, additive=total).mean, "Paris: nothing has been observed yet; call `update` first."),
        (lambda m: Paris(m, additive=total).update(Y[None]), "`y_t` must be of shape (dy,) or (series, dy)"),
        (lambda m: ffbs(m, Y, 1, additive=total), "ffbs: `n_particles` must be an int >= 2; got 1."),
        (lambda m: particle_filter(m, Y, 1), "particle_filter: `n_particles` must be an int >= 2; got 1."),
        (
            lambda m: particle_filter(m, Y, resampling="x"),
            "`resampling` must be one of multinomial, stratified, systematic",
        ),
        (lambda m: parisian_gibbs(m, Y, 5, 3, 3, additive=total), "`burn_in` must be below n_sweeps = 3; got 3."),
        (lambda m: parisian_gibbs(m, Y, 5, 0, additive=total), "`n_sweeps` must be an int >= 1; got 0."),
        (lambda m: parisian_gibbs(m, Y, 5, 1, additive=total, n_chains=0), "`n_chains` must be an int >= 1; got 0."),
        (
            lambda m: parisian_gibbs(m, Y, 5, 1, additive=total, path=torch.zeros(6, 1)),
            "ParisianGibbs: `path` must be of shape (1, 6, d); got (6, 1).",
        ),
        (lambda m: fit_mle(m, Y, n_steps=0), "fit_mle: `n_steps` must be an int >= 1; got 0."),
        (lambda m: fit_mle(m, Y, decay=2), "fit_mle: `decay` must be in [0, 1]; got 2."),
        (lambda m: fit_mle(m, Y, average=-1), "fit_mle: `average` must be in [0, 1]; got -1."),
        (lambda m: fit_mle(m, Y, burn_in=2), "fit_mle: `burn_in` must be below n_sweeps = 2; got 2."),
        (lambda m: fit_mle(m, Y, estimator="x"), "fit_mle: `estimator` must be one of ppg, paris, path; got 'x'."),
        (lambda m: estimate_score(Flat(), Y, 5, 1), "`model` must be one with parameters that want gradients"),
        (lambda m: simulate(m, 0), "simulate: `n_steps` must be at least 1; got 0."),
        (lambda m: simulate(m, 1, 0), "simulate: `n_series` must be at least 1; got 0."),
        (lambda m: LinearGaussian(1.0, 0.1), "LinearGaussian: `initial_cov` must be given: A has no stationary law"),
        (
            lambda m: LinearGaussian(0.5, -0.1),
            "LinearGaussian: `transition_cov` must be symmetric and positive definite",
        ),
        (
            lambda m: LinearGaussian(torch.eye(2) / 2, 0.1),
            "LinearGaussian: `transition_cov` must be of shape (2, 2); got (1, 1).",
        ),
        (lambda m: StochasticVolatility(rho=1), "StochasticVolatility: `rho` must be in (-1, 1); got 1."),
        (lambda m: StochasticVolatility(sigma=0), "StochasticVolatility: `sigma` must be above 0; got 0."),
        (lambda m: ChaoticRNN(torch.zeros(2, 3)), "ChaoticRNN: `weights` must be a square matrix; got (2, 3)."),
        (lambda m: ChaoticRNN(torch.zeros(2, 2), tau=0), "ChaoticRNN: `tau` must be above 0; got 0."),
        (lambda m: ChaoticRNN.random(0), "ChaoticRNN.random: `n_units` must be at least 1; got 0."),
        (
            lambda m: FiniteHMM(torch.ones(2), torch.eye(2), torch.zeros(2), torch.ones(2)),
            "FiniteHMM: `initial_probs` must be positive with sum 1; got [1.0, 1.0].",
        ),
        (
            lambda m: FiniteHMM(torch.ones(2) / 2, torch.ones(2, 2) / 2, torch.zeros(2), torch.zeros(2)),
            "FiniteHMM: `scales` must be above 0; got [0.0, 0.0].",
        ),
        (
            lambda m: FiniteHMM(torch.ones(2) / 2, torch.eye(3), torch.zeros(2), torch.zeros(2)),
            "FiniteHMM: `transition_probs` must be of shape (2, 2); got (3, 3).",
        ),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(line())


def test_what_goes_wrong_on_the_way_names_the_time():
    class Far(Flat):
        def observation(self, t, x):
            return Independent(Uniform(x + (100 if t == 2 else 0) - 5, x + 105, validate_args=False), 1)

    with pytest.raises(
        ValueError, match=r"the weights of a cloud are all 0 at t = 2; take more particles, a `proposal`"
    ):
        paris(Far(), Y, 5, additive=total, backward="exact")
    smoother = Paris(line(), 5, additive=total)
    smoother.update(Y[0])
    with pytest.raises(ValueError, match="`y_t` must be of 1 series as before; got "):
        smoother.update(Y[:2])
    guided = Flat()
    guided.proposal = lambda t, x, y: None if t != 1 else Independent(Normal(x + 7.0, 0.1), 1)
    with pytest.raises(ValueError, match="all 0 at t = 1"):
        paris(guided, Y, 5, additive=total, backward="exact")


def test_a_kernel_that_leads_nowhere_is_refused():
    class Lost(Flat):
        def transition(self, t, x):
            law = Independent(Normal(x, 1.0), 1)
            law.log_prob = lambda value: torch.full(torch.broadcast_shapes(value.shape[:-1], x.shape[:-1]), -math.inf)
            return law

    with pytest.raises(
        ValueError, match="could have come from none of those before it; the transition needs a density"
    ):
        paris(Lost(), Y, 5, additive=total, backward="exact", reuse_ancestors=False)
