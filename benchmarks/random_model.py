"""A Llama of a billion random weights, in our checkpoint and in llama.cpp's Q4_0: the very same codes and scales.

What is measured on it is speed; nobody reads what it says. Groups of 32 with half-precision scales are what Q4_0 holds.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import data

NAME = "Llama, 1.1 billion random weights"
VOCAB = 32000
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def checkpoint(shape: dict[str, int] | None = None) -> Path:
    """Return the model in our layout, made once."""
    shape = SHAPE if shape is None else shape

    def make(folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

        import planish  # noqa: PLC0415
        from planish.quant import Affine, QLinear, QTensor  # noqa: PLC0415

        generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
        grid = Affine(4, group_size=32, symmetric=True, scale_dtype="float16")
        for name, linear in list(model.named_modules()):
            if isinstance(linear, torch.nn.Linear) and name != "lm_head":
                out, inp = linear.weight.shape
                codes = torch.randint(0, 16, (out, inp), generator=generator, dtype=torch.uint8)
                scale = (torch.rand(out, inp // 32, generator=generator) + 0.5) / (5 * inp**0.5)
                model.set_submodule(name, QLinear.of(QTensor(codes, scale.half(), None, grid)))
        for name, parameter in list(model.named_parameters()):
            made = torch.ones(parameter.shape)
            if parameter.ndim > 1:
                made = torch.randn(parameter.shape, generator=generator) / shape["hidden_size"] ** 0.5
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(made, requires_grad=False))
        planish.save(model, folder / "checkpoint", layout="compressed-tensors")
        for file in (folder / "checkpoint").iterdir():
            file.rename(folder / file.name)
        (folder / "checkpoint").rmdir()

    return data.once(f"random-llama-{shape['num_hidden_layers']}x{shape['hidden_size']}-w4g32", make)


def gguf(command: Callable[[Path], list[str]], path: Path) -> Path:
    """Return the same weights as a GGUF file, embedding and head in what llama.cpp's quantizer gives them."""
    target = data.cache_dir() / f"{path.name}.gguf"
    if not target.exists():
        from planish.quant import export  # noqa: PLC0415

        plain = target.with_suffix(".float-ends.gguf")
        plain.unlink(missing_ok=True)
        export(path, plain, "gguf", allow_rounding=True)
        partial = target.with_suffix(".partial")
        subprocess.run([*command(partial), "from", str(plain)], check=True, cwd=data.ROOT)
        plain.unlink()
        partial.rename(target)
    return target


def commands(llamacpp: Callable[[Path], list[str]], ours: Callable[[str, Path], list[str]]) -> dict[str, list[str]]:
    """Return the subjects that run it."""
    path = checkpoint()
    return {
        "planish": ours("native", path),
        "llama.cpp Q4_0": llamacpp(gguf(llamacpp, path)),
        "transformers float32": ours("float", path),
    }
