"""Small denoisers of diffusers' stock classes, for examples, tests and benchmarks: a transformer and a U-Net.

Both learn images of a few classes, the class given or not (classifier-free guidance), by predicting v on the squared
cosine schedule; both are sampled by any stock scheduler. Trained on scikit-learn's 8 x 8 digits they are good after two
to three minutes on one core, and their layers are those of the large ones: adaptive norms, attention, GELU; residual
blocks, skip connections, convolutions.
"""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from planish._support import bad, require

CLASSES = 10


def _diffusers() -> Any:  # noqa: ANN401  (an optional module)
    return require("diffusers", "diffusers", "planish.diffusion")


def digits_dit(*, classes: int = 1000, layers: int = 4, heads: int = 4, head_dim: int = 32, seed: int = 0) -> Any:  # noqa: ANN401
    """Build a small diffusion transformer for 8 x 8 images in grey (1.9 million parameters).

    Args:
        classes: Its table of classes; 1000, of which digits use ten, because the stock pipeline takes class 1000 for
            "no class".
        layers: Blocks, >= 1.
        heads: Attention heads, >= 1.
        head_dim: Channels of a head, >= 1.
        seed: Of its weights.

    Returns:
        An untrained `diffusers.DiTTransformer2DModel` whose blocks begin as identities.

    Raises:
        ValueError: A size is not positive.
        MissingExtra: diffusers is not installed.

    Example:
        >>> model = digits_dit(layers=1)
        >>> x, t = torch.zeros(2, 1, 8, 8), torch.tensor([9, 9])
        >>> model(x, timestep=t, class_labels=torch.tensor([3, 1000])).sample.shape
        torch.Size([2, 1, 8, 8])
    """
    for name, value in (("classes", classes), ("layers", layers), ("heads", heads), ("head_dim", head_dim)):
        if value < 1:
            raise bad("digits_dit", name, "an integer >= 1", value)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _diffusers().DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=head_dim, in_channels=1, out_channels=1, num_layers=layers,
            sample_size=8, patch_size=2, num_embeds_ada_norm=classes,
        )  # fmt: skip
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    return model.eval()


def digits_unet(*, classes: int = CLASSES, channels: tuple[int, int] = (48, 96), seed: int = 0) -> Any:  # noqa: ANN401
    """Build a small U-Net with attention for 8 x 8 images in grey (1.6 million parameters).

    Args:
        classes: How many; one more stands for "no class".
        channels: At full and at half resolution, multiples of 8.
        seed: Of its weights.

    Returns:
        An untrained `diffusers.UNet2DModel`.

    Raises:
        ValueError: `classes` is not positive, or channels are not two multiples of 8.
        MissingExtra: diffusers is not installed.

    Example:
        >>> model = digits_unet(channels=(16, 16))
        >>> model(torch.zeros(2, 1, 8, 8), 9, class_labels=torch.tensor([3, 10])).sample.shape
        torch.Size([2, 1, 8, 8])
    """
    if classes < 1:
        raise bad("digits_unet", "classes", "an integer >= 1", classes)
    if len(channels) != 2 or any(c < 8 or c % 8 for c in channels):
        raise bad("digits_unet", "channels", "two multiples of 8", channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _diffusers().UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=channels,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8, attention_head_dim=8 * math.gcd(channels[0] // 8, channels[1] // 8) // 2,
            num_class_embeds=classes + 1,
        )  # fmt: skip
    return model.eval()


def null_class(model: nn.Module) -> int:
    """Return the class that stands for "none given".

    Args:
        model: A class-conditional denoiser of diffusers.

    Returns:
        Its last class.

    Raises:
        TypeError: The model takes no classes.

    Example:
        >>> null_class(digits_unet(classes=10, channels=(16, 16)))
        10
    """
    config: Any = getattr(model, "config", {})
    if config.get("num_embeds_ada_norm"):
        return int(config["num_embeds_ada_norm"])
    if config.get("num_class_embeds"):
        return int(config["num_class_embeds"]) - 1
    raise TypeError(f"null_class: `model` must be a class-conditional denoiser; got {type(model).__name__}.")


def digits_scheduler() -> Any:  # noqa: ANN401
    """Build the scheduler that the digits' denoisers are trained for: DDIM on the squared cosine, predicting v.

    Returns:
        A `diffusers.DDIMScheduler`; other stock schedulers take its config.

    Raises:
        MissingExtra: diffusers is not installed.

    Example:
        >>> digits_scheduler().config.prediction_type
        'v_prediction'
    """
    return _diffusers().DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing", set_alpha_to_one=True,
    )  # fmt: skip


def train_denoiser(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    *,
    steps: int = 1000,
    batch_size: int = 128,
    lr: int | float = 1e-3,
    label_dropout: int | float = 0.1,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train a class-conditional denoiser to predict v, in place; its weights end as their running average.

    AdamW, fifty steps of warm-up, a cosine down to nothing, gradients clipped to norm 1.

    Args:
        model: Called as model(noisy, timestep=, class_labels=).
        images: In [-1, 1].
        labels: The class of each.
        steps: Of the optimizer, >= 1.
        batch_size: Images a step, >= 1.
        lr: Highest learning rate, > 0.
        label_dropout: How often a label is hidden, in [0, 1): what guidance needs.
        seed: Of batches, noise and hidden labels.
        progress: Called as progress(step, steps, loss).

    Returns:
        The loss of each step.

    Raises:
        ValueError: A setting is out of its range, or labels do not fit images.
        TypeError: The model takes no classes.
        MissingExtra: diffusers is not installed.

    Example:
        >>> model = digits_unet(channels=(8, 8))
        >>> losses = train_denoiser(model, torch.zeros(8, 1, 8, 8), torch.arange(8), steps=2, batch_size=4)
        >>> len(losses)
        2
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise bad("train_denoiser", name, "an integer >= 1", value)
    if not lr > 0:
        raise bad("train_denoiser", "lr", "a float > 0", lr)
    if not 0 <= label_dropout < 1:
        raise bad("train_denoiser", "label_dropout", "a float in [0, 1)", label_dropout)
    if len(images) != len(labels) or len(images) == 0:
        raise bad("train_denoiser", "labels", f"one for each of {len(images)} images", len(labels))
    none = null_class(model)
    scheduler = _diffusers().DDPMScheduler.from_config(digits_scheduler().config)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99))
    average, losses = copy.deepcopy(model), []
    model.train()
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.eval()  # it would hide labels block by block; they are hidden here, for the whole model at once
    for step in range(steps):
        scale = min((step + 1) / 50, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        clean, classes = images[chosen], labels[chosen]
        hidden = torch.rand(batch_size, generator=generator) < label_dropout
        classes = torch.where(hidden, none, classes)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy, target = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)
        loss = nn.functional.mse_loss(model(noisy, timestep=t, class_labels=classes).sample, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.99, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, now in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, 1 - decay)
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, steps, losses[-1])
    model.load_state_dict(average.state_dict())
    model.eval()
    return losses


@torch.no_grad()
def sample(
    model: nn.Module,
    labels: Int[Tensor, " n"],
    *,
    steps: int = 10,
    guidance: int | float = 1.5,
    scheduler: Any = None,  # noqa: ANN401  (any of diffusers' schedulers)
    seed: int = 0,
    latents: Float[Tensor, "n c h w"] | None = None,
) -> Float[Tensor, "n c h w"]:
    """Draw images of given classes, as the stock pipeline does, from a transformer or a U-Net.

    Args:
        model: A class-conditional denoiser of diffusers.
        labels: The classes wanted.
        steps: Of the scheduler, >= 1; the model runs once for each, on both branches of guidance together.
        guidance: Weight of the class's direction; 1 or less runs without guidance.
        scheduler: A copy of it is used; None: the one of `digits_scheduler`.
        seed: Of the noise.
        latents: The noise to begin with, instead of that of the seed.

    Returns:
        Images, about in [-1, 1].

    Raises:
        ValueError: `steps` is not positive; `latents` do not fit.
        TypeError: The model takes no classes.
        MissingExtra: diffusers is not installed.

    Example:
        >>> sample(digits_unet(channels=(8, 8)), torch.tensor([3, 7]), steps=2).shape
        torch.Size([2, 1, 8, 8])
    """
    if steps < 1:
        raise bad("sample", "steps", "an integer >= 1", steps)
    none, config = null_class(model), cast(Any, model.config)
    scheduler = copy.deepcopy(digits_scheduler() if scheduler is None else scheduler)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), config["in_channels"], config["sample_size"], config["sample_size"])
    if latents is None:
        latents = torch.randn(shape, generator=generator)
    elif latents.shape != shape:
        raise bad("sample", "latents", f"of shape {shape}", tuple(latents.shape))
    scheduler.set_timesteps(steps)
    x = latents * scheduler.init_noise_sigma
    guided = guidance > 1
    classes = torch.cat([labels, torch.full_like(labels, none)]) if guided else labels
    # Only schedulers that draw noise of their own take a generator.
    noise = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        out = model(both, timestep=t.expand(len(both)), class_labels=classes).sample
        if guided:
            conditional, free = out.chunk(2)
            out = free + guidance * (conditional - free)
        x = scheduler.step(out, t, x, **noise).prev_sample
    return cast(Tensor, x)


def digits_pipeline(model: nn.Module) -> Any:  # noqa: ANN401
    """Put a transformer for pixels into diffusers' stock pipeline.

    Args:
        model: A `diffusers.DiTTransformer2DModel`.

    Returns:
        A `diffusers.DiTPipeline`: `pipeline([3, 7], guidance_scale=1.5, num_inference_steps=10).images`.

    Raises:
        TypeError: The model is not a transformer of this kind.
        MissingExtra: diffusers is not installed.

    Example:
        >>> pipeline = digits_pipeline(digits_dit(layers=1))
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> pipeline([3], num_inference_steps=2).images[0].size
        (8, 8)
    """
    diffusers = _diffusers()
    if not isinstance(model, diffusers.DiTTransformer2DModel):
        kind = type(model).__name__
        raise TypeError(f"digits_pipeline: `model` must be a diffusers.DiTTransformer2DModel; got {kind}.")
    from planish.diffusion.pixels import Pixels  # noqa: PLC0415  (its bases are those of diffusers)

    names = dict(enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")))
    pipeline = diffusers.DiTPipeline(transformer=model, vae=Pixels(), scheduler=digits_scheduler(), id2label=names)
    pipeline.register_to_config(id2label=names)  # or it is not saved
    return pipeline
