"""Caches on tiny random denoisers of diffusers: what is exact, what is forgotten when, what is refused."""

import re
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from planish._support import PlanishWarning
from planish.diffusion import CachePlan, fold_correction
from planish.quant import QLinear, rtn

diffusers = pytest.importorskip("diffusers")
from planish.diffusion import (  # noqa: E402
    apply_cache,
    cache_and_quantize,
    cached_calls,
    fit_cache,
    multiply_adds,
    remove_cache,
)

nets = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "cached_nets.py")))
dit = nets.dit
unet = nets.unet
flux = nets.flux
KINDS = nets.KINDS
inputs = nets.inputs
call = nets.call
steps = nets.steps
draw = nets.draw
T = 10


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_in_full_is_no_cache_bit_for_bit(kind):
    model = KINDS[kind]()
    plain = draw(model, kind)
    apply_cache(model, CachePlan(range(T), T))
    assert torch.equal(draw(model, kind), plain)
    assert remove_cache(model) and not remove_cache(model)
    assert torch.equal(draw(model, kind), plain)
    assert not any(hasattr(m, "_diffusers_hook") or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_reused_feature_of_the_same_input_gives_the_same_output(kind):
    model, x = KINDS[kind](), inputs(kind)
    wanted = call(model, kind, 9.0, x)
    apply_cache(model, CachePlan((0,), 2))
    assert torch.equal(call(model, kind, 9.0, x), wanted)
    torch.testing.assert_close(call(model, kind, 9.0, x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reused_feature_of_another_input_gives_another_output(kind):
    model = KINDS[kind]()
    plain = draw(model, kind)
    apply_cache(model, CachePlan((0, 5), T))
    cached = draw(model, kind)
    assert not torch.equal(cached, plain)
    assert (cached - plain).norm() < 0.5 * plain.norm()
    assert torch.equal(draw(model, kind), cached)  # the second run starts clean


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_what_is_skipped_is_not_computed(kind):
    model, x = KINDS[kind](), inputs(kind)
    full = multiply_adds(model, lambda: call(model, kind, 9.0, x))
    apply_cache(model, CachePlan((0,), 2))
    assert multiply_adds(model, lambda: call(model, kind, 9.0, x)) == full
    reused = multiply_adds(model, lambda: call(model, kind, 9.0, x))
    if kind == "dit":
        blocks = model.transformer_blocks
        part = sum(m.weight.numel() for b in blocks[1:] for m in b.modules() if isinstance(m, nn.Linear))
        assert 0 < full - reused <= part * 2 * 4  # tokens; what embeds the timestep runs once a sample
    assert reused < 0.6 * full


def test_guidance_has_a_state_for_each_branch():
    model, a, b = dit(), inputs("dit", seed=1), inputs("dit", seed=2)
    alone = []
    for x in (a, b):
        apply_cache(model, CachePlan((0, 2), 4))
        alone.append([call(model, "dit", 9.0 - t, x) for t in range(4)])
        remove_cache(model)
    apply_cache(model, CachePlan((0, 2), 4, branches=2))
    for t in range(4):
        assert torch.equal(call(model, "dit", 9.0 - t, a), alone[0][t])
        assert torch.equal(call(model, "dit", 9.0 - t, b), alone[1][t])


def test_guidance_by_the_context_of_diffusers():
    model, a, b = flux(), inputs("flux", seed=1), inputs("flux", seed=2)
    alone = []
    for x in (a, b):
        apply_cache(model, CachePlan((0,), 2))
        alone.append([call(model, "flux", 9.0, x) for _ in range(2)])
        remove_cache(model)
    apply_cache(model, CachePlan((0,), 2))
    for t in range(2):
        for name, x, wanted in (("cond", a, alone[0]), ("uncond", b, alone[1])):
            with model.cache_context(name):
                assert torch.equal(call(model, "flux", 9.0, x), wanted[t])
    model._reset_stateful_cache()
    with model.cache_context("cond"):
        assert torch.equal(call(model, "flux", 9.0, b), alone[1][0])


def test_another_batch_starts_anew():
    model = dit()
    apply_cache(model, CachePlan((0,), 4))
    call(model, "dit", 9.0, inputs("dit", 2))
    wide = inputs("dit", 3, seed=5)
    first = call(model, "dit", 9.0, wide)
    remove_cache(model)
    assert torch.equal(first, call(model, "dit", 9.0, wide))


def test_an_interrupted_run_is_forgotten():
    model = dit()
    plan = fit_cache(model, lambda: draw(model), 5, correction=None)
    apply_cache(model, plan)
    whole = draw(model)
    draw(model, times=steps()[:3])  # given up; the next run begins at the first timestep
    assert torch.equal(draw(model), whole)
    with pytest.raises(RuntimeError):
        call(model, "dit", 90.0, {**inputs("dit"), "class_labels": torch.zeros(3, dtype=torch.long)})
    assert torch.equal(draw(model), whole)


def test_a_batch_that_shrinks_in_a_run_is_computed():
    model = dit()
    plan = fit_cache(model, lambda: draw(model), 5, correction=None)
    apply_cache(model, plan)
    call(model, "dit", 90.0, inputs("dit", 4))
    x = inputs("dit", 2)
    given = call(model, "dit", 81.0, x)  # guidance ends after a call
    remove_cache(model)
    assert torch.equal(given, call(model, "dit", 81.0, x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_finds_the_best_cut_and_corrections_bring_it_nearer(kind):
    model = KINDS[kind]()
    plain = draw(model, kind)
    plan = fit_cache(model, lambda: draw(model, kind), 5, validate=False)
    assert plan.steps == T and len(plan.schedule) == 2 and list(plan.timesteps) == steps()
    uniform = fit_cache(model, lambda: draw(model, kind), 5, schedule="uniform", correction=None)
    assert plan.made_for["cost"] <= uniform.made_for["cost"] and list(uniform.schedule) == [0, 5]
    errors = []
    for chosen in (plan, replace(plan, corrections=(), extrapolate=False)):
        apply_cache(model, chosen)
        errors.append(float((draw(model, kind) - plain).norm()))
        remove_cache(model)
    assert errors[0] < errors[1]
    assert [i for i, c in enumerate(plan.corrections) if c is None] == list(plan.schedule)


def test_one_call_quantizes_and_caches():
    model = dit()
    report, plan = cache_and_quantize(model, lambda: draw(model), rtn(group_size=32), 5, validate=False)
    assert len(report.blocks) == 3 and isinstance(model.transformer_blocks[0].attn1.to_q, QLinear)
    assert any(c is not None and c.kept > 0 for c in plan.corrections)
    apply_cache(model, plan)
    assert torch.isfinite(draw(model)).all()
    again = dit()
    _, other = cache_and_quantize(again, lambda: draw(again), rtn(group_size=32), 5, features="quantized")
    assert len(other.schedule) == len(plan.schedule)


def test_calls_along_the_cached_trajectory():
    model = dit()
    plan = CachePlan((0, 5), T)
    kept = cached_calls(model, lambda: draw(model), plan, calls=3)
    assert [float(c["timestep"][0]) for c in kept] == [steps()[i] for i in (0, 4, 9)]
    apply_cache(model, plan)
    final = draw(model)
    remove_cache(model)
    assert not torch.equal(kept[-1]["hidden_states"], final) and len(kept[-1]["hidden_states"]) == 4


def test_a_budget_of_time_sets_the_number_of_full_calls(monkeypatch):
    import planish.diffusion.cache_session as timed

    model, clock = dit(), [0.0]

    class Hours:
        @staticmethod
        def perf_counter():
            return clock[0]

    def tick(module, args, out):
        clock[0] += 1.0

    handles = [b.register_forward_hook(tick) for b in model.transformer_blocks]  # passed through too, so: by computing
    for h in handles:
        h.remove()
    for block in model.transformer_blocks:
        block.attn1.register_forward_hook(tick)
    monkeypatch.setattr(timed, "time", Hours)
    # a full call takes 3 s, one that reuses 1 s
    plan = fit_cache(model, lambda: draw(model), budget=18.5, correction=None)
    assert len(plan.schedule) == 4
    assert len(fit_cache(model, lambda: draw(model), budget=1e6, correction=None).schedule) == T
    with pytest.raises(ValueError, match=r"`budget` must be at least 12 s, what one full call and 9 that reuse take"):
        fit_cache(model, lambda: draw(model), budget=11)


def test_few_steps_warn():
    model = dit()
    with pytest.warns(PlanishWarning, match="at 4 steps there is little to reuse"):
        fit_cache(model, lambda: draw(model, times=steps()[:4]), 2, correction=None)


def test_a_control_net_is_refused():
    model, x = unet("UNet2DConditionModel"), inputs("cross")
    apply_cache(model, CachePlan((0,), 2))
    with pytest.raises(ValueError, match="a U-Net's cache skips the blocks that a ControlNet adds to"):
        call(model, "cross", 9.0, {**x, "down_block_additional_residuals": ()})


def later(plan, times):
    model = dit()
    apply_cache(model, plan)
    draw(model, times=times)


TIMED = CachePlan((0,), 3, timesteps=(9.0, 6.0, 3.0))


@pytest.mark.refuses
@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (
            lambda: apply_cache(nn.Linear(2, 2), CachePlan((0,), 2)),
            "apply_cache: `model` must be a U-Net of diffusers, or hold two blocks under one of blocks",
        ),
        (
            lambda: apply_cache(dit(), CachePlan((0,), 2, region=(2, 5))),
            "`region` must be two of the blocks 0 to 2 in order; got (2, 5).",
        ),
        (lambda: apply_cache(unet(), CachePlan((0,), 2, region=(0, 1))), "`region` must be None for a U-Net"),
        (
            lambda: apply_cache(dit(), CachePlan((0,), 2, outputs={"nose": ()})),
            "`plan` must be made for DiTTransformer2DModel; got 'one for a model with nose'.",
        ),
        (
            lambda: later(TIMED, (9.0, 5.0)),
            "apply_cache: `plan` must be made for this scheduler and number of steps; call 1 came at timestep 5, the "
            "plan has 6.",
        ),
        (lambda: later(TIMED, (9.0, 6.0, 3.0, 1.0)), "call 3 came at timestep 1, the plan has no more than 3."),
        (
            lambda: later(CachePlan((0,), 3, shape=(1, 8, 8)), (9.0,)),
            "apply_cache: `plan` must be made for samples of (1, 4, 4); got (1, 8, 8).",
        ),
        (lambda: fit_cache(dit(), lambda: None), "`run` must be a function that calls the model; got 'one that never"),
        (lambda: fit_cache(dit(), lambda: None, 0), "fit_cache: `interval` must be at least 1; got 0."),
        (lambda: fit_cache(dit(), lambda: None, correction="no"), "`correction` must be 'least_squares', 'variance'"),
        (lambda: fit_cache(dit(), lambda: None, schedule="no"), "`schedule` must be 'dps', 'uniform' or a list"),
        (lambda: fit_cache(dit(), lambda: None, budget=1.0), "`run` must be of more than three steps"),
        (lambda: cached_calls(dit(), lambda: None, CachePlan((0,), 2), calls=0), "`calls` must be at least 1; got 0."),
        (lambda: cache_and_quantize(dit(), lambda: None, features="no"), "`features` must be 'float' or 'quantized'"),
        (
            lambda: fold_correction(nn.Linear(2, 2), torch.ones(3), torch.ones(2)),
            "fold_correction: `scale` must be of shape (2,); got (3,).",
        ),
    ],
)
def test_a_mistake_is_one_sentence(mistake, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        mistake()


def test_mistakes_that_need_a_model():
    model = dit()
    with pytest.raises(ValueError, match="must be a function that draws 4 samples a batch or more; got 2"):
        fit_cache(model, lambda: draw(model, n=2), 5)
    with pytest.raises(ValueError, match="must be a function that draws 2 samples a batch or more; got 1"):
        fit_cache(model, lambda: draw(model, n=1), 5, validate=False)
    apply_cache(model, CachePlan((0,), T))
    for again in (lambda: apply_cache(model, CachePlan((0,), T)), lambda: fit_cache(model, lambda: draw(model), 5)):
        with pytest.raises(ValueError, match="`model` must be without a cache; `remove_cache` takes it off"):
            again()
    with pytest.raises(TypeError, match=r"fold_correction: `layer` must be nn.Linear or nn.Conv2d"):
        fold_correction(nn.ReLU(), torch.ones(1), torch.ones(1))
