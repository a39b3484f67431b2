"""Training speed of the engine beside transformers.Trainer + peft: the same LoRA, text, dtype and threads, in rounds in turn.

Run it with `make bench-engine`, or `python -m bench.engine --model FOLDER --json FILE` from the repository's root.
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

from bench.lead_in import options_of, scratch_and_model
from bench.limits import TrainingCost, matmul_flops_per_s
from bench.ours import EngineJobs
from bench.report import Machine, describe, machine
from bench.text import Text, equal_text, variable_text
from bench.trainer import TrainerJob
from gradstream.shared.wire import AdamParams

RANK = 8
LEARNING_RATE = 1e-4
# The Trainer's own default.
CLIP = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens a second on one kind of text, padding not counted: medians over rounds. ratio: the median of the rounds' own ratios.

    of_limit: the share of the machine's matrix products that ours comes to. padding: the Trainer's tokens for one of ours.
    """

    text: str
    tokens: int
    padding: float
    ours: float
    trainer: float
    ratio: float
    of_limit: float
    trainer_of_limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """num_gemm: the model's parameters in matrix products. limit_gflops: of the machine's products, measured between the rounds."""

    model: str
    num_gemm: int
    limit_gflops: float
    speeds: list[Speed]
    machine: Machine


def measure(folder: Path, texts: Sequence[Text], *, rounds: int, scratch: Path) -> tuple[list[Speed], float]:
    """The speeds, and the limit in operations a second."""
    ours = EngineJobs.of_loras(folder, rank=RANK)
    trainer = TrainerJob(folder, rank=RANK, learning_rate=LEARNING_RATE, scratch=scratch)
    base = ours.engine.state.base
    adam = AdamParams(learning_rate=LEARNING_RATE, beta2=0.999, eps=1e-8, grad_clip_norm=CLIP)
    limits: list[float] = []
    times: dict[str, list[tuple[float, float]]] = {text.name: [] for text in texts}
    for number in range(rounds + 1):
        for text in texts:
            elapsed = ours.train(text, adam), trainer.train(text)
            # The first round is for warming up.
            if number:
                times[text.name].append(elapsed)
        limits.append(matmul_flops_per_s(base.device, base.compute_dtype, clock=time.process_time))
    limit = float(np.median(limits))
    cost = TrainingCost.of(AutoConfig.from_pretrained(folder))
    return [_speed(text, times[text.name], cost, limit) for text in texts], limit


def _speed(text: Text, elapsed: list[tuple[float, float]], cost: TrainingCost, limit: float) -> Speed:
    ours_s, trainer_s = (float(np.median(values)) for values in zip(*elapsed, strict=True))
    flops = cost.flops([len(tokens) for step in text.steps for tokens in step], is_lora=True)
    return Speed(
        text=text.name,
        tokens=text.num_tokens,
        padding=round(text.num_padded / text.num_tokens, 2),
        ours=round(text.num_tokens / ours_s, 1),
        trainer=round(text.num_tokens / trainer_s, 1),
        ratio=round(float(np.median([trainer / ours for ours, trainer in elapsed])), 2),
        of_limit=round(flops / ours_s / limit, 3),
        trainer_of_limit=round(flops / trainer_s / limit, 3),
    )


def show(run: EngineRun, console: Console) -> None:
    """Print the run."""
    table = Table(title=f"tokens a second, {run.model}, LoRA rank {RANK}", title_justify="left")
    for column in ("text", "tokens", "padding", "engine", "of limit", "Trainer + peft", "of limit", "ratio"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for speed in run.speeds:
        table.add_row(
            speed.text,
            str(speed.tokens),
            f"{speed.padding:.2f}x",
            f"{speed.ours:.0f}",
            f"{100 * speed.of_limit:.0f} %",
            f"{speed.trainer:.0f}",
            f"{100 * speed.trainer_of_limit:.0f} %",
            f"{speed.ratio:.2f}",
        )
    console.print(table)
    console.print(
        f"limit: {run.limit_gflops:.0f} GFLOP/s of square products; a token counts as 4 x {run.num_gemm:,} operations "
        "and its attention",
        highlight=False,
    )
    console.print(describe(run.machine), highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="steps in a round")
    parser.add_argument(
        "--batch", type=int, default=16, help="sequences in a step of variable length; a quarter of equal length"
    )
    parser.add_argument("--longest", type=int, default=512, help="of the sequences; the median is a quarter of it")
    options = options_of(parser)
    load_before = os.getloadavg()[0]
    with scratch_and_model(options.model) as (scratch, model):
        vocab_size = AutoConfig.from_pretrained(model).vocab_size
        sizes = {"num_steps": options.steps, "vocab_size": vocab_size}
        texts = [
            variable_text(batch=options.batch, median=options.longest // 4, longest=options.longest, **sizes),
            equal_text(batch=max(1, options.batch // 4), length=options.longest // 2, **sizes),
        ]
        speeds, limit = measure(model, texts, rounds=options.rounds, scratch=scratch / "trainer")
        num_gemm = TrainingCost.of(AutoConfig.from_pretrained(model)).num_gemm
    run = EngineRun(
        model="random Qwen3" if options.model is None else options.model.name,
        num_gemm=num_gemm,
        limit_gflops=round(limit / 1e9, 1),
        speeds=speeds,
        machine=machine(load_before=load_before, torch_threads=options.threads),
    )
    show(run, Console())
    if options.json:
        options.json.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
