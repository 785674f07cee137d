"""Denoisers and what is taken down of their runs: equal to the stock pipeline, and to what keeping everything gives."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from planish.quant import QConv, QLinear, quantize, rtn, svdquant
from planish.quant.engine import Walk
from planish.quant.moments import Moments
from planish.quant.stacks import find_blocks

diffusers = pytest.importorskip("diffusers")

from planish.diffusion import (  # noqa: E402  (diffusers is optional)
    SKIP,
    capture,
    digits_dit,
    digits_pipeline,
    digits_scheduler,
    digits_unet,
    null_class,
    sample,
    train_denoiser,
    watch_steps,
)


def dit(seed=0):
    """A transformer whose blocks do something: untrained ones are identities."""
    model = digits_dit(layers=2, heads=2, seed=seed)
    torch.manual_seed(seed)
    for block in model.transformer_blocks:
        nn.init.normal_(block.norm1.linear.weight, std=0.1)
    return model.requires_grad_(False)


def unet():
    return digits_unet(channels=(16, 16)).requires_grad_(False)


LABELS = torch.tensor([3, 7, 1])


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_sampling_is_what_the_stock_pipeline_does(guidance):
    model = dit()
    pipeline = digits_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        LABELS.tolist(), guidance_scale=guidance, num_inference_steps=3, output_type="pt",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    ours = sample(model, LABELS, steps=3, guidance=guidance, seed=5)
    assert torch.equal((ours / 2 + 0.5).clamp(0, 1), theirs)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"])
def test_stock_schedulers_sample_and_are_left_as_they_were(name):
    scheduler = getattr(diffusers, name).from_config(digits_scheduler().config)
    model = unet()
    first, again = (sample(model, LABELS, steps=3, scheduler=scheduler, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (3, 1, 8, 8) and first.isfinite().all()


def test_guidance_follows_the_class_and_nothing_else_at_one():
    model = unet()
    plain = sample(model, LABELS, steps=2, guidance=1.0)
    assert torch.equal(plain, sample(model, LABELS, steps=2, guidance=0.0))
    guided = [sample(model, LABELS, steps=1, guidance=g) for g in (1.0, 2.0, 3.0)]
    torch.testing.assert_close(guided[2] - guided[1], guided[1] - guided[0], rtol=1e-3, atol=1e-4)
    nothing = torch.full_like(LABELS, null_class(model))
    torch.testing.assert_close(
        sample(model, nothing, steps=2, guidance=3.0), sample(model, nothing, steps=2, guidance=1.0)
    )


@pytest.mark.parametrize("make", [dit, unet])
def test_streamed_statistics_are_those_of_stored_activations(make):
    model, stored = make(), {}

    def store(name):
        def look(module, args):
            x = args[0]
            rows = x.permute(0, 2, 3, 1) if isinstance(module, nn.Conv2d) else x
            stored.setdefault(name, []).append(rows.reshape(-1, rows.shape[-1]))

        return look

    handles = [m.register_forward_pre_hook(store(n)) for n, m in model.named_modules()
               if isinstance(m, nn.Linear | nn.Conv2d)]  # fmt: skip
    with watch_steps(model) as (found, times):
        sample(model, LABELS, steps=3)
    for handle in handles:
        handle.remove()
    assert times == found.steps == [999.0, 666.0, 332.0]
    assert set(found.layers) == set(stored)
    for name, kept in stored.items():
        for rows, step in zip(torch.cat(kept).chunk(3), times, strict=True):  # each layer runs as often at each step
            moments = found.of(name, step)
            assert moments.rows == len(rows)
            assert torch.equal(moments.amax, rows.abs().amax(0))
            torch.testing.assert_close(moments.mean_abs, rows.abs().mean(0))
            torch.testing.assert_close(moments.second_moment, rows.square().mean(0))
        low, high = found.ranges()[name]
        assert 0 <= low <= high == torch.cat(kept).abs().max()


def test_statistics_hold_three_numbers_a_channel_and_step():
    model = dit()
    with watch_steps(model) as (found, _):
        sample(model, LABELS.repeat(9), steps=2)
    held = [m for steps in found.layers.values() for m in steps.values()]
    assert all(isinstance(m, Moments) and m.amax.shape == m.mean_abs.shape == m.second_moment.shape for m in held)
    widths = sum(m.weight[0].numel() if isinstance(m, nn.Linear) else m.in_channels for m in model.modules()
                 if isinstance(m, nn.Linear | nn.Conv2d))  # fmt: skip
    blocks = sum(2 * 128 for n, _ in model.named_modules() if n.endswith("norm1.emb"))  # read once more for the output
    assert sum(m.amax.numel() for m in held) <= 2 * (widths + blocks)


def test_calls_are_what_the_pipeline_asked():
    model = dit()
    calls = capture(model, lambda: sample(model, LABELS, steps=3))
    assert calls.seen == 3 and calls.times == [999.0, 666.0, 332.0]
    for named, answer in zip(calls.inputs, calls.outputs, strict=True):
        assert torch.equal(model(**named).sample, answer)
    assert calls.inputs[0]["class_labels"] is calls.inputs[2]["class_labels"]  # kept once
    sizes = {id(t): t.nbytes for named in calls.inputs for t in named.values()}
    assert calls.bytes == sum(sizes.values()) + sum(t.nbytes for t in calls.outputs)


def test_a_limit_keeps_a_fair_share_of_calls():
    model = nn.Linear(2, 16).requires_grad_(False)

    def run():
        for i in range(40):
            model(torch.full((1, 2), float(i)))

    calls = capture(model, run, limit=8)
    kept = [float(named["input"][0, 0]) for named in calls.inputs]
    assert calls.seen == 40 and len(kept) == 8 and kept == sorted(kept) == calls.times
    assert min(kept) < 15 and max(kept) > 25
    assert [float(o[0, 0]) for o in calls.outputs] == [float(model(torch.full((1, 2), k))[0, 0]) for k in kept]
    assert capture(model, run, limit=50).seen == 40


def test_a_tensor_that_is_written_into_later_was_copied():
    model, x = nn.Linear(2, 16).requires_grad_(False), torch.ones(1, 2)

    def run():
        model(x)
        x.zero_()
        model(x)

    assert [named["input"].sum() for named in capture(model, run).inputs] == [2, 0]


def test_training_learns_and_repeats_itself():
    images, labels = torch.full((20, 1, 8, 8), 0.5), torch.arange(20) % 10
    runs = []
    for _ in range(2):
        model = digits_unet(channels=(8, 8))
        losses = train_denoiser(model, images, labels, steps=30, batch_size=8, lr=1e-2)
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, runs[1][1][n]) for n, a in runs[0][1].items())
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])
    assert not model.training


def test_a_u_net_is_one_block_and_a_chain_of_equal_blocks_is_walked():
    assert find_blocks(unet())[0] == [""]
    assert find_blocks(dit())[0] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert find_blocks(nn.Sequential(unet()))[0] != [""]  # only a denoiser itself says so of its parts


def test_layers_that_absorb_are_looked_for_only_where_something_may_fold():
    assert not rtn().folds and not svdquant().folds
    assert svdquant(fold=True).folds and svdquant(budget=1000).folds
    model = dit()
    calls = capture(model, lambda: sample(model, LABELS, steps=1))
    sites = {}
    for probe in (False, True):
        walk = Walk(model, calls.inputs, skip=SKIP, probe=probe)
        hidden = walk.stream.start()
        sites[probe] = walk.sites(walk.stream.block(0, hidden))
    assert [s.kind for s in sites[False]] == [s.kind for s in sites[True]]
    assert all(s.producer is None for s in sites[False])


@pytest.mark.parametrize("make", [dit, unet])
def test_quantized_denoisers_still_denoise(make):
    from planish.plugins.diffusers import whole

    model, base = make(), make()
    calls = capture(model, lambda: sample(model, LABELS, steps=2))
    wanted = sample(base, LABELS, steps=3)
    quantize(model, calls.inputs, whole(svdquant(group_size=8, rank=4, grid=2, iterations=2)), skip=SKIP)
    kinds = {type(m) for m in model.modules()}
    assert QLinear in kinds and (QConv in kinds) == (make is unet)
    left = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert left and all(any(fnmatchcase(n, p) for p in SKIP) for n in left)
    assert not any(isinstance(m, QLinear) for n, m in model.named_modules() if any(fnmatchcase(n, p) for p in SKIP))
    found = sample(model, LABELS, steps=3)
    error = (found - wanted).square().sum() / wanted.square().sum()
    assert 0 < error < 0.02
