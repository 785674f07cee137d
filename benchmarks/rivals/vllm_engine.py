"""A vLLM engine that answers requests for timings: a subject of `benchmarks serve`, in vLLM's own environment.

    python benchmarks/rivals/vllm_engine.py MODEL DTYPE THREADS

Says {"ready": ...}, then reads one JSON a line, {"context", "concurrency", "tokens", "seed"}, and answers
with the seconds until all requests had their first token, and those of all tokens.
"""

import json
import os
import random
import sys
import time


def main() -> None:
    if os.environ.get("AVX2_ONLY"):
        import torch  # noqa: PLC0415

        torch.cpu._is_avx512_supported = lambda: False  # vLLM then loads its build without AVX-512
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    model, dtype, _ = sys.argv[1:4]
    llm = LLM(
        model=model, dtype=dtype, enforce_eager=True, max_model_len=2304, max_num_seqs=16,
        max_num_batched_tokens=4096, enable_prefix_caching=False,
    )  # fmt: skip

    def run(asked: list[dict[str, list[int]]], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        made = llm.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(one.outputs[0].token_ids) != tokens for one in made):
            raise ValueError("vLLM made fewer tokens than asked for")
        return seconds

    run([{"prompt_token_ids": list(range(3, 40))}], 4)  # the first call pays for what comes once
    print("\n" + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        order = random.Random(ask["seed"])
        one = [
            {"prompt_token_ids": [order.randrange(100, 40000) for _ in range(ask["context"])]}
            for _ in range(ask["concurrency"])
        ]
        first = run(one, 1)
        print("\n" + json.dumps({"first": first, "all": run(one, 1 + ask["tokens"])}), flush=True)


if __name__ == "__main__":
    main()
