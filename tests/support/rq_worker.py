"""rq's worker inside the process of a test."""

import signal

from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer


def work_off(queue: Queue) -> None:
    """Run everything that is on the queue. rq takes over SIGINT and SIGTERM, which are pytest's own again afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        SimpleWorker([queue], connection=queue.connection, serializer=JSONSerializer).work(burst=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
