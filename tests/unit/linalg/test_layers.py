"""Whitening whitens and stands in for batch normalization; pooling and distances are what they are defined as."""

import copy

import pytest
import torch
from torch import nn

from planish.linalg import CovPool2d, SqrtCov, ZCAWhitening2d, frechet_distance, matrix_sqrth


def features(n=64, channels=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=g, dtype=torch.float64)
    return torch.einsum("oc,nchw->nohw", mix, torch.randn(n, channels, 4, 4, generator=g, dtype=torch.float64)) + 3


def covariance(x):
    rows = x.transpose(0, 1).flatten(1)
    return (rows - rows.mean(1, keepdim=True)) @ (rows - rows.mean(1, keepdim=True)).T / rows.shape[1]


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_each_group_is_white(groups):
    y = ZCAWhitening2d(6, groups, eps=1e-9).double()(features())
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(6, dtype=torch.float64), atol=1e-10, rtol=0)
    size = 6 // groups
    for first in range(0, 6, size):
        block = covariance(y)[first : first + size, first : first + size]
        torch.testing.assert_close(block, torch.eye(size, dtype=torch.float64), atol=1e-5, rtol=0)


def test_one_channel_a_group_is_batch_normalization():
    ours, torchs = ZCAWhitening2d(6, groups=6, eps=1e-3), nn.BatchNorm2d(6, eps=1e-3)
    ours.load_state_dict(ours.state_dict() | {k: v for k, v in torchs.state_dict().items() if k in ("weight", "bias")})
    for step in range(3):
        x = features(seed=step).float()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = ours(a), torchs(b)
        torch.testing.assert_close(ya, yb)
        (ya**3).sum().backward()
        (yb**3).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.running_mean.flatten(), torchs.running_mean)
    torch.testing.assert_close(ours.running_cov.flatten(), torchs.running_var)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))
    assert ours.num_batches_tracked == torchs.num_batches_tracked == 3


def test_evaluation_whitens_by_the_averaged_covariance():
    layer = ZCAWhitening2d(6, eps=1e-9, momentum=None, affine=False).double()
    batches = [features(seed=0) * s for s in (0.5, 1, 2)]  # of one mixing, at three sizes
    for x in batches:
        layer(x)
    mean = sum(covariance(x) for x in batches) / 3 * (1024 / 1023)
    torch.testing.assert_close(layer.running_cov[0], mean)
    y = layer.eval()(batches[1])
    root = matrix_sqrth(mean)
    torch.testing.assert_close(root @ covariance(y) @ root, covariance(batches[1]))
    again = ZCAWhitening2d(6, eps=1e-9, affine=False).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.eval()(batches[1]), y)
    assert torch.equal(copy.deepcopy(layer)(batches[1]), y)


def test_options_of_batch_normalization():
    free = ZCAWhitening2d(6, affine=False, track_running_stats=False, eps=1e-9).double()
    assert not free.state_dict()
    assert torch.equal(free.eval()(features()), free.train()(features()))
    assert "6, groups=1, eps=1e-09" in repr(free)
    half = ZCAWhitening2d(6)(features().to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    frozen = ZCAWhitening2d(6, momentum=0.0)
    frozen(features().float())
    assert torch.equal(frozen.running_cov, torch.eye(6)[None])


def test_pooling_of_second_order():
    x = features(n=3)
    cov = CovPool2d(eps=0.5)(x)
    for one, picture in zip(cov, x, strict=True):
        expected = torch.cov(picture.flatten(1), correction=0) + 0.5 * torch.eye(6)
        torch.testing.assert_close(one, expected)
    root = SqrtCov(vectorize=False)(cov)
    torch.testing.assert_close(root @ root, cov)
    flat = SqrtCov(method="pade_iter")(cov)
    row, column = torch.triu_indices(6, 6)
    assert flat.shape == (3, 21)
    torch.testing.assert_close(flat, root[:, row, column], atol=1e-6, rtol=0)


def test_more_channels_than_places_train():
    x = torch.randn(2, 20, 2, 2, requires_grad=True)  # covariances of rank 3
    SqrtCov()(CovPool2d()(x)).square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_frechet_distance():
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    half = torch.randn(2, 3, 5, 9, generator=g, dtype=torch.float64)
    sigma = half @ half.mT / 9
    d = frechet_distance(mu[0], sigma[0], mu[1], sigma[1])
    scipy = pytest.importorskip("scipy.linalg")
    for i in range(3):
        root = scipy.sqrtm((sigma[0, i] @ sigma[1, i]).numpy()).real
        expected = (mu[0, i] - mu[1, i]).square().sum() + (sigma[0, i] + sigma[1, i]).trace() - 2 * root.trace()
        assert d[i].item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(d, frechet_distance(mu[1], sigma[1], mu[0], sigma[0]))
    assert frechet_distance(mu[0], sigma[0], mu[0], sigma[0]).abs().max() < 1e-12
    first = tuple(part[0].requires_grad_() for part in (mu[0], sigma[0], mu[1], sigma[1]))
    assert torch.autograd.gradcheck(
        lambda m, s, n, t: frechet_distance(m, (s + s.mT) / 2, n, (t + t.mT) / 2),
        [p.detach().clone().requires_grad_() for p in first],
    )


def test_frechet_distance_of_few_samples():
    g = torch.Generator().manual_seed(0)
    half = torch.randn(16, 4, generator=g, dtype=torch.float64)
    sigma, mu = half @ half.T, torch.zeros(16, dtype=torch.float64)  # of rank 4
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-9
    assert frechet_distance(mu, sigma, mu, 4 * sigma).item() == pytest.approx(sigma.trace().item(), rel=1e-9)
    s = sigma.clone().requires_grad_()
    frechet_distance(mu, s, mu, torch.eye(16, dtype=torch.float64)).backward()
    assert torch.isfinite(s.grad).all()
