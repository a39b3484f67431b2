"""How soon a sample of one token is answered by a server that is idle, trains, or samples at length beside it.

Run it with `python -m bench.first_token`, from the repository's root: the model and the training of `make bench`, the stock tinker SDK.
The states come in rounds in turn.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import tinker
from rich.console import Console
from rich.table import Table
from tinker import types

from bench import job
from bench.fleet import ClientProcess, clients
from bench.latency import CONFIG, MODEL_NAME
from bench.report import describe, latency, machine
from examples.local_server import local_server

PROMPT = list(range(4, 36))
LONG_TOKENS = 1024
NUM_LONG = 8


def first_token_ms(client: tinker.SamplingClient) -> float:
    """Submit to result of one token."""
    params = types.SamplingParams(max_tokens=1, temperature=1.0)
    started = time.perf_counter()
    client.sample(types.ModelInput.from_ints(PROMPT), num_samples=1, sampling_params=params).result()
    return (time.perf_counter() - started) * 1000


@contextmanager
def training(process: ClientProcess, *, steps: int) -> Iterator[None]:
    """Within the block the process trains as fast as it can; the block ends when it has."""
    process.send("pipelined", steps)
    try:
        yield
    finally:
        process.receive()


@contextmanager
def sampling(client: tinker.SamplingClient) -> Iterator[None]:
    """Within the block long samples run, each begun anew when it has ended."""
    params = types.SamplingParams(max_tokens=LONG_TOKENS, temperature=1.0, stop=[])
    prompt = types.ModelInput.from_ints(PROMPT)
    running = [client.sample(prompt, num_samples=1, sampling_params=params) for _ in range(NUM_LONG)]
    try:
        yield
    finally:
        for future in running:
            future.result()


def measure(url: str, *, rounds: int, samples: int, steps: int) -> dict[str, list[float]]:
    """Times in ms by the state of the server."""
    found: dict[str, list[float]] = {"alone": [], "beside training": [], "beside long samples": [], "beside both": []}
    with (
        clients(1, url=url, base_model=MODEL_NAME) as (trainer,),
        tinker.ServiceClient(base_url=url, api_key="tml-bench") as service,
    ):
        client = service.create_sampling_client(base_model=MODEL_NAME).result()
        first_token_ms(client)
        trainer.ask("pipelined", 5)
        for _ in range(rounds):
            for name, values in found.items():
                trains, long = (
                    name in {"beside training", "beside both"},
                    name in {"beside long samples", "beside both"},
                )
                with (
                    training(trainer, steps=steps) if trains else nullcontext(),
                    sampling(client) if long else nullcontext(),
                ):
                    # The load is there before the first sample is sent.
                    time.sleep(0.2)
                    values += [first_token_ms(client) for _ in range(samples)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.first_token", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all states in turn")
    parser.add_argument("--samples", type=int, default=10, help="samples in a round and state")
    parser.add_argument("--steps", type=int, default=60, help="training steps meanwhile, four in flight")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    console = Console()
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
        model = job.make_model(Path(folder) / "model")
        overrides = {"model_path": str(model), "model_name": MODEL_NAME, "torch_threads": "1"}
        with local_server(CONFIG, output_dir=Path(folder) / "outputs", overrides=overrides) as server:
            found = measure(server.url, rounds=options.rounds, samples=options.samples, steps=options.steps)
    table = Table(title="submit to result of one token [ms]", title_justify="left")
    for column in ("server", "p50", "p95", "p50 of alone", "n"):
        table.add_column(column, justify="left" if column == "server" else "right")
    alone = latency(found["alone"])
    for name, values in found.items():
        figure = latency(values)
        ratio = f"{figure.p50_ms / alone.p50_ms:.2f}"
        table.add_row(name, f"{figure.p50_ms:.1f}", f"{figure.p95_ms:.1f}", ratio, str(figure.num))
    console.print(table)
    facts = machine(load_before=load_before, torch_threads=1)
    console.print(describe(facts), highlight=False)


if __name__ == "__main__":
    main()
