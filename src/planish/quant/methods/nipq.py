r"""NIPQ: train weights, ranges and widths under noise instead of rounding, then round.

Quantization-aware training usually rounds in the forward pass and pretends in the backward pass that it did not. The
weights then never rest: one that belongs between two codes jumps from one to the other at every few steps. Here the
forward pass adds a random error with the law of rounding's; what is minimised is a smooth function of everything,

    E[L] = L(w) + 1/2 Var(epsilon) sum_i step_i^2 L_ii + ...,

so weights settle, flat minima are preferred, and the widths of layers can be learned by the same gradients: a layer
with little curvature gives bits to one with much. Only at the end is the true rounding put in.

    x^ = x + epsilon * step inside the range, +-alpha outside;   step = alpha / (2^(b-1) - 1)
    b~ = round(b + U(-1/2, 1/2)) with the gradient of b
    loss + sum of multiplier * gap + gap^2 / 2,   gap = cost(widths) / target - 1

================  =================================  ===========================================
paper             here                               shape, range
================  =================================  ===========================================
alpha             ``NoiseProxy.alpha``               (outputs, groups) or one, > 0, learned as its logarithm
b                 ``Width.value``                    from 2 to 8; learned through a sigmoid
epsilon           ``draw``                           [-1/2, 1/2], in steps; "empirical", "shuffle" or "uniform"
lambda            ``Budget.multiplier``              >= 0, raised until the target is met
================  =================================  ===========================================

Differs from the paper: ranges start where rounding loses least; one range a row or group as well as one for the tensor;
the budget is met by a multiplier that climbs (a fixed weight leaves the average above the target) and by an allocation
of whole widths; layers that share an input share a width, because engines fuse them; widths end at 8 bits, where
formats do. A fixed width is no parameter.

Without training, `nipq()` takes from this only the last idea: it allocates widths by what each layer costs the model.

When to use: with training data and a training loop, at 2 and 3 bits, or for convolutions and small networks; else
`best`.

Reference:
    Shin et al., NIPQ: Noise proxy-based Integrated Pseudo-Quantization, 2023. https://arxiv.org/abs/2206.00820
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.quant.budget import Budget, Part, read_goals
from planish.quant.conv import is_conv
from planish.quant.engine import Method
from planish.quant.experts import unfuse
from planish.quant.formats import SCALE_DTYPES, Affine
from planish.quant.layers import QLinear
from planish.quant.mixed import WIDTHS, Learned, SearchBits, check_widths
from planish.quant.noise import KINDS, NoiseProxy, Width
from planish.quant.proxies import (
    groups_of,
    memory_of,
    proxy_of,
    put,
    renew_norms,
    rounded_layers,
    take_off,
    trace,
    weight_in,
)
from planish.quant.rounding import Clip
from planish.quant.sites import stays_float
from planish.quant.stream import tensors_in

_BUDGET, MULTIPLIER = "_noise_budget", "noise_multiplier"


def attach(
    model: nn.Module,
    sample: Any,  # noqa: ANN401  (a batch of whatever the model takes)
    *,
    bits: float | int | None = None,
    size: float | int | None = None,
    bops: float | int | None = None,
    act_bits: float | int | None = None,
    learn: bool = True,
    group_size: int | None = None,
    per_tensor: bool = False,
    noise: str = "empirical",
    scale_dtype: str = "float16",
    skip: Sequence[str] = ("lm_head",),
    generator: torch.Generator | None = None,
) -> list[str]:
    """Let a model be trained under noise, in place: its layers keep their types, and their weights become noisy ones.

    Concerned are the layers that `quantize` would round: linears of 16 outputs and more inside the blocks; and
    convolutions. In training mode weights (and inputs) carry noise, in eval mode they are rounded.

    Args:
        model: A trained float model.
        sample: A batch of what it takes: who shares an input, ranges and sizes are read from it.
        bits: Average bits of a weight, 2 to 8; default 4 unless `size` or `bops` is given.
        size: Or: bytes of the quantized weights with their scales.
        bops: Or: bit operations for one example, products * bits of the weight * bits of the input (32 for float).
        act_bits: Average bits of the layers' inputs, 2 to 8; None leaves inputs in float. What enters the model itself
            stays in float. With `bops` it is only where widths start.
        learn: Whether widths are learned, within the budget. Default True; False gives every layer the same.
        group_size: Input channels that share a range; None for one range a row (an output). Default None.
        per_tensor: One range for the whole weight, as in the paper. Default False.
        noise: See `planish.quant.noise.draw`; default "empirical".
        scale_dtype: See `planish.quant.Affine`; rounding uses steps of this precision.
        skip: See `quantize`.
        generator: Source of the noise; default torch's own, which gradient checkpointing replays.

    Returns:
        The names of the layers concerned.

    Raises:
        ValueError: An argument is out of range; the model is quantized or has proxies already; it has no such layer;
            a weight or an input is not finite; channels do not divide into groups; the budget cannot be met.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        >>> attach(model, torch.randn(4, 8), bits=3)
        ['0', '2']
        >>> len(torch.unique(model.eval()[0].weight[0])) <= 7  # of its grid
        True
    """
    if noise not in KINDS:
        raise bad("attach", "noise", f"one of {', '.join(KINDS)}", noise)
    if any(isinstance(m, QLinear) for m in model.modules()):
        raise bad("attach", "model", "a float model", "one that holds QLinear layers already")
    if _BUDGET in model.__dict__:
        raise bad("attach", "model", "one without noise proxies", "one that `attach` has seen already")
    goals = read_goals(bits, size, bops, act_bits, learn=learn)
    if per_tensor and group_size is not None:
        raise bad("attach", "group_size", "None with per_tensor=True", group_size)
    grid = Affine(4, group_size, symmetric=True, scale_dtype=scale_dtype)
    unfuse(model)
    layers = rounded_layers(model, skip)
    if not layers:
        raise bad("attach", "model", "one with linears of 16 outputs and more, or convolutions", type(model).__name__)
    calls = trace(model, layers, sample)
    groups = {name: groups_of(name, layers[name], grid) for name in calls}
    given = {memory_of(t) for t in tensors_in(sample)}
    shared: dict[Any, Width] = {}
    parts: dict[str, Part] = {}
    for name, (x, out) in calls.items():
        layer, examples = layers[name], x.shape[0]
        weight = weight_in(layer)
        parts[name] = Part(
            weight=shared.setdefault(memory_of(x), Width(4, learn=learn)),
            inputs=None if act_bits is None or memory_of(x) in given else Width(4, learn=learn),
            n_weights=weight.numel(), n_inputs=x.numel() // examples,
            products=out.numel() // examples * weight[0].numel(),
            overhead=weight.shape[0] * groups[name] * SCALE_DTYPES[scale_dtype].itemsize * 8,
        )  # fmt: skip
    budget = Budget(parts, goals if learn else (), grid)
    budget.start(goals, act_bits)
    for name, part in parts.items():
        shape = () if per_tensor else (weight_in(layers[name]).shape[0], groups[name])
        put(layers[name], part, shape, calls[name], noise=noise, scale_dtype=scale_dtype, generator=generator)
    model.__dict__[_BUDGET] = budget  # no submodule: a Sequential would run it
    model.register_buffer(MULTIPLIER, torch.zeros(len(budget.goals), device=next(iter(calls.values()))[0].device))
    return list(parts)


def cost(model: nn.Module) -> Tensor:
    """Return what is to be added to the loss so that learned widths keep their budget: 0 where they meet it.

    Each call in training mode with gradients moves the multipliers a step: call it once a step of the optimizer.

    Args:
        model: What `attach` has seen.

    Returns:
        A scalar with the gradient of the widths.

    Raises:
        ValueError: The model has no proxies.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> _ = attach(model, torch.randn(4, 8), bits=3)
        >>> abs(cost(model).item()) < 1e-6
        True
    """
    budget = _budget(model, "cost")
    multiplier = model.get_buffer(MULTIPLIER)
    return budget.penalty(multiplier, climb=model.training and torch.is_grad_enabled())


def widths(model: nn.Module) -> dict[str, tuple[float, float | None]]:
    """Return the width of every layer's weight and input (None in float) as they stand.

    Args:
        model: What `attach` has seen.

    Returns:
        Pairs by the layer's name.

    Raises:
        ValueError: The model has no proxies.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> _ = attach(model, torch.randn(4, 8), bits=3, learn=False)
        >>> widths(model)
        {'0': (3.0, None)}
    """
    parts = _budget(model, "widths").parts.items()
    return {n: (p.weight.value.item(), None if p.inputs is None else p.inputs.value.item()) for n, p in parts}


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    range_lr: float | None = None,
    bits_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Return groups for an optimizer: matrices, other parameters, ranges, widths; only matrices decay.

    Args:
        model: What `attach` has seen.
        lr: Of everything that the float model had.
        weight_decay: Of tensors with more than one axis; default 0.
        range_lr: Of the logarithms of ranges; default `lr`.
        bits_lr: Of widths; default 10 times `lr`.

    Returns:
        The groups that are not empty.

    Raises:
        ValueError: The model has no proxies.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> _ = attach(model, torch.randn(4, 8), bits=3)
        >>> [len(group["params"]) for group in param_groups(model, 0.01)]
        [1, 1, 1, 1]
    """
    _budget(model, "param_groups")
    ranges = {id(m.log_alpha) for m in model.modules() if isinstance(m, NoiseProxy)}
    bits = {id(m.raw) for m in model.modules() if isinstance(m, Width) and m.raw is not None}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ranges | bits]
    made = [
        {"params": [p for p in rest if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if id(p) in ranges], "lr": range_lr or lr, "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if id(p) in bits], "lr": bits_lr or 10 * lr, "weight_decay": 0.0},
    ]
    return [group for group in made if group["params"]]


def freeze(model: nn.Module, batches: Iterable[Any] | None = None, *, widths: Sequence[int] = WIDTHS) -> dict[str, int]:
    """End the noise, in place: fix whole widths within the budget, round from now on, and renew batch norms.

    Some epochs of training afterwards, with the straight-through gradient, let the network settle.

    Args:
        model: What `attach` has seen.
        batches: Data for the running statistics of batch norms, which were collected under noise; default None, which
            leaves them to the training that follows.
        widths: What learned widths may become. Default 2, 3, 4, 5, 6, 8; stock vLLM reads 4 and 8.

    Returns:
        The width of every layer's weight.

    Raises:
        ValueError: The model has no proxies, or no such widths keep the budget.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> _ = attach(model, torch.randn(4, 8), bits=3)
        >>> freeze(model)
        {'0': 3}
    """
    budget = _budget(model, "freeze")
    budget.settle(check_widths("freeze", widths))
    for proxy in model.modules():
        if isinstance(proxy, NoiseProxy):
            proxy.noisy = False
    if batches is not None:
        renew_norms(model, batches)
    return {name: int(part.weight.whole) for name, part in budget.parts.items()}


def learned(model: nn.Module, *, inputs: str | None = None) -> Method:
    """Take the proxies off, in place, and return the method that rounds the model to what was trained.

    `quantize(model, batches, learned(model))` then makes the layers. Convolutions that have none to become (of one or
    three dimensions, or with fewer than 16 outputs) keep float tensors, with the rounded values.

    Args:
        model: What `attach` has seen; it is frozen first if it is not yet.
        inputs: Where inputs were rounded too: "token" rounds them by the learned widths with ranges of each token
            (or image), as the library's layers do (the learned ranges are of the whole tensor, so outputs change);
            "float" leaves them alone. Default None, for models whose inputs were not rounded.

    Returns:
        The method.

    Raises:
        ValueError: The model has no proxies; inputs were rounded and `inputs` does not say what becomes of that.

    Example:
        >>> from planish.quant import quantize
        >>> model = nn.Sequential(nn.Linear(8, 16))
        >>> x = torch.randn(4, 8)
        >>> _ = attach(model, x, bits=3)
        >>> before = model.eval()(x)
        >>> _ = quantize(model, [x], learned(model))
        >>> type(model[0]).__name__, torch.allclose(model(x), before, atol=1e-4)
        ('QLinear', True)
    """
    budget = _budget(model, "learned")
    rounded_inputs = any(part.inputs is not None for part in budget.parts.values())
    if inputs not in (None, "token", "float"):
        raise bad("learned", "inputs", "'token', 'float' or None", inputs)
    if rounded_inputs and inputs is None:
        raise bad("learned", "inputs", "'token' or 'float', as this model's inputs were rounded", inputs)
    if any(isinstance(m, NoiseProxy) and m.noisy for m in model.modules()):
        freeze(model)
    scales: dict[str, Tensor] = {}
    convolutions = False
    for name in budget.parts:
        layer = model.get_submodule(name)
        made, values = proxy_of(layer), cast(Tensor, layer.weight).detach()
        take_off(layer)
        if isinstance(layer, nn.Linear) or (is_conv(layer) and not stays_float(layer)):
            scales[name] = made.steps(len(values))
            convolutions |= is_conv(layer)
        else:
            with torch.no_grad():
                weight_in(layer).copy_(values)
    del model.__dict__[_BUDGET], model._buffers[MULTIPLIER]
    digest = hashlib.sha256(b"".join(s.cpu().float().numpy().tobytes() for s in scales.values())).hexdigest()[:16]
    bits = {name: int(budget.parts[name].weight.whole) for name in scales}
    acts = {n: int(p.whole) for n in scales if (p := budget.parts[n].inputs) is not None and inputs == "token"}
    most = max(bits.values(), key=list(bits.values()).count, default=4)
    rounding = Learned(tuple(bits.items()), tuple(acts.items()), digest, scales)
    return Method("nipq", replace(budget.grid, bits=most), round=rounding, convolutions=convolutions)


def nipq(
    *,
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    ragged: bool = False,
    scale_dtype: str = "float16",
    widths: tuple[int, ...] = WIDTHS,
    objective: str | None = None,
) -> Method:
    """Allocate widths by what each layer costs the model, with `bits` on average, and clip ranges: without training.

    NIPQ proper trains: see `attach`.

    Args:
        bits: Average bits of a weight, within the range of `widths`; default 4.
        group_size: Input channels that share a scale; None for one scale a row. Default 128.
        symmetric: No zero points. Default False.
        ragged: Allow a shorter last group.
        scale_dtype: See `planish.quant.Affine`.
        widths: See `planish.quant.mixed.SearchBits`.
        objective: See `planish.quant.mixed.SearchBits`.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> nipq(bits=3).plan.widths
        (2, 3, 4, 5, 6, 8)
    """
    grid = Affine(bits, group_size, symmetric, ragged, scale_dtype)
    return Method("nipq", grid, plan=SearchBits(widths=widths, objective=objective), round=Clip())


def _budget(model: nn.Module, where: str) -> Budget:
    found = model.__dict__.get(_BUDGET)
    if not isinstance(found, Budget):
        raise bad(where, "model", "one that `attach` has seen", type(model).__name__)
    return found
