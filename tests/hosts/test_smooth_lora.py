"""Smooth adapters in stock diffusers: pipelines load them, schedulers agree, double backward runs through attention."""

import pytest
import torch

from planish.diffusion import (
    NullTextInverter,
    StepwiseVariationRegularizer,
    ddim_invert,
    ddim_sample,
    interpolate,
    load_smooth_lora,
    predict_x0,
    save_smooth_lora,
    train_smooth_lora,
)
from planish.diffusion.prediction import levels, target

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers', of its own parts
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")


def build(kind):
    torch.manual_seed(0)
    if kind == "unet2d":
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=8, num_class_embeds=11,
        )  # fmt: skip
    if kind == "dit":
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=10,
        )  # fmt: skip
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8,
    )  # fmt: skip


def example(kind, n=2):
    draw = torch.Generator().manual_seed(1)
    if kind == "unet":
        return torch.randn(n, 4, 8, 8, generator=draw), {"encoder_hidden_states": torch.randn(n, 5, 8, generator=draw)}
    return torch.randn(n, 1, 8, 8, generator=draw), {"class_labels": torch.arange(n)}


def scheduler(kind="epsilon", **more):
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type=kind, **more,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["unet", "unet2d", "dit"])
def test_every_architecture_trains_and_its_adapter_comes_back(kind, tmp_path):
    model, (x0, cond) = build(kind), example(kind)
    run = train_smooth_lora(model, [(x0, cond)], scheduler(), tmp_path, steps=2, lr=1e-2)
    assert len(run.variations) == 2 and all(mean > 0 for mean, _ in run.variations)
    again = build(kind)
    t = torch.tensor([7, 900])
    with torch.no_grad():
        plain = again.eval()(x0, timestep=t, **cond).sample
        load_smooth_lora(again, tmp_path)
        one, two = (net.eval()(x0, timestep=t, **cond).sample for net in (model, again))
    assert torch.equal(one, two) and not torch.allclose(one, plain, atol=1e-4)


def pipeline(unet):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=2, sample_size=8,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    made = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler(steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def test_a_stock_pipeline_loads_scales_and_unloads_the_adapter(tmp_path):
    model, (x0, cond) = build("unet"), example("unet")
    train_smooth_lora(model, [(x0, cond)], scheduler(), tmp_path, steps=2, lr=3e-2)
    torch.manual_seed(5)
    stock = pipeline(build("unet"))
    ours = pipeline(model)
    ours.vae = stock.vae
    told = {
        "prompt_embeds": cond["encoder_hidden_states"][:1],
        "negative_prompt_embeds": torch.zeros(1, 5, 8),
        "num_inference_steps": 3,
        "latents": x0[:1],
        "output_type": "latent",
    }
    plain, wanted = stock(**told).images, ours(**told).images
    stock.load_lora_weights(tmp_path)
    found = stock(**told).images
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found, plain, atol=1e-3)
    stock.unload_lora_weights()
    assert torch.allclose(stock(**told).images, plain, atol=1e-6)
    fresh = build("unet")
    fresh.load_lora_adapter(tmp_path, prefix="unet", adapter_name="other", use_safetensors=True)
    assert save_smooth_lora(fresh, tmp_path / "copy", adapter="other").exists()


def test_a_stock_pipeline_walks_between_noises():
    pipe = pipeline(build("unet"))
    a, b = torch.randn(2, 1, 4, 8, 8)
    embeds = torch.randn(2, 1, 5, 8)
    settings = {"negative_prompt_embeds": torch.zeros(4, 5, 8), "num_inference_steps": 2}
    frames = interpolate(pipe, a, b, prompt_embeds=(embeds[0], embeds[1]), num_frames=4, **settings)
    assert frames.shape == (4, 1, 3, 8, 8)
    settings["negative_prompt_embeds"] = torch.zeros(1, 5, 8)
    last = pipe(latents=b, prompt_embeds=embeds[1], output_type="pt", **settings).images
    assert torch.allclose(frames[-1], last, atol=1e-4)
    dit = diffusers.DiTPipeline(build("dit"), pipe.vae, pipe.scheduler)
    with pytest.raises(ValueError, match="`generate` must be a pipeline whose call takes `latents`, or a function"):
        interpolate(dit, a, b, class_labels=[1] * 4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_sampling_is_that_of_the_stock_scheduler(kind, spacing):
    model, (x0, cond) = build("unet"), example("unet")
    stock = scheduler(kind, timestep_spacing=spacing)
    ours = ddim_sample(model, x0, stock, cond=cond, steps=5)
    stock.set_timesteps(5)
    z = x0
    with torch.no_grad():
        for t in stock.timesteps:
            z = stock.step(model(z, t, **cond).sample, t, z).prev_sample
    assert torch.allclose(ours, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_inversion_is_that_of_the_stock_scheduler(kind):
    model, (x0, cond) = build("unet"), example("unet")
    ours = ddim_invert(model, x0, scheduler(kind), cond=cond, steps=5)[-1]
    inverse = diffusers.DDIMInverseScheduler.from_config(scheduler(kind).config)
    inverse.set_timesteps(5)
    z = x0
    with torch.no_grad():
        for t in inverse.timesteps:
            z = inverse.step(model(z, t, **cond).sample, t, z).prev_sample
    assert torch.allclose(ours, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_predictions_are_read_as_the_stock_scheduler_reads_them(kind):
    stock = scheduler(kind)
    x0, noise = torch.randn(2, 3, 1, 8, 8)
    t = torch.tensor([1, 400, 999])
    a, s = levels(stock, t, x0)
    z = stock.add_noise(x0, noise, t)
    assert torch.allclose(z, a * x0 + s * noise, atol=1e-5)
    said = target(kind, x0, noise, a, s)
    if kind == "v_prediction":
        assert torch.allclose(said, stock.get_velocity(x0, noise, t), atol=1e-5)
    stock.set_timesteps(1000)
    for i in range(3):
        theirs = stock.step(said[i : i + 1] + 0.1, int(t[i]), z[i : i + 1]).pred_original_sample
        assert torch.allclose(predict_x0(said + 0.1, z, t, stock)[i], theirs[0], rtol=1e-4, atol=1e-4)


def test_flow_matching_is_sampled_as_the_stock_scheduler_does():
    model, (x0, cond) = build("unet"), example("unet")
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = ddim_sample(model, x0, stock, cond=cond, steps=4)
    stock.set_timesteps(4)
    z = x0
    with torch.no_grad():
        for t in stock.timesteps:
            z = stock.step(model(z, t, **cond).sample, t, z).prev_sample
    assert torch.allclose(ours, z, rtol=1e-4, atol=1e-4)
    run = train_smooth_lora(model, [(x0, cond)], diffusers.FlowMatchEulerDiscreteScheduler(), steps=2)
    assert len(run.variations) == 2


def test_null_text_inversion_through_a_stock_unet():
    model, (x0, cond) = build("unet"), example("unet")
    null = {"encoder_hidden_states": torch.zeros(1, 5, 8)}
    inverter = NullTextInverter(model, scheduler(), steps=4, guidance_scale=5.0, inner_steps=10, lr=0.1)
    found = inverter.invert(x0, cond, null)
    plain = ddim_sample(
        model, found.noise, scheduler(), cond=cond,
        null_cond={"encoder_hidden_states": torch.zeros(2, 5, 8)}, steps=4, guidance_scale=5.0,
    )  # fmt: skip
    assert float((inverter.reconstruct(found, cond) - x0).norm()) < float((plain - x0).norm())


def test_stock_attention_is_refused_until_it_is_plain():
    model, (x0, cond) = build("dit").eval(), example("dit")
    noise = torch.randn_like(x0).requires_grad_()
    t, stock = torch.tensor([10, 500]), scheduler()
    abar = stock.alphas_cumprod[t]
    a, s = levels(stock, t, x0)

    def loss():
        z = a * x0 + s * noise
        x0hat = predict_x0(model(z, timestep=t, **cond).sample[:, :1], z, t, stock)
        return StepwiseVariationRegularizer()(x0hat, noise, abar)[0]

    with pytest.raises(ValueError, match="sdpa_kernel"):
        loss()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss().backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())
