"""Many registered models on one server, few of which train: memory, time to bring one back, cuts, recovery.

Run it with `make bench-adapters`, or `python -m bench.adapters --models 200` from the repository's root. Everything goes through the
tinker SDK and a real server, once with the parked models in host memory and once in files; both are there beside models on the device
in the same run.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import tinker
from rich.console import Console
from rich.table import Table
from tinker import types

from bench import job
from bench.client import datums
from bench.latency import CONFIG, MODEL_NAME
from bench.report import describe, machine
from examples.local_server import LocalServer, local_server

# What parked models may take of host memory, by where they are then.
PLACES = {"host memory": "64gb", "files": "0"}
NUM_ACTIVE = 64
# Of one model on the device and one that is parked.
NUM_PAIRS = 32
CREATED_AT_ONCE = 16
AWAIT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one server gave. forward_active_ms, forward_parked_ms, step_ms are medians: of a forward pass on one token of a model on the
    device and of a parked one, in the gang; and of a step of training, submit to result.

    create_s: making all models but those that are active. parked_kib: growth of the gang's resident memory for each parked model;
    state_kib: of its tensors. cut_all, cut_few, as text: the time of a cut in which the most models, and of a later one in which a few
    had changed, and how many these were. recovery_s: from the kill of rank 0 to the next result; restored_ms: the take-over in it.
    """

    create_s: float
    parked_kib: float
    state_kib: float
    forward_active_ms: float
    forward_parked_ms: float
    step_ms: float
    cut_all: str
    cut_few: str
    recovery_s: float
    restored_ms: float


class Models:
    """Models of one client, by number."""

    def __init__(self, service: tinker.ServiceClient) -> None:
        self._service = service
        self._clients: list[tinker.TrainingClient] = []
        self._data = datums(job.make_data())
        self._one_token = datums(job.make_data(num_datums=1, num_tokens=1))
        self._adam = types.AdamParams(learning_rate=job.LEARNING_RATE, beta2=job.BETA2, eps=job.EPS)

    def create(self, number: int) -> None:
        """That many more."""
        while number:
            several = min(number, CREATED_AT_ONCE)
            made = [
                self._service.create_lora_training_client(base_model=MODEL_NAME, rank=job.RANK, seed=job.SEED)
                for _ in range(several)
            ]
            self._clients += [future.result() for future in made]
            number -= several

    def forward_ms(self, number: int) -> float:
        """A forward pass on one token."""
        start_s = time.perf_counter()
        self._clients[number].forward(self._one_token, "cross_entropy").result()
        return 1000 * (time.perf_counter() - start_s)

    def step_ms(self, number: int) -> float:
        """A step of training, both ops submitted at once."""
        start_s = time.perf_counter()
        passed = self._clients[number].forward_backward(self._data, "cross_entropy")
        self._clients[number].optim_step(self._adam).result()
        passed.result()
        return 1000 * (time.perf_counter() - start_s)


class Gang:
    """Rank 0 of a server, as its process and its log tell of it."""

    def __init__(self, server: LocalServer, output_dir: Path) -> None:
        self._server = server
        self._output_dir = output_dir

    def process(self) -> psutil.Process:
        for process in psutil.Process(self._server.pid).children(recursive=True):
            command = process.cmdline()
            if "gradstream.worker" in command and "gradstream.worker.torchrun" not in command:
                return process
        raise RuntimeError("rank 0 was not found")

    def rss(self) -> int:
        """Bytes of resident memory of its own; pages of files are not counted."""
        facts = self.process().memory_info()
        return int(facts.rss - facts.shared)

    def events(self, name: str) -> list[dict[str, Any]]:
        """What was logged under a name, oldest first."""
        logs = sorted((self._output_dir / "logs").glob("gang.log*"), reverse=True)
        lines = [line for path in logs for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        events: list[dict[str, Any]] = [json.loads(line) for line in lines if line.startswith("{") and name in line]
        return [event for event in events if event["event"] == name]

    def await_cut(self, *, num_before: int = 0, num_models: int = 0) -> int:
        """How many cuts there are, once they are more than num_before and the last one is of num_models at least."""
        deadline_s = time.monotonic() + AWAIT_S
        while time.monotonic() < deadline_s:
            cuts = self.events("snapshot")
            if len(cuts) > num_before and cuts[-1]["num_models"] >= num_models:
                return len(cuts)
            time.sleep(0.2)
        raise TimeoutError(f"no further snapshot within {AWAIT_S} s")


@contextmanager
def _running(model: Path, folder: Path, *, host_memory: str, num_models: int) -> Iterator[tuple[LocalServer, Gang]]:
    overrides = {
        "model_path": str(model),
        "model_name": MODEL_NAME,
        "torch_threads": "1",
        "max_active_adapters": str(NUM_ACTIVE),
        "adapter_host_memory": host_memory,
        "max_models_per_tenant": str(num_models),
        "snapshot_idle_s": "2",
    }
    with local_server(CONFIG, output_dir=folder, overrides=overrides) as server:
        yield server, Gang(server, folder)


def measure(model: Path, folder: Path, *, host_memory: str, num_models: int) -> Figures:
    """One server from its first model to its recovery."""
    with _running(model, folder, host_memory=host_memory, num_models=num_models) as (server, gang):
        models = Models(tinker.ServiceClient(base_url=server.url, api_key="tml-local"))
        models.create(NUM_ACTIVE)
        gang.await_cut(num_models=NUM_ACTIVE)
        rss = gang.rss()
        start_s = time.perf_counter()
        models.create(num_models - NUM_ACTIVE)
        create_s = time.perf_counter() - start_s
        num_cuts = gang.await_cut(num_models=num_models)
        parked = (gang.rss() - rss) / (num_models - NUM_ACTIVE)
        all_cut = max(gang.events("snapshot"), key=lambda cut: int(cut["num_changed"]))
        active = range(num_models - NUM_ACTIVE, num_models)
        steps = [models.step_ms(number) for number in active]
        gang.await_cut(num_before=num_cuts)
        few_cut = gang.events("snapshot")[-1]
        for number in range(NUM_PAIRS):
            # The last ones that were used: others leave the device for those that come.
            models.forward_ms(num_models - 1 - number)
            models.forward_ms(number)
        batches = [event["elapsed_ms"] for event in gang.events("batch") if event["kind"] == "forward"]
        killed_s = time.monotonic()
        gang.process().kill()
        models.forward_ms(0)
        recovery_s = time.monotonic() - killed_s
        return Figures(
            create_s=round(create_s, 1),
            parked_kib=round(parked / 1024, 1),
            state_kib=round(int(all_cut["num_bytes"]) / int(all_cut["num_changed"]) / 1024, 1),
            forward_active_ms=round(median(batches[-2 * NUM_PAIRS :: 2]), 2),
            forward_parked_ms=round(median(batches[1 - 2 * NUM_PAIRS :: 2]), 2),
            step_ms=round(median(steps), 2),
            cut_all=_cut(all_cut),
            cut_few=_cut(few_cut),
            recovery_s=round(recovery_s, 2),
            restored_ms=float(gang.events("took_over")[-1]["elapsed_ms"]),
        )


def _cut(event: dict[str, Any]) -> str:
    return f"{event['elapsed_ms']} ms ({event['num_changed']} of {event['num_models']} changed)"


def show(figures: dict[str, Figures], console: Console) -> None:
    """Print what the servers gave, side by side."""
    table = Table("", *figures)
    rows: Sequence[tuple[str, str]] = (
        ("resident memory a parked model, KiB", "parked_kib"),
        ("its tensors, KiB", "state_kib"),
        ("1 token, model on the device, in the gang, ms", "forward_active_ms"),
        ("1 token, parked model, in the gang, ms", "forward_parked_ms"),
        ("a step of training, ms", "step_ms"),
        ("largest cut", "cut_all"),
        ("a later cut", "cut_few"),
        ("from kill to next result, s", "recovery_s"),
        ("of it, the take-over, ms", "restored_ms"),
        (f"making all but {NUM_ACTIVE} models, s", "create_s"),
    )
    for title, name in rows:
        table.add_row(title, *(str(getattr(one, name)) for one in figures.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.adapters", description=__doc__)
    parser.add_argument("--models", type=int, default=1000, help="registered models, more than the active ones")
    parser.add_argument("--json", type=Path, help="write every figure to this file too")
    options = parser.parse_args()
    console = Console(width=120)
    load_before = os.getloadavg()[0]
    figures = {}
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
        model = job.make_model(Path(folder) / "model")
        for number, (place, host_memory) in enumerate(PLACES.items()):
            # The SDK's threads go on speaking to a server that ended; they end with their process.
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
                asked = process.submit(
                    measure, model, Path(folder) / str(number), host_memory=host_memory, num_models=options.models
                )
                figures[place] = asked.result()
            console.print(f"done: parked models are in {place}", highlight=False)
    show(figures, console)
    about = machine(load_before=load_before, torch_threads=1)
    console.print(describe(about), highlight=False)
    if options.json:
        found = {"figures": {place: asdict(one) for place, one in figures.items()}, "machine": asdict(about)}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
