"""Make equal steps in a diffusion model's noise equal steps in its images: step-wise variation regularization.

Between two noises lie noises, and the images that a model makes of them jump. Ideally the image would move as much as
the noise does, everywhere: |d x0| = C |d noise|. Training sees one time t only, so this is asked of what the model
predicts there,

    |d x0hat| in proportion to sqrt(1 - abar_t) |d noise|,                                  (8)

and approached by making the norm n of a product with the Jacobian J = d x0hat / d noise, in random directions D, the
same for all noises, times and directions: then J J^T is a multiple of the identity.

    n = sqrt(1 - abar_t) |J^T D|,    L = L_base + weight mean (n - a)^2,    a = running mean of n      (9, 10)

D weighs the outputs whose derivative is taken, as in any reverse-mode product; it is not added to the noise.

================  ==============================  =====================================
paper             here                            shape, range
================  ==============================  =====================================
lambda            ``weight``                      >= 0; 1
a                 ``mean_variation``              (1,), or one a bucket of noise levels
decay of a        ``decay``                       (0, 1]; 0.01
abar_t            ``alphas_cumprod_t``            (batch,), [0, 1]
x0hat             ``pred_x0``                     (batch, ...)
================  ==============================  =====================================

Differs from the paper: a starts as the first batch's mean, not at 0; it is shared by all ranks and saved with the
module; the factor sqrt((1 - abar) / abar) in J is clamped at ``max_ratio``, above every value of Stable Diffusion's
schedule (14.6) but not of others (158), where it would take all of the loss.
When to use: to interpolate, invert or edit. As a LoRA: ``train_smooth_lora``. See ``docs/jobs/smooth.md``.

Reference:
    Guo et al., Smooth Diffusion: Crafting Smooth Latent Spaces in Diffusion Models, CVPR 2024.
    https://arxiv.org/abs/2312.04410
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from planish._support import bad

_WHERE = "StepwiseVariationRegularizer"
_LEAST, _MOST = 0.05, 20.0
"""Where buckets of sqrt((1 - abar) / abar) begin and end."""
_FUSED = ("FlashAttention", "EfficientAttention", "CudnnAttention", "FusedAttention", "fMHA")


@dataclass(frozen=True)
class VariationStats:
    """What the regularizer saw in a batch.

    Attributes:
        variation: n of each sample, detached.
        target: a, after this batch; one a bucket.
        penalty: mean (n - a)^2, without weights.

    Example:
        >>> noise = torch.randn(4, 8, requires_grad=True)
        >>> _, stats = StepwiseVariationRegularizer()(2 * noise, noise, torch.full((4,), 0.5))
        >>> stats.variation.shape, stats.target.shape
        (torch.Size([4]), torch.Size([1]))
    """

    variation: Tensor
    target: Tensor
    penalty: float

    @property
    def mean(self) -> float:
        """Mean of n."""
        return float(self.variation.mean())

    @property
    def std(self) -> float:
        """Standard deviation of n, by the number of samples."""
        return float(self.variation.std(correction=0))


class StepwiseVariationRegularizer(nn.Module):
    """Penalize noises whose prediction varies more, or less, than the average one's.

    Call it with the prediction (second derivatives; the published way) or use `along` with a function (first
    derivatives only). In `eval` mode the running mean stays as it is.

    Args:
        weight: lambda, >= 0; default 1, the paper's. Quality falls from 10 on.
        decay: Share of the newest batch in the running mean, in (0, 1]; default 0.01, the official code's.
        scope: "global" for one mean; "per_timestep" for one a bucket of log sqrt((1 - abar) / abar).
        buckets: Number of buckets of "per_timestep"; default 10.
        max_ratio: Bound on sqrt((1 - abar) / abar), > 0; samples beyond count as if they were there; None for none.
        every: Regularize every k-th step, with k times the weight; default 1. The caller asks `due(step)`.
        normalize_probe: Make D a unit vector exactly instead of in expectation; default False.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> reg, noise = StepwiseVariationRegularizer(), torch.randn(4, 3, 8, 8, requires_grad=True)
        >>> alphas = torch.tensor([0.9, 0.5, 0.5, 0.1])
        >>> z = alphas.sqrt().view(-1, 1, 1, 1) * torch.ones(4, 3, 8, 8) + noise     # the noise first, then z_t
        >>> loss, stats = reg(z.sin(), noise, alphas, generator=torch.Generator().manual_seed(0))
        >>> loss.requires_grad, bool(torch.isclose(reg.mean_variation, stats.variation.mean()))
        (True, True)
    """

    mean_variation: Tensor
    seen: Tensor

    def __init__(
        self,
        weight: int | float = 1.0,
        decay: int | float = 0.01,
        *,
        scope: Literal["global", "per_timestep"] = "global",
        buckets: int = 10,
        max_ratio: int | float | None = 15.0,
        every: int = 1,
        normalize_probe: bool = False,
    ) -> None:
        super().__init__()
        if not (weight >= 0 and math.isfinite(weight)):
            raise bad(_WHERE, "weight", "a finite number >= 0", weight)
        if not 0 < decay <= 1:
            raise bad(_WHERE, "decay", "in (0, 1]", decay)
        if scope not in {"global", "per_timestep"}:
            raise bad(_WHERE, "scope", "'global' or 'per_timestep'", scope)
        if max_ratio is not None and not max_ratio > 0:
            raise bad(_WHERE, "max_ratio", "> 0 or None", max_ratio)
        for name, value in (("buckets", buckets), ("every", every)):
            if not (isinstance(value, int) and value >= 1):
                raise bad(_WHERE, name, "an int >= 1", value)
        self.weight, self.decay, self.scope, self.max_ratio = float(weight), float(decay), scope, max_ratio
        self.every, self.normalize_probe = every, normalize_probe
        count = buckets if scope == "per_timestep" else 1
        self.register_buffer("mean_variation", torch.zeros(count))
        self.register_buffer("seen", torch.zeros(count, dtype=torch.bool))

    def extra_repr(self) -> str:
        """Name the settings."""
        text = f"weight={self.weight:g}, decay={self.decay:g}, scope={self.scope!r}, every={self.every}"
        return f"{text}, max_ratio={self.max_ratio}, normalize_probe={self.normalize_probe}"

    def due(self, step: int) -> bool:
        """Tell whether step number `step`, from 0, is to be regularized."""
        return self.weight > 0 and step % self.every == 0

    def forward(
        self,
        pred_x0: Float[Tensor, "batch *shape"],
        noise: Float[Tensor, "batch *shape"],
        alphas_cumprod_t: Float[Tensor, " batch"],
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], VariationStats]:
        """Return weight * every * mean (n - a)^2 and what was seen; n = sqrt(1 - abar) |J^T D|.

        Args:
            pred_x0: The prediction, made from `noise`, with its graph.
            noise: A leaf or not, but with `requires_grad` before the noisy sample was made of it.
            alphas_cumprod_t: abar of each sample's time. For flow matching (1 - s)^2 / ((1 - s)^2 + s^2).
            generator: Source of the directions.

        Raises:
            ValueError: Shapes differ, the prediction does not depend on the noise, numbers are of half precision, or
                the prediction went through fused attention.
        """
        self._check(noise, alphas_cumprod_t, pred_x0)
        if not noise.requires_grad:
            raise bad(_WHERE, "noise", "of requires_grad=True before the noisy sample is made of it", False)
        _refuse_fused(pred_x0)
        probe = self._direction(noise, alphas_cumprod_t, generator)
        weighed = (pred_x0 * probe.to(pred_x0)).sum()
        found = (
            torch.autograd.grad(weighed, noise, create_graph=True, allow_unused=True)[0] if _traced(weighed) else None
        )
        if found is None:
            raise bad(_WHERE, "pred_x0", "made from `noise` (which must require its gradient first)", "no dependence")
        return self._penalty(found, alphas_cumprod_t)

    def along(
        self,
        predict: Callable[[Tensor], Tensor],
        noise: Float[Tensor, "batch *shape"],
        alphas_cumprod_t: Float[Tensor, " batch"],
        *,
        step: int | float | None = 0.1,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, ""], VariationStats]:
        """Return pred_x0, the loss and what was seen, for n = sqrt(1 - abar) |J D|: no second derivatives.

        The minimizers are the same (J orthogonal up to a factor), so is the mean square of n; any attention will do
        with differences.

        Args:
            predict: noise -> pred_x0, one sample a row; called twice for differences. Dropout must be off.
            noise: The noise.
            alphas_cumprod_t: As above.
            step: Length of the difference, > 0, where noise has length sqrt(dim); None for an exact derivative by
                forward-mode differentiation.
            generator: Source of the directions.

        Raises:
            ValueError: Shapes differ, `step` is not positive, or numbers are of half precision.
        """
        if step is not None and not step > 0:
            raise bad(_WHERE, "step", "> 0 or None", step)
        self._check(noise, alphas_cumprod_t, noise)
        probe = self._direction(noise, alphas_cumprod_t, generator)
        if step is None:
            pred_x0, found = torch.func.jvp(predict, (noise,), (probe,))[:2]
        else:
            pred_x0 = predict(noise)
            found = (predict(noise + step * probe) - pred_x0) / step
        self._check(noise, alphas_cumprod_t, pred_x0)
        loss, stats = self._penalty(found, alphas_cumprod_t)
        return pred_x0, loss, stats

    def _check(self, noise: Tensor, alphas: Tensor, pred_x0: Tensor) -> None:
        if pred_x0.shape != noise.shape:
            raise bad(_WHERE, "pred_x0", f"of the noise's shape {tuple(noise.shape)}", tuple(pred_x0.shape))
        if alphas.shape != noise.shape[:1]:
            raise bad(_WHERE, "alphas_cumprod_t", f"of shape ({len(noise)},)", tuple(alphas.shape))
        if not bool(((alphas >= 0) & (alphas <= 1)).all()):
            raise bad(_WHERE, "alphas_cumprod_t", "in [0, 1]", [float(alphas.min()), float(alphas.max())])
        kind = noise.device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
        if cast or torch.float16 in {pred_x0.dtype, noise.dtype}:
            raise bad(
                _WHERE, "pred_x0", "of float32 or bfloat16, for second derivatives overflow in float16", "float16"
            )

    def _direction(self, noise: Tensor, alphas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw D, times sqrt(1 - abar) and the clamp's share."""
        where = noise.device if generator is None else generator.device
        kind = torch.float64 if noise.dtype is torch.float64 else torch.float32
        flat = torch.randn(len(noise), noise[0].numel(), generator=generator, device=where, dtype=kind).to(noise.device)
        flat = flat / (flat.norm(dim=1, keepdim=True) if self.normalize_probe else math.sqrt(flat.shape[1]))
        alphas = alphas.to(flat)
        level = (1 - alphas).sqrt()  # eq. (8)
        if self.max_ratio is not None:
            level = level * (self.max_ratio * (alphas / (1 - alphas)).sqrt()).clamp_max(1)
        level = torch.where(alphas < 1, level, 0)
        return (flat * level[:, None]).reshape(noise.shape).to(noise.dtype)

    def _penalty(self, found: Tensor, alphas: Tensor) -> tuple[Tensor, VariationStats]:
        """Return the loss of products with the Jacobian, and move the mean."""
        wide = found.flatten(1).to(torch.promote_types(found.dtype, torch.float32))
        n = (wide.square().sum(1) + 1e-12).sqrt()  # eq. (9); a root of 0 has no derivative
        valid = (alphas > 0).to(n)  # without any signal, J says nothing
        count = len(self.mean_variation)
        ratio = ((1 - alphas) / alphas).to(n).sqrt().clamp(_LEAST, _MOST)
        place = (ratio / _LEAST).log() / math.log(_MOST / _LEAST)  # even in log(s / a): times of like variation meet
        bucket = (place * count).long().clamp_max(count - 1)
        sums = n.new_zeros(count).index_add(0, bucket, n * valid)
        counts = n.new_zeros(count).index_add(0, bucket, valid)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everywhere = torch.stack([sums.detach(), counts])
            torch.distributed.all_reduce(everywhere)
            sums, counts = sums + (everywhere[0] - sums.detach()), everywhere[1]
        mean = sums / counts.clamp_min(1)
        old = torch.where(self.seen, self.mean_variation.to(n), mean.detach())
        new = torch.where(
            counts > 0, old + self.decay * (mean - old), old
        )  # with its graph, as the official code has it
        penalty = ((n - new[bucket]).square() * valid).sum() / valid.sum().clamp_min(1)  # eq. (10)
        if self.training:
            self.mean_variation.copy_(new.detach())
            self.seen |= counts > 0
        stats = VariationStats(n.detach(), new.detach(), float(penalty.detach()))
        return self.weight * self.every * penalty, stats


def _traced(x: Tensor) -> bool:
    return x.grad_fn is not None


def _refuse_fused(pred_x0: Tensor) -> None:
    """Refuse, before it fails without a name, what cannot be differentiated twice."""
    stack, met = [pred_x0.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in met:
            continue
        met.add(node)
        name = node.name()
        if any(part in name for part in _FUSED):
            raise bad(
                _WHERE,
                "pred_x0",
                "made by plain attention (run the model under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), without "
                "xformers), for fused attention has no second derivative",
                name,
            )
        if name.startswith("CheckpointFunction"):
            raise bad(_WHERE, "pred_x0", "checkpointed with use_reentrant=False, or not at all", name)
        stack.extend(parent for parent, _ in node.next_functions)
