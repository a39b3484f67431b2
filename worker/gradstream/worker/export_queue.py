"""From the records of exports to rq jobs. The records are the truth: rq's own states only say whether somebody is at work."""

from collections.abc import Iterator
from pathlib import Path

import redis
import structlog
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from gradstream.shared.exports import OPEN, QUEUE, ExportState
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.joblog.port import RecordKind
from gradstream.worker.rq_queue import json_queue, put_once

# By name: who puts it on the queue does not import the engine.
_TASK = "gradstream.worker.exports.make_export"
# The base model is read, summed and written once. What takes longer hangs.
_TIMEOUT_S = 4 * 3600
_FAILURE_TTL_S = 24 * 3600
# A process that ends this often without a word is likely to be out of memory, and is not started again.
MAX_STARTS = 3
_AT_WORK = frozenset({JobStatus.QUEUED, JobStatus.STARTED})

_log = structlog.get_logger(__name__)


def export_queue(engine: str, connection: "redis.Redis") -> Queue:
    """The engine's queue of exports."""
    return json_queue(f"gradstream-{engine}-{QUEUE}", connection)


def order_exports(queue: Queue, census: RedisCensus, *, settings_file: Path) -> int:
    """Put every export on the queue that is asked for and that nobody works on; how many.

    One whose process died is put there again, up to MAX_STARTS times in all.
    """
    num_put = 0
    for export, record in _open(census):
        if _is_at_work(queue, export):
            continue
        if int(record.get("num_starts") or 0) >= MAX_STARTS:
            error = f"the export was started {MAX_STARTS} times and ended each time without a result; the log exports.log says more"
            census.change(RecordKind.EXPORT, export, {"state": ExportState.FAILED, "error": error})
            _log.error("export_given_up", export_id=export, num_starts=record["num_starts"])
            continue
        num_put += put_once(
            queue,
            _TASK,
            str(settings_file),
            export,
            job_id=_job_id(queue, export),
            timeout_s=_TIMEOUT_S,
            failure_ttl_s=_FAILURE_TTL_S,
        )
    return num_put


def forget_dead_workers(queue: Queue) -> int:
    """Free the exports of a worker that was killed with its child; how many. Called by the queue's only worker before it works."""
    dead: list[str] = queue.started_job_registry.get_job_ids(cleanup=False)
    for job_id in dead:
        _remove(queue, job_id)
    return len(dead)


def _open(census: RedisCensus) -> Iterator[tuple[str, dict[str, str]]]:
    for export, record in census.children(RecordKind.EXPORT, QUEUE):
        if record.get("state") in OPEN:
            yield export, record


def _is_at_work(queue: Queue, export: str) -> bool:
    """True when a job of the export waits or runs. One that ended is removed, so that its id is free."""
    try:
        job = Job.fetch(_job_id(queue, export), connection=queue.connection, serializer=JSONSerializer)
    except NoSuchJobError:
        return False
    if job.get_status() in _AT_WORK:
        return True
    _remove(queue, job.id)
    return False


def _remove(queue: Queue, job_id: str) -> None:
    try:
        Job.fetch(job_id, connection=queue.connection, serializer=JSONSerializer).delete()
    except NoSuchJobError:
        queue.started_job_registry.remove(job_id)


def _job_id(queue: Queue, export: str) -> str:
    """rq takes letters, digits, '_' and '-'; the last part of an export's id is its digest, and says which save it is of."""
    return f"{queue.name}-{export.rpartition(':')[2]}"
