"""What enable_compile gains on this machine: the same training with and without it, by adapters and in full, in rounds in turn.

Run it with `python -m bench.compiled --model FOLDER --json FILE` from the repository's root.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from bench.engine import RANK
from bench.lead_in import options_of, scratch_and_model
from bench.ours import EngineJobs
from bench.report import describe, machine
from bench.text import Text, equal_text, variable_text
from gradstream.engine.config import Numerics
from gradstream.shared.wire import AdamParams, LoraSpec

KINDS = {"LoRA": True, "full weights": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """CPU seconds of a round, medians; ratio: eager over compiled, the median of the rounds' own. compile_s: CPU of the first round."""

    kind: str
    text: str
    eager_s: float
    compiled_s: float
    ratio: float
    compile_s: float


def jobs_of(folder: Path, *, is_lora: bool, is_compiled: bool) -> EngineJobs:
    """An engine with one model."""
    jobs = EngineJobs.of_config(folder, is_lora=is_lora, numerics=Numerics(enable_compile=is_compiled))
    jobs.create(LoraSpec(rank=RANK, seed=0, train_unembed=False) if is_lora else None)
    return jobs


def measure(folder: Path, kind: str, texts: Sequence[Text], *, rounds: int) -> list[Gain]:
    """The gains of one kind of model on some texts."""
    eager, compiled = (jobs_of(folder, is_lora=KINDS[kind], is_compiled=choice) for choice in (False, True))
    adam = AdamParams(learning_rate=1e-4)
    started = time.process_time()
    for text in texts:
        compiled.train(text, adam)
    compile_s = time.process_time() - started
    for text in texts:
        eager.train(text, adam)
    taken: dict[str, list[tuple[float, float]]] = {text.name: [] for text in texts}
    for _ in range(rounds):
        for text in texts:
            taken[text.name].append((eager.train(text, adam), compiled.train(text, adam)))
    gains = []
    for name, pairs in taken.items():
        eager_s, compiled_s = (round(float(np.median(values)), 2) for values in zip(*pairs, strict=True))
        ratio = round(float(np.median([one / other for one, other in pairs])), 2)
        gains.append(
            Gain(
                kind=kind,
                text=name,
                eager_s=eager_s,
                compiled_s=compiled_s,
                ratio=ratio,
                compile_s=round(compile_s, 1),
            )
        )
    return gains


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.compiled", description=__doc__)
    options = options_of(parser)
    load_before = os.getloadavg()[0]
    with scratch_and_model(options.model) as (_, model):
        vocab_size = AutoConfig.from_pretrained(model).vocab_size
        texts = [
            variable_text(batch=16, median=64, longest=256, num_steps=2, vocab_size=vocab_size),
            equal_text(batch=4, length=256, num_steps=2, vocab_size=vocab_size),
        ]
        gains = [gain for kind in KINDS for gain in measure(model, kind, texts, rounds=options.rounds)]
    facts = machine(load_before=load_before, torch_threads=options.threads)
    table = Table(
        "model", "text", "eager [s]", "compiled [s]", "ratio", "first round [s]", title="enable_compile, CPU time"
    )
    for gain in gains:
        table.add_row(
            gain.kind,
            gain.text,
            f"{gain.eager_s:.2f}",
            f"{gain.compiled_s:.2f}",
            f"{gain.ratio:.2f}",
            f"{gain.compile_s:.0f}",
        )
    console = Console()
    console.print(table)
    console.print(describe(facts), highlight=False)
    if options.json is not None:
        found = {"gains": [asdict(gain) for gain in gains], "machine": asdict(facts)}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
