"""Evol-Q: what it changes, what it leaves alone, and what it refuses."""

import copy
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish.quant import (
    Evolve,
    Journal,
    QLinear,
    evol_q,
    evolve,
    gptq,
    quantize,
    rtn,
    search,
    smoothquant_plus,
    svdquant,
)  # fmt: skip
from planish.quant.evolution import RegularizedTournament
from planish.quant.formats import FP4, Affine
from planish.quant.methods.evol_q import ClipWeight, published
from planish.quant.plans import SearchAlpha

nets = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "plain_nets.py")))
QUICK = Evolve(passes=2, cycles=6)


def data(batches=3, rows=24):
    return [nets.noise(rows, nets.C, seed=i) for i in range(batches)]


def small(bits=2, method=None, **options):
    """Return a float network and the same rounded; the scales in float32."""
    base = nets.mlp()
    model = copy.deepcopy(base)
    method = method or rtn(bits=bits, group_size=None, scale_dtype="float32", **options)
    quantize(model, data(), method)
    return base, model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("codes", ["fixed", "nearest"])
def test_steps_of_zero_leave_the_model_bit_for_bit(codes):
    base, model = small()
    before = state(model)
    done = evolve(model, data(), base, replace(QUICK, mutation=0.0, codes=codes))
    assert changed(before, model) == set()
    assert len(set(done.losses)) == 1
    assert not any(v.accepted for v in done.visits)


@pytest.mark.parametrize("loss", ["infonce", "mse", "kl", "cosine", lambda q, k: (q - k).abs().mean()])
@pytest.mark.parametrize("codes", ["fixed", "nearest"])
def test_losses_never_rise_searched_or_held_out(loss, codes):
    base, model = small()
    done = evolve(model, data(5), base, replace(QUICK, loss=loss, codes=codes))
    assert done.losses == sorted(done.losses, reverse=True)
    assert done.held_losses == sorted(done.held_losses, reverse=True)
    assert done.losses[-1] < done.losses[0]
    assert len(done.losses) == len(done.held_losses) == len(done.visits) + 1


def test_a_seed_decides_all_and_the_global_state_is_left_alone():
    found = []
    for seed in (0, 0, 1):
        base, model = small()
        random = torch.get_rng_state()
        evolve(model, data(), base, replace(QUICK, seed=seed))
        assert torch.equal(torch.get_rng_state(), random)
        found.append(model[0].weight_scale.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_only_scales_in_the_scope_change():
    base, model = small()
    before = state(model)
    evolve(model, data(), base, replace(QUICK, scope=lambda name, layer: name == "2"))
    assert changed(before, model) == {"2.weight_scale"}
    base, model = small()
    before = state(model)
    evolve(model, data(), base, replace(QUICK, codes="nearest"))
    changes = changed(before, model)
    assert {"0.weight_scale", "2.weight_scale", "4.weight_scale"} <= changes
    assert {name.rpartition(".")[2] for name in changes} <= {"weight_scale", "weight_packed"}


def test_codes_follow_the_scales_where_they_are_nearest():
    base, model = small(bits=3)
    evolve(model, data(), base, replace(QUICK, codes="nearest", mutation=0.1))
    for name in ("0", "2", "4"):
        layer, weight = model.get_submodule(name), base.get_submodule(name).weight
        q = layer.weight
        wanted = (weight / q.scale).round().add(q.zero).clamp(0, 7)
        assert torch.equal(q.codes.float(), wanted)


def test_attention_alone_moves_where_that_is_the_scope():
    model = nets.Net()
    base = copy.deepcopy(model)
    tokens = [nets.ids(4, 7, seed=i) for i in range(3)]
    quantize(model, tokens, rtn(bits=2, group_size=None))
    before = state(model)
    done = evolve(model, tokens, base, replace(QUICK, loss="kl", passes=1))
    assert [v.group for v in done.visits] == ["blocks.1", "blocks.0"]  # the class is called Attention
    assert changed(before, model) <= {n for n in before if n.endswith("weight_scale")}
    forward = evolve(model, tokens, base, replace(QUICK, scope="attention", order="forward", passes=1))
    assert [v.group for v in forward.visits] == ["blocks.0", "blocks.1"]


def test_evaluations_are_counted():
    base, model = small()
    settings = replace(QUICK, passes=3, cycles=4, holdout=0.0, race=None)
    done = evolve(model, data(), base, settings)
    assert [v.evaluations for v in done.visits] == [5, 5, 5]  # one group, and each visit's start
    assert sum(v.runs for v in done.visits) == 3 * 5 * 3
    base, model = small()
    limited = evolve(model, data(), base, replace(settings, budget=8))
    assert [v.evaluations for v in limited.visits] == [5, 3]


def test_what_is_remembered_changes_nothing():
    results = []
    for cache in (True, False):
        model = nets.Net(depth=3)
        base = copy.deepcopy(model)
        tokens = [nets.ids(4, 7, seed=i) for i in range(3)]
        quantize(model, tokens, rtn(bits=2, group_size=None))
        done = evolve(model, tokens, base, replace(QUICK, loss="kl"), cache=cache)
        results.append((done.losses, done.held_losses, state(model)))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[0][2][n], t) for n, t in results[1][2].items())


def test_what_does_not_gain_on_data_held_out_is_undone():
    seen = set()
    for seed in range(8):
        base, model = small()
        before = state(model)
        settings = Evolve(passes=1, cycles=2, holdout=0.4, mutation=0.03, race=None, seed=seed, codes="nearest")
        [visit] = evolve(model, [d[:8] for d in data(5)], base, settings).visits
        seen.add((visit.accepted, visit.after < visit.before))
        assert visit.accepted == bool(changed(before, model))
        assert visit.held_after <= visit.held_before
    assert seen >= {(True, True), (False, False)}


def test_rows_are_held_out_where_there_is_one_batch():
    base, model = small()
    [batch] = data(1, rows=64)
    done = evolve(model, [batch], base, replace(QUICK, cycles=15))
    assert done.held_losses[-1] < done.held_losses[0]


class FakeWeight(nn.Module):
    """A linear layer whose weight is rounded by a module of the host's kind."""

    def __init__(self, linear, fake):
        super().__init__()
        self.linear, self.weight_fake_quant = linear, fake

    def forward(self, x):
        return nn.functional.linear(x, self.weight_fake_quant(self.linear.weight), self.linear.bias)


def test_the_scales_of_torch_fake_quantize_evolve_as_ours():
    from torch.ao.quantization import FakeQuantize, PerChannelMinMaxObserver

    base, ours = small(bits=3)
    theirs = copy.deepcopy(base)
    for name in ("0", "2", "4"):
        fake = FakeQuantize(
            observer=PerChannelMinMaxObserver, quant_min=0, quant_max=7, dtype=torch.quint8,
            qscheme=torch.per_channel_affine, ch_axis=0,
        )  # fmt: skip
        fake(base.get_submodule(name).weight)
        with pytest.raises(ValueError, match=r"Evolve, `.*`: `model` must be one whose observers are off"):
            evolve(FakeWeight(base.get_submodule(name), fake), data(), data())
        fake.disable_observer()
        q = ours.get_submodule(name).weight
        fake.scale.copy_(q.scale.squeeze(1))
        fake.zero_point.copy_(q.zero.squeeze(1))
        theirs.set_submodule(name, FakeWeight(base.get_submodule(name), fake))
    torch.testing.assert_close(theirs(data()[0]), ours(data()[0]))
    settings = Evolve(passes=1, cycles=15, codes="nearest")
    first = evolve(ours, data(), base, settings)
    second = evolve(theirs, data(), base, replace(settings, codes="fixed"))  # the host rounds anew by itself
    assert first.losses == pytest.approx(second.losses, rel=1e-4)
    for name in ("0", "2", "4"):
        scale = theirs.get_submodule(name).weight_fake_quant.scale
        torch.testing.assert_close(scale, ours.get_submodule(name).weight_scale.squeeze(1))


@pytest.mark.parametrize("method", [
    smoothquant_plus(0.5, bits=2, group_size=16), gptq(bits=2, group_size=None),
    rtn(bits=2, group_size=None, symmetric=True), evol_q(bits=2, refine=QUICK),
    svdquant(bits=2, act_bits=None, group_size=16, rank=2),
    replace(rtn(bits=2, group_size=None), act=Affine(8, None)),
], ids=lambda m: m.name)  # fmt: skip
def test_it_refines_after_any_method(method):
    errors = []
    tokens = [nets.ids(4, 9, seed=i) for i in range(4)]
    for refine in (rtn().refine, Evolve(passes=2, cycles=20, mutation=0.03)):
        model = nets.Net()
        report = quantize(model, tokens, replace(method, refine=refine))
        assert isinstance(model.blocks[0].q, QLinear)
        errors.append(report.blocks[0].error)
    assert errors[1] < errors[0]


def test_codes_may_follow_after_smoothing_too():
    model = nets.Net()
    method = replace(smoothquant_plus(0.5, bits=2, group_size=16), refine=replace(QUICK, codes="nearest"))
    report = quantize(model, [nets.ids(4, 9)], method)
    assert 0 < report.blocks[-1].error < 1


def test_a_search_of_alpha_leaves_the_evolution_for_the_end():
    calls = []

    class Counting(Evolve):
        def __call__(self, block, method):
            calls.append(block.name)
            super().__call__(block, method)

    method = replace(smoothquant_plus(group_size=16), plan=SearchAlpha(steps=3))
    method = replace(method, refine=Counting(passes=1, cycles=2))
    quantize(nets.Net(), [nets.ids(4, 9)], method)
    assert calls == ["blocks.0", "blocks.1"]


def test_a_search_among_methods_sees_what_evolution_gains():
    tokens = [nets.ids(4, 9, seed=i) for i in range(3)]
    start = rtn(bits=2, group_size=None)
    choice = search(nets.Net(depth=1), tokens, [start, replace(start, refine=Evolve(cycles=15))])
    assert choice.best == 1


def test_a_journal_keeps_what_evolved(tmp_path):
    tokens, outputs = [nets.ids(4, 9, seed=i) for i in range(2)], []
    for _ in range(2):
        model = nets.Net()
        quantize(model, tokens, evol_q(bits=3, refine=QUICK), journal=Journal(tmp_path / "journal"))
        outputs.append(model(tokens[0])["logits"])
    assert torch.equal(*outputs)


def test_convolutions_evolve():
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten()
    ).eval()
    model, images = copy.deepcopy(base), [torch.randn(6, 3, 8, 8) for _ in range(3)]
    quantize(model, images, evol_q(bits=2, refine=replace(QUICK, codes="nearest")))
    done = evolve(model, images, base, replace(QUICK, codes="nearest"))
    assert done.losses[-1] < done.losses[0]


def test_any_optimizer_may_be_asked():
    base, model = small()
    asked = []

    def make(group, start, loss, bounds):
        asked.append((group, len(start), len(bounds[0])))
        return RegularizedTournament(start, fitness=loss, mutation=0.05, relative=True)

    done = evolve(model, data(), base, QUICK, optimizer=make)
    assert asked[0] == ("", 48 + 48 + 32, 48 + 48 + 32)
    assert done.loss < done.losses[0]


def test_training_mode_comes_back_and_does_not_disturb():
    base, model = small()
    model.insert(1, nn.Dropout(0.5))
    base.insert(1, nn.Dropout(0.5))
    model.train()
    done = evolve(model, data(), base.eval(), QUICK)
    assert model.training
    assert model[1].training
    assert done.loss < done.losses[0]


def test_the_published_settings_need_no_half_scales():
    assert published().mutation == 1e-3
    assert (published().passes, published().cycles, published().population, published().tournament) == (10, 3, 15, 10)
    base = nets.Net()
    model, tokens = copy.deepcopy(base), [nets.ids(4, 7, seed=i) for i in range(2)]
    quantize(model, tokens, rtn(bits=3, group_size=None))
    with pytest.raises(ValueError, match=r"Evolve: `relative` must be True where scales are stored in half precision"):
        evolve(model, tokens, base, published())
    model = copy.deepcopy(base)
    quantize(model, tokens, rtn(bits=3, group_size=None, scale_dtype="float32"))
    done = evolve(model, tokens, base, replace(published(), passes=1))
    assert done.losses == sorted(done.losses, reverse=True)
    assert done.held_losses == []


def test_the_table_has_a_line_a_pass():
    base, model = small()
    assert len(str(evolve(model, data(), base, QUICK)).splitlines()) == 3


class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + torch.randn(len(x), 1)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"loss": "ce"}, r"`loss` must be one of infonce, mse, kl, cosine; got 'ce'"),
    ({"passes": 0}, r"`passes` must be an integer of at least 1; got 0"),
    ({"cycles": 1.5}, r"`cycles` must be an integer of at least 1; got 1.5"),
    ({"mutation": 1.0}, r"`mutation` must be at least 0, and below 1 where it is relative; got 1.0"),
    ({"share": 2.0}, r"`share` must be a float in \(0, 1\]; got 2.0"),
    ({"scope": "mlp"}, r"`scope` must be one of all, attention; got 'mlp'"),
    ({"order": "random"}, r"`order` must be one of reverse, forward; got 'random'"),
    ({"codes": "free"}, r"`codes` must be one of fixed, nearest; got 'free'"),
    ({"temperature": 0.0}, r"`temperature` must be a float above 0; got 0.0"),
    ({"holdout": 1.0}, r"`holdout` must be a float in \[0, 1\); got 1.0"),
    ({"race": 0}, r"`race` must be an integer of at least 1; got 0"),
    ({"budget": 0}, r"`budget` must be an integer of at least 1; got 0"),
])  # fmt: skip
def test_bad_settings(options, sentence):
    with pytest.raises(ValueError, match=f"Evolve: {sentence}"):
        Evolve(**options)


def test_bad_models_and_data():
    base, model = small()
    for wrong, sentence in (
        ({"batches": []}, r"evolve: `batches` must be at least one batch of what the model takes; got \[\]"),
        ({"reference": [data()[0]]}, r"evolve: `reference` must be 3 outputs, one a batch; got 1"),
        ({"settings": replace(QUICK, scope="attention")}, r"Evolve: `scope` must be one that holds a quantized layer"),
        ({"model": base}, r"Evolve: `scope` must be one that holds a quantized layer"),
        ({"model": model[0]}, r"evolve: `model` must be a module that holds layers"),
        ({"batches": [d[:1] for d in data()]}, r"Evolve: `batches` must be batches of at least 2 rows.*got 1"),
        ({"reference": [d * float("nan") for d in data()]}, r"`model` must be one whose loss is finite at the start"),
        ({"reference": data(), "settings": replace(QUICK, codes="nearest")}, r"evolve: `reference` must be the float"),
    ):
        given = {"model": model, "batches": data(), "reference": base, "settings": QUICK} | wrong
        with pytest.raises(ValueError, match=sentence):
            evolve(**given)
    noisy = Noisy(*model)
    with pytest.raises(ValueError, match=r"`model` must be one that gives finite and equal outputs twice"):
        evolve(noisy, data(), base, QUICK)
    model[0].weight_scale[0] = 0
    with pytest.raises(ValueError, match=r"Evolve, `0`: `scale` must be finite and above 0; got 0.0"):
        evolve(model, data(), base, QUICK)


def test_codes_cannot_follow_what_was_not_rounded_to_nearest():
    base, model = small(method=gptq(bits=2, group_size=None))
    with pytest.raises(ValueError, match=r"Evolve, `0`: `codes` must be 'fixed' for a layer that was not rounded"):
        evolve(model, data(), base, replace(QUICK, codes="nearest"))
    with pytest.raises(ValueError, match=r"Evolve, `.*`: `codes` must be 'fixed'"):
        quantize(nets.mlp(), data(), replace(gptq(bits=2, group_size=None), refine=replace(QUICK, codes="nearest")))


def test_grids_of_floats_are_refused():
    with pytest.raises(ValueError, match=r"Evolve, `.*`: `format` must be an Affine format"):
        quantize(nets.mlp(), data(), replace(rtn(), weight=FP4(), refine=QUICK))
    with pytest.raises(ValueError, match=r"ClipWeight: `weight` must be a grid of integers"):
        quantize(nets.mlp(), data(), replace(evol_q(), weight=FP4()))


def test_predictions_cannot_be_judged_inside_a_model():
    with pytest.raises(ValueError, match=r"Evolve, block blocks.0: `loss` must be another where outputs are no pred"):
        quantize(nets.Net(), [nets.ids(4, 9)], evol_q(refine=replace(QUICK, loss="kl")))


@pytest.mark.parametrize(("options", "sentence"), [
    ({"steps": 1}, r"`steps` must be at least 2; got 1"), ({"least": 1.0}, r"`least` must be a float in \(0, 1\)"),
])  # fmt: skip
def test_bad_ranges(options, sentence):
    with pytest.raises(ValueError, match=f"ClipWeight: {sentence}"):
        ClipWeight(**options)
