"""ReQU has the derivatives that it says, and its sums are the polynomials that it says."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from planish.nn import ReQU, requ

X = torch.linspace(-3, 3, 601, dtype=torch.float64)


def test_value_and_derivatives():
    x = X.clone().requires_grad_()
    y = requ(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(y, torch.where(X > 0, X * X, 0))
    assert torch.equal(first, 2 * X.relu())
    assert torch.equal(second, torch.where(X > 0, 2.0, 0.0))


def test_polynomials_are_exact():
    z, w = X, X.flip(0) * 0.7 + 0.1

    def square(v):
        return requ(v) + requ(-v)

    assert torch.equal(square(z), z * z)
    assert torch.allclose((square(z + w) - square(z - w)) / 4, z * w, atol=1e-14)
    assert torch.allclose((square(z + 1) - square(z - 1)) / 4, z, atol=1e-14)


def test_gradients_by_finite_differences():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(ReQU(), x)
    assert gradgradcheck(ReQU(), x)


def test_transforms_of_functions():
    grad = torch.vmap(torch.func.grad(requ))(X)
    assert torch.equal(grad, 2 * X.relu())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers(value):
    x = torch.tensor(value)
    assert torch.equal(requ(x).nan_to_num(nan=-1.0), (x.relu() * x.relu()).nan_to_num(nan=-1.0))


@pytest.mark.refuses
def test_refuses_integers():
    with pytest.raises(TypeError, match="requ: `x` must be a floating-point tensor; got torch.int64"):
        requ(torch.arange(3))
