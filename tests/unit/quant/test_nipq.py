"""NIPQ's functions: what they refuse, and in which words; models of all kinds; checkpoints; plans."""

import math

import pytest
import torch
from torch import nn

from planish.quant import Journal, inspect, load, nipq, quantize, rtn, save
from planish.quant.conv import QConv
from planish.quant.engine import Walk
from planish.quant.methods.nipq import attach, cost, freeze, learned, param_groups, widths
from planish.quant.mixed import Learned, Mixed, SearchBits, allocate
from planish.quant.noise import NoiseProxy, Width, draw


def mlp(out=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, out))


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def attached(**options):
    model = mlp()
    attach(model, X, **options)
    return model


def broken(value):
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = value
    return model


def quantized():
    model = mlp()
    quantize(model, [X], rtn(group_size=None))
    return model


REFUSED = [
    (lambda: attach(mlp(), X, bits=1.5), "attach: `bits` must be from 2 to 8; got 1.5."),
    (lambda: attach(mlp(), X, bits=4, act_bits=9), "attach: `act_bits` must be from 2 to 8; got 9.0."),
    (lambda: attach(mlp(), X, bits=4, size=100), "attach: `bits` must be the only budget given: bits, size or bops;"),
    (lambda: attach(mlp(), X, size=10.0), "attach: `size` must be from"),
    (lambda: attach(mlp(), X, bops=1e12), "attach: `bops` must be from"),
    (lambda: attach(mlp(), X, size=1000.0, learn=False), "attach: `learn` must be True with `size` or `bops`;"),
    (lambda: attach(mlp(), X, bits=3.5, learn=False), "Width: `bits` must be a whole number from 2 to 8; got 3.5."),
    (lambda: attach(mlp(), X, noise="white"), "attach: `noise` must be one of empirical, uniform, shuffle;"),
    (lambda: attach(mlp(), X, group_size=5), "attach, `0`: "),
    (lambda: attach(mlp(), X, group_size=8, per_tensor=True), "attach: `group_size` must be None with per_tensor=True"),
    (lambda: attach(quantized(), X), "attach: `model` must be a float model;"),
    (lambda: attach(attached(), X), "attach: `model` must be one without noise proxies;"),
    (lambda: attach(nn.Sequential(nn.Linear(16, 8)), X), "attach: `model` must be one with linears of 16 outputs"),
    (lambda: attach(broken(math.nan), X), "attach, `2`: its weight holds NaN or Inf."),
    (lambda: attach(mlp(), X * math.inf), "attach, `0`: its input holds NaN or Inf."),
    (lambda: cost(mlp()), "cost: `model` must be one that `attach` has seen; got 'Sequential'."),
    (lambda: widths(mlp()), "widths: `model` must be"),
    (lambda: param_groups(mlp(), 0.1), "param_groups: `model` must be"),
    (lambda: freeze(mlp()), "freeze: `model` must be"),
    (lambda: learned(mlp()), "learned: `model` must be"),
    (lambda: freeze(attached(), widths=(4, 9)), "freeze: `widths` must be different integers from 2 to 8; got (4, 9)."),
    (lambda: freeze(attached(bits=3), widths=(4, 8)), "freeze: `widths` must be widths whose least costs at most 3;"),
    (lambda: freeze(attached(), []), "freeze: `batches` must be at least one batch, or None; got []."),
    (lambda: learned(attached(act_bits=4)), "learned: `inputs` must be 'token' or 'float', as this model's inputs"),
    (lambda: learned(attached(), inputs="row"), "learned: `inputs` must be 'token', 'float' or None; got 'row'."),
    (lambda: Width(8, learn=True), "Width: `bits` must be above 2 and below 8 to be learned; got 8."),
    (lambda: NoiseProxy(torch.zeros(()), Width(4)), "NoiseProxy: `alpha` must be above 0; got 0.0."),
    (lambda: NoiseProxy(torch.ones(()), Width(4), noise="no"), "NoiseProxy: `noise` must be one of"),
    (lambda: draw("no", X, torch.ones(()), torch.ones(())), "draw: `kind` must be one of empirical, uniform, shuffle;"),
    (lambda: allocate([1.0], [2.0, 3.0], 9), "allocate: `sensitivity` must be numbers of at least 0, one for every"),
    (
        lambda: allocate([1.0], [2.0], 3),
        "allocate: `target` must be at least 4, the price of 2 bits everywhere; got 3.",
    ),
    (lambda: SearchBits(widths=()), "SearchBits: `widths` must be different integers from 2 to 8; got ()."),
    (lambda: SearchBits(bits=9), "SearchBits: `bits` must be from 2 to 8, the widths allowed, or None; got 9."),
    (lambda: SearchBits(objective="mse"), "SearchBits: `objective` must be None or one of hidden_mse, kl, nll;"),
    (lambda: SearchBits(tokens=0), "SearchBits: `tokens` must be at least 1; got 0."),
    (lambda: Mixed((("a", 9),)), "Affine: `bits` must be an integer from 1 to 8; got 9."),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_input_is_refused_in_one_sentence(case):
    do, sentence = REFUSED[case]
    with pytest.raises(ValueError) as failure:
        do()
    assert str(failure.value).startswith(sentence)


def test_a_refusal_leaves_the_model_as_it_was():
    model = mlp()
    names = list(model.state_dict())
    for options in ({"size": 10.0}, {"group_size": 5}, {"bits": 3.5, "learn": False}):
        with pytest.raises(ValueError):
            attach(model, X, **options)
    assert list(model.state_dict()) == names and type(model[0]) is nn.Linear
    attach(model, X)


class Separable(nn.Module):
    """Convolutions with batch norms, a depthwise one among them, and a linear head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.BatchNorm1d(8), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8 * 6, 16)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def test_convolutions_inputs_and_norms():
    model, x = Separable(), torch.randn(16, 2, 6, generator=torch.Generator().manual_seed(1))
    names = attach(model, x, bits=3, act_bits=4, learn=False, per_tensor=True, generator=torch.Generator())
    assert names == ["body.0", "body.3", "head"]
    assert widths(model) == {"body.0": (3.0, None), "body.3": (3.0, 4.0), "head": (3.0, 4.0)}
    assert not model.body[3].input_proxy.signed, "what leaves a ReLU is never negative"
    assert cost(model) == 0 and len(param_groups(model, 0.1)) == 3
    model(x).square().sum().backward()
    assert model.body[3].input_proxy.log_alpha.grad is not None
    before = model.body[1].running_mean.clone()
    freeze(model, [x, x])
    weight = model.eval().body[0].weight.detach()
    model.body[1](model.body[0](x))
    torch.testing.assert_close(model.body[1].running_mean, model.body[0](x).mean((0, 2)))
    assert not torch.equal(before, model.body[1].running_mean) and model.body[1].momentum == 0.1
    report = quantize(model, [x], learned(model, inputs="token"))
    assert torch.equal(model.body[0].weight, weight) and type(model.body[0]) is nn.Conv1d
    assert len(weight.unique()) <= 7 and model.head.act.bits == 4 and model.head.format.bits == 3
    assert not hasattr(model.body[3], "input_proxy") and not model.body[3]._forward_pre_hooks
    assert "Learned(widths=(('head', 3),)" in report.method


def test_convolutions_of_two_dimensions_become_quantized_ones(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU()
        ).eval()

    model, x = make(), torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    attach(model, x, bits=3.5, per_tensor=True)
    model[2].parametrizations.weight[0].width.start(4.2)
    bits, before = freeze(model), model(x)
    quantize(model, [x], method := learned(model))
    assert method.convolutions and [type(model[i]) for i in (0, 2)] == [QConv, QConv]
    assert {"0": model[0].format.bits, "2": model[2].format.bits} == bits
    torch.testing.assert_close(model(x), before)
    save(model, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a", into=make())(x), model(x))


def test_what_was_learned_survives_a_checkpoint(tmp_path):
    model = attached(bits=3)
    for layer in (model[0], model[2]):
        layer.parametrizations.weight[0].width.start(2.2 if layer is model[2] else 4.6)
    method = learned(model)
    quantize(model, [X], method)
    assert [model[0].format.bits, model[2].format.bits] == [5, 2]  # 3 on average
    save(model, tmp_path / "small")
    twin = load(tmp_path / "small", into=mlp())
    assert torch.equal(twin(X), model(X)) and twin[2].format.bits == 2
    assert inspect(tmp_path / "small")


def test_layers_without_a_learned_grid_stay_in_float():
    model = mlp()
    attach(model, X, skip=("2",))
    quantize(model, [X], learned(model))
    assert type(model[0]).__name__ == "QLinear" and type(model[2]) is nn.Linear
    assert isinstance(Learned(()), Learned)


def test_training_goes_on_after_a_state_dict(tmp_path):
    model = attached(bits=3, generator=torch.Generator().manual_seed(0))
    cost(model.train())
    with torch.no_grad():
        model.noise_multiplier.fill_(0.5)
    twin = attached(bits=3)
    twin.load_state_dict(model.state_dict())
    assert twin.noise_multiplier == 0.5 and widths(twin) == widths(model)
    assert torch.equal(twin.eval()(X), model.eval()(X))


def test_noise_reaches_only_what_skip_leaves():
    model = mlp()
    assert attach(model, X, skip=("0",)) == ["2"]
    assert torch.equal(model.train()[0](X), model[0](X))


def test_the_plan_says_what_it_found_and_a_journal_recalls_it(tmp_path):
    model = mlp(out=16)
    method = nipq(bits=4, group_size=None, widths=(2, 4, 8))
    with (journal := Journal(tmp_path / "j")).opened(walk := Walk(model, [X], journal=journal), method):
        first = method.plan(walk, method)
        again = method.plan(walk, method)
    assert again == first and set(first.findings["costs"]) == {"0", "2"}
    assert first.findings["average"] <= 4
    report = quantize(model, [X], method)
    assert report.search == first.findings


def test_a_budget_of_its_own_allows_widths_that_servers_fuse():
    model = mlp(out=16)
    method = nipq(bits=4, group_size=None)
    wider = SearchBits(bits=6.0, widths=(4, 8))
    planned = wider(Walk(model, [X]), method)
    assert sorted(dict(planned.round.widths).values()) in ([4, 8], [4, 4])
    assert planned.findings["average"] <= 6
