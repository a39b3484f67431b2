"""When a model was used last, as its record tells."""

from collections.abc import Mapping

# Milliseconds since the Unix epoch: when the newest job was accepted, when the last one ended, when a client asked for a result or sent
# a sign of life.
ACTIVITY = ("used_ms", "done_ms", "seen_ms")


def last_active_ms(record: Mapping[str, str]) -> int:
    """The latest sign of life in a model's record, its creation at the least; 0 when it tells nothing."""
    return max((int(record[name]) for name in ("created_ms", *ACTIVITY) if record.get(name)), default=0)
