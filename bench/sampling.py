"""New tokens a second of the engine's sampler and of transformers' generate, in rounds in turn.

Run it with `make bench-sampling`, or `python -m bench.sampling --json FILE` from the repository's root. A round runs one after the
other; figures are medians over rounds. CPU time is that of this process, which other work on the machine moves less.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from bench.report import describe, machine
from bench.sampling_sides import Generate, Ours, Task, make_model, make_prompts

BATCHES = (1, 2, 4, 8, 16, 32)
PROMPT_TOKENS = 32
MIXED_PROMPT_TOKENS = (8, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Medians of one task. ratios: ours to theirs, above 1 where ours is ahead, by the clock and by CPU time."""

    task: str
    batch: int
    ours_tokens_per_s: float
    theirs_tokens_per_s: float
    ratio: float
    cpu_ratio: float


def tasks(batch: int, *, vocab_size: int, num_tokens: int) -> dict[str, Task]:
    """What is sampled at a batch size, by name."""
    low, high = MIXED_PROMPT_TOKENS
    mixed = [low + (high - low) * row // max(1, batch - 1) for row in range(batch)]
    found = {}
    for adapter in (False, True):
        for temperature in (0.0, 1.0):
            for shape, lengths in (("equal", [PROMPT_TOKENS] * batch), ("mixed", mixed)):
                name = f"{'LoRA' if adapter else 'base'}, {'drawn' if temperature else 'greedy'}, {shape} prompts"
                prompts = make_prompts(lengths, vocab_size=vocab_size, seed=batch)
                found[name] = Task(prompts=prompts, num_tokens=num_tokens, temperature=temperature, has_adapter=adapter)
    prompts = make_prompts([4 * PROMPT_TOKENS], vocab_size=vocab_size, seed=batch)
    found["base, drawn, one prompt of 128 tokens"] = Task(
        prompts=prompts, num_tokens=num_tokens, temperature=1.0, has_adapter=False, num_samples=batch
    )
    return found


def measure(ours: Ours, theirs: Generate, task: Task, name: str, *, batch: int, rounds: int) -> Figure:
    """One task, once to warm up and then in rounds."""
    walls: dict[str, list[float]] = {"ours": [], "theirs": []}
    cpus: dict[str, list[float]] = {"ours": [], "theirs": []}
    sides: dict[str, Callable[[Task], int]] = {"ours": ours.run, "theirs": theirs.run}
    for turn in range(rounds + 1):
        for side, run in sides.items():
            started, cpu_before = time.perf_counter(), time.process_time()
            num_tokens = run(task)
            assert num_tokens == task.total_tokens, f"{side} gave {num_tokens} tokens for {task.total_tokens}"
            if turn:
                walls[side].append(time.perf_counter() - started)
                cpus[side].append(time.process_time() - cpu_before)
    wall = {side: statistics.median(values) for side, values in walls.items()}
    cpu = {side: statistics.median(values) for side, values in cpus.items()}
    return Figure(
        task=name,
        batch=batch,
        ours_tokens_per_s=round(task.total_tokens / wall["ours"], 1),
        theirs_tokens_per_s=round(task.total_tokens / wall["theirs"], 1),
        ratio=round(wall["theirs"] / wall["ours"], 2),
        cpu_ratio=round(cpu["theirs"] / cpu["ours"], 2),
    )


def measure_model(
    folder: Path, *, batches: Sequence[int], num_tokens: int, rounds: int, console: Console
) -> list[Figure]:
    """Every task at every batch size on one model."""
    ours, theirs = Ours(folder), Generate(folder)
    figures = []
    for batch in batches:
        for name, task in tasks(batch, vocab_size=ours.base.vocab_size, num_tokens=num_tokens).items():
            figures.append(measure(ours, theirs, task, name, batch=batch, rounds=rounds))
            console.print(_line(figures[-1]), highlight=False)
    return figures


def show(title: str, figures: list[Figure], console: Console) -> None:
    """Print the figures of a model, the smallest and the largest ratio last."""
    table = Table(title=title, title_justify="left")
    for column in ("task", "batch", "ours tok/s", "generate tok/s", "ratio", "CPU ratio"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for figure in figures:
        rates = (f"{figure.ours_tokens_per_s:.0f}", f"{figure.theirs_tokens_per_s:.0f}")
        table.add_row(figure.task, str(figure.batch), *rates, f"{figure.ratio:.2f}", f"{figure.cpu_ratio:.2f}")
    console.print(table)
    ratios = sorted(figure.cpu_ratio for figure in figures)
    console.print(f"CPU ratios: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}")


def _line(figure: Figure) -> str:
    return f"{figure.task}, batch {figure.batch}: ratio {figure.ratio:.2f}, by CPU time {figure.cpu_ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.sampling", description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="prompts, or samples, at a time")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both sides in turn")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument(
        "--model", type=Path, help="a model directory beside the random Qwen3 of 7.3 million parameters"
    )
    parser.add_argument("--model-rounds", type=int, default=1, help="rounds on that model")
    parser.add_argument("--json", type=Path, help="write every figure to this file too")
    options = parser.parse_args()
    console = Console()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning)
    load_before = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
        models = {"random Qwen3, 7.3 M parameters": (make_model(Path(folder) / "model"), options.rounds)}
        if options.model is not None:
            models[options.model.name] = (options.model, options.model_rounds)
        found = {
            title: measure_model(
                path, batches=options.batches, num_tokens=options.tokens, rounds=rounds, console=console
            )
            for title, (path, rounds) in models.items()
        }
    for title, figures in found.items():
        show(title, figures, console)
    facts = machine(load_before=load_before, torch_threads=options.threads)
    console.print(describe(facts), highlight=False)
    if options.json:
        every = {title: [asdict(figure) for figure in figures] for title, figures in found.items()}
        options.json.write_text(json.dumps({"machine": asdict(facts), "figures": every}, indent=2) + "\n")


if __name__ == "__main__":
    main()
