"""The roots satisfy their equations, their errors obey the stated laws, and their gradients are those of the root."""

import math
from fractions import Fraction

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from planish.linalg import (
    iterations,
    lyapunov,
    matrix_inv_sqrth,
    matrix_sqrth,
    matrix_sqrth_pair,
    rational,
    solve_lyapunov_psd,
)

F64 = torch.float64
METHODS = {
    "eigh": {},
    "mpa": {"order": 9},
    "pade_iter": {},
    "newton_schulz": {"steps": 25},
    "mtp": {"order": 60},
}


def spd(spectrum, batch=(), seed=0, dtype=F64):
    """A random basis for a spectrum: the matrix, its root and its inverse root."""
    values = torch.as_tensor(spectrum, dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*batch, len(values), len(values), generator=g, dtype=dtype)).Q
    return tuple((q * values**power) @ q.mT for power in (1, 0.5, -0.5))


def spread(condition, n=64):
    return torch.logspace(0, -math.log10(condition), n, dtype=F64)


def off(x, exact):
    return (torch.linalg.matrix_norm(x - exact) / torch.linalg.matrix_norm(exact)).max().item()


# Coefficients


def test_pade_is_the_published_quotient():
    p, q = rational.pade(5)
    assert p == [1, -2.75, 2.75, -1.203125, 0.21484375, -0.0107421875]
    assert q == [1, -2.25, 1.75, -0.546875, 0.05859375, -0.0009765625]


@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_the_forms_of_pade_are_one_function(order):
    n = 2 * order + 1
    p, q = rational.pade(order)
    for x in (1e-6, 0.01, 0.1, 0.5, 0.999, 1.5, 7.0, 100.0):
        z, s = 1 - x, math.sqrt(x)
        gragg = s * ((1 + s) ** n + (1 - s) ** n) / ((1 + s) ** n - (1 - s) ** n)
        parts = 1 - sum(alpha * z / (1 - beta * z) for alpha, beta in rational.fractions(order))
        reciprocal = (1 + 2 * sum(1 / (u + v * x) for u, v in rational.shifts(order))) / n
        assert parts == pytest.approx(gragg, rel=1e-12)
        assert 1 / reciprocal == pytest.approx(gragg, rel=1e-12)
        if x < 1:
            quotient = sum(c * z**k for k, c in enumerate(p)) / sum(c * z**k for k, c in enumerate(q))
            assert quotient == pytest.approx(gragg, rel=1e-9)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_pade_agrees_with_the_series_to_its_whole_order(order):
    p, q = ([Fraction(c) for c in part] for part in rational.pade(order))
    series = [Fraction(c) for c in rational.taylor(2 * order)]
    product = [sum(q[i] * series[k - i] for i in range(min(k, order) + 1)) for k in range(2 * order + 1)]
    assert product == p + [0] * order  # exactly


def test_the_error_law():
    a, steps = torch.tensor([[0.01]], dtype=F64), 2
    for x in (0.001, 0.01, 0.1, 10.0):
        s = math.sqrt(x)
        q = ((1 - s) / (1 + s)) ** 11
        (root, inverse), (one, _) = (
            f(a * 0 + x, 5, **kind, root=True, inverse=True)
            for f, kind in ((iterations.mpa, {}), (iterations.coupled, {"steps": 1}))
        )
        assert root.item() / s - 1 == pytest.approx(2 * q / (1 - q), rel=1e-6)
        assert inverse.item() * s - 1 == pytest.approx(-2 * q / (1 + q), rel=1e-6)
        assert one.item() / s - 1 == pytest.approx(-2 * q / (1 + q), rel=1e-6)
        twice, _ = iterations.coupled(a * 0 + x, 5, steps, root=True, inverse=False)
        q = q**11
        assert twice.item() / s - 1 == pytest.approx(-2 * q / (1 + q), rel=1e-6, abs=1e-14)
    assert iterations.mpa(a * 0, 5, root=True, inverse=False)[0].item() == pytest.approx(1 / 11)
    assert iterations.coupled(a * 0, 5, 1, root=True, inverse=False)[0].item() == 0


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4])
def test_reaches_are_where_the_error_is_the_tolerance(tolerance):
    x = rational.reach(5, 1, tolerance)
    q = ((1 - math.sqrt(x)) / (1 + math.sqrt(x))) ** 11
    assert 2 * q / (1 - q) == pytest.approx(tolerance)


@pytest.mark.parametrize("order", [1, 2, 4, 5, 7])
def test_one_quotient_is_the_sum_of_fractions(order):
    a = spd(spread(50, 7), batch=(2,))[0]
    for one, other in zip(
        iterations.mpa(a, order, root=True, inverse=True, whole=True),
        iterations.mpa(a, order, root=True, inverse=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
        assert torch.equal(one, one.mT) or off(one, one.mT) < 1e-15
    p, q = rational.quotient(order)
    assert sum(p) == pytest.approx(1) and q == p[::-1]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_rounding_leaves_the_tolerance_on_the_whole_interval(tolerance, inverse):
    low, high = rational.interval(5, tolerance, torch.finfo(torch.float32).eps, inverse=inverse)
    values = torch.logspace(math.log10(low), math.log10(high), 32, dtype=F64)
    for seed in range(3):
        a, root, other = spd(values, batch=(4,), seed=seed)
        x, y = iterations.mpa(a.float(), 5, root=not inverse, inverse=inverse, whole=True)
        assert off((y if inverse else x).double(), other if inverse else root) <= tolerance
    assert rational.interval(5, 1e-6, torch.finfo(torch.float32).eps, inverse=inverse) is None
    wide = rational.interval(5, tolerance, 1e-30, inverse=inverse)
    assert wide[0] == low and wide[1] == pytest.approx(1 / low)


@pytest.mark.parametrize("tolerance", [0.1, 1e-2, 1e-4, 1e-8])
def test_auto_keeps_to_its_tolerance(tolerance):
    quick = 0
    for condition in (1.5, 5, 30, 1e3):
        for f, exact in zip((matrix_sqrth, matrix_inv_sqrth), spd(spread(condition, 16), batch=(3,))[1:], strict=True):
            a = spd(spread(condition, 16), batch=(3,))[0].requires_grad_()
            x = f(a, tolerance=tolerance)
            assert off(x, exact) <= tolerance
            quick += off(x, exact) > 1e-13
            x.sum().backward()
            assert torch.isfinite(a.grad).all()
    assert quick >= 2 if tolerance > 1e-3 else True  # it does take the quicker way where it may


TABLE = {  # condition: Taylor, Pade (both as published), Newton-Schulz 5, 10, 20, Pade by the trace
    1e1: (8.7e-2, 1.0e-2, 2.4e-2, 2e-15, 2e-15, 9.8e-7),
    1e2: (2.3e-1, 6.4e-2, 7.6e-2, 8e-7, 2e-15, 8.6e-4),
    1e4: (4.8e-1, 2.1e-1, 8.6e-2, 9e-3, 6e-15, 2.6e-2),
    1e6: (6.2e-1, 3.0e-1, 7.8e-2, 1e-2, 8e-7, 4.9e-2),
}


@pytest.mark.parametrize("condition", TABLE)
def test_the_table_of_errors(condition):
    a, root, _ = spd(spread(condition))
    mean = a.trace() / 64
    traced, _ = iterations.mpa(a / mean, 5, root=True, inverse=False)
    found = (
        matrix_sqrth(a, paper=True, method="mtp"),
        matrix_sqrth(a, paper=True),
        *(matrix_sqrth(a, method="newton_schulz", steps=k) for k in (5, 10, 20)),
        traced * mean.sqrt(),
    )
    for x, expected in zip(found, TABLE[condition], strict=True):
        assert off(x, root) == pytest.approx(expected, rel=0.1, abs=2e-14)
    assert off(matrix_sqrth(a, method="mpa"), root) <= off(found[-1], root) * (1 if condition < 1e4 else 0.55)
    assert off(matrix_sqrth(a, method="pade_iter"), root) < {1e6: 1e-7}.get(condition, 1e-12)
    assert off(matrix_sqrth(a), root) < 1e-12


# The equations of the root


@pytest.mark.parametrize("method", METHODS)
def test_equations(method):
    given = {"method": method, **METHODS[method]}
    a, root, inverse = spd([2.0, 1.7, 1.3, 1.0, 0.6], batch=(3, 2))
    x, y = matrix_sqrth_pair(a, **given)
    eye = torch.eye(5, dtype=F64).expand_as(a)
    for found, exact in ((x, root), (y, inverse), (x @ x, a), (x @ y, eye), (y @ a @ y, eye)):
        torch.testing.assert_close(found, exact, atol=1e-9, rtol=0)
    assert torch.equal(x, x.mT) or off(x, x.mT) < 1e-15
    assert torch.linalg.eigvalsh(x).min() > 0
    for alone, together in ((matrix_sqrth(a, **given), x), (matrix_inv_sqrth(a, **given), y)):
        torch.testing.assert_close(alone, together)
    torch.testing.assert_close(matrix_sqrth(1e6 * a, **given), 1e3 * x)  # homogeneous, whatever the error
    u = torch.linalg.qr(torch.randn(5, 5, dtype=F64)).Q
    torch.testing.assert_close(matrix_sqrth(u @ a @ u.mT, **given), u @ x @ u.mT)
    diagonal = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    torch.testing.assert_close(matrix_sqrth(diagonal, **given), diagonal.sqrt(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("given", [{"method": m} for m in METHODS] + [{"paper": True}], ids=[*METHODS, "paper"])
def test_matrices_of_a_batch_know_nothing_of_each_other(given):
    parts = [spd(spread(c, 6), seed=int(c))[0] * size for c, size in ((2, 1), (8, 1e-6), (4, 1e5))]
    for f in (matrix_sqrth, matrix_inv_sqrth):
        batch = torch.stack(parts).requires_grad_()
        g = torch.randn(6, 6, dtype=F64)
        (f(batch, **given) * g).sum().backward()
        for i, part in enumerate(parts):
            alone = part.clone().requires_grad_()
            x = f(alone, **given)
            (x * g).sum().backward()
            torch.testing.assert_close(x, f(batch, **given)[i])
            torch.testing.assert_close(alone.grad, batch.grad[i], rtol=1e-6, atol=0)


# Gradients


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"backward": "lyapunov"},
        {"method": "pade_iter"},
        {"method": "pade_iter", "backward": "eigh"},
        {"method": "mpa", "backward": "autograd", "scale": 1.0},
        {"tolerance": 0.5},
        {"method": "mtp", "backward": "autograd", "scale": 2.0},
        {"method": "newton_schulz", "backward": "autograd", "scale": 2.0, "steps": 8},
    ],
    ids=str,
)
def test_gradients_of_both_orders(given):
    a = spd([1.8, 1.0, 1.0])[0].requires_grad_()  # two eigenvalues coincide
    for f in (matrix_sqrth, matrix_inv_sqrth):
        assert gradcheck(lambda a, f=f: f((a + a.mT) / 2, **given), a)
        assert gradgradcheck(lambda a, f=f: f((a + a.mT) / 2, **given), a, atol=1e-4)


def test_complex_hermitian():
    z = torch.randn(2, 2, 2, dtype=torch.complex128)
    a = (z @ z.mH + torch.eye(2)).requires_grad_()
    x, y = matrix_sqrth_pair(a)
    torch.testing.assert_close(x @ x, a)
    torch.testing.assert_close(x @ y, torch.eye(2, dtype=a.dtype).expand_as(a))
    assert gradcheck(lambda a: matrix_sqrth((a + a.mH) / 2), a)
    assert gradgradcheck(lambda a: matrix_inv_sqrth((a + a.mH) / 2), a, atol=1e-4)


def test_the_gradient_at_the_unit_is_half_of_what_comes():
    for given in ({}, {"method": "pade_iter"}):
        a = torch.eye(5, dtype=F64).requires_grad_()
        g = torch.randn(5, 5, dtype=F64)
        (matrix_sqrth(a, **given) * g).sum().backward()
        torch.testing.assert_close(a.grad, (g + g.mT) / 4)  # of the symmetric part
    a = torch.eye(5, dtype=F64).requires_grad_()
    values, vectors = torch.linalg.eigh(a)
    (((vectors * values.sqrt()) @ vectors.mT) * g).sum().backward()
    assert not torch.isfinite(a.grad).all()  # what autograd makes of it


@pytest.mark.parametrize("method", ["eigh", "iteration"])
def test_lyapunov(method):
    _, x, _ = spd(spread(1e4, 8), batch=(2,))
    g = torch.randn(2, 8, 8, dtype=F64)
    d = solve_lyapunov_psd(x, g, method=method)
    torch.testing.assert_close(x @ d + d @ x, g)
    x = spd([1.5, 1.0, 1.0])[0].requires_grad_()
    g = torch.randn(3, 3, dtype=F64, requires_grad=True)
    assert gradcheck(lambda x, g: solve_lyapunov_psd((x + x.mT) / 2, g, method=method), (x, g))
    assert gradgradcheck(lambda x, g: solve_lyapunov_psd((x + x.mT) / 2, g, method=method), (x, g), atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 8, "auto"])
def test_a_symmetric_side_needs_fewer_products_for_the_same(steps):
    _, x, _ = spd(spread(20, 6), batch=(2,))
    g = torch.randn(2, 6, 6, dtype=F64)
    g = g + g.mT
    found = lyapunov.solve(x, g, steps, even=True)
    torch.testing.assert_close(found, solve_lyapunov_psd(x, g, method="iteration", steps=steps))
    assert torch.equal(found, found.mT)


def test_the_published_iteration():
    _, x, _ = spd(spread(20, 6))
    g = torch.randn(6, 6, dtype=F64)
    b, c = x / (x @ x).norm().sqrt(), g / (x @ x).norm().sqrt()
    eye = torch.eye(6, dtype=F64)
    for _ in range(8):
        square = b @ b
        b, c = b @ (3 * eye - square) / 2, (c @ (3 * eye - square) - square @ c + b @ c @ b) / 2
    torch.testing.assert_close(solve_lyapunov_psd(x, g, method="iteration", steps=8), c / 2)


def test_eight_steps_are_a_cut_off():
    g = torch.randn(64, 64, dtype=F64)
    g = g + g.mT
    for condition, expected in ((1e1, 1e-7), (1e2, 1.6e-2), (1e3, 0.26), (1e4, 0.61)):
        _, x, _ = spd(spread(condition))
        exact = solve_lyapunov_psd(x, g)
        eight = off(solve_lyapunov_psd(x, g, method="iteration", steps=8), exact)
        assert eight == pytest.approx(expected, rel=0.6, abs=1e-7)  # varies with G
        enough = math.ceil(math.log(math.sqrt(torch.linalg.matrix_norm(x @ x) * condition), 1.5)) + 4
        assert off(solve_lyapunov_psd(x, g, method="iteration", steps=enough), exact) < 1e-3
        assert off(solve_lyapunov_psd(x, g, method="iteration"), exact) < 1e-10


# Degenerate matrices


@pytest.mark.parametrize("method", METHODS)
def test_zero_is_its_own_root(method):
    a = torch.zeros(2, 3, 3, dtype=F64, requires_grad=True)
    x = matrix_sqrth(a, method=method)
    x.sum().backward()
    assert torch.equal(x, torch.zeros_like(x))
    assert torch.isfinite(a.grad).all()


@pytest.mark.parametrize("method", METHODS)
def test_singular_matrices_have_roots_and_finite_gradients(method):
    half = torch.randn(6, 2, dtype=F64)
    a = (half @ half.mT).requires_grad_()
    x = matrix_sqrth(a, method=method)
    torch.testing.assert_close(x.detach() @ x.detach(), a.detach(), atol=0.5 if method == "mtp" else 1e-3, rtol=0)
    x.trace().backward()
    assert torch.isfinite(a.grad).all()
    if method == "eigh":  # nothing flows inside the null space: that of tr A^1/2 is half the pseudo-inverse of the root
        torch.testing.assert_close(a.grad, torch.linalg.pinv(x.detach(), hermitian=True, rtol=1e-6) / 2)
    for f in (matrix_inv_sqrth, matrix_sqrth_pair):
        with pytest.raises(torch.linalg.LinAlgError, match=r"`A` must be positive definite \(or `eps` above 0\); got"):
            f(a, method=method)
    y = matrix_inv_sqrth(a.detach(), eps=1.0)
    torch.testing.assert_close(y @ (a.detach() + torch.eye(6)) @ y, torch.eye(6, dtype=F64))


@pytest.mark.parametrize("method", METHODS)
def test_one_by_one(method):
    assert matrix_sqrth(torch.tensor([[9.0]], dtype=F64), method=method).item() == pytest.approx(3)


def test_ill_conditioned_float32():
    a, root, inverse = spd(spread(1e5, 32))
    for method, digits in (("eigh", 1e-4), ("pade_iter", 1e-3)):
        assert off(matrix_sqrth(a.float(), method=method).double(), root) < digits
        assert off(matrix_inv_sqrth(a.float(), method=method).double(), inverse) < 5e-2


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    a = spd([2.0, 1.0, 0.5])[0].to(dtype).requires_grad_()
    x = matrix_sqrth(a)
    assert x.dtype == dtype
    assert torch.equal(x, matrix_sqrth(a.detach().float()).to(dtype))
    x.sum().backward()
    assert a.grad.dtype == dtype


def test_neither_autocast_nor_a_lower_precision_gets_in():
    a = spd(spread(10, 32))[0].float().requires_grad_()
    expected = matrix_sqrth(a, method="pade_iter")
    (before,) = torch.autograd.grad(expected.square().sum(), a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matrix_sqrth(a, method="pade_iter"), expected)
        x = solve_lyapunov_psd(expected.detach(), a.detach(), method="iteration")
    torch.testing.assert_close(expected @ x + x @ expected, a)
    torch.set_float32_matmul_precision("medium")
    try:
        x = matrix_sqrth(a, method="pade_iter")
        (after,) = torch.autograd.grad(x.square().sum(), a)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(x, expected) and torch.equal(before, after)


# Transforms of torch


def first_row(a, **given):
    return matrix_sqrth(a, check=False, **given)[..., 0, :].sum()


@pytest.mark.parametrize("given", [{}, {"method": "pade_iter", "backward_steps": 12}, {"paper": True}], ids=str)
def test_vmap(given):
    a = torch.stack([spd(spread(c, 4))[0] for c in (2, 3, 4)])
    batched = torch.func.vmap(torch.func.grad(lambda m: first_row(m, **given)))(a)
    leaf = a.clone().requires_grad_()
    first_row(leaf, **given).backward()
    torch.testing.assert_close(batched, leaf.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("given", [{}, {"method": "pade_iter", "backward_steps": 12}], ids=str)
def test_compiles_whole(given, unchecked):
    a = torch.stack([spd(spread(c, 4))[0] for c in (2, 3, 4)])
    leaf, other = a.clone().requires_grad_(), a.clone().requires_grad_()
    torch.compile(lambda a: first_row(a, **given), fullgraph=True, backend="aot_eager")(leaf).backward()
    first_row(other, **given).backward()
    torch.testing.assert_close(leaf.grad, other.grad)
