r"""CacheQuant: run the whole network at few steps, reuse its features at the others, and correct what is lost.

Features of a denoiser change little from step to step. Steps are cut into groups; the first of a group runs in full and
the others reuse its feature X_c. Where to cut is found exactly, by dynamic programming over the features X_g of a run
without a cache; what is left is corrected per channel, first for the cache, then for the quantization after it.

    D(i, j) = sum_{t=i}^{j-1} |X_t - X_i|_1                                            (cost of a group)
    M(n, k) = min_j M(j, k-1) + D(j, n),      ceil(N/2) <= n - j <= 2N                 (cheapest cut)
    X_g ~= a1 X_c + b1,      a1 = Cov(X_c, X_g) / Var(X_c)                             (cache part)
    O ~= a2 O_q + b2,        a2 = Cov(O_q, O) / Var(O_q)                               (quantization part)

================  ==============================  =====================================
paper             here                            shape, range
================  ==============================  =====================================
T, N, K           ``steps, interval, n_groups``   K = ceil(T / N)
D                 ``distances``                   (T, T), see `StepDistances`
a1, b1            ``plan.corrections``            (channels,) for each step
a2, b2            ``plan.outputs``                (outputs,) for each step and layer
================  ==============================  =====================================

Differs from the paper: corrections are fitted on the cached trajectory, each as the run that it changes goes by, and
shrunk to the identity by cross-validation, because a plain fit of few samples costs more than it brings once bits are
few; a2, b2 act on the layer's whole output, not on the half of its input channels that is cached; a feature may be
carried on linearly; K may follow from a time budget. Corrections and carrying on are kept only where samples that were
held out end nearer (`cache_validation`): what is better at every call need not be better in the end.
When to use: from some twenty steps on. Models distilled to a few steps have nothing to reuse.

Reference:
    Liu, Li and Gu, CacheQuant: Comprehensively Accelerated Diffusion Models, CVPR 2025.
    https://arxiv.org/abs/2503.01323
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from planish._support import bad, warn_once
from planish.diffusion.cache_fitting import (
    Run,
    Watched,
    check_free,
    checked,
    fit_corrections,
    groups_within,
    known,
    observe,
)
from planish.diffusion.cache_hooks import attach, detach, find_cut
from planish.diffusion.cache_session import Branch, Session
from planish.diffusion.cache_validation import Validation
from planish.diffusion.correction import Match
from planish.diffusion.grouping import check_schedule, dps_schedule, schedule_cost, uniform_schedule
from planish.diffusion.plans import CachePlan
from planish.quant import Method, Report, quantize

FEW_STEPS = 8


@torch.no_grad()
def fit_cache(
    model: nn.Module,
    run: Run,
    interval: int = 5,
    *,
    schedule: Literal["dps", "uniform"] | Sequence[int] = "dps",
    correction: Match | None = "least_squares",
    extrapolate: bool = True,
    reference: nn.Module | None = None,
    check: Callable[[], Tensor] | None = None,
    budget: int | float | None = None,
    region: tuple[int, int] | None = None,
    branches: int = 1,
    min_len: int | None = None,
    max_len: int | None = None,
    folds: int = 2,
    validate: bool = True,
) -> CachePlan:
    """Choose which calls of a denoiser run in full and how the others correct what they reuse; changes nothing.

    Args:
        model: A transformer or a U-Net of diffusers, quantized or not, without a cache.
        run: Draws one batch of samples with this model, as in `lambda: pipeline(prompts, generator=...)`. Called once
            to watch the features, once more to fit corrections, which needs two samples a batch or more, and up to four
            times to validate, which needs twice as many samples and the same noise at every call: torch's own random
            numbers are given again, a generator of yours must be made anew.
        interval: N: every how many calls one runs in full, on average.
        schedule: "dps", "uniform", or the calls themselves.
        correction: How reused features are fitted; None leaves them as they are.
        extrapolate: Carry features on as they went between the last two refreshes, where that is validated; not in the
            paper. By far the better at short intervals; of no use from some ten calls on.
        reference: The float model that a quantized `model` was made of: corrections then aim at its features, and
            layers that meet the feature are corrected too.
        check: Draws other samples with this model, from the same noise every time, and returns them: corrections and
            extrapolation then stay only if they bring these nearer to those without a cache. Takes the place of
            `validate`.
        budget: Seconds for one run, in place of `interval`: as many calls run in full as time allows.
        region: See `CachePlan`.
        branches: See `CachePlan`.
        min_len: See `dps_schedule`.
        max_len: See `dps_schedule`.
        folds: Parts for cross-validation, >= 2.
        validate: Leave out carrying on and corrections unless samples held out of the fit end nearer to those of a run
            without a cache (of the `reference`, if there is one), by more than the gain's standard error. Default True;
            False keeps what is asked for.

    Returns:
        The plan, for `apply_cache`.

    Raises:
        ValueError: A setting is out of range; the run never calls the model; the budget cannot be met.
        MissingExtra: diffusers is not installed.

    Example:
        >>> from diffusers import DDIMScheduler, DiTTransformer2DModel
        >>> model = DiTTransformer2DModel(2, 4, 1, 1, 3, sample_size=4, num_embeds_ada_norm=4).eval()
        >>> def draw():
        ...     scheduler, x = DDIMScheduler(), torch.randn(4, 1, 4, 4)
        ...     scheduler.set_timesteps(10)
        ...     for t in scheduler.timesteps:
        ...         v = model(x, timestep=t.expand(4), class_labels=torch.zeros(4, dtype=torch.long)).sample
        ...         x = scheduler.step(v, t, x).prev_sample
        >>> plan = fit_cache(model, draw, 5)
        >>> len(plan.schedule), plan.steps
        (2, 10)
    """
    where, groups = "fit_cache", None
    if correction not in ("least_squares", "variance", None):
        raise bad(where, "correction", "'least_squares', 'variance' or None", correction)
    if isinstance(schedule, str) and schedule not in ("dps", "uniform"):
        raise bad(where, "schedule", "'dps', 'uniform' or a list of calls", schedule)
    if interval < 1:
        raise bad(where, "interval", "at least 1", interval)
    cut = find_cut(model, region)
    if budget is not None:
        groups, steps = groups_within(model, run, cut, branches, budget)
        interval = -(-steps // groups)
    watched = Watched(window=2 * interval if max_len is None else max_len)
    validation = Validation(model, run) if validate and check is None else None
    seen = run if validation is None else validation.watched
    observe(model, seen, cut, Session(branches=branches, watch=watched.feature), watched)
    if watched.steps == 0:
        raise bad(where, "run", "a function that calls the model", "one that never did")
    if watched.steps <= FEW_STEPS:
        warn_once(f"{where}: at {watched.steps} steps there is little to reuse; a cache pays from some twenty on.")
    table = watched.distances[0].matrix()
    for other in watched.distances[1:]:
        table = table + other.matrix()
    if schedule == "uniform":
        starts = uniform_schedule(len(table), interval)
    elif isinstance(schedule, str):
        one = interval if groups is None else None
        starts = dps_schedule(table, one, n_groups=groups, min_len=min_len, max_len=max_len)
    else:
        starts = check_schedule(where, schedule, len(table))
    plan = CachePlan(
        starts, len(table), cut.region, watched.timesteps, watched.shape, branches, extrapolate=extrapolate,
        made_for={"model": type(model).__name__, "cost": known(schedule_cost(table, starts))},
    )  # fmt: skip
    if validation is not None:
        plan, kept = validation.decide(cut, plan, correction, reference, folds)
        correction = correction if kept else None
    if correction is not None:
        plan = fit_corrections(model, run, cut, plan, correction, reference, folds)
    return plan if check is None else checked(model, check, plan)


def apply_cache(model: nn.Module, plan: CachePlan) -> None:
    """Make a denoiser reuse features as planned, in place, until `remove_cache`.

    Pipelines go on as before: every run starts clean, and each branch of guidance has its own state.

    Args:
        model: A transformer or a U-Net of diffusers.
        plan: What to do.

    Raises:
        ValueError: The model has a cache already, or not the blocks or layers that the plan names. Later, from the
            model's call: a timestep or shape that the plan was not made for.
        MissingExtra: diffusers is not installed.

    Example:
        >>> from diffusers import UNet2DModel
        >>> model = UNet2DModel(8, 1, 1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ...                     block_out_channels=(8,), norm_num_groups=4).eval()
        >>> x = torch.randn(2, 1, 8, 8)
        >>> apply_cache(model, CachePlan((0,), 2))
        >>> full, reused = model(x, 9).sample, model(x, 9).sample
        >>> torch.equal(full, reused), remove_cache(model)
        (True, True)
    """
    cut = find_cut(model, plan.region)
    check_free("apply_cache", model)
    missing = [name for name in plan.outputs if name not in cut.outputs]
    if missing:
        raise bad("apply_cache", "plan", f"made for {type(model).__name__}", f"one for a model with {missing[0]}")
    attach(model, Session(plan), replace(cut, outputs={n: a for n, a in cut.outputs.items() if n in plan.outputs}))


def remove_cache(model: nn.Module) -> bool:
    """Take a cache off a model, in place.

    Args:
        model: With or without one.

    Returns:
        Whether there was one.

    Example:
        >>> remove_cache(nn.Linear(2, 2))
        False
    """
    return detach(model)


def cached_calls(model: nn.Module, run: Run, plan: CachePlan, *, calls: int = 16) -> list[dict[str, Any]]:
    """Return what a model is called with along the cached trajectory: batches for `planish.quantize`.

    Args:
        model: Without a cache.
        run: See `fit_cache`.
        plan: What the cache does.
        calls: How many are kept, evenly over the run, >= 1.

    Returns:
        Arguments by name.

    Raises:
        ValueError: `calls` is below 1.

    Example:
        >>> from diffusers import UNet2DModel
        >>> model = UNet2DModel(8, 1, 1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ...                     block_out_channels=(8,), norm_num_groups=4).eval()
        >>> x = torch.randn(2, 1, 8, 8)
        >>> sorted(cached_calls(model, lambda: model(x, 9), CachePlan((0,), 1))[0])
        ['sample', 'timestep']
    """
    if calls < 1:
        raise bad("cached_calls", "calls", "at least 1", calls)
    wanted = {round(i * (plan.steps - 1) / max(calls - 1, 1)) for i in range(calls)}
    kept: list[dict[str, Any]] = []

    def keep(step: int, branch: Branch, call: dict[str, Any]) -> None:
        if step in wanted:
            kept.append({n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in call.items()})

    session = Session(plan)
    session.on_call = keep
    observe(model, run, find_cut(model, plan.region), session)
    return kept


def cache_and_quantize(
    model: nn.Module,
    run: Run,
    method: Method | None = None,
    interval: int = 5,
    *,
    correction: Match | None = "least_squares",
    features: Literal["float", "quantized"] = "float",
    calls: int = 16,
    **settings: Any,  # noqa: ANN401  (handed on as they are)
) -> tuple[Report, CachePlan]:
    """Quantize a denoiser in place for the trajectory that a cache makes it take, and fit the cache to what it became.

    Args:
        model: A transformer or a U-Net of diffusers, in float.
        run: See `fit_cache`.
        method: See `planish.quantize`.
        interval: See `fit_cache`.
        correction: See `fit_cache`.
        features: Whose features the schedule is chosen by: "float" as published, or those of the quantized model.
        calls: Of the trajectory, that are calibrated with.
        **settings: Other arguments of `fit_cache`.

    Returns:
        What quantizing did, and the plan for `apply_cache`.

    Raises:
        ValueError: See `fit_cache` and `planish.quantize`.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> from planish.quant import rtn
        >>> model = DiTTransformer2DModel(2, 16, 1, 1, 3, sample_size=4, num_embeds_ada_norm=4).eval()
        >>> x, t, y = torch.randn(4, 1, 4, 4), torch.tensor([9] * 4), torch.tensor([0] * 4)
        >>> def draw():
        ...     for step in range(10):
        ...         model(x, timestep=t - step, class_labels=y)
        >>> report, plan = cache_and_quantize(model, draw, rtn(group_size=32), 5)
        >>> len(report.blocks), len(plan.schedule)
        (3, 2)
    """
    if features not in ("float", "quantized"):
        raise bad("cache_and_quantize", "features", "'float' or 'quantized'", features)
    reference = copy.deepcopy(model)
    plan = fit_cache(model, run, interval, correction=None, **settings)
    report = quantize(model, cached_calls(model, run, plan, calls=calls), method)
    chosen = plan.schedule if features == "float" else settings.pop("schedule", "dps")
    settings = {k: v for k, v in settings.items() if k not in ("schedule", "budget")}
    if features == "quantized":
        interval = -(-plan.steps // len(plan.schedule))
    plan = fit_cache(
        model, run, interval, schedule=chosen, correction=correction, reference=reference, **settings
    )  # fmt: skip
    return report, plan
