"""What every optimizer owes: it solves, it resumes bit for bit, it scales with its problem; and who equals whom."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from planish.optim import GeneralizedSmoothness, GradNormNewton, NormalizedGD, PhaseRetrieval, Spider


@dataclass(frozen=True)
class Subject:
    """An optimizer under test: make(params, c, s) for the problem c f(x / s); lengths in `step` fit c = s = 1.

    `closure` says what it is stepped with: "backward", a loss after backward(); "loss", the loss alone.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    closure: str = "backward"
    steps: int = 300
    falls_to: float = 0.02  # of the loss at the start, for all problems


def normalized(beta: float, lr: float, clip: float = 0.0, momentum: float = 0.0):
    # the length lr g^(1 - beta) scales with s where g scales with c / s
    return lambda params, c=1.0, s=1.0: NormalizedGD(
        params, lr * s ** (2 - beta) * c ** (beta - 1), beta, clip * c / s, momentum, 1e-12 * c / s
    )


def automatic(params, c=1.0, s=1.0):
    a = 2 / 3  # enough for all problems below, around where they are started
    known = GeneralizedSmoothness(a, 5.0 * c / s**2, 1.0 * c ** (1 - a) * s ** (a - 2))
    return NormalizedGD(params, "auto", smoothness=known)


def newton(**settings):
    return lambda params, c=1.0, s=1.0: GradNormNewton(params, gamma0=0.7 * s, **settings)


def private(**settings):
    def make(params, c=1.0, s=1.0):
        pytest.importorskip("opacus")
        from planish.optim import MNGPOptimizer

        for p in params:  # the whole loss is one sample, so that there is something to compare

            def sample(q):
                q.grad_sample = q.grad[None].clone()

            p.register_post_accumulate_grad_hook(sample)
        inner = torch.optim.SGD(params, 0.04 * s)
        return MNGPOptimizer(inner, noise_multiplier=0.0, expected_batch_size=1, threshold=10.0 * c / s, **settings)

    return make


# A new optimizer joins by a line.
SUBJECTS = [
    Subject("gradient descent", normalized(0.0, 0.01), steps=600),
    Subject("normalized", normalized(1.0, 0.04), steps=300),
    Subject("half normalized", normalized(0.5, 0.02), steps=600),
    Subject("clipped", normalized(1.0, 0.1, clip=10.0), steps=600),
    Subject("with momentum", normalized(1.0, 0.03, momentum=0.5), steps=400),
    Subject("automatic", automatic, steps=1500),
    Subject("spider", lambda params, c=1.0, s=1.0: Spider(params, 0.04 * s, q=4, eps=1e-12 * c / s), steps=300),
    Subject("private, without noise", private(), steps=1500),
    Subject("newton", newton(solver="cholesky"), "loss", steps=60),
    Subject("newton, eigenvalues", newton(solver="eigh"), "loss", steps=60),
    Subject("newton, products", newton(solver="cg"), "loss", steps=80),
    Subject("newton, diagonal", newton(hessian="diag"), "loss", steps=300),
    Subject("newton, no hessian", newton(hessian="zero"), "loss", steps=600),
]
subjects = pytest.mark.parametrize("subject", SUBJECTS, ids=[subject.name for subject in SUBJECTS])


def quadratic(x):
    return (torch.arange(1, 6, dtype=x.dtype) * (x - 1).square()).sum() / 2


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 5 * (x[1] - x[0] ** 2) ** 2


def logistic(x):
    rows = torch.linspace(-1, 1, 60, dtype=x.dtype).reshape(20, 3).cos() * torch.tensor([1.0, -1, 1], dtype=x.dtype)
    signs = (-1.0) ** torch.arange(20, dtype=x.dtype)
    return F.softplus(-signs * (rows @ x)).sum() + 0.5 * x.square().sum()


# name -> function, start, its least value
PROBLEMS = {
    "quadratic": (quadratic, [0.0, 3.0, -1.0, 2.0, 4.0], 0.0),
    "rosenbrock": (rosenbrock, [-1.2, 1.0], 0.0),
    "logistic": (logistic, [4.0, -3.0, 5.0], None),
}


def least(function, start):
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([x], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        value = function(x)
        value.backward()
        return value

    lbfgs.step(closure)
    return float(function(x).detach())


def begin(subject, problem, dtype=torch.float64, c=1.0, s=1.0):
    """Return parameters (two tensors, so that norms must be global), the optimizer, and a step."""
    function, start, _ = PROBLEMS[problem]
    whole = torch.tensor(start, dtype=dtype) * s
    params = [whole[:1].clone().requires_grad_(), whole[1:].clone().requires_grad_()]
    return params, *resume(subject, function, params, c, s)


def resume(subject, function, params, c=1.0, s=1.0):
    optimizer = subject.make(params, c, s)

    def value():
        return c * function(torch.cat(params) / s)

    def backward():
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        return loss

    return optimizer, lambda: optimizer.step(backward if subject.closure == "backward" else value)


def flat(params):
    return torch.cat([p.detach() for p in params])


@subjects
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_solves(subject, problem, dtype):
    function, start, bottom = PROBLEMS[problem]
    bottom = least(function, start) if bottom is None else bottom
    params, _, step = begin(subject, problem, dtype)
    first = float(function(flat(params))) - bottom
    for taken in range(subject.steps):
        step()
        if taken % 20 == 19 and float(function(flat(params))) - bottom <= subject.falls_to * first:
            break
    assert flat(params).dtype == dtype and bool(flat(params).isfinite().all())
    assert float(function(flat(params))) - bottom <= subject.falls_to * first


@subjects
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_resumed_from_its_state_it_goes_on_bit_for_bit(subject, dtype):
    params, optimizer, step = begin(subject, "rosenbrock", dtype)
    for _ in range(6):
        step()
    kept, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    for _ in range(7):
        step()
    again = [p.clone().requires_grad_() for p in kept]
    other, step = resume(subject, rosenbrock, again)
    other.load_state_dict(state)
    for _ in range(7):
        step()
    assert torch.equal(flat(again), flat(params)) and not torch.equal(flat(params), torch.cat(kept))


@subjects
@pytest.mark.parametrize(("c", "s"), [(1e3, 1.0), (1.0, 1e-2), (1e-4, 30.0)])
def test_it_scales_with_the_function_and_with_the_space(subject, c, s):
    plain, _, step = begin(subject, "rosenbrock")
    scaled, _, step_scaled = begin(subject, "rosenbrock", c=c, s=s)
    for _ in range(8):
        step()
        step_scaled()
        assert torch.allclose(flat(scaled) / s, flat(plain), rtol=1e-8, atol=1e-10)


@subjects
def test_a_gradient_of_zero_moves_nothing(subject):
    params = [torch.ones(3, dtype=torch.float64, requires_grad=True)]
    _, step = resume(subject, lambda x: (x - 1).square().sum(), params)
    step()
    step()
    assert torch.equal(params[0].detach(), torch.ones(3, dtype=torch.float64))


@subjects
def test_a_copy_goes_its_own_way(subject):
    params, optimizer, step = begin(subject, "quadratic")
    step()
    state = copy.deepcopy(optimizer).state_dict()
    assert state["param_groups"][0].keys() == optimizer.state_dict()["param_groups"][0].keys()
    before = flat(params)
    step()
    assert not torch.equal(before, flat(params))


def trajectory(optimizer, x, steps=25, function=rosenbrock, before=lambda: None):
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        function(x).backward()
        before()
        optimizer.step()
        seen.append(x.detach().clone())
    return torch.stack(seen)


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_beta_zero_is_sgd_bit_for_bit(momentum):
    x, y = leaf(-1.2, 1.0), leaf(-1.2, 1.0)
    ours = trajectory(NormalizedGD([x], 3e-3, beta=0.0, momentum=momentum), x)
    theirs = trajectory(torch.optim.SGD([y], 3e-3, momentum=momentum, dampening=momentum), y)
    assert torch.equal(ours, theirs)


def test_a_clip_is_clipping_then_sgd():
    x, y = leaf(-1.2, 1.0), leaf(-1.2, 1.0)
    c = 3.0
    ours = trajectory(NormalizedGD([x], 0.02, clip=c), x)
    clip = lambda: torch.nn.utils.clip_grad_norm_([y], c)  # noqa: E731
    theirs = trajectory(torch.optim.SGD([y], 0.02 / c), y, before=clip)
    assert torch.allclose(ours, theirs, rtol=1e-6)  # theirs adds 1e-6 to the norm


def test_a_schedule_of_torch_is_a_factor_of_the_automatic_length():
    x, y = leaf(-1.2, 1.0), leaf(-1.2, 1.0)
    half = automatic([x])
    torch.optim.lr_scheduler.LambdaLR(half, lambda t: 0.5)
    moved, whole = trajectory(half, x, 1)[0], trajectory(automatic([y]), y, 1)[0]
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    assert torch.allclose(2 * (moved - start), whole - start)


def phase():
    return PhaseRetrieval.random(60, 4, generator=torch.Generator().manual_seed(3))


def stepped(optimizer, problem, t, rows):
    def loss(rows=rows):
        optimizer.zero_grad()
        value = problem(rows)
        value.backward()
        return value

    return optimizer.step(loss, lambda: loss(slice(None))) if isinstance(optimizer, Spider) else optimizer.step(loss)


def test_spider_that_always_takes_anchors_is_normalized_descent():
    p, q = phase(), phase()
    spider, plain = Spider(p.parameters(), 0.05, q=1), NormalizedGD(q.parameters(), 0.05)
    for t in range(20):
        stepped(spider, p, t, slice(0, 3))
        stepped(plain, q, t, slice(None))
        assert torch.equal(p.z, q.z)


def test_spider_with_all_data_in_each_batch_telescopes_to_the_gradient():
    p, q = phase(), phase()
    spider, plain = Spider(p.parameters(), 0.05, q=100), NormalizedGD(q.parameters(), 0.05)
    for t in range(20):
        stepped(spider, p, t, slice(None))
        stepped(plain, q, t, slice(None))
        assert torch.allclose(p.z, q.z, atol=1e-10)


def test_spider_takes_the_difference_on_one_batch_and_says_when_an_anchor_is_due():
    p = phase()
    spider = Spider(p.parameters(), 0.05, q=3)
    batches = [slice(3 * t, 3 * t + 9) for t in range(6)]
    v = previous = None
    for t, rows in enumerate(batches):
        here = p.z.detach().clone()
        assert spider.anchors == (t % 3 == 0)
        gradient = torch.func.grad(p.at)
        if t % 3 == 0:
            v = gradient(here, slice(None))
        else:
            v = v + gradient(here, rows) - gradient(previous, rows)
        loss = stepped(spider, p, t, rows)
        assert float(loss.detach()) == pytest.approx(float(p.at(here, slice(None) if t % 3 == 0 else rows)))
        assert torch.allclose(p.z.detach(), here - 0.05 * v / v.norm(), atol=1e-12)
        previous = here


def test_a_failing_closure_leaves_parameters_bit_for_bit():
    p = phase()
    spider = Spider(p.parameters(), 0.05, q=5)
    stepped(spider, p, 0, slice(None))
    here, calls = p.z.detach().clone(), []

    def loss():
        spider.zero_grad()
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        p(slice(0, 2)).backward()

    with pytest.raises(KeyboardInterrupt):
        spider.step(loss)
    assert torch.equal(p.z.detach(), here)


def test_the_norm_is_global_and_neither_overflows_nor_vanishes():
    for size in (1e-30, 1e30):
        a = torch.zeros(2, requires_grad=True)
        b = torch.zeros(1, requires_grad=True)
        a.grad, b.grad = torch.tensor([3.0, 0.0]) * size, torch.tensor([4.0]) * size
        optimizer = NormalizedGD([{"params": [a]}, {"params": [b], "lr": 2.0}], lr=1.0, eps=1e-40)
        optimizer.step()
        assert torch.allclose(a.detach(), torch.tensor([-0.6, 0.0])) and torch.allclose(
            b.detach(), torch.tensor([-1.6])
        )
    assert math.isclose(1e-40, optimizer.param_groups[0]["eps"])
