"""What the vocabulary logits take: peak memory of a forward and a backward pass, ours beside one that holds all logits.

    make bench-head-memory
    python -m bench.head_memory [--tokens 2048] [--vocabulary 65536]

A model of one layer of 256 hidden units, so that the unembedding is nearly all of it; each side runs in a process of its own, and its
peak is counted from what the process held before its first pass.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from bench.ours import EngineJobs, cross_entropy
from bench.report import describe, machine
from bench.text import equal_text, make_model

RANK = 8
_SIDES = ("ours", "full logits")
_MIB = 1 << 20


def _peak_bytes() -> int:
    """The most memory that this process held so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def run_side(side: str, folder: Path, *, num_tokens: int, vocab_size: int) -> int:
    """Bytes by which one side's pass raises this process's peak."""
    (step,) = equal_text(num_steps=1, batch=1, length=num_tokens, vocab_size=vocab_size).steps
    if side == "ours":
        jobs = EngineJobs.of_loras(folder, rank=RANK)
        payload = cross_entropy(list(step))
        before = _peak_bytes()
        jobs.run({0: payload})
        return _peak_bytes() - before
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers" in name)
    ids = torch.from_numpy(step[0])[None]
    before = _peak_bytes()
    torch.autograd.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
    return _peak_bytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.head_memory", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=65_536)
    parser.add_argument("--side", choices=_SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        size = run_side(options.side, options.model, num_tokens=options.tokens, vocab_size=options.vocabulary)
        sys.stdout.write(f"{size}\n")
        return
    console = Console()
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
        model = make_model(Path(folder) / "model", layers=1, vocab_size=options.vocabulary)
        command = [sys.executable, "-m", "bench.head_memory", "--model", str(model)]
        command += ["--tokens", str(options.tokens), "--vocabulary", str(options.vocabulary)]
        for side in _SIDES:
            done = subprocess.run([*command, "--side", side], check=True, capture_output=True, text=True)
            console.print(f"{side}: {int(done.stdout.split()[-1]) / _MIB:.0f} MiB above the model")
    logits = options.tokens * options.vocabulary * 4 / _MIB
    console.print(f"logits of {options.tokens} tokens x {options.vocabulary} in float32: {logits:.0f} MiB")
    facts = machine(load_before=os.getloadavg()[0], torch_threads=torch.get_num_threads())
    console.print(describe(facts), highlight=False)


if __name__ == "__main__":
    main()
