"""What a pipeline asks of its denoiser, taken down while the user's own program runs.

The calls are the calibration data: real prompts or classes, the sampler's own timesteps, both branches of guidance, in
the shares in which they occur. Of activations inside the model only sums are kept (`StepStatistics`).
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from planish._support import bad
from planish.diffusion.timesteps import StepStatistics, time_of, watch_steps
from planish.quant.calls import by_name
from planish.quant.stream import first_tensor, tensors_in

SKIP = ("*norm*.linear", "*emb*", "conv_in", "conv_out", "proj_in", "proj_out*", "norm_out*")
"""Layers that are left in float unless told otherwise: embeddings of time, class and patches, modulation, the ends."""
PARTS = ("transformer", "unet", "prior", "decoder")
"""Names under which pipelines keep their denoiser."""


@dataclass
class Calls:
    """Calls of a denoiser, in the order in which they were made.

    Attributes:
        inputs: The arguments by name, one dict a call: what `planish.quantize` takes as batches.
        outputs: What the model answered, its main tensor.
        times: The timestep of each call.
        seen: How many calls there were; more than were kept where a limit was given.
        statistics: What entered the layers; empty unless asked for.

    Example:
        >>> latents = torch.zeros(1, 4)
        >>> calls = Calls([{"sample": latents}, {"sample": latents}], [latents, latents], [999.0, 499.0], seen=2)
        >>> calls.bytes
        16
    """

    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    seen: int = 0
    statistics: StepStatistics = field(default_factory=StepStatistics)

    @property
    def bytes(self) -> int:
        """Memory that the calls take; a tensor that several share counts once."""
        held = {id(t): t.nbytes for t in tensors_in([self.inputs, self.outputs])}
        return sum(held.values())


def denoiser_of(pipeline: Any, part: str | None = None) -> tuple[str, nn.Module]:  # noqa: ANN401  (any pipeline)
    """Return the denoiser of a pipeline and the name under which it is kept there.

    Args:
        pipeline: One of diffusers' pipelines.
        part: The name; default the first of `PARTS` that there is.

    Returns:
        Name and module.

    Raises:
        TypeError: It is not a pipeline.
        ValueError: There is no such part.

    Example:
        >>> from planish.diffusion import digits_dit, digits_pipeline
        >>> denoiser_of(digits_pipeline(digits_dit(layers=1)))[0]
        'transformer'
    """
    parts = getattr(pipeline, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(f"denoiser_of: `pipeline` must be a pipeline of diffusers; got {type(pipeline).__name__}.")
    modules = {name: module for name, module in parts.items() if isinstance(module, nn.Module)}
    for name in PARTS if part is None else (part,):
        if name in modules:
            return name, modules[name]
    raise bad(
        "denoiser_of", "part", f"one of the pipeline's modules, {', '.join(modules) or 'of which it has none'}", part
    )


def capture(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    limit: int | None = None,
    statistics: bool = False,
    layers: Callable[[str], bool] | None = None,
) -> Calls:
    """Run a program and take down how it calls a denoiser.

    Args:
        model: The denoiser, anywhere in what the program uses.
        run: The program: `lambda: pipeline(["a fox", "a boat"], num_inference_steps=20)`.
        limit: Keep a random sample of so many calls, all equally likely; default all. A call's tensors are copied, and
            one that is passed again and again is kept once.
        statistics: Watch the layers as well, see `watch_steps`.
        layers: Which, by name; default all.

    Returns:
        The calls.

    Raises:
        ValueError: The program never called the model; `limit` is not positive.

    Example:
        >>> from planish.diffusion import digits_unet, sample
        >>> model = digits_unet(channels=(8, 8))
        >>> calls = capture(model, lambda: sample(model, torch.tensor([3, 7]), steps=2))
        >>> calls.times, sorted(calls.inputs[0])
        ([999.0, 499.0], ['class_labels', 'sample', 'timestep'])
    """
    if limit is not None and limit < 1:
        raise bad("capture", "limit", "None or an integer >= 1", limit)
    found, last = Calls(), dict[str, Tensor]()
    order: list[int] = []
    generator = torch.Generator().manual_seed(0)
    signature = inspect.signature(type(model).forward)

    def keep(value: Any, name: str) -> Any:  # noqa: ANN401
        if isinstance(value, Tensor):
            before = last.get(name)
            if before is None or before.shape != value.shape or not torch.equal(before, value):
                last[name] = value.detach().clone()  # a scheduler may go on to write into its own
            return last[name]
        if isinstance(value, dict):
            return {key: keep(part, f"{name}.{key}") for key, part in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(keep(part, f"{name}.{i}") for i, part in enumerate(value))
        return value

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:  # noqa: ANN401
        found.seen += 1
        slot = len(found.inputs)
        if limit is not None and slot >= limit:  # reservoir sampling
            slot = int(torch.randint(found.seen, (), generator=generator))
            if slot >= limit:
                return
        named = by_name(signature, args, kwargs)
        named.pop("return_dict", None)
        entry = {name: keep(value, name) for name, value in named.items()}
        time, answer = time_of(module, args, kwargs, found.seen - 1), first_tensor(out).detach().clone()
        if slot == len(found.inputs):
            order.append(found.seen)
            found.inputs.append(entry)
            found.outputs.append(answer)
            found.times.append(time)
        else:
            order[slot], found.inputs[slot], found.outputs[slot], found.times[slot] = found.seen, entry, answer, time

    with ExitStack() as stack:
        if statistics:
            found.statistics = stack.enter_context(watch_steps(model, layers=layers))[0]
        handle = model.register_forward_hook(look, with_kwargs=True)
        stack.callback(handle.remove)
        run()
    if not found.seen:
        raise bad("capture", "run", f"a program that calls the {type(model).__name__}", "one that never did")
    ranked = sorted(range(len(order)), key=order.__getitem__)
    found.inputs = [found.inputs[i] for i in ranked]
    found.outputs = [found.outputs[i] for i in ranked]
    found.times = [found.times[i] for i in ranked]
    return found
