"""Many small tenants on one server: all at once beside one after another, and what a small one waits beside a heavy one.

Run it with `make bench-tenants`, or `python -m bench.tenants --json FILE` from the repository's root.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench import job
from bench.edge_bodies import body_of
from bench.edge_http import PROTOBUF, Connection
from bench.report import Latency, Machine, describe, latency, machine
from examples.local_server import local_server
from gradstream.api.tinker.proto import wire_pb2

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "tiny.yaml"
MODEL_NAME = "bench/qwen3-0.34m"
# A heavy tenant's job, and how many of them wait or run at any time.
HEAVY_DATUMS = 8
HEAVY_TOKENS = 256
HEAVY_IN_FLIGHT = 4
WARM_UP_ROUNDS = 2
# How many steps each tenant makes at a time: one, in which all begin and end together, and as many as show how it goes on.
STEPS = (1, 10)

Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Steps (a forward_backward and an optim_step each) a second, medians over rounds; ratio: the median of the rounds' own.

    tokens: of one step of all. steps: of each tenant in a round.
    """

    tenants: int
    tokens: int
    steps: int
    together: float
    in_turn: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Submit to result of a small tenant's step. heavy: one job of the heavy tenant, behind others of its own; heavy_alone: behind none.

    batches: beside over heavy_alone by their medians, about how many of the heavy tenant's batches a step waits for.
    """

    alone: Latency
    beside: Latency
    heavy_alone: Latency
    heavy: Latency
    batches: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantsRun:
    throughput: list[Together]
    waiting: Beside
    machine: Machine


class Tenant:
    """A model on the server with a connection of its own, and one job that it repeats."""

    def __init__(self, connection: Connection, model: str, body: bytes) -> None:
        self._connection = connection
        self._model = model
        self._body = body
        self._seq = 0

    @classmethod
    async def open(cls, port: int, *, name: str, num_datums: int, num_tokens: int) -> "Tenant":
        connection = await Connection.open(port)
        session = await connection.ask("create_session", {"tags": [name], "sdk_version": "0"})
        promise = await connection.ask(
            "create_model",
            {
                "session_id": session["session_id"],
                "model_seq_id": 0,
                "base_model": MODEL_NAME,
                "lora_config": {"rank": job.RANK, "seed": 0},
            },
        )
        model = await connection.ask("retrieve_future", {"request_id": promise["request_id"]})
        data = job.make_data(num_datums, num_tokens)
        message = wire_pb2.ForwardBackwardRequest(
            data=[_datum(*pair) for pair in zip(data.inputs, data.targets, strict=True)], loss_fn="cross_entropy"
        )
        return cls(connection, str(model["model_id"]), message.SerializeToString())

    async def forward_backward(self) -> str:
        """Submitted; returns the future."""
        self._seq += 1
        answer = await self._connection.post("forward_backward", body_of(self._model, self._seq, self._body), PROTOBUF)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {answer.body[:300]!r}")
        return str(json.loads(answer.body)["request_id"])

    async def finish(self, request_id: str) -> None:
        answer = await self._connection.ask("retrieve_future", {"request_id": request_id})
        if "error" in answer:
            raise RuntimeError(str(answer))

    async def job(self) -> float:
        """Wall time in s of a forward_backward."""
        started = time.perf_counter()
        await self.finish(await self.forward_backward())
        return time.perf_counter() - started

    async def step(self) -> float:
        """Wall time in s of a step, both ops submitted before the first result is awaited."""
        started = time.perf_counter()
        first = await self.forward_backward()
        self._seq += 1
        fields = {"model_id": self._model, "seq_id": self._seq, "adam_params": {"learning_rate": job.LEARNING_RATE}}
        second = await self._connection.ask("optim_step", fields)
        await self.finish(first)
        await self.finish(str(second["request_id"]))
        return time.perf_counter() - started


def _datum(inputs: Tokens, targets: Tokens) -> wire_pb2.Datum:
    tensors = {
        "target_tokens": wire_pb2.Tensor(
            dense=targets.astype("<i8").tobytes(), dtype=wire_pb2.DTYPE_INT64, shape=targets.shape
        )
    }
    text = wire_pb2.EncodedText(tokens=inputs.astype("<i4").tobytes())
    return wire_pb2.Datum(model_input=[wire_pb2.Chunk(encoded_text=text)], loss_fn_inputs=tensors)


async def throughput(tenants: list[Tenant], *, num_tokens: int, rounds: int, steps: int) -> Together:
    """Rounds of all at once, each of them so many steps at its own pace, and of one after another in turn."""

    async def train(tenant: Tenant) -> float:
        return sum([await tenant.step() for _ in range(steps)])

    async def together() -> float:
        started = time.perf_counter()
        await asyncio.gather(*(train(tenant) for tenant in tenants))
        return time.perf_counter() - started

    async def in_turn() -> float:
        return sum([await train(tenant) for tenant in tenants])

    for _ in range(WARM_UP_ROUNDS):
        await together()
        await in_turn()
    times = [(await together(), await in_turn()) for _ in range(rounds)]
    together_s, in_turn_s = (float(np.median(values)) for values in zip(*times, strict=True))
    return Together(
        tenants=len(tenants),
        tokens=num_tokens,
        steps=steps,
        together=round(steps * len(tenants) / together_s, 1),
        in_turn=round(steps * len(tenants) / in_turn_s, 1),
        ratio=round(float(np.median([turn / all_ for all_, turn in times])), 2),
    )


async def waiting(tenant: Tenant, heavy: Tenant, *, steps: int) -> Beside:
    """A small tenant's steps one at a time: alone, then beside a heavy one whose queue never runs dry."""
    alone = [await tenant.step() * 1000 for _ in range(steps)]
    heavy_alone = [await heavy.job() * 1000 for _ in range(steps)]
    heavy_ms: list[float] = []
    is_over = False

    async def load() -> None:
        queue: list[tuple[float, str]] = []
        while queue or not is_over:
            while len(queue) < HEAVY_IN_FLIGHT and not is_over:
                queue.append((time.perf_counter(), await heavy.forward_backward()))
            if queue:
                started, request_id = queue.pop(0)
                await heavy.finish(request_id)
                heavy_ms.append((time.perf_counter() - started) * 1000)

    task = asyncio.create_task(load())
    beside = [await tenant.step() * 1000 for _ in range(steps)]
    is_over = True
    await task
    return Beside(
        alone=latency(alone),
        beside=latency(beside),
        heavy_alone=latency(heavy_alone),
        heavy=latency(heavy_ms),
        batches=round(float(np.median(beside) / np.median(heavy_alone)), 2),
    )


async def measure(port: int, options: argparse.Namespace) -> tuple[list[Together], Beside]:
    """All parts on the server at port."""
    lengths = np.random.default_rng(job.SEED).integers(options.tokens[0], options.tokens[1] + 1, options.tenants)
    small = [
        await Tenant.open(port, name=f"small{number}", num_datums=1, num_tokens=length)
        for number, length in enumerate(lengths.tolist())
    ]
    heavy = await Tenant.open(port, name="heavy", num_datums=HEAVY_DATUMS, num_tokens=HEAVY_TOKENS)
    num_tokens = int(lengths.sum())
    many = [await throughput(small, num_tokens=num_tokens, rounds=options.rounds, steps=steps) for steps in STEPS]
    return many, await waiting(small[0], heavy, steps=options.steps)


def show(run: TenantsRun, console: Console) -> None:
    """Print the run."""
    first = run.throughput[0]
    title = f"{first.tenants} tenants, one datum each, {first.tokens} tokens in all: steps a second"
    many = Table(
        "steps of each at a time", "all at once", "one after another", "ratio", title=title, title_justify="left"
    )
    for one in run.throughput:
        many.add_row(str(one.steps), f"{one.together:.1f}", f"{one.in_turn:.1f}", f"{one.ratio:.2f}")
    console.print(many)
    table = Table(title="a small tenant's step in ms, submit to result", title_justify="left")
    for column in ("", "p50", "p95", "n"):
        table.add_column(column, justify="right" if column else "left")
    rows: Sequence[tuple[str, Latency]] = (
        ("alone", run.waiting.alone),
        ("beside a heavy tenant", run.waiting.beside),
        (f"a heavy job ({HEAVY_DATUMS} x {HEAVY_TOKENS} tokens) alone", run.waiting.heavy_alone),
        (f"the last of {HEAVY_IN_FLIGHT} heavy jobs", run.waiting.heavy),
    )
    for name, value in rows:
        table.add_row(name, f"{value.p50_ms:.1f}", f"{value.p95_ms:.1f}", str(value.num))
    console.print(table)
    console.print(
        f"a step beside the heavy tenant takes as long as {run.waiting.batches:.2f} of its jobs", highlight=False
    )
    console.print(describe(run.machine), highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.tenants", description=__doc__)
    parser.add_argument("--tenants", type=int, default=16)
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=[32, 64], help="the fewest and the most of a tenant's datum"
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds of both ways in turn")
    parser.add_argument(
        "--steps", type=int, default=40, help="steps of the small tenant alone, and beside the heavy one"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the gang")
    parser.add_argument("--json", type=Path, help="write every figure to this file too")
    options = parser.parse_args()
    console = Console()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as folder:
        model = job.make_model(Path(folder) / "model")
        overrides = {"model_path": str(model), "model_name": MODEL_NAME, "torch_threads": str(options.threads)}
        with local_server(CONFIG, output_dir=Path(folder) / "outputs", overrides=overrides) as server:
            many, beside = asyncio.run(measure(int(server.url.rpartition(":")[2]), options))
    facts = machine(load_before=load_before, torch_threads=options.threads)
    run = TenantsRun(throughput=many, waiting=beside, machine=facts)
    show(run, console)
    if options.json:
        options.json.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
