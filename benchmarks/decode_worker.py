"""One subject of `benchmarks decode`, as a process of its own: ours, or transformers.

    python -m benchmarks.decode_worker KIND MODEL

KIND is native (our decoder), native8 (with 8-bit activations), native-half (with a float16 cache), or float
(transformers, float32). Reads requests, one JSON a line, and answers each by one. {"prompt": ids, "new": n} gives the
seconds of the prompt and of n new tokens, and the tokens; {"stock": ids, "new": n} the tokens of the model without our
decoder; {"nll": rows} the mean log-likelihood lost; {"read": bytes} the rate at which the same threads read memory
plainly, in GB/s.
"""

import contextlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "temperature": None, "top_p": None}


class Native:
    """Our decoder."""

    def __init__(self, kind: str, path: str) -> None:
        import planish  # noqa: PLC0415
        from planish.quant import Decoder  # noqa: PLC0415

        self.model = planish.load(path)
        options: dict[str, Any] = {"native8": {"activation_bits": 8}, "native-half": {"cache_dtype": torch.float16}}
        self.decoder = Decoder(self.model, **options.get(kind, {}))
        if self.decoder.path != "native":
            raise ValueError(f"the native decoder does not run this model: {self.decoder.why}")

    def generate(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Return seconds of prompt and new tokens, and the tokens."""
        ids = torch.tensor([prompt])
        stamps = _Stamps()
        made = self.decoder.generate(ids, max_new_tokens=new + 1, streamer=stamps, **SETTINGS)
        return {**stamps.seconds(), "tokens": made[0, len(prompt) :].tolist()}

    def stock(self, prompt: list[int], new: int) -> list[int]:
        """Return the tokens of the model without the decoder."""
        made = self.model.generate(torch.tensor([prompt]), max_new_tokens=new, **SETTINGS)
        return made[0, len(prompt) :].tolist()

    def nll(self, rows: list[list[int]]) -> float:
        """Return the mean negative log-likelihood of rows of tokens."""
        return sum(float(self.decoder.nll(torch.tensor([row]))) for row in rows) / len(rows)

    def facts(self) -> dict[str, Any]:
        """Return the bytes that a token needs."""
        native, config = self.decoder._native, self.decoder.config
        head = config.vocab_size * (config.hidden_size + 8)  # a byte a weight, a scale and a bound a row
        position = 2 * native.layers * native.shape.kv_heads * native.padded
        size = 2 if self.decoder.cache_dtype is torch.float16 else 4
        return {"bytes": sum(a.size for a in native.arenas) + head, "bytes_a_position": position * size}


class _Stamps:
    """A streamer that notes when the prompt came, when the first token, and when the last."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: torch.Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""

    def seconds(self) -> dict[str, float]:
        """Return the seconds until the first token, and from there to the last."""
        return {"prompt": self.times[1] - self.times[0], "decode": self.times[-1] - self.times[1]}


class Float:
    """transformers in float32, with no more Python than its forward pass."""

    def __init__(self, path: str) -> None:
        from planish.quant import QLinear, sources  # noqa: PLC0415

        self.model = sources.open_model(Path(path), dtype="auto").float()
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, QLinear):
                self.model.set_submodule(name, layer.dequantize().float())

    @torch.inference_mode()
    def generate(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Return seconds of prompt and new tokens, and the tokens."""
        began = time.perf_counter()
        out = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        found = [int(out.logits[0, -1].argmax())]
        middle = time.perf_counter()
        while len(found) <= new:
            out = self.model(torch.tensor([found[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            found.append(int(out.logits[0, -1].argmax()))
        return {"prompt": middle - began, "decode": time.perf_counter() - middle, "tokens": found}

    def facts(self) -> dict[str, Any]:
        """Return the bytes that a token needs."""
        seen = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        return {"bytes": sum(seen.values())}


def read_rate(size: int, repeats: int = 7) -> float:
    from planish.kernels import cpu, placing  # noqa: PLC0415

    native, arena = cpu.module(), placing.Arena()
    arena.place(size)
    arena.open()  # large pages, as our weights have
    data = arena.memory
    data.fill_(1)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        native.read(data.data_ptr(), size, torch.get_num_threads())
        best = min(best, time.perf_counter() - began)
    return size / best / 1e9


def main() -> None:
    kind, path = sys.argv[1:3]
    with contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        subject = Float(path) if kind == "float" else Native(kind, path)
    print(json.dumps({"ready": True, **subject.facts()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "read" in asked:
            answer: Any = read_rate(asked["read"])
        elif "nll" in asked:
            answer = subject.nll(asked["nll"])
        elif "stock" in asked:
            answer = subject.stock(asked["stock"], asked["new"])
        else:
            answer = subject.generate(**asked)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
