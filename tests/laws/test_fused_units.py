"""The compiled unit equals the plain formulas: every kernel, layout, instruction set and number of threads."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from planish._compiled import absence, isa, native
from planish.nn import SAU, fused, sau
from planish.nn.profiles import PROFILES
from planish.nn.unit import slopes, value

pytestmark = [
    pytest.mark.skipif(bool(absence), reason="the compiled module is absent"),
    # what torch itself calls when it first differentiates forward
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]
KERNELS = list(PROFILES)
SETS = native.runnable() if native is not None else []
ULP = 2.0**-23
LAYOUTS = {
    "flat": lambda: torch.randn(3, 5, 7, 11),
    "channels last": lambda: torch.randn(3, 5, 7, 11).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(7, 5, 3, 11).transpose(0, 2),
    "every other": lambda: torch.randn(3, 5, 14, 11)[:, :, ::2],
    "expanded": lambda: torch.randn(3, 5, 1, 11).expand(3, 5, 7, 11),
    "rows": lambda: torch.randn(1300, 5),
    "rows of many": lambda: torch.randn(70, 2500),
    "runs": lambda: torch.randn(2, 3, 9001),
    "one": lambda: torch.randn(1, 1),
}


@pytest.fixture(params=SETS)
def instructions(request, monkeypatch):
    monkeypatch.setattr(fused, "isa", request.param)
    return request.param


def results(x, a, s, weight, f):
    x, a, s = (v.clone(memory_format=torch.preserve_format).requires_grad_() for v in (x, a, s))
    y = f(x, a, s)
    return [y.detach(), *torch.autograd.grad(y, (x, a, s), weight)]


def exact(x, a, s, weight, kernel, dim=1):
    shape = [-1] + [1] * (x.dim() - dim - 1)
    plain = [t.double() for t in (x, a, s, weight)]
    return results(*plain, lambda x, a, s: value(x, a.reshape(shape), s.reshape(shape), kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_within_units_in_the_last_place(kernel, instructions):
    """Of the larger of |x| and the width; in the tails of their own size too, for the rounded |x| / sigma."""
    x = torch.cat([torch.linspace(-30, 30, 60_001), torch.logspace(-44, 38, 3000), -torch.logspace(-44, 38, 3000)])
    grad = torch.ones_like(x)
    for a, s in itertools.product(torch.tensor([0.15, 0.0, -0.5]), torch.tensor([0.7, 5e-5, 3e6])):
        y = fused.forward(x, a, s, kernel, 0)
        by_x = fused.backward(grad, x, a, s, kernel, 0, (True, True, True))[0]
        want, slope, *_ = exact(x[:, None], a[None], s[None], grad[:, None], kernel)
        assert ((y - want[:, 0]).abs() <= 2 * ULP * (1 + float(a.abs())) * x.abs().clamp_min(float(s))).all()
        assert ((by_x - slope[:, 0]).abs() <= 2.5 * ULP * (1 + float(a.abs()))).all()
    u = torch.linspace(0, 5, 20_001)  # beyond, the definition itself cancels
    tail = fused.forward(-u, torch.tensor(0.0), torch.tensor(1.0), kernel, 0).double()
    want = PROFILES[kernel].tail(u.double())
    inside = want > 1e-3 if kernel in ("uniform", "triangular", "epanechnikov") else want > 0
    assert (((tail - want) / want).abs()[inside] <= 5 * ULP * (1 + u.double().square() / 4)[inside]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout(layout, instructions):
    x = LAYOUTS[layout]()
    sizes = (1, x.shape[1])
    for kernel, per_slope, per_width in itertools.product(("gaussian", "logistic"), sizes, sizes):
        a, s = torch.rand(per_slope) - 0.3, torch.rand(per_width) + 0.2
        weight = torch.randn(x.shape)
        got = results(x, a, s, weight, lambda x, a, s: sau(x, a, s, kernel=kernel))  # noqa: B023
        want = exact(x, a, s, weight, kernel)
        assert got[0].shape == x.shape and (layout == "every other" or got[0].stride() == torch.empty_like(x).stride())
        for one, other, size in zip(got[:2], want[:2], (6, 6), strict=True):
            assert (one - other).abs().max() <= size * 2 * ULP
        for one, other in zip(got[2:], want[2:], strict=True):  # sums: of many terms, each as large as weight x
            assert (one - other).abs().max() <= 4 * ULP * float((weight * x).double().norm()) + 1e-6


def test_an_expanded_gradient_and_a_gradient_of_another_layout():
    x = torch.randn(4, 3, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    for weight in (torch.tensor(2.0).expand(4, 3, 6, 5), torch.randn(4, 3, 6, 5)):
        (got,) = torch.autograd.grad(sau(x, 0.2, 0.5), x, weight)
        (want,) = torch.autograd.grad(value(x.double(), torch.tensor(0.2), torch.tensor(0.5), "gaussian"), x, weight)
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_special_values(kernel, instructions):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 3e38, -3e38, 1e-30, 13.25, -13.25])
    for a, s in itertools.product(torch.tensor([0.15, 1.0]), torch.tensor([0.0, 1e-42, 5e-5, 0.5, 1e30])):
        for n in (len(x), 40):  # alone, and among others in whole vectors
            many = x.repeat(4)[:n] if n > len(x) else x
            y = fused.forward(many, a, s, kernel, 0)
            by_x = fused.backward(torch.ones(n), many, a, s, kernel, 0, (True, False, False))[0]
            want, slope = value(many, a, s, kernel), slopes(many, a, s, kernel)[0]
            assert torch.equal(y.isnan(), want.isnan())
            assert torch.allclose(y, want, rtol=3e-7, atol=1e-6 * float(s) + 1e-37, equal_nan=True)
            assert torch.allclose(by_x, slope, atol=1e-6, equal_nan=True)
            assert bool(by_x[4].isnan()) and float(by_x[2]) == 1 and float(by_x[3]) == float(a)


def test_threads_change_nothing():
    before = torch.get_num_threads()
    try:
        for x, channels in ((torch.randn(300_000), 1), (torch.randn(3, 4, 30_000), 4), (torch.randn(30_000, 7), 7)):
            a, s, weight = torch.rand(channels), torch.rand(channels) + 0.1, torch.randn(x.shape)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(results(x, a, s, weight, sau))
            for other in found[1:]:
                assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own():
    program = """if True:
        import os, torch
        from planish.nn import sau
        torch.set_num_threads(2)
        x = torch.randn(200_000)
        want = sau(x, 0.15, 0.5).numpy()
        child = os.fork()
        if child == 0:
            os._exit(0 if (sau(x, 0.15, 0.5).numpy() == want).all() else 1)
        raise SystemExit(os.waitpid(child, 0)[1])
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_long_sums_are_exact_to_a_float():
    x, weight = torch.randn(1 << 20), torch.rand(1 << 20)
    a, s = torch.tensor([0.15]), torch.tensor([0.5])
    got, want = (f[2:] for f in (results(x, a, s, weight, sau), exact(x[:, None], a, s, weight[:, None], "gaussian")))
    for one, other in zip(got, want, strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-6)


def test_parameters_of_other_dtypes_get_gradients_of_theirs():
    for dtype in (torch.float64, torch.bfloat16):
        a, s = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in (0.25, 0.5))
        sau(torch.randn(50), a, s).sum().backward()
        assert a.grad.dtype == s.grad.dtype == dtype


# The rule of choice.


@pytest.fixture
def calls(monkeypatch):
    """Count what reaches the compiled module."""
    made = []

    def counted(name):
        original = getattr(fused, name)

        def run(*args):
            made.append(name)
            return original(*args)

        monkeypatch.setattr(fused, name, run)

    counted("forward")
    counted("backward")
    return made


def test_taken_for_float32_alone(calls):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        sau(torch.randn(9, dtype=dtype, requires_grad=True), 0.15, 0.5).sum().backward()
    sau(torch.randn(0), 0.15, 0.5)
    sau(torch.randn(3, device="meta"), torch.tensor(0.2, device="meta"), torch.tensor(0.5, device="meta"))
    assert calls == []
    unit = SAU(sigma=0.5, learn_sigma=True)
    unit(torch.randn(9, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert unit(torch.randn(9)).dtype == torch.float32
    assert calls == ["forward", "backward", "forward"]


def test_not_taken_without_the_module(calls, monkeypatch):
    x = torch.randn(40, requires_grad=True)
    with_it = results(x.detach(), torch.tensor(0.15), torch.tensor(0.5), torch.ones(40), sau)
    assert calls == ["forward", "backward"]
    monkeypatch.setattr(fused, "native", None)
    without = results(x.detach(), torch.tensor(0.15), torch.tensor(0.5), torch.ones(40), sau)
    assert calls == ["forward", "backward"]
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(with_it, without, strict=True))


def test_what_transforms_and_modes_see_is_made_of_operations(calls):
    make_fx = pytest.importorskip("torch.fx.experimental.proxy_tensor").make_fx
    x, other = torch.randn(5, 3), torch.randn(5, 3)
    graph = make_fx(lambda x: sau(x, 0.15, 0.5))(x)
    with FlopCounterMode(display=False):
        sau(x, 0.15, 0.5)
    batch = torch.vmap(lambda x: sau(x, 0.15, 0.5))(x)
    each = torch.vmap(torch.func.grad(lambda x: sau(x, 0.15, 0.5).sum()))(x)
    assert calls == []
    assert torch.allclose(graph(other), sau(other, 0.15, 0.5), atol=1e-6)
    assert torch.allclose(batch, sau(x, 0.15, 0.5), atol=1e-6)
    inner = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(sau(inner, 0.15, 0.5).sum(), inner)
    assert torch.allclose(each, want, atol=1e-6)


def test_second_derivatives_batches_of_gradients_and_forward_mode_after_a_compiled_forward(calls):
    x = torch.randn(6, requires_grad=True)
    a, s = torch.tensor(0.2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    y = sau(x, a, s)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    second = torch.autograd.grad(first.sum(), (x, a, s), retain_graph=True)
    assert calls == ["forward"]  # the way back that is differentiated again is made of operations
    wide = [v.detach().double().requires_grad_() for v in (x, a, s)]
    (wide_first,) = torch.autograd.grad(sau(*wide).sum(), wide[0], create_graph=True)
    for one, other in zip(second, torch.autograd.grad(wide_first.sum(), wide), strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)
    several = torch.randn(4, 6)
    (batch,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    assert torch.allclose(batch, several * first.detach(), atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(6))
        tangent = torch.autograd.forward_ad.unpack_dual(sau(dual, 0.2, 0.5)).tangent
    assert torch.allclose(tangent, first.detach(), atol=1e-6)


def test_the_instruction_set_in_use_is_that_of_the_kernels():
    from planish.kernels import cpu

    assert isa == cpu.isa == fused.isa
    with pytest.raises(ValueError, match="unknown kernel"):
        native.smoothed(0, 0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 7, 1, "portable")
