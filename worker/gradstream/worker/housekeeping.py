"""The side process for work that never touches the gang: an rq worker, and a thread that puts tasks on its queue and that of exports.

    python -m gradstream.worker.housekeeping --settings FILE

rq runs tasks at least once and in no order, which is all that idempotent sweeps need; training jobs never go through it.
"""

import argparse
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import redis
import structlog
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from gradstream.shared.clock import Clock, SystemClock
from gradstream.shared.config import read_handover
from gradstream.shared.errors import Unavailable
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.telemetry.log import setup_logging
from gradstream.worker import sidejobs
from gradstream.worker.export_queue import export_queue, order_exports
from gradstream.worker.parts import redis_url
from gradstream.worker.rq_queue import json_queue, put_once

TICK_S = 5.0
_LATE_S = 6 * TICK_S
_TASK_TIMEOUT_S = 300
# A failed task blocks its name for this long, then runs again.
_FAILURE_TTL_S = 60

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task that is due every so many ticks."""

    function: Callable[[str, int, int | None], int]
    every_ticks: int

    @property
    def name(self) -> str:
        return self.function.__name__


TASKS = (
    Task(function=sidejobs.keep_books, every_ticks=12),
    Task(function=sidejobs.sweep_sessions, every_ticks=2),
    Task(function=sidejobs.sweep_files, every_ticks=12),
)


def queue_for(engine: str, connection: "redis.Redis") -> Queue:
    """The engine's own queue."""
    return json_queue(f"gradstream-{engine}", connection)


def enqueue(queue: Queue, task: Task, *, settings_file: Path, tick_ms: int, awake_ms: int) -> bool:
    """Put a task on the queue unless it waits or runs already; True when it was put.

    tick_ms: when that is, in wall time. awake_ms: since when clients could reach the server without a pause.
    """
    return put_once(
        queue,
        task.function,
        str(settings_file),
        awake_ms,
        tick_ms,
        job_id=f"{queue.name}-{task.name}",
        timeout_s=_TASK_TIMEOUT_S,
        failure_ttl_s=_FAILURE_TTL_S,
    )


class ExportOrders:
    """Puts the exports that are asked for on their queue. One thread."""

    def __init__(self, queue: Queue, *, url: str, engine: str, settings_file: Path) -> None:
        self._queue = queue
        self._url = url
        self._engine = engine
        self._settings_file = settings_file

    def put(self) -> int:
        """How many were put."""
        self._queue.started_job_registry.cleanup()
        with RedisCensus(self._url, engine=self._engine) as census:
            return order_exports(self._queue, census, settings_file=self._settings_file)


class Ticker:
    """Puts due tasks on the queue, and takes back those whose worker died (rq alone would wait a quarter of an hour).

    A tick that comes late (a machine that slept) or finds no Redis means that clients could not be heard either.
    """

    def __init__(
        self, queue: Queue, *, settings_file: Path, exports: ExportOrders | None = None, clock: Clock | None = None
    ) -> None:
        self._queue = queue
        self._exports = exports
        self._settings_file = settings_file
        self._clock = clock or SystemClock()
        self._awake_ms = self._clock.wall_ms()
        self._ticked_ms = self._awake_ms
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ticker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=TICK_S)

    def _run(self) -> None:
        number = 0
        while not self._closing.wait(TICK_S):
            self.tick(number)
            number += 1

    def tick(self, number: int) -> None:
        """Put on the queue what is due at this tick."""
        now_ms = self._clock.wall_ms()
        if abs(now_ms - self._ticked_ms) > _LATE_S * 1000:
            self._awake_ms = now_ms
        self._ticked_ms = now_ms
        try:
            StartedJobRegistry(queue=self._queue).cleanup()
            for task in TASKS:
                if number % task.every_ticks == 0:
                    self._enqueue(task)
            if self._exports is not None:
                self._exports.put()
        except (RedisError, Unavailable) as error:
            self._awake_ms = now_ms
            _log.warning("redis_unreachable", reason=str(error))

    def _enqueue(self, task: Task) -> None:
        enqueue(self._queue, task, settings_file=self._settings_file, tick_ms=self._ticked_ms, awake_ms=self._awake_ms)


def main() -> None:
    """Work until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m gradstream.worker.housekeeping", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="resolved settings, as the launcher writes them")
    settings_file: Path = parser.parse_args().settings
    settings = read_handover(settings_file)
    setup_logging(process="housekeeping", level=settings.log_level)
    url, engine = redis_url(settings), settings.engine_name
    connection = redis.Redis.from_url(url)
    queue = queue_for(engine, connection)
    exports = ExportOrders(export_queue(engine, connection), url=url, engine=engine, settings_file=settings_file)
    ticker = Ticker(queue, settings_file=settings_file, exports=exports)
    ticker.start()
    worker = SimpleWorker([queue], connection=connection, serializer=JSONSerializer)
    worker.work(logging_level="WARNING")
    ticker.close()


if __name__ == "__main__":
    main()
