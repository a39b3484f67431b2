"""Latency and throughput of the server on a tiny model, beside the same job on bare torch + peft in the same run.

Run it with `make bench`, or `python -m bench.latency --json FILE` from the repository's root.
"""

import argparse
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

from bench import job
from bench.bare import BareJob
from bench.fleet import ClientProcess, clients
from bench.report import Latency, Run, Throughput, latency, machine, show, write_json
from examples.local_server import local_server

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "tiny.yaml"
MODEL_NAME = "bench/qwen3-0.34m"
WARM_UP_STEPS = 5


class Samples:
    """Measured times by name, in ms."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, values_ms: Iterable[float]) -> None:
        self._values.setdefault(name, []).extend(values_ms)

    def latency(self, name: str) -> Latency:
        return latency(self._values[name])


def measure_latency(client: ClientProcess, bare: BareJob, *, rounds: int, steps: int) -> Samples:
    """Rounds of the server and of the bare job in turn, so that a busy moment of the machine meets both."""
    samples = Samples()
    data, one_token = job.make_data(), job.make_data(num_datums=1, num_tokens=1)
    client.ask("sequential", WARM_UP_STEPS)
    client.ask("one_token", WARM_UP_STEPS)
    for _ in range(WARM_UP_STEPS):
        bare.forward_backward(data)
        bare.optim_step()
    for _ in range(rounds):
        answer = client.ask("sequential", steps)
        samples.add("forward_backward", answer["forward_backward_ms"])
        samples.add("optim_step", answer["optim_step_ms"])
        samples.add("one_token", client.ask("one_token", steps)["forward_ms"])
        for _ in range(steps):
            samples.add("bare forward_backward", [bare.forward_backward(data)])
            samples.add("bare optim_step", [bare.optim_step()])
        samples.add("bare one_token", [bare.forward(one_token) for _ in range(steps)])
    return samples


def measure_throughput(fleet: list[ClientProcess], *, steps: int) -> Throughput:
    """Steps a second of all clients, from the first one's start to the last one's end."""
    for client in fleet:
        client.send("pipelined", WARM_UP_STEPS)
    for client in fleet:
        client.receive()
    for client in fleet:
        client.send("pipelined", steps)
    answers = [client.receive() for client in fleet]
    elapsed_s = max(answer["ended_s"] for answer in answers) - min(answer["started_s"] for answer in answers)
    num_steps = steps * len(fleet)
    return Throughput(
        clients=len(fleet),
        steps_per_s=round(num_steps / elapsed_s, 2),
        client_cpu_ms=round(sum(answer["cpu_s"] for answer in answers) / num_steps * 1000, 2),
    )


def measure(*, rounds: int, steps: int, fleet_sizes: list[int], threads: int, console: Console) -> Run:
    """The whole run, on a server of its own in a temporary directory. threads: of torch, in the gang and in the bare job."""
    load_before = os.getloadavg()[0]
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
        model = job.make_model(Path(folder) / "model")
        bare = BareJob(model)
        overrides = {"model_path": str(model), "model_name": MODEL_NAME, "torch_threads": str(threads)}
        with local_server(CONFIG, output_dir=Path(folder) / "outputs", overrides=overrides) as server:
            console.print(f"server ready at {server.url}", highlight=False)
            with clients(1, url=server.url, base_model=MODEL_NAME) as (client,):
                samples = measure_latency(client, bare, rounds=rounds, steps=steps)
            throughput = []
            for size in fleet_sizes:
                console.print(f"{size} client(s) at once")
                with clients(size, url=server.url, base_model=MODEL_NAME) as fleet:
                    throughput.append(measure_throughput(fleet, steps=rounds * steps // 2))
    bare_forward_backward, bare_optim_step = (
        samples.latency("bare forward_backward"),
        samples.latency("bare optim_step"),
    )
    return Run(
        forward_backward=samples.latency("forward_backward"),
        bare_forward_backward=bare_forward_backward,
        optim_step=samples.latency("optim_step"),
        bare_optim_step=bare_optim_step,
        one_token=samples.latency("one_token"),
        bare_one_token=samples.latency("bare one_token"),
        throughput=throughput,
        bare_steps_per_s=round(1000 / (bare_forward_backward.p50_ms + bare_optim_step.p50_ms), 2),
        machine=machine(load_before=load_before, torch_threads=threads),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.latency", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of server and bare job in turn")
    parser.add_argument("--steps", type=int, default=20, help="steps in a round")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="how many clients at once, one run each")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the gang and of the bare job")
    parser.add_argument("--json", type=Path, help="write every figure to this file too")
    options = parser.parse_args()
    console = Console()
    # The libraries of the bare job speak of themselves; the figures are all that matters here.
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    run = measure(
        rounds=options.rounds,
        steps=options.steps,
        fleet_sizes=options.clients,
        threads=options.threads,
        console=console,
    )
    show(run, console)
    if options.json:
        write_json(run, options.json)


if __name__ == "__main__":
    main()
