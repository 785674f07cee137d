"""llama.cpp's server, in process, that answers requests for timings: a subject of `benchmarks serve`.

    python benchmarks/rivals/llama_server.py MODEL.gguf - THREADS

The same conversation as `vllm_engine.py`; it needs the wheel `xllamacpp`.
"""

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor


def main() -> None:
    import xllamacpp  # noqa: PLC0415

    model, _, threads = sys.argv[1:4]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_ctx, params.n_batch = 16, 16 * 2304, 4096
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.cache_prompt, params.warmup, params.verbosity = False, True, 0
    server = xllamacpp.Server(params)

    def one(prompt: list[int], tokens: int) -> None:
        ask = {"prompt": prompt, "max_tokens": tokens, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        answer = server.handle_completions(ask | {"cache_prompt": False})
        made = answer["usage"]["completion_tokens"]
        if made != tokens:
            raise ValueError(f"llama.cpp made {made} tokens, not {tokens}")

    def run(prompts: list[list[int]], tokens: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: one(prompt, tokens), prompts))
        return time.perf_counter() - start

    run([list(range(3, 40))], 4)
    print("\n" + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        order = random.Random(ask["seed"])
        prompts = [[order.randrange(100, 40000) for _ in range(ask["context"])] for _ in range(ask["concurrency"])]
        first = run(prompts, 1)
        print("\n" + json.dumps({"first": first, "all": run(prompts, 1 + ask["tokens"])}), flush=True)


if __name__ == "__main__":
    main()
