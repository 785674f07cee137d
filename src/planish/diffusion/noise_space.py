"""Walk from one noise to another, and measure how evenly the images follow: slerp, interpolation, ISTD."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from planish._support import bad

_STRAIGHT = 0.9995
"""Cosine from which the arc is taken for its chord, where its formula is 0 / 0."""


def slerp(
    a: Float[Tensor, "batch *shape"], b: Float[Tensor, "batch *shape"], t: Tensor | int | float
) -> Float[Tensor, "..."]:
    """Interpolate between noises along the arc of their directions, so that the norm stays that of noise.

    Computed in float64. Each row is a vector of its own; unequal norms are kept as they are, as everybody does.

    Args:
        a: Noises at t = 0, none of them zero.
        b: Noises at t = 1.
        t: One position, or several as a vector; [0, 1] lies between the ends.

    Returns:
        For one t of the ends' shape, for a vector (len(t), batch, *shape); of the ends' dtype.

    Raises:
        ValueError: Shapes differ, a noise is zero or not finite, or two ends are opposite: no arc is shortest then.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> slerp(a, b, 0.5)
        tensor([[0.7071, 0.7071]])
    """
    if a.shape != b.shape or a.ndim < 2:
        raise bad("slerp", "b", f"of the shape of `a`, (batch, ...); `a` has {tuple(a.shape)}", tuple(b.shape))
    where = torch.as_tensor(t, dtype=torch.float64, device=a.device)
    if where.ndim > 1:
        raise bad("slerp", "t", "a number or a vector", tuple(where.shape))
    u, v = a.double().flatten(1), b.double().flatten(1)
    sizes = u.norm(dim=1) * v.norm(dim=1)
    if not bool((sizes > 0).all() and sizes.isfinite().all()):
        raise bad("slerp", "a and b", "finite and not zero", "norms " + str(sizes.tolist()[:4]))
    cosine = ((u * v).sum(1) / sizes).clamp(-1, 1)
    if bool((cosine < -_STRAIGHT).any()):
        raise bad("slerp", "b", "no opposite of `a`, for all arcs between opposites are equally short", "cosine -1")
    angle = cosine.acos()
    straight = cosine > _STRAIGHT
    sine = torch.where(straight, 1, angle.sin())
    places = where.reshape(-1, 1)
    left = torch.where(straight, 1 - places, ((1 - places) * angle).sin() / sine)
    right = torch.where(straight, places, (places * angle).sin() / sine)
    made = (left[..., None] * u + right[..., None] * v).reshape(-1, *a.shape).to(a.dtype)
    return made if where.ndim else made[0]


def interpolate(
    generate: Callable[..., Any],
    a: Float[Tensor, "batch *shape"],
    b: Float[Tensor, "batch *shape"],
    prompt: str | None = None,
    *,
    num_frames: int = 9,
    prompt_embeds: tuple[Tensor, Tensor] | None = None,
    batch_size: int | None = None,
    **kwargs: Any,  # noqa: ANN401  (the pipeline's own)
) -> Float[Tensor, "frames batch *image"]:
    """Generate the images of noises on the arc between two.

    Args:
        generate: A diffusers pipeline whose call takes `latents`, or a function noise -> images.
        a: Noises of the first frame; the noisiest latents of `ddim_invert` for real images.
        b: Noises of the last frame.
        prompt: The pipeline's prompt.
        num_frames: Images a pair, both ends included, >= 2; default 9.
        prompt_embeds: Embeddings of two prompts, (1, tokens, channels) each, to go between in a straight line.
        batch_size: Frames a call; default all.
        **kwargs: Passed to the pipeline: `num_inference_steps`, `guidance_scale`, ...

    Raises:
        ValueError: Fewer than two frames, equal or opposite ends, or a pipeline that takes no latents.

    Example:
        >>> a, b = torch.eye(2)[:1], torch.eye(2)[1:]
        >>> interpolate(lambda noise: 2 * noise, a, b, num_frames=3)[:, 0]
        tensor([[2.0000, 0.0000],
                [1.4142, 1.4142],
                [0.0000, 2.0000]])
    """
    if num_frames < 2:
        raise bad("interpolate", "num_frames", "at least 2", num_frames)
    _refuse_equal("interpolate", a, b)
    places = torch.linspace(0, 1, num_frames, dtype=torch.float64)
    frames = slerp(a, b, places)
    flat = frames.flatten(0, 1)
    pipeline = hasattr(generate, "scheduler") and hasattr(generate, "components")
    made = []
    for start in range(0, len(flat), batch_size or len(flat)):
        part = flat[start : start + (batch_size or len(flat))]
        if not pipeline:
            made.append(generate(part, **kwargs))
            continue
        more = dict(kwargs)
        if prompt is not None:
            more["prompt"] = [prompt] * len(part)
        if prompt_embeds is not None:
            share = places.repeat_interleave(len(a))[start : start + len(part)].to(prompt_embeds[0]).reshape(-1, 1, 1)
            more["prompt_embeds"] = (1 - share) * prompt_embeds[0] + share * prompt_embeds[1]
        try:
            made.append(generate(latents=part, output_type="pt", **more).images)
        except TypeError as error:
            if "latents" not in str(error):
                raise
            raise bad(
                "interpolate", "generate", "a pipeline whose call takes `latents`, or a function", type(generate)
            ) from None
    images = torch.cat([torch.as_tensor(part) for part in made])
    return images.reshape(num_frames, len(a), *images.shape[1:])


@dataclass(frozen=True)
class ISTDResult:
    """How evenly images follow noises.

    All distances are of images scaled to [0, 1], in the Euclidean norm over the whole image.

    Attributes:
        istd: Mean over pairs of the standard deviation (by the number of steps, not one less) of the distances between
            neighbours; 0 for equal steps. It also falls when images merely lose contrast: look at the next two.
        mean_step: Mean distance between neighbours.
        cv: Mean over pairs of standard deviation over mean: free of scale.
        max_over_mean: Mean over pairs of the largest step over the mean one: free of scale.
        per_pair: The distances, (pairs, num_points - 1).

    Example:
        >>> istd(lambda noise: noise, torch.randn(2, 3, 50), data_range=2.0).cv < 1e-1
        True
    """

    istd: float
    mean_step: float
    cv: float
    max_over_mean: float
    per_pair: Tensor

    def __str__(self) -> str:
        return (
            f"ISTD {self.istd:.4g}, mean step {self.mean_step:.4g}, std / mean {self.cv:.3f}, "
            f"largest / mean {self.max_over_mean:.3f}, over {len(self.per_pair)} pairs"
        )


def istd(
    sample_fn: Callable[..., Tensor],
    pairs: Float[Tensor, "2 pairs *shape"],
    conditions: Sequence[object] | Tensor | None = None,
    *,
    num_points: int = 11,
    data_range: int | float = 1.0,
    pairs_per_call: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ISTDResult:
    """Measure the interpolation standard deviation: how unequal the steps of images are along arcs of noise.

    Models are compared on the same pairs and conditions, by the same sampler and guidance scale.

    Args:
        sample_fn: (noises) or (noises, conditions) -> images, one a row; deterministic.
        pairs: The ends: `torch.randn(2, n, *shape, generator=...)`; the paper takes n = 500.
        conditions: One a pair (prompts, labels); repeated for every noise of the pair.
        num_points: Noises a pair, ends included, >= 3; default 11, the paper's.
        data_range: Width of the range of the images' values, > 0: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.
        pairs_per_call: Pairs in one call of `sample_fn`; default 1.
        progress: Called with (pairs done, pairs).

    Raises:
        ValueError: An argument is out of range, there are fewer than 3 points, two ends are equal or opposite, or
            images are not finite.

    Example:
        >>> wavy = istd(lambda noise: noise + 0.5 * (5 * noise).sin(), torch.randn(2, 20, 4))
        >>> plain = istd(lambda noise: noise, torch.randn(2, 20, 4))
        >>> wavy.cv > 2 * plain.cv
        True
    """
    if pairs.ndim < 3 or len(pairs) != 2 or pairs.shape[1] == 0:
        raise bad("istd", "pairs", "of shape (2, pairs, ...)", tuple(pairs.shape))
    if num_points < 3:
        raise bad("istd", "num_points", "at least 3", num_points)
    if not data_range > 0:
        raise bad("istd", "data_range", "> 0", data_range)
    if pairs_per_call < 1:
        raise bad("istd", "pairs_per_call", "at least 1", pairs_per_call)
    if conditions is not None and len(conditions) != pairs.shape[1]:
        raise bad("istd", "conditions", f"one a pair ({pairs.shape[1]})", len(conditions))
    _refuse_equal("istd", pairs[0], pairs[1])
    places = torch.linspace(0, 1, num_points, dtype=torch.float64)
    found = []
    for start in range(0, pairs.shape[1], pairs_per_call):
        some = slice(start, start + pairs_per_call)
        noises = slerp(pairs[0, some], pairs[1, some], places).transpose(0, 1)
        flat = noises.flatten(0, 1)
        if conditions is None:
            images = sample_fn(flat)
        elif isinstance(conditions, Tensor):
            images = sample_fn(flat, conditions[some].repeat_interleave(num_points, 0))
        else:
            images = sample_fn(flat, [c for c in conditions[some] for _ in range(num_points)])
        if len(images) != len(flat):
            raise bad("istd", "sample_fn", f"returning an image for each of {len(flat)} noises", len(images))
        if not bool(images.isfinite().all()):
            raise bad("istd", "sample_fn", "returning finite images", f"others in pairs {start}...")
        walk = images.detach().double().reshape(len(noises), num_points, -1) / data_range
        found.append(walk.diff(dim=1).norm(dim=2).cpu())
        if progress is not None:
            progress(min(start + pairs_per_call, pairs.shape[1]), pairs.shape[1])
    steps = torch.cat(found)
    std, mean = steps.std(1, correction=0), steps.mean(1)
    if not bool((mean > 0).all()):
        raise bad("istd", "sample_fn", "returning images that depend on the noise", "pairs with equal images")
    return ISTDResult(
        istd=float(std.mean()),
        mean_step=float(mean.mean()),
        cv=float((std / mean).mean()),
        max_over_mean=float((steps.amax(1) / mean).mean()),
        per_pair=steps,
    )


def _refuse_equal(where: str, a: Tensor, b: Tensor) -> None:
    if a.shape == b.shape and bool((a == b).flatten(1).all(1).any()):
        raise bad(where, "b", "different from `a` in every pair", "equal ends")
