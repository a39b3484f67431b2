"""The side process that makes exports, one at a time: an rq worker that forks a process for each.

    python -m gradstream.worker.exporter --settings FILE

It imports no torch itself, so what an export takes in memory is given back with the process that made it. One runs per engine.
"""

import argparse
import signal
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import redis
import structlog
from rq import Queue, Worker
from rq.job import Job
from rq.serializers import JSONSerializer

from gradstream.shared.config import read_handover
from gradstream.shared.telemetry.log import setup_logging
from gradstream.worker.export_queue import export_queue, forget_dead_workers
from gradstream.worker.parent import end_with_parent

# How soon a dead child is noticed, at most.
_LOOK_EVERY_S = 5

_log = structlog.get_logger(__name__)


class ExportWorker(Worker):  # type: ignore[misc] # rq's classes are untyped here
    """Stops at once when it is asked to: an export that was cut off is made again by the next one."""

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Kill the child and leave."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Long enough ago not to be taken for the second of two signals in a row.
        self._shutdown_requested_date = datetime.fromtimestamp(0, tz=UTC)
        self.request_force_stop(signum, frame)

    def main_work_horse(self, job: Job, queue: Queue) -> None:
        """The child: it is in a process group of its own, and must not outlive its parent."""
        end_with_parent()
        super().main_work_horse(job, queue)


def main() -> None:
    """Work until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m gradstream.worker.exporter", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="resolved settings, as the launcher writes them")
    settings = read_handover(parser.parse_args().settings)
    setup_logging(process="exports", level=settings.log_level)
    assert settings.redis_url is not None, "the launcher, or whoever wrote the settings, names the queue"
    connection = redis.Redis.from_url(settings.redis_url)
    queue = export_queue(settings.engine_name, connection)
    num_freed = forget_dead_workers(queue)
    _log.info("exports_ready", num_freed=num_freed)
    worker = ExportWorker(
        [queue], connection=connection, serializer=JSONSerializer, job_monitoring_interval=_LOOK_EVERY_S
    )
    worker.work(logging_level="WARNING")


if __name__ == "__main__":
    main()
