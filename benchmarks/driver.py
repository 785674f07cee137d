"""What every quantization driver, ours or a rival's, does alike: arguments, loading, the clock, the memory, the output.

A driver is a function `quantize(model, tokens, settings) -> read` handed to `main`: the call quantizes and is what the
clock sees; `read()` then returns the dense weights. It runs as a process of its own, so that its peak memory is its
own, and prints one JSON line. Nothing here imports planish or a rival: the same file
serves both environments.
"""

import argparse
import json
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """What a driver is asked to do.

    `method` chooses among the methods of one driver. `group_size` None means one group a row. `batch_size` is how many
    calibration windows go through the model together. `iters` is read by drivers that train.
    """

    model: Path
    bits: int
    group_size: int | None
    symmetric: bool
    batch_size: int
    method: str
    iters: int


Read = Callable[[], Mapping[str, Tensor]]
Quantize = Callable[[nn.Module, Tensor, Settings], Read]


class _ResidentPeak:
    """The largest resident size, in bytes, sampled while it runs.

    The kernel's own high-water mark cannot be used alone: it still holds the peak of loading the model.
    """

    def __init__(self, period: float = 0.01) -> None:
        self.peak = self.start = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(period,), daemon=True)

    def _watch(self, period: float) -> None:
        while not self._stop.wait(period):
            self.peak = max(self.peak, resident_bytes())

    def __enter__(self) -> "_ResidentPeak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())


def resident_bytes() -> int:
    """Return the resident size of this process now, in bytes (0 where the system does not tell)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def process_peak_bytes() -> int:
    """Return the largest resident size of this process since it began, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_model(directory: Path) -> nn.Module:
    """Load a Hugging Face directory in float32, with the head of a language model when it has one."""
    import transformers  # noqa: PLC0415  (both environments have it; the harness imports this module without)

    config = transformers.AutoConfig.from_pretrained(directory)
    causal = any(name.endswith("ForCausalLM") for name in config.architectures or ())
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


def float_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter, so that what a method changed can be told afterwards."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """Name the linears that all subjects quantize: every `nn.Linear` but the language model's head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of `after` that differ from the float model's, in float32.

    Raises:
        ValueError: A parameter is missing, has another shape, or is not finite.
    """
    out = {}
    for name, old in before.items():
        if name not in after:
            raise ValueError(f"changed: the quantized model has no parameter `{name}`.")
        new = after[name].detach().to(torch.float32).contiguous()
        if new.shape != old.shape:
            raise ValueError(f"changed: `{name}` has shape {tuple(new.shape)}; the float one has {tuple(old.shape)}.")
        if not new.isfinite().all():
            raise ValueError(f"changed: `{name}` holds numbers that are not finite.")
        if not torch.equal(new, old):
            out[name] = new
    return out


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of `packages`, and Python's; what runs from its sources has none."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "from source"
    return found


def main(quantize: Quantize, packages: Sequence[str], methods: Sequence[str]) -> None:
    """Parse the command line, quantize on exactly the given tokens, write the weights, print one JSON line."""
    parser = argparse.ArgumentParser(description="Quantize a float model on given token ids; write dense weights.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the float model")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with `input_ids` [windows, length]")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64, help="0: one group a row")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--method", choices=methods, default=methods[0])
    parser.add_argument("--iters", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch decides")
    parser.add_argument("--out", type=Path, help="where the changed parameters go, as safetensors")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(
        args.model, args.bits, args.group_size or None, args.symmetric, args.batch_size, args.method, args.iters
    )
    tokens = load_file(args.tokens)["input_ids"]
    model = load_model(args.model)
    names = list(targets(model))
    # Copied only when asked for: the copy would sit in the resident size of a run that measures cost.
    before = float_parameters(model) if args.out else {}
    torch.random.default_generator.manual_seed(0)  # rivals draw from it
    with _ResidentPeak() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        read = quantize(model, tokens, settings)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    written: dict[str, Tensor] = {}
    if args.out:
        written = changed(before, read())
        if not written:
            raise ValueError(f"main: {args.method} changed no parameter.")
        partial = args.out.with_suffix(".partial")
        save_file(written, partial)
        partial.replace(args.out)
    line = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rss_before": memory.start,
        "rss_peak": memory.peak,
        "process_peak": process_peak_bytes(),
        "threads": torch.get_num_threads(),
        "tokens": tokens.numel(),
        "left_float": [name for name in names if f"{name}.weight" not in written] if args.out else None,
        "versions": versions(("torch", "transformers", *packages)),
    }
    print(json.dumps(line), flush=True)
