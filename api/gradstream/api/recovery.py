"""What a client hears about things that are not found while a gang brings back what the queue lost.

A Redis that was emptied, or put back in time, is filled again from the log on disk by the next gang. Until that gang leads, nothing that
is missing is known not to exist.
"""

import math

from gradstream.shared.clock import Clock
from gradstream.shared.errors import GradstreamError, SequenceConflict, Unavailable, UnknownModel
from gradstream.shared.joblog.port import Intake

# Errors that only say what the queue holds now.
_DOUBTFUL = (UnknownModel, SequenceConflict)


class Recovery:
    """Since when the gang leads that leads now, as far as this process has seen.

    Epochs only grow, and a queue that lost its records lost its gang's epoch too. So a gang that is seen to lead before a look-up, and
    again after it, led all the time between, and everything that it restored was there.
    """

    def __init__(self, intake: Intake, *, clock: Clock) -> None:
        self._intake = intake
        self._clock = clock
        self._epoch: int | None = None
        self._since_s = math.inf

    async def look(self) -> None:
        """See who leads now. Raises Unavailable."""
        epoch = await self._intake.leading()
        if epoch != self._epoch:
            self._epoch = epoch
            self._since_s = math.inf if epoch is None else self._clock.monotonic_s()

    async def is_settled(self, since_s: float) -> bool:
        """True when what was looked for after since_s, by the clock's monotonic time, and not found does not exist. Raises Unavailable."""
        await self.look()
        return self._since_s <= since_s

    async def check(self, error: GradstreamError, *, since_s: float) -> None:
        """Raise Unavailable when the error, of a request that began at since_s, may only be due to what is not restored yet."""
        if isinstance(error, _DOUBTFUL) and not await self.is_settled(since_s):
            raise Unavailable(
                "the server is recovering, or has just recovered: what it knows may not all be there yet; ask again in a few seconds"
            ) from error
