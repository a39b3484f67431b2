"""The streams of finished samples: their entries, and cursors that fit into one integer."""

from collections.abc import Mapping, Sequence

from gradstream.shared.ids import FutureId, SamplerId, future_parts
from gradstream.shared.joblog.port import Completion, Completions, FutureStatus

MAX_COMPLETIONS = 1000
# A client of a sampler takes its seqs from a block of this many.
BLOCK_SEQS = 10**9
# An entry's id is milliseconds and a counter within them; a cursor holds both.
_COUNTER_BITS = 20
_Entry = tuple[bytes, Mapping[bytes, bytes]]


def block_name(sampler: SamplerId, block: int) -> str:
    """What those wait for who wait for any sample of a block. No future has such an id."""
    return f"{sampler}#{block}"


def block_of_future(future_id: str) -> str | None:
    """The block_name of a sample's future, None for every other future."""
    if ":sample:" not in future_id:
        return None
    sample = future_parts(FutureId(future_id))
    return block_name(SamplerId(sample.owner), sample.seq // BLOCK_SEQS)


def entry_id(cursor: int) -> str:
    """The stream id that a cursor stands for."""
    return f"{cursor >> _COUNTER_BITS}-{cursor & ((1 << _COUNTER_BITS) - 1)}"


def completions_of(entries: Sequence[_Entry]) -> Completions:
    """The entries of a stream, at least one."""
    items = []
    for _, fields in entries:
        items.append(
            Completion(
                future_id=FutureId(fields[b"future"].decode()),
                is_failed=fields[b"status"].decode() == FutureStatus.FAILED,
                num_bytes=int(fields[b"bytes"]),
            )
        )
    milliseconds, _, counter = entries[-1][0].partition(b"-")
    return Completions(items=items, cursor=(int(milliseconds) << _COUNTER_BITS) | int(counter))
