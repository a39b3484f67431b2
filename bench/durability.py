"""What each durability setting costs, and how long clients wait when the gang is killed.

Run it with `make bench-durability`, or `python -m bench.durability --json FILE` from the repository's root. Servers with different
settings take turns, so that a busy moment of the machine meets them all; quote ratios.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from bench import job
from bench.fleet import clients
from bench.latency import CONFIG, MODEL_NAME, WARM_UP_STEPS, Samples
from bench.report import machine
from examples.local_server import LocalServer, local_server

SETTINGS: dict[str, Mapping[str, str]] = {
    "default: queue synced always, log on disk every second": {},
    "log on disk synced always": {"joblog_sync": "always"},
    "log on disk never synced": {"joblog_sync": "no"},
    "queue synced every second": {"durability": "everysec"},
    "no recovery: no snapshots": {"recovery": "none"},
    "a snapshot after every batch": {"snapshot_replay_budget_s": "0"},
}
# Steps since the last snapshot that a recovery has to repeat.
REPLAYED_STEPS = (0, 50, 200)


def measure_settings(model: Path, *, rounds: int, steps: int, console: Console) -> dict[str, Samples]:
    """Times of both ops under each setting; one server and one client each, in turn."""
    found = {name: Samples() for name in SETTINGS}
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder, ExitStack() as stack:
        asked = {}
        for number, (name, overrides) in enumerate(SETTINGS.items()):
            server = stack.enter_context(_server(model, Path(folder) / str(number), overrides))
            (asked[name],) = stack.enter_context(clients(1, url=server.url, base_model=MODEL_NAME))
            asked[name].ask("sequential", WARM_UP_STEPS)
            console.print(f"ready: {name}", highlight=False)
        for _ in range(rounds):
            for name, client in asked.items():
                answer = client.ask("sequential", steps)
                found[name].add("forward_backward", answer["forward_backward_ms"])
                found[name].add("optim_step", answer["optim_step_ms"])
    return found


def measure_recovery(model: Path, *, console: Console) -> dict[int, float]:
    """Seconds from the kill of rank 0 to the next result, by the number of steps that were repeated; an idle server's client waits."""
    found = {}
    for num_steps in REPLAYED_STEPS:
        with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
            overrides = {"snapshot_replay_budget_s": "1e6", "snapshot_idle_s": "2"}
            with ExitStack() as stack:
                server = stack.enter_context(_server(model, Path(folder), overrides))
                (client,) = stack.enter_context(clients(1, url=server.url, base_model=MODEL_NAME))
                client.ask("sequential", WARM_UP_STEPS)
                _await_snapshot(Path(folder))
                if num_steps:
                    client.ask("sequential", num_steps)
                start_s = time.monotonic()
                _kill_rank_0(server)
                client.ask("sequential", 1)
                found[num_steps] = round(time.monotonic() - start_s, 2)
        console.print(f"{num_steps} steps repeated: {found[num_steps]} s", highlight=False)
    return found


def _server(model: Path, folder: Path, overrides: Mapping[str, str]) -> AbstractContextManager[LocalServer]:
    given = {"model_path": str(model), "model_name": MODEL_NAME, "torch_threads": "1", **overrides}
    return local_server(CONFIG, output_dir=folder, overrides=given)


def _await_snapshot(output_dir: Path) -> None:
    deadline_s = time.monotonic() + 60
    while not list(output_dir.glob("snapshots/*/cuts/*.json")):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no snapshot below {output_dir} within 60 s")
        time.sleep(0.1)


def _kill_rank_0(server: LocalServer) -> None:
    for process in psutil.Process(server.pid).children(recursive=True):
        command = process.cmdline()
        if "gradstream.worker" in command and "gradstream.worker.torchrun" not in command:
            process.kill()
            return
    raise RuntimeError("rank 0 was not found")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.durability", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all settings in turn")
    parser.add_argument("--steps", type=int, default=20, help="steps in a round")
    parser.add_argument("--json", type=Path, help="write every figure to this file too")
    options = parser.parse_args()
    console = Console()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
        model = job.make_model(Path(folder) / "model")
        settings = measure_settings(model, rounds=options.rounds, steps=options.steps, console=console)
        recovery = measure_recovery(model, console=console)
    figures = {
        name: {op: asdict(samples.latency(op)) for op in ("forward_backward", "optim_step")}
        for name, samples in settings.items()
    }
    table = Table("setting", "forward_backward p50 ms", "optim_step p50 ms", "ratio to default")
    base = next(iter(figures.values()))["optim_step"]["p50_ms"]
    for name, by_op in figures.items():
        step_ms = by_op["optim_step"]["p50_ms"]
        table.add_row(name, str(by_op["forward_backward"]["p50_ms"]), str(step_ms), f"{step_ms / base:.2f}")
    console.print(table)
    about = machine(load_before=load_before, torch_threads=1)
    console.print(f"{about.cpu}, {about.cores} cores, load {about.load}", highlight=False)
    if options.json:
        options.json.write_text(
            json.dumps({"settings": figures, "recovery_s": recovery, "machine": asdict(about)}, indent=2)
        )


if __name__ == "__main__":
    main()
