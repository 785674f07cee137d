"""Rivals that round activations too, behind rotations: llm-compressor's SpinQuant and QuIP, AutoRound's Hadamard.

What they compute is not in their weights alone, so they are scored in their own process: per window of the evaluation
text, beside the float model. One scale a row of the weight and a token, asymmetric, 4 bits, as all others in
`benchmarks.outliers`. llm-compressor's SpinQuant turns by fixed matrices, it does not learn them; AutoRound turns in
blocks of 64, as it has no Hadamard matrix for whole rows of 576.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.driver import load_model, targets, versions
from benchmarks.predictions import window_scores

METHODS = ("spinquant", "spinquant, gptq", "quip, gptq", "hadamard")


def llm_compressor(model: nn.Module, tokens: Tensor, method: str) -> nn.Module:
    """Run `oneshot` with a rotation and a rounding modifier; the model then rounds as its checkpoint would."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: PLC0415
    from llmcompressor import oneshot  # noqa: PLC0415
    from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: PLC0415
    from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: PLC0415
    from llmcompressor.modifiers.transform.quip import QuIPModifier  # noqa: PLC0415
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier  # noqa: PLC0415
    from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: PLC0415
    from torch.utils.data import DataLoader  # noqa: PLC0415

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="channel")
    act = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="token", dynamic=True)
    scheme = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=act)},
        "ignore": ["lm_head"],
    }
    # Random signs over a known Hadamard matrix: sizes here are no powers of two.
    how = {"transform_type": "random-hadamard"}
    turn = QuIPModifier(rotations=["v", "u"], **how) if method.startswith("quip") else SpinQuantModifier(
        rotations=["R1", "R2", "R4"], **how
    )  # fmt: skip
    rounding = GPTQModifier(**scheme) if method.endswith("gptq") else QuantizationModifier(**scheme)
    if not torch.accelerator.is_available():  # it pins memory without asking whether anything could read it pinned
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    rows = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens]
    loader = DataLoader(rows, batch_size=4, shuffle=False)
    oneshot(model=model, dataset=loader, recipe=[turn, rounding], num_calibration_samples=len(rows))
    return model


def auto_round(model: nn.Module, tokens: Tensor, directory: Path) -> nn.Module:
    """Turn by Hadamard matrices and round at 0 iterations."""
    from auto_round import AutoRound  # noqa: PLC0415
    from auto_round.algorithms.quantization.rtn.config import RTNConfig  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(directory),
        bits=4,
        group_size=-1,
        sym=False,
        act_bits=4,
        act_group_size=-1,
        act_sym=False,
        act_dynamic=True,
        act_data_type="int",
        rotation_config={"backend": "inplace", "hadamard_type": "inplace_hadamard", "block_size": 64},
        alg_configs=RTNConfig(),
        dataset=list(tokens.split(4)),
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=4,
        device_map="cpu",
        amp=False,
        disable_model_free=True,
    )
    return rounder.quantize()[0]


def main() -> None:
    """Quantize on exactly the given tokens, score on others, write the scores, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the float model")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with `input_ids` and `evaluation`")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where the scores by window go, as safetensors")
    args = parser.parse_args()
    tokens = load_file(args.tokens)
    model = load_model(args.model)
    names = list(targets(model))
    torch.random.default_generator.manual_seed(0)
    start = time.perf_counter()
    if args.method == "hadamard":
        ours = auto_round(model, tokens["input_ids"], args.model)
    else:
        ours = llm_compressor(model, tokens["input_ids"], args.method)
    seconds = time.perf_counter() - start
    scores = window_scores(load_model(args.model), ours, tokens["evaluation"])
    save_file({name: column.contiguous() for name, column in scores.items()}, args.out)
    packages = ("torch", "transformers", "llmcompressor", "auto-round")
    print(json.dumps({"seconds": seconds, "targets": len(names), "versions": versions(packages)}), flush=True)


if __name__ == "__main__":
    main()
