"""SAU is the convolution that it says to be, with every kernel; its derivatives, limits and symmetries follow."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from planish.nn import sau, smooth_piecewise, smu, smu1
from planish.nn.profiles import PROFILES
from planish.nn.unit import value

# what torch itself calls when it first differentiates forward
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
KERNELS = list(PROFILES)
X = torch.arange(-400, 401, dtype=torch.float64) / 100
COMPACT = ("uniform", "triangular", "epanechnikov")


def leaky(x, a):
    return torch.where(x < 0, a * x, x)


def convolved(f, kernel, x, s, corners):
    """f * phi_s at x by quadrature of the density, cut where f or the density has a corner."""
    quad = pytest.importorskip("scipy.integrate").quad
    pdf = PROFILES[kernel].pdf

    def integrand(u):
        return float(f(x - s * u) * pdf(torch.tensor(abs(u), dtype=torch.float64)))

    cuts = sorted({-1.0, 0.0, 1.0, *((x - c) / s for c in corners)})
    ends = (-1.0, 1.0) if kernel in COMPACT else (-math.inf, math.inf)
    inner = [ends[0], *(c for c in cuts if ends[0] < c < ends[1]), ends[1]]
    return sum(quad(integrand, a, b, epsabs=1e-12, epsrel=1e-12, limit=200)[0] for a, b in itertools.pairwise(inner))


@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_convolution(kernel):
    for x, a, s in itertools.product((-1.3, -0.2, 0.0, 0.4, 2.0), (0.15, -0.5), (0.3, 1.7)):
        want = convolved(lambda v, a=a: v if v >= 0 else a * v, kernel, x, s, [0.0])
        assert float(sau(torch.tensor(x, dtype=torch.float64), a, s, kernel=kernel)) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_profile_is_of_one_piece(kernel):
    """The mass is one, and each curve is the derivative of the next, as the table of the module has it."""
    profile = PROFILES[kernel]
    u = torch.linspace(0.01, 3, 300, dtype=torch.float64).add_(1e-3).requires_grad_()

    def slope(y):
        return torch.autograd.grad(y.sum(), u)[0]

    with torch.no_grad():
        zero = torch.zeros((), dtype=torch.float64)
        assert float(profile.sf(zero)) == pytest.approx(0.5) and float(profile.tail(zero)) == pytest.approx(
            profile.peak
        )
        assert torch.allclose(profile.gap(u), profile.tail(u) + u * profile.sf(u), atol=1e-14)
    assert torch.allclose(slope(profile.tail(u)), -profile.sf(u), atol=1e-12)
    assert torch.allclose(slope(profile.sf(u)), -profile.pdf(u), atol=1e-12)
    assert torch.allclose(slope(profile.gap(u)), -u * profile.pdf(u), atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma", [0.05, 0.7])
def test_shape(kernel, sigma):
    a, x = 0.15, X.clone().requires_grad_()
    y = sau(x, a, sigma, kernel=kernel)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    above = (y - leaky(x, a)).detach()
    assert first.min() >= a - 1e-12 and first.max() <= 1 + 1e-12  # increasing, 1-Lipschitz
    assert second.min() >= -1e-12  # convex
    assert above.min() >= -1e-12 and above.max() <= (1 - a) * sigma * PROFILES[kernel].peak + 1e-12
    assert float(above[X == 0]) == pytest.approx((1 - a) * sigma * PROFILES[kernel].peak, abs=1e-12)
    if kernel in COMPACT:
        assert torch.equal(above[X.abs() > sigma].abs() < 1e-14, torch.ones(int((X.abs() > sigma).sum()), dtype=bool))


@pytest.mark.parametrize("kernel", KERNELS)
def test_symmetry_and_scale(kernel):
    y = sau(X, 0.3, 0.6, kernel=kernel)
    assert torch.allclose(y - y.flip(0), 1.3 * X, atol=1e-13)
    assert torch.allclose(sau(2.5 * X, 0.3, 1.5, kernel=kernel), 2.5 * y, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
def test_tends_to_leaky_relu(kernel):
    for sigma in (1e-3, 1e-6, 0.0):
        bound = 0.85 * sigma * PROFILES[kernel].peak
        assert (sau(X, 0.15, sigma, kernel=kernel) - F.leaky_relu(X, 0.15)).abs().max() <= bound + 1e-15
    assert (sau(X, 0.15, kernel="gaussian") - F.leaky_relu(X, 0.15)).abs().max() <= 1.7e-5


def test_members_that_have_names():
    assert torch.allclose(sau(X, 0.0, 0.25, kernel="logistic"), F.softplus(X, beta=4.0, threshold=1e9), atol=1e-14)
    assert torch.allclose(smu(X, 0.0, math.sqrt(0.5)), F.gelu(X), atol=1e-14)
    for a, s in ((0.25, 0.8), (-0.5, 0.1)):
        assert torch.allclose(smu1(X, a, (1 - a) * s), sau(X, a, s, kernel="student"), atol=1e-14)
    assert torch.allclose(smu1(X, 0.25), F.leaky_relu(X, 0.25), atol=1e-8)
    assert torch.allclose(smu(X, 0.25), F.leaky_relu(X, 0.25), atol=1e-6)


def test_smu_is_a_smoothing_from_below():
    assert (smu(X, 0.25, 1.0) - leaky(X, 0.25)).max() <= 1e-15
    slope = torch.diff(smu(X, 0.0, math.sqrt(0.5)))
    assert slope.min() < 0 < torch.diff(sau(X, 0.0, 1.0)).min() + 1e-12  # GELU falls, no SAU does


def test_mean_over_noise():
    """The unit is what noise of width sigma before Leaky ReLU gives on average."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400_000, generator=generator, dtype=torch.float64)
    for x in (-0.5, 0.0, 0.8):
        draws = leaky(x + 0.7 * noise, 0.15)
        error = 4 * float(draws.std()) / math.sqrt(len(draws))
        assert float(draws.mean()) == pytest.approx(
            float(sau(torch.tensor(x, dtype=torch.float64), 0.15, 0.7)), abs=error
        )


def inputs(channels):
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    sizes = (3,) if channels else (1,)
    a = torch.rand(sizes, dtype=torch.float64).sub_(0.3).requires_grad_()
    s = torch.rand(sizes, dtype=torch.float64).mul_(0.5).add_(0.3).requires_grad_()
    return x, a, s


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_by_finite_differences(kernel, channels):
    given = inputs(channels)

    def f(*v):
        return sau(*v, kernel=kernel)

    assert gradcheck(f, given, check_forward_ad=channels)
    if kernel != "uniform":  # its second derivative jumps
        assert gradgradcheck(f, given, atol=1e-4)


@pytest.mark.parametrize("f", [smu, smu1])
def test_gradients_of_the_siblings(f):
    assert gradcheck(f, inputs(True)) and gradgradcheck(f, inputs(False))


def graded(f, x, a, s, weight):
    x, a, s = (v.clone().requires_grad_() for v in (x, a, s))
    y = f(x, a, s)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), (x, a, s))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_quick_path_equals_plain_operations(kernel, dtype, monkeypatch):
    """More than a block, in every layout, against autograd of the plain formula in float64."""
    monkeypatch.setattr("planish.nn.blocks.PER_THREAD", 50)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    base = torch.randn(6, 4, 5, 3, dtype=dtype)
    layouts = (base, base.to(memory_format=torch.channels_last), base.transpose(0, 3), base[:, :, ::2])
    for x, shared in itertools.product(layouts, (True, False)):
        size = 1 if shared else x.shape[1]
        a, s = torch.rand(size, dtype=dtype) * 0.5, torch.rand(size, dtype=dtype) + 0.2
        weight = torch.randn(x.shape, dtype=dtype)
        got = graded(lambda *v: sau(*v, kernel=kernel), x, a, s, weight)

        def plain(x, a, s):
            return value(x, a.reshape(-1, 1, 1), s.reshape(-1, 1, 1), kernel)

        want = graded(plain, x.double(), a.double(), s.double(), weight.double())
        assert got[0].shape == x.shape and got[0].dtype == dtype
        for one, other in zip(got, want, strict=True):
            assert torch.allclose(one.double(), other, atol=tolerance * max(1.0, float(other.abs().max())))


def test_a_gradient_at_zero_itself():
    for kernel, s in itertools.product(KERNELS, (0.5, 5e-5)):
        x = torch.zeros(3, requires_grad=True)
        (slope,) = torch.autograd.grad(sau(x, 0.2, s, kernel=kernel).sum(), x)
        assert torch.allclose(slope, torch.full((3,), 0.6))


@pytest.mark.parametrize("kernel", KERNELS)
def test_transforms_of_functions(kernel):
    def f(x):
        return sau(x, 0.15, 0.6, kernel=kernel)

    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(torch.vmap(f)(x), f(x))
    a, s = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64) + 0.2
    each = torch.stack([sau(x[i][None], a[i], s[i], kernel=kernel)[0] for i in range(5)])
    got = torch.vmap(lambda x, a, s: sau(x[None], a, s, kernel=kernel)[0])(x, a, s)
    assert torch.allclose(got, each)
    scalars = torch.vmap(lambda x, s: sau(x, 0.15, s, kernel=kernel))(x[:, 0], s[:, 0])
    assert torch.allclose(scalars, torch.stack([sau(x[i, 0], 0.15, float(s[i, 0]), kernel=kernel) for i in range(5)]))
    v = x[0]
    hessian = torch.func.hessian(lambda v: f(v).square().sum())(v)
    u = v.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(u).square().sum(), u, create_graph=True)
    rows = torch.stack([torch.autograd.grad(g[i], u, retain_graph=True)[0] for i in range(3)])
    assert torch.allclose(hessian, rows)


PIECES = {
    "relu6": (F.relu6, [0.0, 6.0], [0.0, 1.0, 0.0], 0.0),
    "hard sigmoid": (F.hardsigmoid, [-3.0, 3.0], [0.0, 1 / 6, 0.0], 0.0),
    "abs": (torch.abs, [0.0], [-1.0, 1.0], 0.0),
    "hinge": (lambda x: (1 - x).clamp_min(0), [1.0], [-1.0, 0.0], 0.0),
}


@pytest.mark.parametrize("name", PIECES)
def test_any_piecewise_linear_function(name):
    exact, knots, slopes, first = PIECES[name]
    x = torch.linspace(-8, 8, 33, dtype=torch.float64)
    assert torch.allclose(smooth_piecewise(x, knots, slopes, first_value=first, sigma=0.0), exact(x), atol=1e-14)
    for kernel in ("gaussian", "triangular"):
        got = smooth_piecewise(x[9:12], knots, slopes, first_value=first, sigma=0.9, kernel=kernel)
        for at, y in zip(x[9:12], got, strict=True):
            f = lambda v: exact(torch.tensor(v, dtype=torch.float64))  # noqa: E731
            assert float(y) == pytest.approx(convolved(f, kernel, float(at), 0.9, knots), abs=1e-9)
