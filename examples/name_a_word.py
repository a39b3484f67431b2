"""Teach a small model by reward: name one English word that starts with a given letter. The stock tinker SDK is the client.

Run it with `make demo-rl`, or `python -m examples.name_a_word --help` from the repository's root.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tinker
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinker import types

from examples.local_server import LocalServer, ServerFailed, local_server
from examples.speak_shakespeare import API_KEY, ROOT, fetch_model
from examples.word_rewards import NameAWord, Prompt, Score, StartWords, Task

PROMPTS_PER_STEP = 8
SAMPLES_PER_PROMPT = 8
MIN_RISE = 0.1  # of the mean reward, last quarter of the steps against the first: more than luck
WORDS_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One sampled reply with the log-probabilities it was sampled with, and its score."""

    tokens: list[int]
    logprobs: list[float]
    score: Score

    def datum(self, prompt: Prompt, advantage: float) -> types.Datum:
        """The reply as training data: the advantage stands at each of its tokens, zero at the prompt's."""
        padding = [0.0] * (len(prompt.tokens) - 1)
        tokens = prompt.tokens + self.tokens
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=tokens[1:], dtype="int64"),
                "logprobs": types.TensorData(data=padding + self.logprobs, dtype="float32"),
                "advantages": types.TensorData(data=padding + [advantage] * len(self.tokens), dtype="float32"),
            },
        )


@dataclass(slots=True, kw_only=True)
class Curve:
    """What each step's replies were worth on average. words: some exact answers of the newest step."""

    rewards: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def add(self, scores: Sequence[Score]) -> None:
        """Take in one step's replies."""
        self.rewards.append(sum(score.reward for score in scores) / len(scores))
        self.exact.append(sum(score.is_exact for score in scores) / len(scores))
        self.words = sorted({score.word for score in scores if score.word}, key=str.lower)

    def quarters(self) -> tuple[float, float]:
        """Mean reward of the first and of the last quarter of the steps."""
        size = max(1, len(self.rewards) // 4)
        return sum(self.rewards[:size]) / size, sum(self.rewards[-size:]) / size


def sample(client: tinker.SamplingClient, task: Task, prompts: Sequence[Prompt], *, seed: int) -> list[list[Reply]]:
    """SAMPLES_PER_PROMPT scored replies to each prompt, all asked for at once."""
    futures = []
    for index, prompt in enumerate(prompts):
        params = types.SamplingParams(max_tokens=task.max_tokens, temperature=1.0, stop=task.stop, seed=seed + index)
        futures.append(client.sample(types.ModelInput.from_ints(prompt.tokens), SAMPLES_PER_PROMPT, params))
    return [
        [
            Reply(
                tokens=list(sequence.tokens),
                logprobs=list(sequence.logprobs or []),
                score=task.score(prompt, sequence.tokens),
            )
            for sequence in future.result().sequences
        ]
        for prompt, future in zip(prompts, futures, strict=True)
    ]


def lessons(prompts: Sequence[Prompt], groups: Sequence[Sequence[Reply]]) -> list[types.Datum]:
    """Training data: each reply against the mean of its group. A group of equal replies teaches nothing and is left out."""
    data = []
    for prompt, group in zip(prompts, groups, strict=True):
        mean = sum(reply.score.reward for reply in group) / len(group)
        advantages = [reply.score.reward - mean for reply in group]
        if any(advantages):
            data += [reply.datum(prompt, advantage) for reply, advantage in zip(group, advantages, strict=True)]
    return data


def train(client: tinker.TrainingClient, task: Task, options: argparse.Namespace, console: Console) -> Curve:
    """Sample, score and train, step after step; the rewards."""
    rng = random.Random(options.seed)
    adam = types.AdamParams(learning_rate=options.learning_rate, beta2=0.95)
    curve = Curve()
    columns = (
        SpinnerColumn(),
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[reward]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("training", total=options.steps, reward="reward ...")
        for step in range(options.steps):
            prompts = task.prompts(rng, PROMPTS_PER_STEP)
            sampler = client.save_weights_and_get_sampling_client().result()
            groups = sample(sampler, task, prompts, seed=options.seed + step * PROMPTS_PER_STEP)
            curve.add([reply.score for group in groups for reply in group])
            if data := lessons(prompts, groups):
                futures = client.forward_backward(data, "importance_sampling"), client.optim_step(adam)
                for future in futures:
                    future.result()
            reward = f"reward {curve.rewards[-1]:.2f}, exact {curve.exact[-1]:.0%}"
            progress.update(bar, advance=1, reward=reward)
            if not console.is_terminal:
                console.print(f"step {step + 1:3d}  {reward}")
    return curve


def draw(curve: Curve, title: str, target: Path) -> None:
    """Write the plot of the rewards as a PNG."""
    steps = range(1, len(curve.rewards) + 1)
    figure = Figure(figsize=(7, 4), dpi=120, layout="tight")
    axes = figure.subplots()
    axes.plot(steps, curve.rewards, marker="o", label="mean reward")
    axes.plot(steps, curve.exact, marker=".", linestyle="--", label="share of exact replies")
    axes.set(xlabel="step", ylim=(-0.02, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def run(server: LocalServer, options: argparse.Namespace, console: Console) -> Curve:
    """The client's part: everything from here on is the stock SDK against the server's URL."""
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as service:
        base_model = (
            tinker.RestClient(base_url=server.url, api_key=API_KEY)
            .get_server_capabilities()
            .result()
            .supported_models[0]
            .model_name
        )
        assert base_model is not None
        client = service.create_lora_training_client(base_model=base_model, rank=16, seed=options.seed).result()
        tokenizer = client.get_tokenizer()
        task: Task = StartWords(tokenizer) if options.model == "tiny" else NameAWord(tokenizer)
        console.print(f"{base_model}: {task.title}\n", highlight=False, soft_wrap=True)
        started = time.monotonic()
        curve = train(client, task, options, console)
        draw(curve, task.title, options.output_dir / "reward.png")
        show_report(console, curve, options.output_dir / "reward.png", seconds=time.monotonic() - started)
    return curve


def show_report(console: Console, curve: Curve, plot: Path, *, seconds: float) -> None:
    """Print the table at the end. Only words of the list are shown."""
    first, last = curve.quarters()
    table = Table(show_header=False, title="\nName a word", title_justify="left")
    table.add_row("mean reward", f"{first:.2f} -> {last:.2f} (first and last quarter of the steps)")
    table.add_row("exact replies", f"{curve.exact[0]:.0%} -> {curve.exact[-1]:.0%} (first and last step)")
    table.add_row("in", f"{seconds:.0f} s, {seconds / len(curve.rewards):.1f} s a step")
    if curve.words:
        table.add_row("it says", escape(", ".join(curve.words[:WORDS_SHOWN])))
    table.add_row("plot", str(plot))
    console.print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="name_a_word", description=__doc__)
    parser.add_argument(
        "--model", choices=["smollm2", "tiny"], default="smollm2", help="tiny: a toy model and rule, in seconds"
    )
    parser.add_argument("--config", type=Path, help="server config (default: the model's in configs/)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, help="default: 3e-4, for the tiny model 1e-2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output-dir", type=Path, default=ROOT / "outputs" / "demo-rl", help="plot, checkpoints, queue and logs"
    )
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps: {options.steps} is too few to see a rise; use 2 or more")
    if options.learning_rate is None:
        options.learning_rate = 1e-2 if options.model == "tiny" else 3e-4
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the reward rose."""
    options = parse(arguments)
    console = Console()
    config = options.config or ROOT / "configs" / ("tiny.yaml" if options.model == "tiny" else "demo.yaml")
    if options.model == "smollm2" and options.config is None:
        fetch_model(console)
    try:
        with (
            console.status("starting the server") as status,
            local_server(config, output_dir=options.output_dir) as server,
        ):
            status.stop()
            console.print(
                f"the server answers at {server.url}, its log is {server.log}", highlight=False, soft_wrap=True
            )
            curve = run(server, options, console)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except ServerFailed as error:
        console.print(f"[red]{escape(str(error))}[/red]", highlight=False, soft_wrap=True)
        return 2
    first, last = curve.quarters()
    if last < first + MIN_RISE:
        console.print("[red]The reward did not rise.[/red]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
