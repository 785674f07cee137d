import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.nn import (
    SAU,
    SMU,
    SMU1,
    ReQU,
    WidthSchedule,
    param_groups,
    replace_activations,
    sau,
    smooth_piecewise,
    smu,
    smu1,
    to_leaky_relu,
)
from planish.nn.profiles import PROFILES

UNITS = [SAU, SMU, SMU1, ReQU]


def net(**options):
    return nn.Sequential(nn.Linear(4, 8), SAU(**options), nn.Linear(8, 3), SAU(**options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", PROFILES)
@pytest.mark.parametrize("sigma", [5e-5, 0.5])
def test_half_precision_stays_finite(kernel, dtype, sigma):
    largest = torch.finfo(torch.float16).max
    x = torch.tensor([-largest, -4.0, -1e-4, -0.0, 0.0, 1e-4, 4.0, largest], dtype=dtype, requires_grad=True)
    a, s = torch.tensor(0.15, requires_grad=True), torch.tensor(sigma, requires_grad=True)
    y = sau(x, a, s, kernel=kernel)
    (by_x,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (by_a,) = torch.autograd.grad(y[1:-1].float().sum(), a, retain_graph=True)
    (by_s,) = torch.autograd.grad(y.float().sum(), s)
    assert y.dtype == by_x.dtype == dtype and a.dtype == by_a.dtype == torch.float32
    for tensor in (y, by_x, by_a, by_s):
        assert tensor.isfinite().all()
    with torch.no_grad():
        wide = sau(x.float(), 0.15, sigma, kernel=kernel)
    assert torch.allclose(y.float(), wide, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert by_x[0] == torch.tensor(0.15, dtype=dtype) and by_x[-1] == 1


@pytest.mark.parametrize("unit", [SAU, SMU, SMU1, ReQU])
def test_under_autocast(unit):
    layers = nn.Sequential(nn.Linear(4, 8), unit())
    with torch.autocast("cpu", torch.bfloat16):
        y = layers(torch.randn(3, 4))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layers[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("unit", UNITS)
def test_shapes_and_what_stands_for_relu(unit):
    made = unit(inplace=True)
    for shape in ((), (0,), (5,), (2, 3), (2, 3, 4, 5)):
        x = torch.randn(shape)
        kept = x.clone()
        assert made(x).shape == shape and torch.equal(x, kept)
    copy.deepcopy(made).double()(torch.randn(3, dtype=torch.float64))


def test_only_the_input_is_kept_for_the_way_back():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sau(torch.randn(1000, requires_grad=True), torch.tensor(0.15, requires_grad=True), 0.5)
    assert sorted(kept) == [1, 1, 1000]


@pytest.mark.parametrize("unit", [SAU, SMU, SMU1])
def test_channels(unit):
    made = unit(3, channel_dim=-1)
    with torch.no_grad():
        made.raw_slope.copy_(torch.tensor([0.1, 0.2, 0.3]))
    x = torch.randn(2, 5, 3)
    single = unit()
    for c in range(3):
        with torch.no_grad():
            single.raw_slope.fill_(made.raw_slope[c])
        assert torch.allclose(made(x)[..., c], single(x[..., c]), atol=1e-6)


def test_state_goes_through_a_file():
    first, second = net(sigma=0.3, learn_sigma=True), net(sigma=0.9)
    file = io.BytesIO()
    safetensors = pytest.importorskip("safetensors.torch")
    file.write(safetensors.save(first.state_dict()))
    assert {"1.raw_slope", "1.log_sigma"} <= first.state_dict().keys()
    second.load_state_dict(safetensors.load(file.getvalue()))
    x = torch.randn(5, 4)
    assert torch.equal(first(x), second(x))


def test_width_and_slope_in_training():
    unit = SAU(sigma=0.5, learn_sigma=True, slope_constraint=(0.0, 1.0))
    assert unit.slope.item() == pytest.approx(0.15) and unit.sigma.item() == pytest.approx(0.5)
    optimizer = torch.optim.SGD(unit.parameters(), lr=100.0)
    for sign in (1, -1, -1):
        optimizer.zero_grad()
        (sign * unit(torch.randn(64))).sum().backward()
        optimizer.step()
        assert unit.sigma.item() >= 0 and 0 <= unit.slope.item() <= 1
    unit.sigma = 0.25
    assert unit.sigma.item() == pytest.approx(0.25)
    assert [name for name, _ in SAU(learn_slope=False).named_parameters()] == []
    assert "slope=0.15, sigma=5e-05, kernel='gaussian'" in repr(SAU())


def test_replacing_activations():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act1, self.act2 = nn.ReLU(), nn.ReLU6()
            self.act3 = self.act1

        def forward(self, x):
            return self.act3(self.act2(self.act1(x)))

    model = nn.Sequential(Block(), nn.Linear(2, 2), nn.ReLU(inplace=True)).double().eval()
    assert replace_activations(model, nn.ReLU, SAU, sigma=0.5) == 2
    assert model[0].act1 is model[0].act3 and isinstance(model[0].act2, nn.ReLU6) and not model[2].training
    assert model[2].raw_slope.dtype == torch.float64
    assert replace_activations(model, (nn.ReLU6, SAU), ReQU) == 3
    model(torch.randn(3, 2, dtype=torch.float64))
    with pytest.raises(
        ValueError, match="replace_activations: `model` must be a module that holds layers of ReLU; got"
    ):
        replace_activations(model, nn.ReLU, SAU)


def test_narrowing_and_taking_out_the_exact_unit():
    model = net(init=0.2)
    schedule = WidthSchedule(model, 1.0, 0.01, 4)
    assert float(model[1].sigma) == pytest.approx(1.0)
    for _ in range(3):
        schedule.step()
    other = WidthSchedule(net(), 5.0, 0.5, 2)
    other.load_state_dict(schedule.state_dict())
    assert other.sigma == schedule.sigma and schedule.step() == pytest.approx(0.01) == schedule.step()
    x = torch.linspace(-0.1, 0.1, 2001)[:, None].expand(-1, 4)
    smooth = model[1](x).detach()
    bounds = to_leaky_relu(model)
    assert bounds.keys() == {"1", "3"} and bounds["1"] == pytest.approx(0.8 * 0.01 / (2 * torch.pi) ** 0.5)
    away = (smooth - model[1](x)).abs().max()
    assert float(away) == pytest.approx(bounds["1"], rel=1e-4)  # the bound is reached, at zero
    assert isinstance(model[1], nn.LeakyReLU) and model[1].negative_slope == pytest.approx(0.2)
    channels = SAU(3, init=0.3)
    exact = channels.to_leaky_relu()
    assert torch.equal(exact(x[:, :3]), F.prelu(x[:, :3], torch.full((3,), 0.3)))
    assert not any(p.requires_grad for p in exact.parameters())


def test_decay_spares_slopes_and_widths():
    model = net(learn_sigma=True)
    decayed, spared = param_groups(model, 0.01)
    assert len(decayed["params"]) == 4 and len(spared["params"]) == 4 and spared["weight_decay"] == 0
    torch.optim.AdamW(param_groups(model, 0.01))
    assert len(param_groups(nn.Linear(2, 2), 0.1)) == 1


X = torch.zeros(2, 3)
REFUSED = [
    (
        lambda: sau(X, kernel="cauchy"),
        "sau: `kernel` must be one of gaussian, logistic, laplace, uniform, triangular, ",
    ),
    (lambda: SAU(kernel="bump"), "SAU: `kernel` must be one of"),
    (lambda: sau(X, sigma=-1.0), "sau: `sigma` must be a finite float >= 0; got -1.0"),
    (lambda: sau(X, slope=float("nan")), "sau: `slope` must be a finite float; got nan"),
    (lambda: smu(X, mu=-1.0), "smu: `mu` must be a finite float >= 0"),
    (lambda: smu1(X, mu=-1.0), "smu1: `mu` must be a finite float >= 0"),
    (
        lambda: sau(X, torch.zeros(4)),
        "sau: `slope` must be one number, or one for each of the channels of x (3 in dim 1)",
    ),
    (lambda: SAU(3)(torch.zeros(3)), "channels of x (none in dim 1)"),
    (lambda: SAU(num_parameters=0), "SAU: `num_parameters` must be an int >= 1; got 0"),
    (lambda: SAU(init=1.0), "SAU: `init` must be a float in (-1, 1); got 1.0"),
    (lambda: SAU(init=-0.1, slope_constraint=(0, 1)), "SAU: `init` must be a float in (0, 1); got -0.1"),
    (lambda: SAU(slope_constraint=(1, 0)), "SAU: `slope_constraint` must be None or two finite floats"),
    (lambda: SAU(sigma=-1.0), "SAU: `sigma` must be a finite float >= 0; got -1.0"),
    (lambda: SAU(sigma=0.0, learn_sigma=True), "SAU: `sigma` must be a finite float > 0; got 0.0"),
    (lambda: setattr(SAU(), "sigma", [1.0, 2.0]), "SAU: `sigma` must be 1 or 1 numbers; got 2"),
    (lambda: SMU(mu=0.0), "SMU: `mu` must be a finite float > 0; got 0.0"),
    (lambda: SAU(3, channel_dim=-1).to_leaky_relu(), "SAU.to_leaky_relu: `channel_dim` must be 1 where"),
    (lambda: smooth_piecewise(X, [], [1.0]), "smooth_piecewise: `knots` must be at least one number, increasing"),
    (lambda: smooth_piecewise(X, [1.0, 0.0], [1.0] * 3), "smooth_piecewise: `knots` must be"),
    (lambda: smooth_piecewise(X, [0.0], [1.0]), "smooth_piecewise: `slopes` must be one more than the 1 knots"),
    (lambda: to_leaky_relu(nn.Linear(1, 1)), "to_leaky_relu: `model` must be a module that holds layers of SAU"),
    (lambda: param_groups(nn.Linear(1, 1), -1.0), "param_groups: `weight_decay` must be a float >= 0; got -1.0"),
    (lambda: WidthSchedule(net(), 0.0, 1.0, 2), "WidthSchedule: `start` must be a finite float > 0; got 0.0"),
    (lambda: WidthSchedule(net(), 1.0, -1.0, 2), "WidthSchedule: `end` must be a finite float > 0"),
    (lambda: WidthSchedule(net(), 1.0, 0.1, 0), "WidthSchedule: `n_steps` must be an int >= 1; got 0"),
    (lambda: WidthSchedule(net(learn_sigma=True), 1.0, 0.1, 2), "layers of SAU with learn_sigma=False"),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED)
def test_refuses(call, sentence):
    with pytest.raises(ValueError) as caught:
        call()
    assert sentence in str(caught.value)


@pytest.mark.parametrize("f", [sau, smu, smu1])
def test_refuses_integers(f):
    with pytest.raises(TypeError, match=f"{f.__name__}: `x` must be a floating-point tensor; got torch.int64"):
        f(torch.arange(3))
