"""Submission with patience: a full queue holds the request for a while before it is refused."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

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

    async def submit(self, submission: Submission, *, hold: bool = True) -> Receipt:
        """The receipt; raises QueueFull when there is no room until hold_s after its request arrived, everything else at once."""
        try:
            receipt = await self._submit(submission, hold=hold)
        except GradstreamError as error:
            self._metrics.jobs.labels(op=submission.op, answer=error.code).inc()
            raise
        answer = "duplicate" if receipt.is_duplicate else "accepted"
        self._metrics.jobs.labels(op=submission.op, answer=answer).inc()
        return receipt

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
        return replace(submission, age_ms=int(1000 * (self._clock.monotonic_s() - since_s)))
