"""Quantize a model of many blocks from disk and print, in bytes, what it took at most beside what was there before.

Run as `python memory_worker.py HOME`; Linux only (/proc). The checkpoint is made by a forked child, so that making it
does not count.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from planish.quant import Journal, assemble, open_model, quantize
from planish.quant.methods.smoothquant_plus import smoothquant_plus


def status(field: str) -> int:
    """One figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def peak(job) -> tuple[int, int]:
    """Run a job; return by how much resident memory grew at most: all of it, and the part not backed by files."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before, anonymous = status("VmRSS"), status("RssAnon")
    seen, over = [anonymous], threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.append(status("RssAnon"))
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        job()
    finally:
        over.set()
        thread.join()
    return status("VmHWM") - before, max(seen) - anonymous


def make(home: Path, layers: int, hidden: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(home / f"float-{layers}")


def main() -> None:
    home = Path(sys.argv[1])
    child = os.fork()
    if not child:
        make(home, 24, 512)
        make(home, 1, 64)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    tokens = [torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(n)) for n in range(2)]

    def job(name: str) -> tuple[torch.nn.Module, Journal]:
        model, weights = open_model(home / f"float-{name}")
        journal = Journal(home / f"journal-{name}")
        quantize(model, tokens, smoothquant_plus(0.5, group_size=64), weights=weights, journal=journal)
        return model, journal

    assemble(*reversed(job("1")), home / "out-1")  # what libraries load and cache at their first use does not count
    kept = []
    quantizing = peak(lambda: kept.extend(job("24")))
    model, journal = kept
    assembling = peak(lambda: assemble(journal, model, home / "out-24"))
    block = sum(p.numel() * p.element_size() for p in LlamaForCausalLM(model.config).model.layers[0].parameters())
    rest = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".layers." not in n)
    sys.stdout.write(json.dumps({
        "block": block, "blocks": 24, "rest": rest, "inputs": sum(t.numel() for t in tokens) * 512 * 4,
        "quantizing": quantizing, "assembling": assembling,
        "written": sum(p.stat().st_size for p in (home / "out-24").iterdir()),
    }) + "\n")  # fmt: skip


main()
