"""Run vLLM in a process of its own: a list of jobs as JSON on stdin, their results as the last line of stdout.

A job: {"model", "prompts": lists of ids, "tokens", "llm": more arguments of LLM}. A result: {"tokens": lists of ids,
"kernels": kinds of the layers' kernels, "peak": KiB} or {"error": what was raised}.
"""

import contextlib
import gc
import json
import os
import resource
import sys


def run(job: dict) -> dict:
    import torch
    from vllm import LLM, SamplingParams

    settings = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8, "skip_tokenizer_init": True}
    llm = LLM(model=job["model"], **settings | job.get("llm", {}))
    sampling = SamplingParams(temperature=0, max_tokens=job.get("tokens", 24), ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    made = llm.generate(asked, sampling, use_tqdm=False)
    found = {"tokens": [list(one.outputs[0].token_ids) for one in made]}
    if "probe" in job:
        found["probe"] = llm.apply_model(PROBES[job["probe"]])
    del llm
    gc.collect()
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()
    return found


def codes(model) -> dict:
    """Return what each of our layers holds, by vLLM's name, as a checksum."""
    import hashlib

    found = {}
    for name, module in model.named_modules():
        held = getattr(module, "quantized", None)
        if held is not None:
            digest = hashlib.sha256()
            for key, tensor in sorted(held.state_dict().items()):
                if key in ("weight_packed", "weight_scale", "weight_zero_point", "down", "up"):
                    digest.update(key.encode() + str(tensor.dtype).encode() + tensor.contiguous().numpy().tobytes())
            found[name] = digest.hexdigest()
    return found


def kinds(model) -> list:
    """Return which kinds of kernel are in use."""
    schemes = [getattr(m, "scheme", None) for m in model.modules()]
    methods = [getattr(m, "quant_method", None) for m in model.modules()]
    kernels = [getattr(holder, "kernel", None) for holder in (*schemes, *methods)]
    return sorted({type(kernel).__name__ for kernel in kernels if kernel is not None})


PROBES = {"codes": codes, "kinds": kinds}


def main() -> None:
    if os.environ.get("AVX2_ONLY"):  # what a processor without AVX-512 would say, so that vLLM loads its build for it
        import torch

        torch.cpu._is_avx512_supported = lambda: False
    results = []
    for job in json.load(sys.stdin):
        try:
            results.append(run(job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("\n" + json.dumps({"results": results, "peak": peak}))


if __name__ == "__main__":
    main()
