"""Ranks in processes of their own that live as long as the test session.

Each rank joins one gloo group once; a test ships a module-level function `work(comm, *args)` and gets every rank's result.
"""

import multiprocessing
import os
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 240.0
WORK_TIMEOUT_S = 240.0
_COLLECTIVE_TIMEOUT_S = 240.0


class RankError(Exception):
    """A rank's work raised; the message holds its traceback."""


class Ranks:
    """size spawned processes in one group. Not for use by several threads."""

    def __init__(self, size: int, rendezvous: Path) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        address = f"file://{rendezvous / uuid.uuid4().hex}"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, address, rank, size), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(START_TIMEOUT_S)

    def run(self, work: Callable[..., Any], *args: object) -> list[Any]:
        """Each rank's result, in rank order; raises RankError when one raised, died or took too long."""
        for pipe in self._pipes:
            pipe.send((work, args))
        return self._collect(WORK_TIMEOUT_S)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()

    def _collect(self, timeout_s: float) -> list[Any]:
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(timeout_s):
                    raise RankError(f"rank {rank} gave no answer within {timeout_s} s")
                ok, value = pipe.recv()
            except EOFError:
                raise RankError(f"rank {rank} died") from None
            results.append(value)
            if not ok:
                errors.append(f"rank {rank}:\n{value}")
        if errors:
            raise RankError("\n".join(errors))
        return results


def _serve(pipe: Connection, address: str, rank: int, size: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from gradstream.engine.parallel.comm import Comm

    comm = Comm.join(address, rank=rank, size=size, timeout_s=_COLLECTIVE_TIMEOUT_S)
    pipe.send((True, None))
    while True:
        try:
            work, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, work(comm, *args)))
        except Exception:  # noqa: BLE001 (the test process raises it again)
            pipe.send((False, traceback.format_exc()))
    comm.close()
