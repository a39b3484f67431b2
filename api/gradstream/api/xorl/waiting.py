"""Calls that answer when their job is done, for clients that do not poll."""

from gradstream.api.parts import Parts
from gradstream.shared import codec
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import FutureId
from gradstream.shared.wire import Outcome

# Clients wait two minutes for such a call.
WAIT_S = 100.0


async def outcome_of(parts: Parts, future_id: FutureId, *, deadline_s: float) -> Outcome | None:
    """The outcome of a job that was accepted, as soon as it is there; None when it is no longer kept.

    Raises Unavailable when it is not there at deadline_s, by the clock's monotonic time, when the server stops, or while what is gone
    may yet be restored; the same request sent again goes on waiting.
    """
    start_s = parts.clock.monotonic_s()
    view = await parts.parked.wait(parts.intake.wait(future_id, timeout_s=max(0.0, deadline_s - start_s)))
    if view is None:
        start_s = parts.clock.monotonic_s()
        # Gone, or the server stops.
        view = await parts.intake.future(future_id)
        if view is None and await parts.recovery.is_settled(start_s):
            return None
    if view is None or view.outcome is None:
        raise Unavailable("the jobs before this one are not done yet; it is in the queue, ask again in a few seconds")
    parts.intake.mark_delivered(future_id)
    return codec.decode_outcome(view.outcome)
