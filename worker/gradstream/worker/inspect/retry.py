"""Submits a dead letter's body again, as a new job.

What a model did since cannot be undone, so a job of a model comes behind everything that was accepted: it takes the next seq of
RETRY_LANE, a lane that no client numbers its requests in, and moves no seq that a client counts on. A sample has no order; its
retry is one without a session. Either way the client that waited for the old future has its failure, and the new future is printed.

The new future is noted in the letter before it is submitted. A retry that was cut short is therefore taken up again under the same
future by the next one, and a job is never submitted twice unless that is asked for.
"""

from dataclasses import dataclass

from gradstream.shared import codec, ids
from gradstream.shared.ids import RETRY_LANE, FutureId, ModelId, OwnerId, SamplerId, future_parts
from gradstream.shared.joblog.keys import next_seq_field
from gradstream.shared.joblog.port import Intake, Receipt, RecordKind, Submission
from gradstream.shared.model_record import OPEN_STATES
from gradstream.worker.dead import DeadLetters, Letter

_IN_ORDER = frozenset(
    {
        "forward_backward",
        "forward",
        "optim_step",
        "save_weights",
        "load_weights",
        "save_weights_for_sampler",
        "save_weights_external",
    }
)
_FIRST_SEQ = ids.seq_in_lane(RETRY_LANE, 1)


class CannotRetry(Exception):
    """The job cannot be submitted again; str() says why, and what can be done instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Where the new job goes."""

    owner: OwnerId
    seq: int
    ordered: bool

    @property
    def future_id(self) -> FutureId:
        return ids.future_id(self.owner, self.seq)


async def retry(letters: DeadLetters, letter: Letter, intake: Intake, *, at_ms: int, again: bool = False) -> Receipt:
    """Submit the letter's body as a new job; call it with `letters.locked()` held.

    Raises CannotRetry (the job cannot be repeated, its model takes no jobs any more, it was retried already and again is false),
    StorageFailure, and what the submission raises.
    """
    if letter.op == "sample":
        target = await _sample_target(letter, intake, again=again)
    elif letter.op in _IN_ORDER and letter.seq != 0:
        target = await _model_target(letters, letter, intake, again=again)
    else:
        raise CannotRetry(_why_not(letter))
    payload = letters.payload(letter)
    codec.decode_payload(payload)
    if letter.retried_as != target.future_id:
        letters.note_retry(letter, future_id=target.future_id, at_ms=at_ms)
    return await intake.submit(
        Submission(
            owner=target.owner,
            seq=target.seq,
            op=letter.op,
            tenant=letter.tenant,
            payload=payload,
            num_tokens=letter.num_tokens,
            ordered=target.ordered,
        )
    )


async def _sample_target(letter: Letter, intake: Intake, *, again: bool) -> _Target:
    """A sampler of its own for each retry, as samples without a session have."""
    salt = ""
    if (before := letter.retried_as) is not None:
        if await intake.future(before) is None:
            # Cut short before it was accepted, or forgotten since: the same future serves both.
            return _Target(owner=SamplerId(future_parts(before).owner), seq=0, ordered=False)
        _check_again(letter, again=again)
        salt = before
    name = codec.digest(f"{letter.future_id} {salt}".encode())
    return _Target(owner=SamplerId(f"direct:sample:{name}"), seq=0, ordered=False)


async def _model_target(letters: DeadLetters, letter: Letter, intake: Intake, *, again: bool) -> _Target:
    """The next seq of the model's retry lane."""
    model = ModelId(letter.owner)
    record = await intake.record(RecordKind.MODEL, model)
    if record is None or record.get("tenant") != letter.tenant:
        raise CannotRetry(
            f"model {model} is gone, so its {letter.op} cannot be repeated; `dead drop` removes the letter"
        )
    if (state := record.get("state")) not in OPEN_STATES:
        raise CannotRetry(f"model {model} is {state}, so it takes no jobs any more; `dead drop` removes the letter")
    target = _Target(owner=model, seq=int(record.get(next_seq_field(_FIRST_SEQ), _FIRST_SEQ)), ordered=True)
    if letter.retried_as not in {None, target.future_id}:
        _check_again(letter, again=again)
    for other in letters.survey().letters:
        if other.retried_as == target.future_id and other.future_id != letter.future_id:
            raise CannotRetry(f"the retry of {other.future_id} was cut short; retry that one first")
    return target


def _check_again(letter: Letter, *, again: bool) -> None:
    if not again:
        raise CannotRetry(
            f"{letter.future_id} was retried already, as {letter.retried_as}; --again submits its body once more"
        )


def _why_not(letter: Letter) -> str:
    if letter.op == "copy_checkpoint" or letter.seq == 0:
        return (
            f"{letter.future_id} was to make model {letter.owner}, which has failed and whose id is used up; "
            "let the client make a new one"
        )
    return f"{letter.op} can be asked for again by the client at any time, with the same effect; there is nothing to retry here"
