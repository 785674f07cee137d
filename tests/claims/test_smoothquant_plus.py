"""SmoothQuant+: its algebra exactly, its search against the naive one, its claim beside plain rounding."""

import copy
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from planish.quant import QLinear, quantize, rtn, search, smoothquant_plus
from planish.quant.candidates import loss
from planish.quant.engine import Method, Walk, no_transform
from planish.quant.formats import Affine
from planish.quant.methods.smoothquant_plus import Smooth
from planish.quant.moments import measure

transformers = pytest.importorskip("transformers")
plant_outliers = runpy.run_path(str(Path(__file__).parents[1] / "planted.py"))["plant_outliers"]
GRID = tuple(i / 20 for i in range(21))


def llama(layers: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def tokens(batches: int = 2, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (2, 40), generator=generator) for _ in range(batches)]


def first_sites(model: nn.Module, batches: list):
    walk = Walk(model, batches)
    block = walk.stream.block(0, walk.stream.start())
    sites = walk.sites(block)
    measure(block, sites)
    return sites


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_alpha_levels(alpha):
    """1 levels the activation, 0 the weight, and one half makes both the geometric mean of what they were."""
    method = smoothquant_plus(alpha, group_size=32)
    for site in first_sites(llama(), tokens()):
        scale = method.transform(site, method).scale
        act = site.moments.amax / scale
        weight = torch.cat(list(site.weights.values())).abs().amax(0) * scale
        act, weight = site.tied(act), site.tied(weight)  # heads that share a key-value head are levelled together
        both = (site.tied(site.moments.amax) * site.tied(torch.cat(list(site.weights.values())).abs().amax(0))).sqrt()
        if alpha == 1:
            torch.testing.assert_close(act, torch.ones_like(act))
        elif alpha == 0:
            torch.testing.assert_close(weight, torch.ones_like(weight))
        else:
            torch.testing.assert_close(act, both)
            torch.testing.assert_close(weight, both)


def test_channels_that_never_fire_are_left_alone():
    site = first_sites(llama(), tokens())[0]
    site.moments.amax[5] = 0.0
    method = smoothquant_plus(0.5, group_size=32)
    assert method.transform(site, method).scale[5] == 1.0


def test_the_noise_model_predicts_what_rounding_does():
    """Uniform noise of one step in every code: squared error = 1/12 sum_j |X_j|^2 sum_o step^2."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator)
    spread = torch.where(torch.rand(512, generator=generator) < 0.02, 20.0, 1.0)
    inputs = torch.randn(2048, 512, generator=generator) * spread
    grid = Affine(4, 128)
    for alpha in (None, 0.0, 0.5):
        scale = (
            torch.ones(512) if alpha is None else inputs.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha)
        )
        scaled, moved = weight * scale, inputs / scale
        measured = ((grid.fake(scaled) - scaled) @ moved.T).square().sum()
        step = grid.encode(scaled).scale.float().square().sum(0).repeat_interleave(128)
        predicted = (moved.square().sum(0) * step).sum() / 12
        assert 0.95 < measured / predicted < 1.05


def hidden_after(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """What leaves the last block."""
    seen = []
    handle = model.model.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    model(batch)
    handle.remove()
    return seen[0]


def gemma(layers: int = 2) -> nn.Module:
    """Norms that multiply by 1 + w, and a norm after every part of a block."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, vocab_size=97, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) - 0.5)
    return model


@pytest.mark.parametrize(("objective", "make"), [("hidden_mse", llama), ("kl", llama), ("nll", llama), ("kl", gemma)])
def test_one_pass_agrees_with_quantizing_once_a_candidate(objective, make):
    model, batches = make(), tokens()
    methods = [rtn(group_size=32), *(smoothquant_plus(a, group_size=32) for a in (0.0, 0.35, 0.7, 1.0))]
    before = {n: p.clone() for n, p in model.named_parameters()}
    choice = search(model, batches, methods, objective=objective)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # a search leaves the model alone
    walk = Walk(model, batches)
    walk.stream.start()
    for method, found in zip(methods, choice.losses, strict=True):
        twin = copy.deepcopy(model)
        quantize(twin, batches, method)
        for name, module in list(twin.named_modules()):
            if isinstance(module, QLinear):
                twin.set_submodule(name, module.dequantize())
        clean, hidden = ([hidden_after(m, b) for b in batches] for m in (model, twin))
        assert found == pytest.approx(loss(walk.stream, clean, hidden, objective), rel=1e-6)


def test_dropping_hopeless_candidates_keeps_the_winner():
    model, batches = llama(), tokens()
    methods = [smoothquant_plus(a, group_size=32) for a in GRID[::4]]
    whole, short = search(model, batches, methods), search(model, batches, methods, drop=1.1)
    assert short.best == whole.best and short.losses[short.best] == whole.losses[whole.best]
    assert any(x == float("inf") for x in short.losses)


@pytest.mark.claim("smoothquant_plus", "the searched alpha is never worse than plain rounding on the calibration loss")
def test_the_chosen_loss_is_the_least(record_claim):
    model, batches = llama(), tokens()
    method = smoothquant_plus(group_size=32)
    chosen = method.plan(Walk(model, batches), method)
    curve = chosen.findings["alpha"]
    assert set(curve) == {"none", *GRID}
    assert chosen.findings["loss"] == min(curve.values())
    record_claim(curve["none"] / chosen.findings["loss"], 1.0, "times less loss than plain rounding")


def test_no_smoothing_wins_where_smoothing_only_hurts():
    model, batches = llama(), tokens()
    method = smoothquant_plus(group_size=32)
    worse = replace(method, transform=WrongWay(0.5))
    assert worse.plan(Walk(model, batches), worse).transform is no_transform


class WrongWay(Smooth):
    """Scales that make a few columns of every weight huge."""

    def scales(self, site, method, alpha):
        return torch.where(torch.arange(len(site.moments.amax)) % 16 == 0, 100.0, 1.0)


def relative(model: nn.Module, method: Method, batches: list) -> float:
    """Squared error of the logits relative to the float model's."""
    clean = [model(b).logits for b in batches]
    twin = copy.deepcopy(model)
    quantize(twin, batches, method)
    gap = sum((twin(b).logits - c).square().sum() for b, c in zip(batches, clean, strict=True))
    return float(gap / sum(c.square().sum() for c in clean)) ** 0.5


@pytest.mark.claim("smoothquant_plus", "planted outliers (x10, x50) hurt plain rounding and leave smoothing unmoved")
@pytest.mark.parametrize("factor", [10, 50])
def test_planted_outliers(factor, record_claim):
    model, batches = llama(), tokens()
    planted = copy.deepcopy(model)
    assert plant_outliers(planted, batches, factor=float(factor), share=0.04) > 0
    torch.testing.assert_close(planted(batches[0]).logits, model(batches[0]).logits, rtol=1e-3, atol=1e-4)
    plain = relative(planted, rtn(group_size=32), batches) / relative(model, rtn(group_size=32), batches)
    full = smoothquant_plus(1.0, group_size=32)
    moved = relative(planted, full, batches) / relative(model, full, batches)
    assert 0.97 < moved < 1.03  # alpha = 1 undoes whatever factor a channel carries
    robust = smoothquant_plus(0.5, group_size=32, act_stat="rms", weight_stat="group_normalized")
    both = relative(planted, robust, batches) / relative(planted, rtn(group_size=32), batches)
    assert both < 0.75
    record_claim(plain, 1.3, "times the error for plain rounding")


@pytest.mark.claim("smoothquant_plus", "alphas by layer lose less than one alpha for the model (planted outliers)")
def test_finer_alphas_lose_less(record_claim):
    model, batches = llama(), tokens()
    plant_outliers(model, batches, factor=20.0, share=0.05)
    losses = []
    for granularity in ("model", "kind", "layer"):
        same = {"act_stat": "absmax", "weight_stat": "absmax", "clip": False}
        method = smoothquant_plus(group_size=32, granularity=granularity, **same)
        chosen = method.plan(Walk(copy.deepcopy(model), batches), method)
        losses.append(chosen.findings["loss"])
    assert losses[1] <= losses[0] and losses[2] <= losses[1]
    record_claim(losses[0] / losses[2], 1.1, "times less loss")


def test_bad_arguments():
    for make, sentence in (
        (lambda: smoothquant_plus(1.5), "smoothquant_plus: `alpha` must be a float in [0, 1] or 'search'; got 1.5."),
        (
            lambda: smoothquant_plus("best"),
            "smoothquant_plus: `alpha` must be a float in [0, 1] or 'search'; got 'best'.",
        ),
        (
            lambda: smoothquant_plus(granularity="row"),
            "SearchAlpha: `granularity` must be one of model, kind, layer; got 'row'.",
        ),
        (
            lambda: smoothquant_plus(objective="mse"),
            "SearchAlpha: `objective` must be None or one of hidden_mse, kl, nll; got 'mse'.",
        ),
        (lambda: smoothquant_plus(act_stat="p99"), "Smooth: `act_stat` must be one of absmax, mean, rms; got 'p99'."),
        (lambda: Smooth(exceptions=(("mlp", 2.0),)), "Smooth: `alpha` must be a float in [0, 1]; got 2.0."),
        (lambda: search(llama(), tokens(), []), "search: `methods` must be at least one method; got []."),
        (lambda: search(llama(), tokens(), [rtn()], drop=1), "search: `drop` must be above 1 or None; got 1."),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value) == sentence
