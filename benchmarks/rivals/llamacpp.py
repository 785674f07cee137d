"""Drive llama.cpp through the C functions that the wheel `xllamacpp` exports: a subject of `benchmarks decode`.

    python benchmarks/rivals/llamacpp.py MODEL.gguf THREADS [from IN.gguf]

Reads requests, one JSON a line ({"prompt": [ids], "new": n}), and answers each with the seconds of the prompt and of
the new tokens, and the tokens. Runs in an environment of its own; structures are passed as they come from llama.cpp's
own functions for defaults, so that nothing of their layout is assumed but the first fields.
"""

import ctypes
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np


class Params(ctypes.Structure):
    """Room for any of llama.cpp's parameter structures: a callee reads and writes only its own size of it."""

    _fields_ = (("words", ctypes.c_int32 * 128),)


def library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ImportError("xllamacpp is not installed here")
    path = next(Path(spec.origin).parent.glob("xllamacpp*.so"))
    lib = ctypes.CDLL(str(path))
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("llama_backend_init", None, ()),
        ("llama_model_default_params", Params, ()),
        ("llama_context_default_params", Params, ()),
        ("llama_model_load_from_file", pointer, (text, Params)),
        ("llama_init_from_model", pointer, (pointer, Params)),
        ("llama_set_n_threads", None, (pointer, ctypes.c_int32, ctypes.c_int32)),
        ("llama_batch_get_one", Params, (pointer, ctypes.c_int32)),
        ("llama_decode", ctypes.c_int32, (pointer, Params)),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), (pointer, ctypes.c_int32)),
        ("llama_get_memory", pointer, (pointer,)),
        ("llama_memory_clear", None, (pointer, ctypes.c_bool)),
        ("llama_model_get_vocab", pointer, (pointer,)),
        ("llama_vocab_n_tokens", ctypes.c_int32, (pointer,)),
        ("llama_log_set", None, (pointer, pointer)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = LOG(lambda _level, _text, _data: None)


class Engine:
    """One model and one context."""

    def __init__(self, path: str, threads: int, context: int = 1024) -> None:
        self.lib = lib = library()
        lib.llama_log_set(ctypes.cast(_silent, ctypes.c_void_p), None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.words[0] = context  # n_ctx is the first field
        self.context = lib.llama_init_from_model(self.model, params)
        lib.llama_set_n_threads(self.context, threads, threads)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def run(self, tokens: list[int]) -> int:
        """Run tokens; return the most probable next one."""
        held = (ctypes.c_int32 * len(tokens))(*tokens)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ctypes.addressof(held), len(tokens))):
            raise ValueError("llama_decode failed")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def generate(self, prompt: list[int], new: int) -> dict[str, object]:
        """Return seconds of prompt and new tokens, and the tokens."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        began = time.perf_counter()
        found = [self.run(prompt)]
        middle = time.perf_counter()
        while len(found) <= new:
            found.append(self.run(found[-1:]))
        return {"prompt": middle - began, "decode": time.perf_counter() - middle, "tokens": found}


def rewrite(source: str, target: str) -> None:
    """Write a file's Q4_0 twin as llama.cpp's own quantizer does: matrices Q4_0, the head Q6_K or Q8_0, vectors as is.

    The wheel lacks that quantizer but exports the functions it calls.
    """
    import gguf  # noqa: PLC0415
    from gguf.quants import dequantize  # noqa: PLC0415

    lib = library()
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    kinds = gguf.GGMLQuantizationType
    tied = not any(t.name == "output.weight" for t in reader.tensors)
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
            continue
        if tensor.tensor_type == kinds.Q4_0:  # already what it is to be
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=kinds.Q4_0)
            continue
        ends = tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight")
        kind = kinds.Q6_K if ends and values.shape[1] % 256 == 0 else kinds.Q8_0 if ends else kinds.Q4_0
        block, size = gguf.GGML_QUANT_SIZES[kind]
        made = np.empty((values.shape[0], values.shape[1] // block * size), dtype=np.uint8)
        lib.ggml_quantize_chunk(kind, values.ctypes.data, made.ctypes.data, 0, *values.shape, None)
        writer.add_tensor(tensor.name, made, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) > 3:
        rewrite(sys.argv[4], path)
        return
    engine = Engine(path, threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.generate(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
