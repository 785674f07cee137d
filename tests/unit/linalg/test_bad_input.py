"""What is refused, and in which words."""

import pytest
import torch
from torch.linalg import LinAlgError

from planish.linalg import (
    CovPool2d,
    ZCAWhitening2d,
    frechet_distance,
    matrix_inv_sqrth,
    matrix_sqrth,
    matrix_sqrth_pair,
    solve_lyapunov_psd,
)

EYE = torch.eye(3)
ODD = EYE + torch.eye(3).roll(1, 0)
NAN, DOWN, FLAT = EYE * torch.nan, torch.diag(torch.tensor([1.0, -0.1, 1.0])), torch.ones(3, 3)

pytestmark = pytest.mark.refuses


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"A": torch.ones(3)}, r"`A` must be square matrices, \(\*b, n, n\), none of them empty; got \(3,\)."),
        ({"A": torch.ones(2, 3)}, r"`A` must be square matrices, \(\*b, n, n\), none of them empty; got \(2, 3\)."),
        ({"A": torch.ones(0, 0)}, r"`A` must be square matrices, \(\*b, n, n\), none of them empty; got \(0, 0\)."),
        ({"A": torch.ones(3, 3, dtype=torch.int64)}, "`A` must be of floats; got torch.int64."),
        (
            {"A": EYE.to(torch.complex64), "method": "mpa"},
            '`method` must be "auto" or "eigh" for complex matrices; got',
        ),
        ({"method": "svd"}, '`method` must be one of "auto", "eigh", "mpa", "mtp", "newton_schulz", "pade_iter"; got'),
        ({"method": "eigh", "paper": True}, '`method` must be one of "auto", "mpa", "mtp" with `paper`; got \'eigh\'.'),
        ({"scale": "max"}, '`scale` must be one of "auto", "trace", "fro", "spectral", or a float; got \'max\'.'),
        (
            {"method": "mtp", "scale": "trace"},
            '`scale` must be an upper bound of the spectrum for "mtp", which diverges',
        ),
        ({"scale": 0.0}, "`scale` must be above 0 and finite; got 0.0."),
        ({"order": 0}, "`order` must be an int >= 1; got 0."),
        ({"steps": 1.5}, "`steps` must be an int >= 1; got 1.5."),
        ({"steps": 0}, "`steps` must be an int >= 1; got 0."),
        ({"backward": "svd"}, '`backward` must be one of "auto", "eigh", "lyapunov", "autograd"; got \'svd\'.'),
        ({"backward": "autograd"}, '`backward` must be one of "auto", "eigh", "lyapunov" with method "auto"; got'),
        ({"backward_steps": 0}, '`backward_steps` must be an int >= 1 or "auto"; got 0.'),
        ({"tolerance": 1.0}, r"`tolerance` must be in \(0, 1\); got 1.0."),
        ({"tolerance": 0.1, "method": "mpa"}, '`tolerance` must be None, unless `method` is "auto"; got 0.1.'),
        ({"tolerance": 0.1, "check": False}, "`tolerance` must be None with `check=False`: it is kept by looking at"),
        ({"eps": -1.0}, "`eps` must be a float >= 0; got -1.0."),
    ],
)
@pytest.mark.parametrize("f", [matrix_sqrth, matrix_inv_sqrth, matrix_sqrth_pair])
def test_arguments(f, given, sentence):
    with pytest.raises(ValueError, match=f"^{f.__name__}: {sentence}"):
        f(**{"A": EYE} | given)


@pytest.mark.parametrize("f", [matrix_sqrth, matrix_inv_sqrth, matrix_sqrth_pair])
@pytest.mark.parametrize("method", ["eigh", "mpa", "mtp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices(f, method, dtype):
    for matrix, sentence in (
        (NAN, "`A` must be finite; got 'NaN or infinity'."),
        (EYE / 0, "`A` must be finite; got 'NaN or infinity'."),
        (ODD, "`A` must be symmetric; got 'entries that differ by 1'."),
        (DOWN, r"`A` must be positive (semi)?definite.*; got 'an eigenvalue of -0.1'."),
        (-EYE, r"`A` must be positive (semi)?definite.*; got 'an eigenvalue of -1'."),
    ):
        with pytest.raises(LinAlgError, match=f"^{f.__name__}: {sentence}"):
            f(torch.stack([EYE, matrix]).to(dtype), method=method)
    if f is not matrix_sqrth:
        for matrix in (FLAT, 0 * EYE):
            with pytest.raises(LinAlgError, match=r"`A` must be positive definite \(or `eps` above 0\); got"):
                f(matrix.to(dtype), method=method)


def test_what_rounding_explains_is_no_mistake():
    a = torch.diag(torch.tensor([1.0, 1.0, -1e-7]))
    a[0, 1] += 1e-7
    assert torch.isfinite(matrix_sqrth(a)).all()
    assert torch.isfinite(matrix_sqrth(a, method="pade_iter")).all()


@pytest.mark.parametrize(
    ("x", "g", "more", "sentence"),
    [
        (torch.ones(2, 3), EYE, {}, r"`x` must be square matrices, \(\*b, n, n\), none of them empty; got \(2, 3\)."),
        (
            EYE,
            torch.eye(2),
            {},
            r"`g` must be of shape \(3, 3\) and torch.float32, as `x`; got \(\(2, 2\), torch.float32",
        ),
        (
            EYE,
            EYE.double(),
            {},
            r"`g` must be of shape \(3, 3\) and torch.float32, as `x`; got \(\(3, 3\), torch.float64",
        ),
        (EYE, EYE, {"method": "svd"}, '`method` must be one of "eigh", "iteration"; got \'svd\'.'),
        (EYE, EYE, {"steps": 0}, '`steps` must be an int >= 1 or "auto"; got 0.'),
    ],
)
def test_lyapunov(x, g, more, sentence):
    with pytest.raises(ValueError, match=f"^solve_lyapunov_psd: {sentence}"):
        solve_lyapunov_psd(x, g, **more)


def test_frechet():
    mu = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^frechet_distance: `mu2` must be of shape \(3,\), as `mu1`; got \(2,\)."):
        frechet_distance(mu, EYE, mu[:2], EYE)
    with pytest.raises(ValueError, match=r"^frechet_distance: `sigma2` must be of shape \(3, 3\); got \(2, 2\)."):
        frechet_distance(mu, EYE, mu, EYE[:2, :2])
    with pytest.raises(LinAlgError, match="`A` must be finite"):
        frechet_distance(mu, EYE, mu, NAN)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"num_features": 0}, "`num_features` must be an int >= 1; got 0."),
        ({"groups": 3}, "`groups` must be a divisor of 4 channels; got 3."),
        ({"groups": 0}, "`groups` must be a divisor of 4 channels; got 0."),
        ({"eps": 0.0}, "`eps` must be above 0; got 0.0."),
        ({"momentum": 2.0}, r"`momentum` must be in \[0, 1\], or None; got 2.0."),
    ],
)
def test_whitening(given, sentence):
    with pytest.raises(ValueError, match="^ZCAWhitening2d: " + sentence):
        ZCAWhitening2d(**{"num_features": 4} | given)


def test_what_layers_refuse_to_see():
    layer = ZCAWhitening2d(4)
    with pytest.raises(ValueError, match=r"`x` must be of shape \(batch, 4, height, width\); got \(2, 3, 1, 1\)."):
        layer(torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="`x` must be more than one value a channel in training"):
        layer(torch.ones(1, 4, 1, 1))
    with pytest.raises(ValueError, match="^CovPool2d: `eps` must be a float >= 0; got -1.0."):
        CovPool2d(-1.0)
    with pytest.raises(ValueError, match=r"`x` must be of shape \(batch, channels, height, width\), none of them 0"):
        CovPool2d()(torch.ones(2, 3))
