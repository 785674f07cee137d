"""Edges of planish.optim, and the sentence of each refused argument."""

import itertools
import math

import numpy as np
import pytest
import torch

from planish._support import PlanishWarning, _warned
from planish.optim import (
    Composite,
    GeneralizedSmoothness,
    GradNormNewton,
    LogSumExp,
    LowRank,
    NormalizedGD,
    PenalizedDRO,
    PhaseRetrieval,
    PowerNorm,
    Spider,
    gamma_estimate,
    minimize_gns,
)

f64 = torch.float64
QUARTIC = GeneralizedSmoothness(2 / 3, 0.0, 4.0)


def parameter(*values, dtype=f64):
    return torch.tensor(values or (1.0, 2.0), dtype=dtype, requires_grad=True)


def square(x):
    return x @ x / 2


X = torch.ones(2, dtype=f64)
REFUSED = {
    "alpha` must be a float in [0, 1]": lambda: GeneralizedSmoothness(1.5, 1.0, 1.0),
    "L0` must be a finite float >= 0": lambda: GeneralizedSmoothness(0.5, -1.0, 1.0),
    "L1` must be a finite float >= 0": lambda: GeneralizedSmoothness(0.5, 1.0, math.inf),
    "L1` must be above 0 where L0 is 0": lambda: GeneralizedSmoothness(0.5, 0.0, 0.0),
    "eps` must be a float in (0, 1]": lambda: QUARTIC.stepsize(2.0),
    "beta` must be a float in [0, 1]; got 1.5": lambda: QUARTIC.stepsize(0.1, 1.5),
    "rule` must be 'sharp' or 'paper'": lambda: QUARTIC.stepsize(0.1, rule="blunt"),
    "gap` must be a float >= 0": lambda: QUARTIC.iterations(0.1, -1.0),
    "gradient_norm` must be a finite float >= 0": lambda: QUARTIC.step_length(math.nan),
    "points` must be a matrix": lambda: GeneralizedSmoothness.estimate(square, X, 0.5),
    "rounds` must be an int >= 1": lambda: GeneralizedSmoothness.estimate(square, X[None].repeat(2, 1), 0.5, rounds=0),
    "step` must be above 0": lambda: GeneralizedSmoothness.estimate(square, X[None].repeat(2, 1), 0.5, step=0.0),
    "estimate: `alpha` must be": lambda: GeneralizedSmoothness.estimate(square, X[None].repeat(2, 1), -0.5),
    "`function` must be one with finite": lambda: GeneralizedSmoothness.estimate(
        lambda x: x.sum().log(), -X[None].repeat(2, 1) * torch.tensor([[0.0], [1.0]]), 0.5
    ),
    "one whose gradient changes": lambda: GeneralizedSmoothness.estimate(lambda x: x.sum(), torch.eye(2), 0.5),
    "NormalizedGD: `lr` must be a finite float > 0 or 'auto'; got 0": lambda: NormalizedGD([parameter()], 0),
    "`smoothness` must be given": lambda: NormalizedGD([parameter()], "auto"),
    "NormalizedGD: `beta` must be a float in [0, 1]": lambda: NormalizedGD([parameter()], 0.1, beta=-0.1),
    "`clip` must be a finite float >= 0": lambda: NormalizedGD([parameter()], 0.1, clip=-1.0),
    "`momentum` must be a float in [0, 1)": lambda: NormalizedGD([parameter()], 0.1, momentum=1.0),
    "NormalizedGD: `eps` must be": lambda: NormalizedGD([parameter()], 0.1, eps=0.0),
    "`momentum` must be 0 where lr='auto'": lambda: NormalizedGD(
        [parameter()], "auto", momentum=0.5, smoothness=QUARTIC
    ),
    "`clip` must be 0 where lr='auto'": lambda: NormalizedGD([parameter()], "auto", clip=0.5, smoothness=QUARTIC),
    "NormalizedGD: `lr` must be a finite float > 0; got -1.0": lambda: NormalizedGD(
        [{"params": [parameter()], "lr": -1.0}], 0.1
    ),
    "Spider: `q` must be an int >= 1; got 0": lambda: Spider([parameter()], 0.1, q=0),
    "Spider: `lr` must be": lambda: Spider([parameter()], -0.1, q=1),
    "Spider.step: `closure` must be": lambda: Spider([parameter()], 0.1, q=1).step(None),
    "GradNormNewton: `gamma0` must be": lambda: GradNormNewton([parameter()], 0.0),
    "GradNormNewton: `hessian` must be one of": lambda: GradNormNewton([parameter()], hessian="exactly"),
    "GradNormNewton: `solver` must be one of": lambda: GradNormNewton([parameter()], solver="lu"),
    "'low_rank' only where hessian='fisher'": lambda: GradNormNewton([parameter()], solver="low_rank"),
    "`cg_iterations` must be an int >= 1": lambda: GradNormNewton([parameter()], cg_iterations=0),
    "`trials` must be an int >= 1": lambda: GradNormNewton([parameter()], trials=True),
    "GradNormNewton: `regrow` must be one of first, always": lambda: GradNormNewton([parameter()], regrow="never"),
    "must be one group": lambda: GradNormNewton([{"params": [parameter()]}, {"params": [parameter()]}]),
    "real, of one dtype and device": lambda: GradNormNewton([parameter(), parameter(dtype=torch.float32)]),
    "GradNormNewton.step: `closure` must be a callable": lambda: GradNormNewton([parameter()]).step(None),
    "`rows` must be a matrix": lambda: LowRank(X),
    "`mu` must be a finite float > 0": lambda: LogSumExp(torch.eye(2), torch.zeros(2), mu=0.0),
    "`b` must be one number a row": lambda: LogSumExp(torch.eye(2), torch.zeros(3)),
    "`p` must be a finite float >= 2; got 1.5": lambda: PowerNorm(lambda x: x, 1.5),
    "`n_dirs` must be an int >= 1": lambda: gamma_estimate(square, torch.eye(2), X, n_dirs=0),
    "`largest` must be a finite float > 0": lambda: gamma_estimate(square, torch.eye(2), X, largest=0.0),
    "`hessian` must be of shape (2, 2)": lambda: gamma_estimate(square, torch.eye(3), X),
    "one with a finite gradient at x": lambda: gamma_estimate(lambda x: x.sum().log(), torch.eye(2), X * 0),
    "PhaseRetrieval: `a` must be": lambda: PhaseRetrieval(torch.eye(2), torch.ones(3), torch.ones(2)),
    "`m` must be an int >= 1": lambda: PhaseRetrieval.random(m=0),
    "`noise` must be a finite float >= 0": lambda: PhaseRetrieval.random(noise=-1.0),
    "`divergence` must be one of chi2, kl, cvar": lambda: PenalizedDRO(torch.eye(2), X, "tv"),
    "`penalty` must be a finite float > 0": lambda: PenalizedDRO(torch.eye(2), X, penalty=0.0),
    "`tail` must be a float in (0, 1)": lambda: PenalizedDRO(torch.eye(2), X, tail=1.0),
    "PenalizedDRO: `x` must be": lambda: PenalizedDRO(torch.eye(2), torch.ones(3)),
}


@pytest.mark.refuses
@pytest.mark.parametrize("sentence", REFUSED)
def test_it_refuses(sentence):
    with pytest.raises(ValueError) as caught:
        REFUSED[sentence]()
    assert sentence in str(caught.value)


MINIMIZE = {
    "`gamma0` must be a finite float > 0": {"gamma0": 0.0},
    "`gtol` must be a finite float >= 0": {"gtol": -1.0},
    "`maxiter` must be an int >= 0": {"maxiter": -1},
    "`solver` must be one of": {"solver": "lu"},
    "`solver` must be 'low_rank' only where": {"solver": "low_rank"},
    "`regrow` must be one of first, always": {"regrow": "never"},
    "`bounds` must be None": {"bounds": [(0, 1)]},
    "`constraints` must be empty": {"constraints": [{"type": "eq"}]},
    "`hess` must be a callable or one of exact": {"hess": "exactly"},
    "`hess` must be another where `fun` is no Composite": {"hess": "ggn"},
    "`hessp` must be None where `hess` is given": {"hess": "exact", "hessp": lambda x, v: v},
    "`hess` must be of shape (2, 2) or (2,); got (3, 3)": {"hess": lambda x: torch.eye(3)},
    "`hess` must be symmetric": {"hess": lambda x: torch.tensor([[1.0, 2.0], [0.0, 1.0]])},
    "`hess` must be finite": {"hess": lambda x: torch.full((2, 2), math.nan)},
    "`hess` must be finite; got 'a diagonal": {"hess": lambda x: torch.full((2,), math.nan)},
    "`hess` must be rows of 2 numbers": {"hess": lambda x: LowRank(torch.ones(1, 3))},
    "`metric` must be positive definite": {"metric": torch.diag(torch.tensor([1.0, -1.0]))},
    "`metric` must be symmetric": {"metric": torch.tensor([[1.0, 2.0], [0.0, 1.0]])},
    "`metric` must be positive everywhere": {"metric": torch.tensor([1.0, 0.0])},
    "`metric` must be None, a vector (2,) or": {"metric": torch.ones(3)},
    "`jac` must be a function that gives 2 numbers": {"jac": lambda x: x[:1]},
}


@pytest.mark.refuses
@pytest.mark.parametrize("sentence", MINIMIZE)
def test_minimize_refuses(sentence):
    pytest.importorskip("scipy")
    with pytest.raises(ValueError) as caught:
        minimize_gns(square, X, **MINIMIZE[sentence])
    assert sentence in str(caught.value) and str(caught.value).startswith("minimize_gns: ")


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("sentence", "fun", "start"),
    [
        ("`x0` must be a vector of floats", square, torch.eye(2)),
        ("`x0` must be where f and its gradient are finite", lambda x: x.sum().log(), -X),
        ("`fun` must be a function that gives one number", lambda x: x * 2, X),
        ("`fun` must be differentiable", lambda x: torch.tensor(1.0), X),
        ("`jac` must be a callable, or True", lambda x: 1.0, np.ones(2)),
    ],
)
def test_minimize_refuses_functions(sentence, fun, start):
    pytest.importorskip("scipy")
    with pytest.raises(ValueError) as caught:
        minimize_gns(fun, start)
    assert sentence in str(caught.value)


def test_arrays_need_their_own_hessian():
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match="`hess` must be a callable or 'zero' where `x0` is no tensor"):
        minimize_gns(lambda x: x @ x, np.ones(2), jac=lambda x: 2 * x, hess="exact")


def test_how_a_minimization_ends():
    pytest.importorskip("scipy")
    assert minimize_gns(square, X * 0).nit == 0
    one = minimize_gns(square, X * 100, maxiter=1)
    assert (one.status, one.success, one.nit, len(one.history["gamma"])) == (1, False, 1, 1)
    flat = minimize_gns(lambda x: 1e16 + square(x), X, gtol=0.0, maxiter=200)
    assert float(flat.x.norm()) < 1e-6  # no value of f tells it, but gradients do
    hopeless = minimize_gns(square, X, jac=lambda x: -x, hess="zero")  # its gradient points uphill
    assert hopeless.status == 2 and torch.equal(hopeless.x, X) and not hopeless.success

    def stop(x):
        raise StopIteration

    assert minimize_gns(square, X * 100, callback=stop).status == 99
    assert minimize_gns(square, X.float()).x.dtype == torch.float32


def test_a_function_that_leaves_its_domain_is_tried_nearer():
    pytest.importorskip("scipy")
    found = minimize_gns(lambda x: (x - x.log()).sum(), X * 1e-3, gamma0=1e3)
    assert found.success and torch.allclose(found.x, X, atol=1e-5)


def test_beta_below_alpha_is_said_to_have_no_theory():
    _warned.clear()
    with pytest.warns(PlanishWarning, match="beta = 0.3 is below alpha = 0.6667"):
        NormalizedGD([parameter()], 0.1, beta=0.3, smoothness=QUARTIC)
    with pytest.warns(PlanishWarning, match="stepsize: beta = 0.3 is below"):
        QUARTIC.stepsize(0.1, 0.3)


def test_gradients_that_cannot_be_measured_leave_everything_as_it_was():
    x = parameter()
    optimizer = NormalizedGD([x], 0.1, momentum=0.5)
    for value in (math.nan, math.inf):
        x.grad = torch.full_like(x, value)
        with pytest.raises(ValueError, match="NormalizedGD.step: `grad` must be finite"):
            optimizer.step()
    table = torch.nn.Embedding(4, 2, sparse=True)
    for make in (lambda p: NormalizedGD(p, 0.1), lambda p: Spider(p, 0.1, q=2)):
        optimizer = make(table.parameters())
        before = table.weight.detach().clone()
        with pytest.raises(ValueError, match="`grad` must be dense"):
            optimizer.step(lambda: table(torch.tensor([1])).sum().backward())
        assert torch.equal(table.weight, before)
    assert torch.equal(x.detach(), torch.tensor([1.0, 2.0], dtype=f64)) and not NormalizedGD([x], 0.1).state


@pytest.mark.parametrize(
    ("hessian", "closure", "sentence"),
    [
        ("exact", lambda x: 1.0, "a function that returns the loss with its graph"),
        ("exact", lambda x: x * 2, "a function that returns one number"),
        ("ggn", square, r"returns \(loss, outputs\)"),
        ("ggn", lambda x: (square(x), torch.ones(1)), r"\(loss, outputs\) with the graph of both"),
        ("fisher", square, "one loss an example"),
        ("exact", lambda x: (y := square(x)).backward() or y, "does not call backward"),
        ("exact", lambda x: x.sum() * math.nan, "finite where the step starts"),
    ],
)
def test_a_closure_that_gives_the_wrong_thing_is_refused(hessian, closure, sentence):
    x = parameter()
    optimizer = GradNormNewton([x], hessian=hessian)
    with pytest.raises(ValueError, match=sentence):
        optimizer.step(lambda: closure(x))
    assert x.tolist() == [1.0, 2.0]


def test_newton_restores_the_parameters_when_a_trial_fails():
    x, calls = parameter(), []

    def closure():
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return square(x)

    with pytest.raises(KeyboardInterrupt):
        GradNormNewton([x]).step(closure)
    assert x.tolist() == [1.0, 2.0]


def net(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, dtype=f64, generator=generator)
    return model, torch.randn(30, 3, dtype=f64, generator=generator), torch.arange(30) % 2


@pytest.mark.parametrize("hessian", ["exact", "ggn", "fisher", "diag", "zero"])
@pytest.mark.parametrize("solver", ["auto", "cholesky", "cg"])
def test_newton_trains_a_net_as_the_function_of_a_vector_is_minimized(hessian, solver):
    """The optimizer and `minimize_gns` are the same method on the same net."""
    pytest.importorskip("scipy")
    model, x, y = net()
    optimizer = GradNormNewton(model.parameters(), hessian=hessian, solver=solver)

    def closure():
        out = model(x)
        losses = torch.nn.functional.cross_entropy(out, y, reduction="none")
        return {"ggn": (losses.mean(), out), "fisher": losses}.get(hessian, losses.mean())

    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])

    def inner(w):
        parts = w.split([s.numel() for s in shapes])
        values = {n: part.view(s) for n, s, part in zip(names, shapes, parts, strict=True)}
        return torch.func.functional_call(model, values, (x,))

    function = Composite(lambda z: torch.nn.functional.cross_entropy(z, y, reduction="none"), inner)
    kind = "cg" if solver == "cg" or (solver == "auto" and hessian in ("exact", "ggn")) else solver
    found = minimize_gns(function, start, hess=hessian, solver=kind, maxiter=4)
    losses = [float(optimizer.step(closure)) for _ in range(4)]
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(after, found.x, rtol=1e-6, atol=1e-8)
    assert all(later < former for former, later in itertools.pairwise(losses))
    assert all(p.grad is None for p in model.parameters())


def test_frozen_and_unused_parameters_stay():
    used, unused, frozen = parameter(), parameter(), parameter().detach()
    newton = GradNormNewton([used, unused, frozen], solver="cholesky")
    newton.step(lambda: square(used))
    spider = Spider([used, unused], 0.1, q=2)

    def closure():
        spider.zero_grad()
        loss = square(used)
        loss.backward()
        return loss

    for _ in range(3):
        spider.step(closure)
    assert used.tolist() != [1.0, 2.0] and unused.tolist() == frozen.tolist() == [1.0, 2.0]
    nothing = GradNormNewton([frozen])
    with pytest.raises(ValueError, match="at least one requires a gradient"):
        nothing.step(lambda: square(used))


def test_a_linear_loss_has_no_curvature_and_is_followed():
    for hessian in ("exact", "diag"):
        x = parameter()
        GradNormNewton([x], hessian=hessian).step(lambda x=x: x.sum())
        assert torch.allclose(x.detach(), torch.tensor([1.0, 2.0], dtype=f64) - 0.5**0.5)


def test_a_group_added_later_starts_with_an_anchor():
    x, y = parameter(), parameter()
    spider = Spider([x], 0.1, q=5)

    def both():
        (square(x) + square(y)).backward()

    spider.step(both)
    assert not spider.anchors
    spider.add_param_group({"params": [y], "lr": 0.2})
    assert spider.anchors
    spider.step(both)
    spider.step(both)
    assert y.tolist() != [1.0, 2.0]
