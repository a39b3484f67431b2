"""The clients of bench.edge, in a process of their own.

Run by bench.edge: python -m bench.edge_load submits|round_trips|heartbeats|polls --port PORT ...; one JSON line comes out at the end.
polls says {"sent": N} before that, when its requests are on their way; heartbeats goes on until stdin ends.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

import uvloop

from bench import edge_bodies
from bench.edge_bodies import Shape, body_of, tail_of
from bench.edge_http import PROTOBUF, Connection

_SHAPES = {
    "small": edge_bodies.SMALL,
    "long": edge_bodies.LONG,
    "many": edge_bodies.MANY,
    "rl": edge_bodies.RL,
    "burst": edge_bodies.BURST,
}
_HEARTBEAT_S = 0.02
_PARK_AT_ONCE = 200
Record = dict[str, object]


async def submits(options: argparse.Namespace) -> Record:
    """count requests in all, over one connection for each model, each model's one after the other; sent again after a 429, as SDKs do."""
    shape: Shape = _SHAPES[options.shape]
    tail = tail_of(shape)
    models: list[str] = options.models
    share = options.count // len(models)
    connections = [await Connection.open(options.port) for _ in models]
    times_ms: list[float] = []
    num_refused = 0

    async def client(connection: Connection, model: str) -> None:
        nonlocal num_refused
        for seq in range(options.first_seq, options.first_seq + share):
            body = body_of(model, seq, tail)
            started = time.perf_counter()
            while (answer := await connection.post("forward_backward", body, PROTOBUF)).status == 429:
                num_refused += 1
                await asyncio.sleep(answer.retry_after_s)
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {answer.body[:300]!r}")
            times_ms.append((time.perf_counter() - started) * 1000)

    started = time.monotonic()
    await _together([client(*pair) for pair in zip(connections, models, strict=True)])
    return {
        "started_s": started,
        "elapsed_s": time.monotonic() - started,
        "times_ms": times_ms,
        "refused": num_refused,
        "body_bytes": len(body_of(models[0], 1, tail)),
    }


async def round_trips(options: argparse.Namespace) -> Record:
    """Times from sending an optim_step to having its result, one op at a time."""
    connection = await Connection.open(options.port)
    times_ms: list[float] = []
    for seq in range(options.first_seq, options.first_seq + options.count):
        started = time.perf_counter()
        promise = await connection.ask("optim_step", {"model_id": options.models[0], "seq_id": seq, "adam_params": {}})
        await connection.ask("retrieve_future", {"request_id": promise["request_id"]})
        times_ms.append((time.perf_counter() - started) * 1000)
    return {"times_ms": times_ms}


async def heartbeats(options: argparse.Namespace) -> Record:
    """One every 20 ms from each of four clients, until stdin ends. started_s: of each, on the machine's monotonic clock."""
    is_over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    started_s: list[float] = []
    times_ms: list[float] = []

    async def client(connection: Connection) -> None:
        while not is_over.done():
            started = time.monotonic()
            await connection.ask("session_heartbeat", {"session_id": options.session})
            started_s.append(started)
            times_ms.append((time.monotonic() - started) * 1000)
            await asyncio.sleep(_HEARTBEAT_S)

    await _together([client(await Connection.open(options.port)) for _ in range(4)])
    return {"started_s": started_s, "times_ms": times_ms}


async def polls(options: argparse.Namespace) -> Record:
    """One retrieve_future for each model and seq, all at once. ended_s: when each answer was there, on the machine's monotonic clock."""
    futures = [
        f"{model}:{seq}"
        for model in options.models
        for seq in range(options.first_seq, options.first_seq + options.count)
    ]
    ended_s: list[float] = []
    statuses: list[int] = []
    gate = asyncio.Semaphore(_PARK_AT_ONCE)

    async def client(future: str) -> None:
        async with gate:
            connection = await Connection.open(options.port)
        answer = await connection.post("retrieve_future", json.dumps({"request_id": future}).encode())
        ended_s.append(time.monotonic())
        statuses.append(answer.status)

    waiting = asyncio.gather(*(client(future) for future in futures))
    _say({"sent": len(futures)})
    await waiting
    return {"ended_s": ended_s, "statuses": sorted(set(statuses))}


async def _together(work: list[Awaitable[None]]) -> None:
    await asyncio.gather(*work)


def _say(record: Record) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def main() -> None:
    commands: dict[str, Callable[[argparse.Namespace], Awaitable[Record]]] = {
        "submits": submits,
        "round_trips": round_trips,
        "heartbeats": heartbeats,
        "polls": polls,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=sorted(commands))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--shape", choices=sorted(_SHAPES), default="small")
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--session", default="")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--first-seq", type=int, default=1)
    options = parser.parse_args()

    async def run() -> Record:
        return await commands[options.command](options)

    _say(uvloop.run(run()))


if __name__ == "__main__":
    main()
