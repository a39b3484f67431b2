"""Submission with patience: a full queue holds the request for a while before it is refused."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from prometheus_client import Counter

from gradstream.api.arrival import arrived_s
from gradstream.api.metrics import Metrics
from gradstream.shared.clock import Clock
from gradstream.shared.errors import GradstreamError, QueueFull
from gradstream.shared.joblog.port import Intake, Receipt, Submission

_RETRY_EVERY_S = 0.25
# Held requests keep their bodies in memory; beyond this many, a full queue answers at once.
_MAX_HELD = 256


class Admission:
    """Hands submissions to the queue, with the age of their requests. Repeating one is safe: the queue knows it by (owner, seq, digest),
    or by its call. sleep: lets time pass on the clock.
    """

    def __init__(
        self,
        intake: Intake,
        *,
        clock: Clock,
        hold_s: float,
        metrics: Metrics,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._intake = intake
        self._clock = clock
        self._hold_s = hold_s
        self._metrics = metrics
        self._sleep = sleep
        self._num_held = 0
        # Looking a metric up by its labels takes longer than counting.
        self._counts: dict[tuple[str, str], Counter] = {}

    async def submit(self, submission: Submission, *, hold: bool = True) -> Receipt:
        """The receipt; raises QueueFull when there is no room until hold_s after its request arrived, everything else at once."""
        try:
            receipt = await self._submit(submission, hold=hold)
        except GradstreamError as error:
            self._count(submission.op, error.code).inc()
            raise
        self._count(submission.op, "duplicate" if receipt.is_duplicate else "accepted").inc()
        return receipt

    def _count(self, op: str, answer: str) -> Counter:
        if (op, answer) not in self._counts:
            self._counts[op, answer] = self._metrics.jobs.labels(op=op, answer=answer)
        return self._counts[op, answer]

    async def _submit(self, submission: Submission, *, hold: bool) -> Receipt:
        since_s = arrived_s(self._clock)
        try:
            return await self._intake.submit(self._aged(submission, since_s))
        except QueueFull:
            if not hold or self._num_held >= _MAX_HELD:
                raise
        self._num_held += 1
        try:
            return await self._submit_until(submission, since_s=since_s)
        finally:
            self._num_held -= 1

    async def _submit_until(self, submission: Submission, *, since_s: float) -> Receipt:
        deadline_s = since_s + self._hold_s
        while True:
            left_s = deadline_s - self._clock.monotonic_s()
            await self._sleep(max(0.0, min(_RETRY_EVERY_S, left_s)))
            try:
                return await self._intake.submit(self._aged(submission, since_s))
            except QueueFull:
                if self._clock.monotonic_s() >= deadline_s:
                    raise

    def _aged(self, submission: Submission, since_s: float) -> Submission:
        """The submission with its age, which only tells repetitions of requests apart."""
        if not submission.retry_key:
            return submission
        return replace(submission, age_ms=int(1000 * (self._clock.monotonic_s() - since_s)))
