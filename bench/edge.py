"""The HTTP edge against its goals: submits, decoding, parked polls, a burst of large bodies, and what the queue costs.

Run it with `make bench-edge`, or `python -m bench.edge [--only submit decode polls burst queue] [--polls 5000] [--durability everysec]`
from the repository's root. Needs Linux. A real API process on a real queue, with fsync always unless told otherwise; the worker has no
engine. The rival of the submit figures is a FastAPI handler that only reads the same body, in the same run.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.edge_bodies import LONG, MANY, RL, SMALL, Shape, body_of, tail_of
from bench.edge_processes import Child, Edge, child, edge
from bench.edge_worker import CARD
from bench.report import describe, latency, machine
from gradstream.api.tinker import training_proto
from gradstream.api.training_data import to_payload
from gradstream.shared import codec
from gradstream.shared.joblog.packed import Packed, payload_digest

_MAX_DATUMS = 4096
_SHAPE_NAMES = {SMALL.name: "small", LONG.name: "long", MANY.name: "many", RL.name: "rl"}
_ROUNDS = 5


def decode(console: Console) -> None:
    """Body to arrays, to the job's bytes, to what is stored; ms, beside a copy of as many bytes to memory that is there already."""
    table = Table(title="one body, one thread [ms]", title_justify="left")
    for name in (
        "body",
        "MB",
        "memcpy",
        "to arrays",
        "ratio",
        "to a checked job",
        "ratio",
        "digest",
        "compress",
        "to MB",
    ):
        table.add_column(name, justify="left" if name == "body" else "right")
    for shape in (LONG, MANY, RL):
        raw = body_of("bench:train:0", 1, tail_of(shape))
        source = np.frombuffer(raw, dtype=np.uint8)
        target = np.empty_like(source)
        copied = _median_ms(lambda source=source, target=target: np.copyto(target, source))  # type: ignore[misc]
        arrays = _median_ms(lambda raw=raw: _arrays(raw))  # type: ignore[misc]
        job = _median_ms(lambda raw=raw: _job(raw))  # type: ignore[misc]
        payload = _job(raw)
        digest = _median_ms(lambda payload=payload: payload_digest(payload))  # type: ignore[misc]
        packed = _median_ms(lambda payload=payload: Packed.of(payload))  # type: ignore[misc]
        stored = len(Packed.of(payload).data) / 1e6
        times = [f"{copied:.3f}", f"{arrays:.2f}", f"{arrays / copied:.1f}", f"{job:.2f}", f"{job / copied:.1f}"]
        table.add_row(
            shape.name, f"{len(raw) / 1e6:.2f}", *times, f"{digest:.2f}", f"{packed - digest:.2f}", f"{stored:.2f}"
        )
    console.print(table)


def _arrays(raw: bytes) -> object:
    return training_proto.training_data(training_proto.parse_request(raw, max_datums=_MAX_DATUMS))


def _job(raw: bytes) -> bytes:
    data = training_proto.training_data(training_proto.parse_request(raw, max_datums=_MAX_DATUMS))
    return codec.encode(to_payload(data, CARD))


def _median_ms(work: Callable[[], object], *, times: int = 25) -> float:
    values = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        values.append(time.perf_counter() - started)
    return statistics.median(values) * 1000


def submit(run: Edge, console: Console) -> None:
    """CPU of the API for one submit and of the raw handler for the same body, in rounds in turn."""
    table = Table(title="CPU of the process for one submit [ms]", title_justify="left")
    for name in ("body", "clients", "API", "raw FastAPI", "ratio", "ack p50", "p95", "raw p50"):
        table.add_column(name, justify="left" if name == "body" else "right")
    for shape, num_clients, count in (
        (SMALL, 1, 200),
        (SMALL, 16, 800),
        (SMALL, 64, 1600),
        (LONG, 1, 12),
        (MANY, 1, 12),
        (MANY, 4, 24),
        (RL, 1, 12),
    ):
        models = run.models(num_clients)
        ours, raws, acks, raw_acks = [], [], [], []
        share = count // num_clients
        for number in range(_ROUNDS):
            run.tell_worker("hold")
            cpu_ms, times_ms = _submits(run.api, run.port, shape, models, count, first_seq=1 + number * share)
            raw_cpu_ms, raw_times_ms = _submits(
                run.raw, run.raw_port, shape, models, count, first_seq=1 + number * share
            )
            run.tell_worker("answer")
            ours.append(cpu_ms)
            raws.append(raw_cpu_ms)
            acks += times_ms
            raw_acks += raw_times_ms
        api_ms, raw_ms = statistics.median(ours), statistics.median(raws)
        ack = latency(acks)
        figures = [f"{api_ms:.3f}", f"{raw_ms:.3f}", f"{api_ms / raw_ms:.2f}", f"{ack.p50_ms:.1f}", f"{ack.p95_ms:.1f}"]
        table.add_row(shape.name, str(num_clients), *figures, f"{latency(raw_acks).p50_ms:.1f}")
    console.print(table)


def _submits(
    server: Child, port: int, shape: Shape, models: list[str], count: int, *, first_seq: int
) -> tuple[float, list[float]]:
    """(CPU of the server for one request, ms; the clients' times, ms)."""
    arguments = [
        "--port",
        str(port),
        "--shape",
        _SHAPE_NAMES[shape.name],
        "--count",
        str(count),
        "--first-seq",
        str(first_seq),
    ]
    before = server.cpu_s()
    with child("bench.edge_load", "submits", *arguments, "--models", *models) as clients:
        answer = clients.hear()
    return (server.cpu_s() - before) / count * 1000, answer["times_ms"]


def polls(run: Edge, console: Console, *, count: int) -> None:
    """Memory and CPU of parked polls, and how long it takes until all have their answer after one commit of all of them."""
    num_each = 250
    models = run.models(count // num_each)
    run.tell_worker("hold")
    for model in models:
        for seq in range(1, num_each + 1):
            run.ask("optim_step", {"model_id": model, "seq_id": seq, "adam_params": {}})
    time.sleep(1)
    memory, cpu = run.api.resident_bytes(), run.api.cpu_s()
    with child(
        "bench.edge_load", "polls", "--port", str(run.port), "--count", str(num_each), "--models", *models
    ) as clients:
        clients.hear()
        _wait_until_parked(run, len(models) * num_each)
        parked_memory, parked_cpu = run.api.resident_bytes(), run.api.cpu_s()
        released = run.tell_worker("release")
        answer = clients.hear()
    woken_cpu = run.api.cpu_s()
    run.tell_worker("answer")
    number = len(answer["ended_s"])
    assert answer["statuses"] == [200], answer["statuses"]
    committed_s = released["started_s"] + released["commit_s"]
    last_s, p50_s = max(answer["ended_s"]), statistics.median(answer["ended_s"])
    console.print(
        f"parked polls: {number}, {(parked_memory - memory) / number / 1024:.1f} KiB and "
        f"{(parked_cpu - cpu) / number * 1e6:.0f} us of CPU each; "
        f"one commit of all took {released['commit_s']:.2f} s; half of the answers were there {p50_s - committed_s:.2f} s after it, the "
        f"last one {last_s - committed_s:.2f} s after it; {(woken_cpu - parked_cpu) / number * 1e6:.0f} us of CPU each to wake",
        highlight=False,
    )


def _wait_until_parked(run: Edge, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://127.0.0.1:{run.port}/metrics", timeout=20) as response:
            if f"gradstream_api_polls_parked {float(count)}" in response.read().decode():
                return
        time.sleep(0.1)
    raise TimeoutError(f"{count} polls were not parked within a minute")


def burst(run: Edge, console: Console) -> None:
    """208 submits of 3.3 MB at once, each on a connection of its own, with heartbeats beside them."""
    session, models = run.session(), run.models(208)
    with child("bench.edge_load", "heartbeats", "--port", str(run.port), "--session", session) as quiet:
        time.sleep(3)
        before = latency(quiet.finish()["times_ms"])
    with child("bench.edge_load", "heartbeats", "--port", str(run.port), "--session", session) as beats:
        time.sleep(1)
        cpu = run.api.cpu_s()
        with child(
            "bench.edge_load",
            "submits",
            "--port",
            str(run.port),
            "--shape",
            "burst",
            "--count",
            "208",
            "--models",
            *models,
        ) as clients:
            answer = clients.hear()
        cpu = run.api.cpu_s() - cpu
        meanwhile = latency(_during(beats.finish(), answer["started_s"], answer["elapsed_s"]))
    console.print(
        f"burst: 208 submits of {answer['body_bytes'] / 1e6:.2f} MB in {answer['elapsed_s']:.2f} s ({answer['refused']} were told to come "
        f"again), {cpu:.2f} s of CPU of the API; heartbeats meanwhile p50 {meanwhile.p50_ms:.1f} ms, p95 {meanwhile.p95_ms:.1f} ms "
        f"(n {meanwhile.num}); without the burst p50 {before.p50_ms:.1f} ms, p95 {before.p95_ms:.1f} ms",
        highlight=False,
    )


# Any: what a client's process says.
def _during(beats: dict[str, Any], started_s: float, elapsed_s: float) -> list[float]:
    """The times of the heartbeats that were sent while the submits were under way, ms."""
    pairs = zip(beats["started_s"], beats["times_ms"], strict=True)
    return [time_ms for start_s, time_ms in pairs if started_s <= start_s <= started_s + elapsed_s]


def queue(run: Edge, console: Console, folder: Path) -> None:
    """optim_step: submit to result with a worker that does nothing."""
    (model,) = run.models(1)
    values: list[float] = []
    disk: list[float] = []
    for number in range(_ROUNDS):
        first_seq = str(1 + 100 * number)
        arguments = ["--port", str(run.port), "--count", "100", "--first-seq", first_seq, "--models", model]
        with child("bench.edge_load", "round_trips", *arguments) as clients:
            values += clients.hear()["times_ms"]
        disk += _sync_times_ms(folder, 40)
    cost, sync = latency(values), latency(disk)
    console.print(
        f"an op around an engine that takes no time: p50 {cost.p50_ms:.2f} ms, p95 {cost.p95_ms:.2f} ms (n {cost.num}), two requests and "
        f"two fsyncs of the queue; the disk's own fsync of 4 KiB, in rounds between: p50 {sync.p50_ms:.2f} ms, p95 {sync.p95_ms:.2f} ms",
        highlight=False,
    )


def _sync_times_ms(folder: Path, times: int) -> list[float]:
    """Of a 4 KiB append and its fdatasync, one after the other."""
    values = []
    with (folder / "sync").open("ab", buffering=0) as file:
        for _ in range(times):
            started = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            values.append((time.perf_counter() - started) * 1000)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.edge", description=__doc__)
    names = ("decode", "submit", "queue", "polls", "burst")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names))
    parser.add_argument("--polls", type=int, default=5000)
    parser.add_argument("--durability", choices=("always", "everysec", "none"), default="always")
    options = parser.parse_args()
    console, load_before = Console(width=140), os.getloadavg()[0]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if "decode" in options.only:
        decode(console)
    parts: dict[str, Callable[[Edge, Path], None]] = {
        "submit": lambda run, _folder: submit(run, console),
        "queue": lambda run, folder: queue(run, console, folder),
        "polls": lambda run, _folder: polls(run, console, count=options.polls),
        "burst": lambda run, _folder: burst(run, console),
    }
    for name in options.only:
        if name in parts:
            with (
                tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder,
                edge(Path(folder), durability=options.durability) as run,
            ):
                parts[name](run, Path(folder))
    facts = machine(load_before=load_before, torch_threads=0)
    console.print(
        f"queue durability {options.durability}; {describe(facts)}, msgspec {msgspec.__version__}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
