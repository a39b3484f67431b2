"""What it saves to compute a prompt once for all its completions: the same jobs, shared and not, in rounds in turn.

Run it with `make bench-prompts`, or `python -m bench.prompts --model FOLDER --json FILE` from the repository's root.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig

from bench.lead_in import options_of, scratch_and_model
from bench.ours import EngineJobs
from bench.report import Machine, describe, machine
from bench.text import Tokens
from gradstream.engine.packing import Sharing, pack
from gradstream.engine.prefixes import find_prefixes
from gradstream.shared.columns import Column
from gradstream.shared.config import Settings
from gradstream.shared.wire import ForwardBackward

SEED = 0
RANK = 8
# What a row holds on a CPU by default.
ROW_TOKENS = 2048
SHARED_FROM = Settings(model_path="").shared_prompt_tokens
# Tokens of the prompt, completions, and tokens of each of these by the mean.
CASES = ((512, 8, 64), (512, 16, 64), (512, 8, 256), (128, 8, 64), (64, 8, 64), (32, 8, 64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One group of completions. tokens of all datums, and computed ones where the prompt is shared.

    CPU seconds of one job, medians over rounds; ratios are the medians of the rounds' own. tokens_per_s: by the wall clock, of all
    datums' tokens, in training. error: relative, of the gradient against the one that shares nothing.
    """

    prompt: int
    group: int
    completion: int
    tokens: int
    computed: int
    train_s: float
    train_shared_s: float
    train_ratio: float
    score_s: float
    score_shared_s: float
    score_ratio: float
    tokens_per_s: float
    tokens_per_s_shared: float
    error: float


class Jobs:
    """An engine with one adapter."""

    def __init__(self, folder: Path) -> None:
        self._engine = EngineJobs.of_loras(folder, rank=RANK, row_budget_tokens=ROW_TOKENS)
        models = self._engine.engine.state.models
        (self._adapter,) = [models[model_id] for model_id in models]
        # One of the factors of a new adapter is zero, and the other's gradient with it.
        noise = torch.randn(self._adapter.weights.shape, generator=torch.Generator().manual_seed(SEED))
        self._adapter.weights.add_(noise, alpha=0.02)

    def timed(self, payload: ForwardBackward, *, share: int) -> tuple[float, float, Tensor]:
        """CPU and wall seconds of a job, and its gradient; share: the plan's shared_prompt_tokens."""
        self._adapter.clear_grad()
        cpu, wall = time.process_time(), time.perf_counter()
        self._engine.run({0: payload}, shared_prompt_tokens=share)
        return time.process_time() - cpu, time.perf_counter() - wall, self._adapter.grad.clone()


def completions(prompt: int, group: int, mean: int, *, vocab_size: int) -> list[Tokens]:
    """Token ids of each datum; completions have from half to one and a half times the mean length."""
    rng = np.random.default_rng(SEED)
    opening = rng.integers(4, vocab_size, prompt)
    lengths = rng.integers(mean // 2, mean + mean // 2 + 1, group)
    return [np.concatenate([opening, rng.integers(4, vocab_size, length)]) for length in lengths]


def job_of(datums: Sequence[Tokens], prompt: int, *, backward: bool) -> ForwardBackward:
    """As in reinforcement learning: the completions have advantages, the prompt has none."""
    rng = np.random.default_rng(SEED)
    advantages = [np.where(np.arange(len(own) - 1) < prompt - 1, 0.0, rng.normal()) for own in datums]
    return ForwardBackward(
        tokens=Column.of([own[:-1] for own in datums], dtype="int32"),
        inputs={
            "target_tokens": Column.of([own[1:] for own in datums], dtype="int64"),
            "logprobs": Column.of([np.full(len(own) - 1, -9.0) for own in datums], dtype="float32"),
            "advantages": Column.of(list(advantages), dtype="float32"),
        },
        loss_fn="importance_sampling",
        backward=backward,
    )


def num_computed(inputs: Sequence[Tokens]) -> int:
    """Tokens that one job's rows compute where prompts are shared; a group of several rows has its prompt in each of them."""
    lengths = list(map(len, inputs))
    paths = find_prefixes(np.concatenate(inputs), lengths, min_tokens=SHARED_FROM)
    sharing = Sharing(paths=[paths], num_candidates=[1])
    return sum(row.num_tokens for row in pack([lengths], budget_tokens=ROW_TOKENS, sharing=sharing))


def measure(jobs: Jobs, shape: tuple[int, int, int], *, rounds: int, vocab_size: int) -> Case:
    """One case."""
    prompt, group, mean = shape
    datums = completions(prompt, group, mean, vocab_size=vocab_size)
    inputs = [own[:-1] for own in datums]
    train, score = (job_of(datums, prompt, backward=backward) for backward in (True, False))
    taken: list[tuple[float, ...]] = []
    error = 0.0
    for number in range(rounds + 1):
        plain, shared = (jobs.timed(train, share=share) for share in (0, SHARED_FROM))
        scores = [jobs.timed(score, share=share)[0] for share in (0, SHARED_FROM)]
        error = float((shared[2] - plain[2]).norm() / plain[2].norm())
        # The first round is for warming up.
        if number:
            taken.append((plain[0], shared[0], *scores, plain[1], shared[1]))
    train_s, train_shared_s, score_s, score_shared_s, wall_s, wall_shared_s = (
        float(np.median(values)) for values in zip(*taken, strict=True)
    )
    tokens = sum(map(len, inputs))
    return Case(
        prompt=prompt,
        group=group,
        completion=mean,
        tokens=tokens,
        computed=num_computed(inputs),
        train_s=round(train_s, 3),
        train_shared_s=round(train_shared_s, 3),
        train_ratio=round(float(np.median([one[0] / one[1] for one in taken])), 2),
        score_s=round(score_s, 3),
        score_shared_s=round(score_shared_s, 3),
        score_ratio=round(float(np.median([one[2] / one[3] for one in taken])), 2),
        tokens_per_s=round(tokens / wall_s, 1),
        tokens_per_s_shared=round(tokens / wall_shared_s, 1),
        error=error,
    )


def show(cases: Sequence[Case], facts: Machine, console: Console) -> None:
    """Print the cases as a table."""
    table = Table(
        title=f"CPU seconds of a job, LoRA rank {RANK}: each datum for itself, and prompts shared", title_justify="left"
    )
    columns = (
        "prompt",
        "completions",
        "computed",
        "train",
        "shared",
        "ratio",
        "tokens/s",
        "shared",
        "score",
        "shared",
        "ratio",
        "error",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(
            str(case.prompt),
            f"{case.group} x {case.completion}",
            f"1/{case.tokens / case.computed:.2f}",
            f"{case.train_s:.2f}",
            f"{case.train_shared_s:.2f}",
            f"{case.train_ratio:.2f}",
            f"{case.tokens_per_s:.0f}",
            f"{case.tokens_per_s_shared:.0f}",
            f"{case.score_s:.2f}",
            f"{case.score_shared_s:.2f}",
            f"{case.score_ratio:.2f}",
            f"{case.error:.0e}",
        )
    console.print(table)
    console.print(describe(facts), highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.prompts", description=__doc__)
    options = options_of(parser)
    load_before = os.getloadavg()[0]
    with scratch_and_model(options.model) as (_, model):
        vocab_size = AutoConfig.from_pretrained(model).vocab_size
        jobs = Jobs(model)
        cases = [measure(jobs, shape, rounds=options.rounds, vocab_size=vocab_size) for shape in CASES]
    facts = machine(load_before=load_before, torch_threads=options.threads)
    show(cases, facts, Console(width=130))
    if options.json is not None:
        found = {"cases": [asdict(case) for case in cases], "machine": asdict(facts)}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
