"""Calls that answer when their job is done, for clients that do not poll."""

from gradstream.api.parts import Parts
from gradstream.shared import codec
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import FutureId
from gradstream.shared.wire import Outcome

# Clients wait two minutes for such a call.
WAIT_S = 100.0


async def outcome_of(parts: Parts, future_id: FutureId, *, deadline_s: float) -> Outcome:
    """The job's outcome as soon as it is there.

    Raises Unavailable when it is not there at deadline_s, by the clock's monotonic time, or when the server stops; the same request
    sent again goes on waiting.
    """
    left_s = max(0.0, deadline_s - parts.clock.monotonic_s())
    view = await parts.parked.wait(parts.intake.wait(future_id, timeout_s=left_s))
    if view is None or view.outcome is None:
        raise Unavailable("the jobs before this one are not done yet; it is in the queue, ask again in a few seconds")
    await parts.intake.mark_delivered(future_id)
    return codec.decode_outcome(view.outcome)
