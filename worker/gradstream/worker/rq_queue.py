"""Queues of rq: JSON only, as nothing on them may be unpickled, and one job of a name at a time."""

from collections.abc import Callable

import redis
from rq import Queue
from rq.exceptions import DuplicateJobError
from rq.serializers import JSONSerializer


def json_queue(name: str, connection: "redis.Redis") -> Queue:
    """The queue of this name."""
    return Queue(name, connection=connection, serializer=JSONSerializer)


def put_once(
    queue: Queue, task: Callable[..., int] | str, *args: str | int, job_id: str, timeout_s: int, failure_ttl_s: int
) -> bool:
    """Put a task on the queue; False when a job of this id waits, runs, or failed less than failure_ttl_s ago."""
    try:
        queue.enqueue_call(
            task, args=args, job_id=job_id, timeout=timeout_s, result_ttl=0, failure_ttl=failure_ttl_s, unique=True
        )
    except DuplicateJobError:
        return False
    return True
