"""Bad input of denoisers and of what takes down their calls, one sentence each."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import planish
from planish.diffusion import (
    Pixels,
    StepStatistics,
    capture,
    denoiser_of,
    digits_dit,
    digits_pipeline,
    digits_unet,
    null_class,
    sample,
    train_denoiser,
    watch_steps,
)

IMAGES, LABELS = torch.zeros(4, 1, 8, 8), torch.arange(4)


def test_sizes():
    with pytest.raises(ValueError, match=r"digits_dit: `layers` must be an integer >= 1; got 0\."):
        digits_dit(layers=0)
    with pytest.raises(ValueError, match=r"digits_unet: `channels` must be two multiples of 8; got \(8, 12\)\."):
        digits_unet(channels=(8, 12))
    with pytest.raises(ValueError, match=r"digits_unet: `classes` must be an integer >= 1; got 0\."):
        digits_unet(classes=0)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"steps": 0}, r"`steps` must be an integer >= 1; got 0\."),
    ({"batch_size": 0}, r"`batch_size` must be an integer >= 1; got 0\."),
    ({"lr": 0}, r"`lr` must be a float > 0; got 0\."),
    ({"lr": float("nan")}, r"`lr` must be a float > 0; got nan\."),
    ({"label_dropout": 1}, r"`label_dropout` must be a float in \[0, 1\); got 1\."),
])  # fmt: skip
def test_training(options, sentence):
    with pytest.raises(ValueError, match="train_denoiser: " + sentence):
        train_denoiser(digits_unet(channels=(8, 8)), IMAGES, LABELS, **options)


def test_training_without_fitting_labels():
    with pytest.raises(ValueError, match=r"train_denoiser: `labels` must be one for each of 4 images; got 3\."):
        train_denoiser(digits_unet(channels=(8, 8)), IMAGES, LABELS[:3])
    with pytest.raises(TypeError, match=r"null_class: `model` must be a class-conditional denoiser; got Linear\."):
        train_denoiser(nn.Linear(2, 2), IMAGES, LABELS)


def test_sampling():
    model = digits_unet(channels=(8, 8))
    with pytest.raises(ValueError, match=r"sample: `steps` must be an integer >= 1; got 0\."):
        sample(model, LABELS, steps=0)
    with pytest.raises(ValueError, match=r"sample: `latents` must be of shape \(4, 1, 8, 8\); got \(2, 1, 8, 8\)\."):
        sample(model, LABELS, latents=torch.zeros(2, 1, 8, 8))
    bare = type(digits_unet(channels=(8, 8)))(
        sample_size=8, block_out_channels=(8,), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"must be a class-conditional denoiser; got UNet2DModel\."):
        null_class(bare)


def test_the_program_must_call_the_model():
    model = digits_unet(channels=(8, 8))
    with pytest.raises(ValueError, match=r"capture: `run` must be a program that calls the UNet2DModel; got 'one that"):
        capture(model, lambda: None)
    with pytest.raises(ValueError, match=r"capture: `limit` must be None or an integer >= 1; got 0\."):
        capture(model, lambda: sample(model, LABELS), limit=0)
    with pytest.raises(RuntimeError, match="the program's own"):
        capture(model, lambda: (_ for _ in ()).throw(RuntimeError("the program's own")))
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_hooks_are_gone_after_an_error_too():
    model = digits_unet(channels=(8, 8))
    with pytest.raises(ValueError, match=r"StepStatistics: `x` must be finite at `conv_in`, timestep 9; got 'NaN or"):
        with watch_steps(model):
            model(torch.full((1, 1, 8, 8), float("nan")), 9, class_labels=torch.tensor([1]))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_statistics_of_what_was_not_watched():
    found = StepStatistics()
    found.add("a", 9.0, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"StepStatistics: `layer` must be one of 1 that were watched; got 'b'\."):
        found.of("b", 9.0)
    with pytest.raises(ValueError, match=r"StepStatistics: `step` must be one of \[9.0\]; got 8.0\."):
        found.of("a", 8.0)


def test_no_pipeline_and_no_such_part():
    with pytest.raises(TypeError, match=r"denoiser_of: `pipeline` must be a pipeline of diffusers; got Linear\."):
        denoiser_of(nn.Linear(2, 2))
    pipeline = digits_pipeline(digits_dit(layers=1, heads=1))
    with pytest.raises(
        ValueError, match=r"denoiser_of: `part` must be one of the pipeline's modules, .*; got 'unet'\."
    ):
        denoiser_of(pipeline, "unet")
    assert denoiser_of(pipeline, "vae")[1] is pipeline.vae
    with pytest.raises(TypeError, match=r"must be a diffusers.DiTTransformer2DModel; got UNet2DModel\."):
        digits_pipeline(digits_unet(channels=(8, 8)))


def test_pixels_change_nothing():
    x = torch.randn(2, 3, 4, 4)
    vae = Pixels()
    latent = vae.encode(x).latent_dist
    assert latent.sample() is x and latent.mode() is x and vae.decode(x).sample is x


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'planish.diffusion' has no attribute 'dit'"):
        _ = planish.diffusion.dit
