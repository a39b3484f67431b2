"""The side process for work that never touches the gang: an rq worker, and a thread that puts the periodic tasks on its queue.

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
from rq.exceptions import DuplicateJobError
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from gradstream.shared.config import read_handover
from gradstream.shared.telemetry.log import setup_logging
from gradstream.worker import sidejobs
from gradstream.worker.parts import redis_url

TICK_S = 5.0
_TASK_TIMEOUT_S = 300
# A failed task blocks its name for this long, then runs again.
_FAILURE_TTL_S = 60

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task that is due every so many ticks."""

    function: Callable[[str], int]
    every_ticks: int

    @property
    def name(self) -> str:
        return self.function.__name__


TASKS = (
    Task(function=sidejobs.sweep_sessions, every_ticks=2),
    Task(function=sidejobs.sweep_checkpoints, every_ticks=12),
)


def queue_for(engine: str, connection: "redis.Redis") -> Queue:
    """The engine's own queue. JSON only: nothing on it is unpickled."""
    return Queue(f"gradstream-{engine}", connection=connection, serializer=JSONSerializer)


def enqueue(queue: Queue, task: Task, *, settings_file: Path) -> bool:
    """Put a task on the queue unless it waits or runs already; True when it was put."""
    try:
        queue.enqueue_call(
            task.function,
            args=(str(settings_file),),
            job_id=f"{queue.name}-{task.name}",
            timeout=_TASK_TIMEOUT_S,
            result_ttl=0,
            failure_ttl=_FAILURE_TTL_S,
            unique=True,
        )
    except DuplicateJobError:
        return False
    return True


class Ticker:
    """Puts due tasks on the queue, and takes back those whose worker died (rq alone would wait a quarter of an hour)."""

    def __init__(self, queue: Queue, *, settings_file: Path) -> None:
        self._queue = queue
        self._settings_file = settings_file
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ticker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=TICK_S)

    def _run(self) -> None:
        tick = 0
        while not self._closing.wait(TICK_S):
            try:
                StartedJobRegistry(queue=self._queue).cleanup()
                for task in TASKS:
                    if tick % task.every_ticks == 0:
                        enqueue(self._queue, task, settings_file=self._settings_file)
            except RedisError as error:
                _log.warning("redis_unreachable", reason=str(error))
            tick += 1


def main() -> None:
    """Work until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m gradstream.worker.housekeeping", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="resolved settings, as the launcher writes them")
    settings_file: Path = parser.parse_args().settings
    settings = read_handover(settings_file)
    setup_logging(process="housekeeping", level=settings.log_level)
    connection = redis.Redis.from_url(redis_url(settings))
    queue = queue_for(settings.engine_name, connection)
    ticker = Ticker(queue, settings_file=settings_file)
    ticker.start()
    worker = SimpleWorker([queue], connection=connection, serializer=JSONSerializer)
    worker.work(logging_level="WARNING")
    ticker.close()


if __name__ == "__main__":
    main()
