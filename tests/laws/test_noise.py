"""The noise proxy: what it has in common with rounding, its gradients, its widths, and what they cost."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from planish.quant import quantize
from planish.quant.budget import Budget, Goal, Part
from planish.quant.formats import Affine
from planish.quant.methods import nipq
from planish.quant.mixed import allocate
from planish.quant.noise import KINDS, NoiseProxy, Width, best_alpha, draw, errors, noised, rounded, top_code

DOUBLE = torch.float64


def values(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def number(value, **options):
    return torch.tensor(value, dtype=DOUBLE, **options)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_a_projection_on_few_levels(bits, signed):
    x, alpha = values(500), number(1.7)
    q = rounded(x, alpha, number(bits), signed=signed)
    assert len(q.unique()) <= 2**bits - (1 if signed else 0)
    torch.testing.assert_close(rounded(q, alpha, number(bits), signed=signed), q, rtol=1e-12, atol=0)
    step = alpha / top_code(number(bits), signed=signed)
    inside = (x.abs() < alpha) & (signed | (x > 0))
    assert ((q - x).abs()[inside] <= step / 2 * (1 + 1e-12)).all()
    assert (q[x >= alpha] == alpha).all() and rounded(0 * x, alpha, number(bits), signed=signed).eq(0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_gradients_of_the_proxy_are_those_of_its_formula(signed):
    x = torch.tensor([-2.0, -0.6, 0.0, 0.3, 0.9, 1.4], dtype=DOUBLE, requires_grad=True)
    alpha, bits = number(1.1, requires_grad=True), number(3.0, requires_grad=True)
    epsilon = torch.tensor([0.4, -0.3, 0.2, 0.5, -0.1, 0.25], dtype=DOUBLE)
    upstream = values(6, seed=1)
    smooth = [0, 1, 3, 4, 5]  # without 0, where the unsigned proxy has a corner
    for_check = x.detach()[smooth].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: noised(x, a, b, epsilon[smooth], signed=signed), (for_check, alpha, bits)
    )
    (noised(x, alpha, bits, epsilon, signed=signed) * upstream).sum().backward()
    with torch.no_grad():
        n = top_code(bits, signed=signed)
        inside = (x < alpha) & (x > (-alpha if signed else 0))
        slope = torch.log(number(2.0)) * torch.exp2(bits - 1 if signed else bits)
        wanted_alpha = torch.where(inside, epsilon / n, (x >= alpha).double() - (signed & (x <= -alpha)).double())
        wanted_bits = torch.where(inside, -epsilon * alpha * slope / n**2, 0)
        torch.testing.assert_close(x.grad, upstream * inside)
        torch.testing.assert_close(alpha.grad, (upstream * wanted_alpha).sum())
        torch.testing.assert_close(bits.grad, (upstream * wanted_bits).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_law_of_rounding_s_error_and_knows_nothing_of_the_value(kind):
    x = values(20_000).abs() ** 1.5  # a law of which rounding's error at 3 bits is no uniform one
    alpha, bits = number(3.0), number(3.0)
    generator = torch.Generator().manual_seed(1)
    epsilon = draw(kind, x, alpha, bits, generator=generator)
    error, inside = errors(x, alpha, bits)
    count, own, real = int(inside.sum()), epsilon[inside], error[inside]
    assert 0.4 < epsilon.abs().max() <= 0.5
    assert abs(torch.corrcoef(torch.stack([own, x[inside]]))[0, 1]) < 4 / count**0.5
    assert abs(torch.corrcoef(torch.stack([own, real]))[0, 1]) < 4 / count**0.5
    if kind == "shuffle":
        assert torch.equal(own.sort().values, real.sort().values)
        return
    law = real if kind == "empirical" else torch.linspace(-0.5, 0.5, count, dtype=DOUBLE)
    grid = torch.linspace(-0.5, 0.5, 400, dtype=DOUBLE)
    below = [torch.searchsorted(v.sort().values, grid, right=True) / count for v in (own, law)]
    assert (below[0] - below[1]).abs().max() < 1.95 * (2 / count) ** 0.5  # Kolmogorov and Smirnov, p = 0.001
    assert abs(own.mean() - law.mean()) < 4 * law.std() / count**0.5
    assert abs(own.var() / law.var() - 1) < 0.05


def test_the_mean_over_noise_is_the_value_moved_by_the_mean_error():
    x, alpha, bits = values(64), number(1.5), number(2.0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [noised(x, alpha, bits, draw("empirical", x, alpha, bits, generator=generator)) for _ in range(4000)]
    )
    error, inside = errors(x, alpha, bits)
    pool = error[inside]
    gap = draws.mean(0) - torch.where(inside, x + alpha * pool.mean(), x.clamp(-alpha, alpha))
    assert (gap.abs() <= 4.5 * alpha * pool.std() / 4000**0.5).all()
    assert (draws.std(0)[~inside] == 0).all(), "what is clipped carries no noise"


def test_unsigned_zeros_stay_zero_and_fine_grids_leave_only_the_clamp():
    x = values(100).relu()
    epsilon = torch.full_like(x, 0.5)
    assert (noised(x, number(1.0), number(3.0), epsilon, signed=False)[x == 0] == 0).all()
    fine = noised(values(100), number(1.0), number(14.0), epsilon)
    torch.testing.assert_close(fine, values(100).clamp(-1, 1), atol=0.5 / 8191, rtol=0)


def test_nothing_is_noised_where_everything_is_clipped():
    x = torch.full((10,), 5.0)
    for kind in KINDS:
        epsilon = draw(kind, x, torch.tensor(1.0), torch.tensor(2.0), generator=torch.Generator().manual_seed(0))
        assert noised(x, torch.tensor(1.0), torch.tensor(2.0), epsilon).eq(1).all()


@pytest.mark.parametrize("bits", [2.05, 2.5, 3.3, 7.9])
def test_noise_on_the_width_is_unbiased_and_never_leaves_the_range(bits):
    width, generator = Width(bits, learn=True), torch.Generator().manual_seed(0)
    drawn = torch.stack([width.sampled(generator).detach() for _ in range(3000)])
    assert abs(drawn.mean() - bits) < 4 * max(drawn.std().item(), 0.05) / 3000**0.5
    assert (drawn >= 2).all() and (drawn <= 8).all() and drawn.eq(drawn.round()).all()
    slope = torch.autograd.grad(width.sampled(generator), width.raw)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(width.value, width.raw)[0])


def test_a_fixed_width_is_no_parameter_and_finite():
    state = Width(2).state_dict()
    assert not list(Width(2).parameters()) and all(torch.isfinite(t).all() for t in state.values())


def test_the_first_range_loses_least():
    x = values(3, 200)
    alpha = best_alpha(x, number(3.0))
    least = (rounded(x, alpha, number(3.0)) - x).square().sum(-1)
    for share in (0.6, 0.9, 1.1, 1.6):
        assert ((rounded(x, alpha * share, number(3.0)) - x).square().sum(-1) >= least * 0.99).all()
    assert best_alpha(torch.zeros(2, 4), torch.tensor(3.0)).eq(1).all()


def proxied(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 32))
    x = values(20, 32, dtype=torch.float32)
    nipq.attach(model, x, **{"bits": 3, "generator": torch.Generator().manual_seed(seed)} | options)
    return model, x


def test_noise_only_in_training_and_the_same_generator_gives_the_same_bits():
    (a, x), (b, _) = proxied(), proxied()
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), a(x))
    generator = a[0].parametrizations.weight[0].generator
    state = generator.get_state()
    a.eval()
    assert torch.equal(a(x), a(x)) and torch.equal(generator.get_state(), state)
    other, _ = proxied(noise="uniform")
    torch.testing.assert_close(a(x), other.eval()(x))


def test_gradient_checkpointing_replays_the_noise():
    model, x = proxied(generator=None)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(5)
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True)) and len(grads[0]) > 6


@pytest.mark.parametrize("options", [{}, {"group_size": 16}, {"per_tensor": True}, {"scale_dtype": "float32"}])
def test_what_is_judged_in_training_is_what_is_exported(options):
    model, x = proxied(**options)
    bits = nipq.freeze(model)
    model.eval()
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in bits}
    before = model(x)
    quantize(model, [x], nipq.learned(model))
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.dequantize().weight, weight) and layer.format.bits == bits[name]
    torch.testing.assert_close(model(x), before, atol=2e-4, rtol=1e-3)  # the kernel rounds inputs to 16 bits


def parts(sizes, entering=None):
    widths = [Width(4, learn=True) for _ in sizes]
    return {
        str(i): Part(w, None if entering is None else Width(4, learn=True), n, 10 * (i + 1), 100 * n, 32)
        for i, (w, n) in enumerate(zip(widths, sizes, strict=True))
    }


@pytest.mark.parametrize("kind", ["bits", "bytes", "bops", "act_bits"])
def test_the_penalty_is_zero_at_the_target_and_pulls_towards_it(kind):
    layers = parts([100, 300], entering=True)
    probe = Budget(layers, [], Affine())
    by_hand = {
        "bits": 4.0, "bytes": (400 * 4 + 64) / 8, "bops": 100 * 400 * 16.0, "act_bits": 4.0
    }[kind]  # fmt: skip
    assert probe.spent(Goal(kind, 1.0)).item() == pytest.approx(by_hand)
    for factor, sign in ((1.0, 0), (0.8, 1), (1.25, -1)):
        budget = Budget(layers, [Goal(kind, by_hand * factor)], Affine())
        multiplier = torch.zeros(1)
        loss = budget.penalty(multiplier, climb=True)
        assert (loss.item() == pytest.approx(0, abs=1e-10)) == (sign == 0)
        width = layers["0"].inputs if kind == "act_bits" else layers["0"].weight
        slope = torch.autograd.grad(loss, width.raw)[0]
        assert sign == 0 or torch.sign(slope) == sign
        assert (multiplier > 0) == (sign > 0)


def test_an_input_s_width_counts_for_its_own_layer_only():
    layers = parts([100, 100], entering=True)
    layers["0"].inputs.start(2.5)
    slopes = torch.autograd.grad(
        Budget(layers, [], Affine()).spent(Goal("bops", 1.0)), [p.weight.raw for p in layers.values()]
    )
    assert slopes[0] / slopes[1] == pytest.approx(2.5 / 4)


def test_allocation_is_what_trying_everything_finds():
    menu = (2, 3, 4, 6)
    random = torch.Generator().manual_seed(0)
    worse = []
    for _ in range(30):
        sensitivity = (torch.rand(4, generator=random) * 6).exp().tolist()
        amount = [1, 2, 5, 9]
        target = 17 * 3.5

        def lost(widths, sensitivity=sensitivity):
            return sum(s * 4.0**-w for s, w in zip(sensitivity, widths, strict=True))

        tried = [
            w for w in itertools.product(menu, repeat=4) if sum(a * b for a, b in zip(amount, w, strict=True)) <= target
        ]
        found = allocate(sensitivity, amount, target, menu)
        assert sum(a * b for a, b in zip(amount, found, strict=True)) <= target
        worse.append(lost(found) / min(lost(w) for w in tried))
    assert max(worse) < 1.1 and sum(w < 1 + 1e-9 for w in worse) >= 25  # not exact: a knapsack


def test_equal_sensitivity_gives_equal_widths():
    assert allocate([5.0] * 6, [7.0] * 6, 4 * 42.0) == [4] * 6


@pytest.mark.parametrize("goal", ["bits", "size", "bops"])
def test_learned_widths_end_within_one_percent_of_the_budget(goal):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(24)))
    x = values(8, 32, dtype=torch.float32)
    scales = 24 * 32 * 2
    target = {"bits": 3.5, "size": 24 * 1024 * 3.5 / 8 + scales, "bops": 24 * 1024 * 3.5 * 32}[goal]
    nipq.attach(model, x, **{goal: target})
    start = [w for w, _ in nipq.widths(model).values()]
    assert sum(start) / 24 == pytest.approx(3.5, rel=1e-3)
    for m in model:  # as if training had moved them
        m.parametrizations.weight[0].width.start(2.3 + 2 * torch.rand(()).item())
    bits = nipq.freeze(model)
    average = sum(bits.values()) / 24
    assert 0.99 * 3.5 <= average <= 3.5 and len(set(bits.values())) >= 2
    assert nipq.freeze(model) == bits
    quantize(model, [x], nipq.learned(model))
    stored = sum(m.weight_packed.numel() * 4 + m.weight_scale.numel() * 2 for m in model)
    assert stored <= (24 * 1024 * 3.5 / 8 + scales) * 1.0001


def test_bit_operations_with_learned_inputs_stay_within_the_budget():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12)))
    nipq.attach(model, values(8, 32, dtype=torch.float32), bops=12 * 1024 * 16.0, act_bits=4)
    weights = nipq.freeze(model)
    spent = sum(1024 * w * (32 if a is None else a) for w, a in nipq.widths(model).values())
    assert 0.9 * 12 * 1024 * 16 <= spent <= 12 * 1024 * 16 and len(weights) == 12


def test_layers_that_share_an_input_share_a_width():
    block = nn.ModuleDict({n: nn.Linear(32, 32) for n in "qkvo"})

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = block

        def forward(self, x):
            x = x * 2
            return self.layers["o"](
                self.layers["q"](x) + self.layers["k"](x.reshape(-1, 32)).reshape(x.shape) + self.layers["v"](x)
            )

    model = Attention()
    nipq.attach(model, values(2, 3, 32, dtype=torch.float32), bits=4)
    proxies = {n: block[n].parametrizations.weight[0] for n in "qkvo"}
    assert proxies["q"].width is proxies["k"].width is proxies["v"].width is not proxies["o"].width
    assert sum(w.raw is not None for w in {id(p.width): p.width for p in proxies.values()}.values()) == 2
    twin = copy.deepcopy(model)
    assert twin.layers["q"].parametrizations.weight[0].width is twin.layers["v"].parametrizations.weight[0].width
    twin.layers["q"].parametrizations.weight[0].width.start(5.0)
    assert nipq.widths(twin)["layers.v"][0] == pytest.approx(5.0)
    assert nipq.widths(model)["layers.v"][0] == pytest.approx(4.0)


def test_a_proxy_in_half_precision_computes_in_float32():
    proxy = NoiseProxy(torch.tensor(1.0), Width(4)).eval()
    x = values(50, dtype=torch.bfloat16)
    assert proxy(x).dtype == torch.bfloat16
    assert torch.equal(proxy(x), proxy(x.float()).bfloat16())
