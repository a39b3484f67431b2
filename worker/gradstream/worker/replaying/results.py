"""What a replay says of each job."""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from gradstream.shared import codec
from gradstream.shared.ids import FutureId
from gradstream.shared.wire import Outcome
from gradstream.worker.inspect.describe import loss_of
from gradstream.worker.recovery.replay import Divergence, PastBatch

# not_run: nothing of it is left to run, or it was not asked for; what says why.
Verdict = Literal["equal", "differs", "not_run"]


class JobResult(msgspec.Struct, frozen=True, kw_only=True):
    """One job that ran again. loss: as recorded. replayed_loss: as it came out now. ms: of its batch now, recorded_ms: then.

    digest: of the recorded outcome, replayed_digest: of the one now; verdict "equal" with other digests is within the tolerance.
    """

    batch: str
    future_id: FutureId
    op: str
    model: str
    verdict: Verdict
    what: str = ""
    loss: float | None = None
    replayed_loss: float | None = None
    digest: str = ""
    replayed_digest: str | None = None
    recorded_ms: float = 0.0
    ms: float | None = None


def job_results(
    past: PastBatch,
    outcomes: Mapping[FutureId, Outcome],
    found: Sequence[Divergence],
    *,
    wrong: Mapping[str, str],
    not_run: str,
    ms: float,
) -> list[JobResult]:
    """A result for each job of a batch. outcomes: of those that ran; not_run: why the others did not."""
    differs = {divergence.job.future_id: divergence.what for divergence in found} | dict(wrong)
    results = []
    for ended in past.ended:
        future_id = ended.job.future_id
        outcome = outcomes.get(future_id)
        verdict: Verdict = "not_run" if outcome is None else "differs" if future_id in differs else "equal"
        results.append(
            JobResult(
                batch=str(past.batch),
                future_id=future_id,
                op=ended.job.op,
                model=ended.job.owner,
                verdict=verdict,
                what=not_run if outcome is None else differs.get(future_id, ""),
                loss=loss_of(codec.decode_outcome(ended.data)),
                replayed_loss=None if outcome is None else loss_of(outcome),
                digest=ended.digest,
                replayed_digest=None if outcome is None else codec.digest(codec.encode(outcome)),
                recorded_ms=past.elapsed_ms,
                ms=None if outcome is None else round(ms, 3),
            )
        )
    return results
