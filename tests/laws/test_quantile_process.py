"""The equations of a quantile process: its losses, its networks, its training, and what follows from its quantiles."""

import numpy as np
import pytest
import torch

from planish.nn import requ
from planish.regression import NonCrossingPenalty, PinballLoss, noncrossing_penalty, pinball_loss
from planish.regression.baseline import DEGREE, baseline, bernstein, linear_median
from planish.regression.network import ACTIVATIONS, ENCODINGS, ProcessNetwork, RisingNetwork, encode_level, rising
from planish.regression.training import Data, Settings, Training, between, draw_levels

MANY = {"dtype": torch.float64}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def networks(n_members=2, hidden=(7, 5)):
    for activation in ACTIVATIONS:
        for encoding in ENCODINGS:
            yield (
                f"{activation}, {encoding}",
                ProcessNetwork(
                    3,
                    hidden,
                    activation=activation,
                    encoding=encoding,
                    n_members=n_members,
                    generator=generator(),
                    **MANY,
                ),
            )
        yield (
            f"{activation}, hard",
            RisingNetwork(3, hidden, activation=activation, n_members=n_members, generator=generator(), **MANY),
        )


NETWORKS = dict(networks())


def points(n=11, m=4, members=2):
    x = torch.randn((members, n, 3), generator=generator(1), **MANY)
    return x, torch.rand((members, n, m), generator=generator(2), **MANY) * 0.98 + 0.01


def test_polynomials_are_networks_of_requ():
    z, w = torch.randn((2, 100), generator=generator(), **MANY)
    torch.testing.assert_close(requ(z) + requ(-z), z**2, rtol=0, atol=1e-12)
    torch.testing.assert_close((requ(z + 1) + requ(-z - 1) - requ(z - 1) - requ(1 - z)) / 4, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(((z + w) ** 2 - (z - w) ** 2) / 4, z * w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_slope_of_a_network_is_its_derivative_by_the_level(name):
    net = NETWORKS[name]
    x, level = points()
    level.requires_grad_()
    value, slope = net.with_slope(x, level)
    torch.testing.assert_close(value, net(x, level), rtol=0, atol=1e-12)
    (by_autograd,) = torch.autograd.grad(value.sum(), level)
    torch.testing.assert_close(slope, by_autograd, rtol=1e-10, atol=1e-10)
    step = 1e-6
    difference = (net(x, level + step) - net(x, level - step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "relu" not in name])  # its slopes jump
def test_the_gradient_of_the_penalty_by_the_weights_is_right(name):
    net = dict(networks(n_members=1, hidden=(3,)))[name]
    x, level = points(n=3, m=2, members=1)
    slopes, names = _Slopes(net), [name for name, _ in net.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]

    def penalty(*values):
        given = {f"net.{name}": value for name, value in zip(names, values, strict=True)}
        return (0.7 - torch.func.functional_call(slopes, given, (x, level))).clamp_min(0).mean()

    assert torch.autograd.gradcheck(penalty, weights)


class _Slopes(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, level):
        return self.net.with_slope(x, level)[1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hard_curves_rise_everywhere(activation):
    net = RisingNetwork(2, (8, 8), activation=activation, n_members=3, generator=generator(), **MANY)
    for p in net.parameters():
        p.data.mul_(6)  # wild
    x = 3 * torch.randn((1, 40, 2), generator=generator(3), **MANY)
    level = torch.linspace(0, 1, 801, **MANY)[1:-1].expand(1, 40, -1)
    value, slope = net.with_slope(x, level)
    assert value.shape == (3, 40, 799)
    assert (value.diff(dim=-1) >= -1e-9 * value.abs().amax()).all() and (slope >= 0).all()


def start(members=2, d=3):
    rise = torch.randn((members, DEGREE + 1), generator=generator(4), **MANY).sort().values
    return torch.randn((members, d), generator=generator(5), **MANY), rise


def test_the_polynomial_of_the_start_rises_and_has_its_slope():
    _, rise = start()
    level = torch.rand((1, 7, 3), generator=generator(), **MANY).requires_grad_()
    value, slope = rising(level, rise)
    assert value.shape == slope.shape == (2, 7, 3) and (slope > 0).all()
    for member in range(2):
        (exact,) = torch.autograd.grad(value[member].sum(), level, retain_graph=True)
        torch.testing.assert_close(slope[member], exact[0])
        by_hand = bernstein(level.detach().ravel().numpy(), rise[member].numpy())
        np.testing.assert_allclose(value[member].detach().ravel().numpy(), by_hand, rtol=1e-9, atol=1e-9)
    ends, _ = rising(torch.tensor([[[0.0, 1.0]]], **MANY), rise)
    torch.testing.assert_close(ends[:, 0], rise[:, [0, -1]], rtol=0, atol=1e-3)


def test_a_network_is_its_start_at_first():
    slopes, rise = start()
    x, level = points()
    line = (x * slopes[:, None]).sum(-1, keepdim=True)
    value, slope = rising(level, rise)
    for name, net in networks():
        net.start_from(slopes, rise)
        found, gradient = net.with_slope(x, level)
        torch.testing.assert_close(net(x, level), found)
        if "hard" in name:  # whose density is linear between knots
            middle = torch.full_like(level[..., :1], 0.5)
            torch.testing.assert_close(net(x, middle), line + rising(middle, rise)[0])
            assert (found - line - value).abs().mean() < 0.1 * value.std()
        else:
            torch.testing.assert_close(found, line + value)
            torch.testing.assert_close(gradient, slope)


def test_members_can_be_kept():
    slopes, rise = start()
    x, level = points()
    for net in dict(networks()).values():
        net.start_from(slopes, rise)
        before = net(x, level)
        net.keep(torch.tensor([1]))
        torch.testing.assert_close(net(x[1:], level[1:]), before[1:])


def test_a_linear_median_does_not_follow_outliers():
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 3))
    y = x @ [1.0, -2.0, 0.0] + 0.1 * random.standard_t(1, 400)
    np.testing.assert_allclose(linear_median(x, y, None, 1e-6), [1, -2, 0], atol=0.05)
    assert np.abs(linear_median(x, y, None, 1e4)).max() < 1e-3
    weight = (np.arange(400) < 200).astype(float)
    half = linear_median(x, y, weight, 1e-3)
    np.testing.assert_allclose(half, linear_median(x[:200], y[:200], None, 5e-4), atol=0.02)


def test_held_out_rows_choose_how_much_of_a_line_there_is():
    random = np.random.default_rng(0)
    x, noise = random.standard_normal((300, 20)), random.standard_normal(300)
    order = np.arange(300)
    slopes, rise = baseline(x, noise, None, order[60:], order[:60])
    assert np.abs(slopes).max() < 0.1 and (np.diff(rise) >= 0).all()
    slopes, rise = baseline(x, 3 * x[:, 0] + 0.1 * noise, None, order[60:], order[:60])
    assert slopes[0] == pytest.approx(3, abs=0.05) and rise[-1] - rise[0] < 1


def test_the_penalty_looks_at_corners_of_the_box_that_two_rows_span():
    x, other = torch.zeros((2, 5000, 4), **MANY), torch.ones((2, 5000, 4), **MANY)
    found = between(x, other, generator())
    assert ((found >= 0) & (found <= 1)).all()
    near = ((found < 0.1) | (found > 0.9)).double().mean()
    assert near == pytest.approx(4 / np.pi * np.arcsin(np.sqrt(0.1)), abs=0.01)  # of the arcsine law
    sides = (found > 0.5).double()
    assert sides.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.corrcoef(sides.flatten(0, 1).T).fill_diagonal_(0).abs().max() < 0.04  # each feature by its own coin


def test_members_do_not_touch_each_other():
    both = ProcessNetwork(2, (6, 6), n_members=2, generator=generator(), **MANY)
    x = torch.randn((1, 5, 2), generator=generator(1), **MANY)
    level = torch.full((1, 5, 1), 0.3, **MANY)
    value = both(x, level)
    value[0].sum().backward()
    assert all((p.grad[1] == 0).all() for p in both.parameters()) and value.shape == (2, 5, 1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_levels_are_encoded_with_their_derivative(encoding):
    level = torch.tensor([0.0005, 0.01, 0.5, 0.9, 0.9999], requires_grad=True, **MANY)
    encoded, rate = encode_level(level, encoding)
    columns = [torch.autograd.grad(c.sum(), level, retain_graph=True)[0] for c in encoded.unbind(-1)]
    torch.testing.assert_close(rate, torch.stack(columns, -1))
    assert torch.isfinite(rate).all() and (rate >= 0).all()


def test_the_penalty_is_zero_just_where_the_network_rises():
    x, level = torch.randn((50, 2), generator=generator(), **MANY), torch.rand(50, generator=generator(1), **MANY)
    assert noncrossing_penalty(lambda x, t: x[:, 0] + t, x, level) == 0
    assert NonCrossingPenalty(4.0)(lambda x, t: x[:, 0] - t, x, level) == 4

    def bump(x, t):  # rises below one half and falls above
        return t * (1 - t)

    each = noncrossing_penalty(bump, x, level, reduction="none")
    torch.testing.assert_close(each, (2 * level - 1).clamp_min(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(noncrossing_penalty(bump, x, level), each.mean())
    torch.testing.assert_close(noncrossing_penalty(bump, x, level, reduction="sum"), each.sum())


def test_the_penalty_of_a_network_is_that_of_its_slopes():
    net = NETWORKS["requ, level"]
    x, level = points(m=1)
    _, slope = net.with_slope(x, level)
    torch.testing.assert_close(noncrossing_penalty(net, x, level), (-slope).clamp_min(0).mean())


def test_each_residual_meets_its_own_level_only():
    z, level = torch.randn((6, 1), generator=generator()), torch.rand((6, 1), generator=generator(1))
    loss = pinball_loss(torch.zeros(6, 1), z, level, reduction="none")
    assert loss.shape == (6, 1)
    by_hand = torch.tensor([v * t if v > 0 else v * (t - 1) for v, t in zip(z[:, 0], level[:, 0], strict=True)])
    torch.testing.assert_close(loss[:, 0], by_hand)
    torch.testing.assert_close(PinballLoss("sum")(torch.zeros(6, 1), z, level), by_hand.sum())


def test_pinball_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    y, q = torch.randn((2, 200), generator=generator(), **MANY)
    for level in (0.05, 0.5, 0.9):
        theirs = metrics.mean_pinball_loss(y.numpy(), q.numpy(), alpha=level)
        assert float(pinball_loss(q, y, level)) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("level", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("law", ["uniform", "normal", "exponential"])
def test_the_true_quantile_has_the_least_mean_pinball(law, level):
    stats = pytest.importorskip("scipy.stats")
    known = {"uniform": stats.uniform(), "normal": stats.norm(), "exponential": stats.expon()}[law]
    nodes = (np.arange(20000) + 0.5) / 20000
    y = torch.from_numpy(known.ppf(nodes))
    right = float(known.ppf(level))
    grid = right + np.linspace(-1, 1, 41)
    losses = [float(pinball_loss(torch.full_like(y, q), y, level)) for q in grid]
    assert int(np.argmin(losses)) == 20


def test_stratified_levels():
    level = draw_levels((400, 5), None, generator(), torch.zeros(1, **MANY))
    assert ((level * 5).floor() == torch.arange(5)).all()
    stats = pytest.importorskip("scipy.stats")
    drawn = draw_levels((4000, 1), (0.5, 2.0), generator(), torch.zeros(1, **MANY)).ravel().numpy()
    assert stats.kstest(drawn, stats.beta(0.5, 2.0).cdf).pvalue > 0.01
    assert ((draw_levels((10, 1), (0.01, 0.01), generator(), torch.zeros(1)) * (1 - 1e-6)) < 1).all()


def test_a_target_that_is_its_level_is_learnt():
    """Y = U: the quantile at a level is the level."""
    net, draw = ProcessNetwork(1, (8,), generator=generator(), **MANY), generator(0)
    x, y = torch.zeros((256, 1), **MANY), (torch.arange(256, **MANY) + 0.5) / 256
    settings = Settings(5.0, None, True, 4, 1e-2, 300, 128, None, 0.99)
    Training(net, Data(x, y, None, torch.arange(256)[None], None), settings, draw).run()
    level = torch.linspace(0.05, 0.95, 19, **MANY)[None, None]
    value, slope = net.with_slope(x[None, :1], level)
    assert (value - level).abs().max() < 0.03 and (slope > 0).all()


def test_a_gradient_is_shortened_after_it_is_made():
    net = ProcessNetwork(1, (4,), n_members=2, generator=generator(), **MANY)
    before = [p.detach().clone() for p in net.parameters()]
    data = Data(torch.ones((2, 1), **MANY), torch.full((2,), 1e12, **MANY), None, torch.arange(2).expand(2, -1), None)
    training = Training(net, data, Settings(0.0, None, True, 1, 0.1, 1, 2, None, 0.0), generator())
    training.run()
    norms = sum(p.grad.square().sum((1, 2)) for p in net.parameters()).sqrt()
    assert (norms <= 1 + 1e-12).all()
    assert any((p != b).any() for p, b in zip(net.parameters(), before, strict=True))
