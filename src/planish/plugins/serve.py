"""Start somebody else's server with our layers in it: vLLM's where it is installed, else that of transformers.

    planish serve small                        # an OpenAI-compatible endpoint on 127.0.0.1:8000
    planish serve smoothed --at-load           # a float checkpoint, rounded to 4 bits while it is read

No server is written here: this module decides which to start and with which arguments.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planish._support import MissingExtra, bad, require

__all__ = ["ENGINES", "Launch", "plan"]

ENGINES = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class Launch:
    """A program to become.

    Attributes:
        engine: "vllm" or "transformers".
        command: Its arguments, the interpreter first.

    Example:
        >>> Launch("vllm", ("python", "-m", "vllm.entrypoints.openai.api_server")).engine
        'vllm'
    """

    engine: str
    command: tuple[str, ...]

    def run(self) -> None:
        """Become the server: signals reach it directly, and its exit code is the command's."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(self.command[0], self.command)


def plan(
    path: Path,
    name: str,
    *,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    at_load: bool = False,
    group_size: int | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    extra: Sequence[str] = (),
) -> Launch:
    """Decide which server to start, and how.

    Args:
        path: A model directory.
        name: What clients call the model.
        engine: "vllm", "transformers", or "auto": the first of them that is installed.
        host: Address to listen on; the default is this machine alone.
        port: Port to listen on, 1 to 65535.
        at_load: Round a float checkpoint to 4 bits while it is read; vLLM only.
        group_size: Inputs that share a scale, with `at_load`; None for the largest of 128, 64 and 32 that fits.
        dtype: Of activations: auto (as stored), float32, bfloat16 or float16.
        max_model_len: Longest request in tokens, vLLM only; None for the model's own.
        extra: More arguments for the engine, as they are.

    Returns:
        The program.

    Raises:
        ValueError: A setting is out of range, or not one of the chosen engine's.
        MissingExtra: No engine is installed.

    Example:
        >>> plan(Path("small"), "small", engine="gpu")
        Traceback (most recent call last):
        ...
        ValueError: serve: `engine` must be one of auto, vllm, transformers; got 'gpu'.
    """
    if engine not in ENGINES:
        raise bad("serve", "engine", f"one of {', '.join(ENGINES)}", engine)
    if not 0 < port < 65536:
        raise bad("serve", "port", "from 1 to 65535", port)
    if group_size is not None and not at_load:
        raise bad("serve", "group_size", "left out without at_load: the checkpoint has its own", group_size)
    if engine == "auto":
        engine = "vllm" if _has_vllm() else "transformers"
    where = ("--host", host, "--port", str(port), *(() if dtype == "auto" else ("--dtype", dtype)))
    if engine == "vllm":
        require("vllm", "vllm", "serving through vLLM")
        command = [sys.executable, "-m", *_vllm_server(), str(path), *where]
        command += ["--served-model-name", name]
        if max_model_len is not None:
            command += ["--max-model-len", str(max_model_len)]
        if at_load:
            settings = {"quant_method": "planish"} | ({} if group_size is None else {"group_size": group_size})
            command += ["--quantization", "planish", "--hf-overrides", json.dumps({"quantization_config": settings})]
        return Launch(engine, (*command, *extra))
    for setting, value in (("at_load", at_load), ("max_model_len", max_model_len)):
        if value:
            raise bad("serve", setting, "left out: it is vLLM's alone (pip install 'planish[vllm]')", value)
    _check_transformers()
    return Launch(engine, (sys.executable, "-m", "planish.plugins.serve", str(path), *where, *extra))


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _vllm_server() -> tuple[str, ...]:
    """Return the module of vLLM's server and the words before the model's path."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # the CPU package: there `vllm serve` ends at once, asking for this
        return ("vllm.entrypoints.openai.api_server", "--model")
    return ("vllm.entrypoints.cli.main", "serve")


def _check_transformers() -> None:
    hub = require("transformers.utils.import_utils", "transformers", "serving without vLLM")
    if not hub.is_serve_available():
        raise MissingExtra("serving needs vLLM (pip install vllm), or: pip install 'transformers[serving]'")


def main() -> None:
    """Run the server of transformers with our layers registered: what `plan` starts where vLLM is not installed."""
    require("planish.plugins.transformers", "transformers", "planish serve")
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    require("transformers.cli.transformers", "transformers", "planish serve").app()


if __name__ == "__main__":
    main()
