"""Ending a session: its state is saved, then it is taken from memory, or, of the model `default`, begins anew.

Clients send this call once and wait; when it takes long they send it again. What was begun is noted in the model's record, so the same
call goes on where the one before was, for as long as nobody sent the model another job.
"""

import hashlib
from collections.abc import Mapping

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel

from gradstream.api.auth import tenant_of
from gradstream.api.body import documents, small_body
from gradstream.api.names import Target, shown
from gradstream.api.parts import Parts, parts_of
from gradstream.api.xorl.bodies import NamedBody
from gradstream.api.xorl.models import target_of, unknown
from gradstream.api.xorl.waiting import WAIT_S, outcome_of
from gradstream.shared import codec
from gradstream.shared.errors import SequenceConflict, Unavailable, UnknownModel
from gradstream.shared.ids import FutureId, ModelId, future_id, future_parts
from gradstream.shared.joblog.port import Intake, RecordKind, Submission
from gradstream.shared.model_record import BROKEN_STATES, is_over
from gradstream.shared.wire import Failed, Payload, ResetModel, SaveWeights, SaveWeightsDone, UnloadModel

router = APIRouter()
_FIELD = "kill"
_MAX_NAME = 128
# How often the state is looked at anew when other jobs come between.
_NUM_TRIES = 20
_NOTHING = "there is no active session to kill"


class KillBody(NamedBody):
    """reset_weights: the model `default` goes back to its first weights, instead of keeping those that it has."""

    save_checkpoint: bool = True
    reset_weights: bool = False


class SessionKilled(BaseModel):
    success: bool
    message: str
    checkpoint_path: str | None = None


class _Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a call came. next_seq: the model's, when nothing was submitted behind what the call did. ended: the last job's future."""

    save_checkpoint: bool
    reset_weights: bool
    next_seq: int
    saved: FutureId | None = None
    path: str | None = None
    ended: FutureId | None = None


class _Overtaken(Exception):
    """Somebody sent the model a job, or ended it, while it was being killed: look again."""


class _Note:
    """The field of the model's record in which calls write how far they came, as this one last saw it.

    A call that stood still since it looked writes nothing over what others noted meanwhile: only the jobs' seqs say who came first.
    """

    def __init__(self, intake: Intake, model: ModelId, *, seen: str) -> None:
        self._intake = intake
        self._model = model
        self._seen = seen

    def last(self, body: KillBody) -> _Progress | None:
        """How far the last call came, if it was one like this."""
        if not self._seen:
            return None
        before = msgspec.json.decode(self._seen, type=_Progress)
        is_same = (before.save_checkpoint, before.reset_weights) == (body.save_checkpoint, body.reset_weights)
        return before if is_same else None

    async def write(self, progress: _Progress) -> bool:
        """Write down how far the call came; False when another call has written since."""
        return await self._swap(msgspec.json.encode(progress).decode())

    async def forget(self) -> bool:
        """The next call begins anew; False when another call has written since."""
        return await self._swap("")

    async def _swap(self, text: str) -> bool:
        if not await self._intake.swap_field(RecordKind.MODEL, self._model, _FIELD, old=self._seen, new=text):
            return False
        self._seen = text
        return True


@router.post("/api/v1/kill_session", openapi_extra=documents(KillBody))
async def kill_session(request: Request) -> SessionKilled:
    """Saves session_MODEL_final, unless told otherwise, then unloads the model; `default` starts anew with the weights it has.

    It waits for everything that the model has queued. When the checkpoint cannot be saved, nothing else is done. A job that arrives
    behind the save makes it save again: nothing that was trained is lost.
    """
    parts = parts_of(request)
    body = await small_body(request, KillBody)
    meant = target_of(body, tenant=tenant_of(request))
    deadline_s = parts.clock.monotonic_s() + WAIT_S
    for _ in range(_NUM_TRIES):
        try:
            return await _kill(parts, meant, body, deadline_s=deadline_s)
        except _Overtaken:
            continue
    raise Unavailable(f"model_id: {meant.name!r} gets jobs all the time; end the client that sends them, and ask again")


async def _kill(parts: Parts, meant: Target, body: KillBody, *, deadline_s: float) -> SessionKilled:
    record = await parts.intake.record(RecordKind.MODEL, meant.model)
    if record is None or record.get("tenant") != meant.tenant:
        if meant.is_default:
            return SessionKilled(success=True, message=_NOTHING)
        raise unknown(meant)
    note = _Note(parts.intake, meant.model, seen=record.get(_FIELD, ""))
    progress = note.last(body)
    if is_over(record):
        progress = _killed_before(meant, progress, record)
        if progress is None:
            return SessionKilled(success=True, message=_NOTHING)
    elif record.get("state") in BROKEN_STATES:
        return SessionKilled(success=True, message=_NOTHING)
    else:
        next_seq = int(record.get("next_seq", "0"))
        progress = await _resumed(parts, meant, note, progress, next_seq=next_seq) or _Progress(
            save_checkpoint=body.save_checkpoint, reset_weights=body.reset_weights, next_seq=next_seq
        )
    if body.save_checkpoint and progress.path is None:
        progress = await _saving(parts, meant, note, progress)
        assert progress.saved is not None
        outcome = await outcome_of(parts, progress.saved, deadline_s=deadline_s)
        if not isinstance(outcome, SaveWeightsDone) or not outcome.path.endswith(f"/{_final(meant)}"):
            await note.forget()
            # No longer kept, or, where the model is over, of another job: a call that noted its save may have died before it submitted it.
            if not isinstance(outcome, Failed):
                raise _Overtaken
            return SessionKilled(
                success=False, message=f"nothing was done, as the checkpoint was not saved: {_why(outcome)}"
            )
        progress = msgspec.structs.replace(progress, path=shown(outcome.path))
        await note.write(progress)
    progress = await _ending(parts, meant, note, progress)
    assert progress.ended is not None
    outcome = await outcome_of(parts, progress.ended, deadline_s=deadline_s)
    # One whose outcome is no longer kept was done: a failure that was told is not noted as an end.
    if isinstance(outcome, Failed):
        await note.forget()
        return SessionKilled(success=False, message=_why(outcome), checkpoint_path=progress.path)
    return SessionKilled(success=True, message=_done(meant, progress), checkpoint_path=progress.path)


def _killed_before(meant: Target, progress: _Progress | None, record: Mapping[str, str]) -> _Progress | None:
    """How far the call came that ended the model, which is unloaded or will be; None when it was not one like this."""
    if progress is None or "ended_at" not in record:
        return None
    ended_at = int(record["ended_at"])
    ended = future_id(meant.model, ended_at)
    # A call may have broken off before it could note its last step.
    if progress.ended != ended and progress.next_seq != ended_at:
        return None
    return msgspec.structs.replace(progress, ended=ended)


async def _resumed(
    parts: Parts, meant: Target, note: _Note, progress: _Progress | None, *, next_seq: int
) -> _Progress | None:
    """How far the last call came; None when jobs came behind what it did, and all is to be done anew."""
    if progress is None or progress.next_seq == next_seq:
        return progress
    may_have_ended = meant.is_default and progress.path is not None and progress.ended is None
    if not may_have_ended or progress.next_seq + 1 != next_seq:
        return None
    # The one job behind it may be its own last one, not noted yet: sent again, that is the same job, and any other a conflict.
    # Saving once more would put the weights that the model began anew with in place of those that were trained.
    try:
        return await _ending(parts, meant, note, progress)
    except _Overtaken:
        return None


async def _saving(parts: Parts, meant: Target, note: _Note, progress: _Progress) -> _Progress:
    """Noted first, so that calls at the same time, which see the seq that it takes, know what has it."""
    if progress.saved is not None:
        # Of one that is over there is only the outcome. Else who noted it may have ended before it was submitted: sent again, it is the same
        # job, and any other one with its seq a conflict.
        if progress.ended is None:
            await _submit_save(parts, meant, note, seq=future_parts(progress.saved).seq)
        return progress
    seq = progress.next_seq
    begun = msgspec.structs.replace(progress, saved=future_id(meant.model, seq), next_seq=seq + 1)
    if not await note.write(begun):
        raise _Overtaken
    await _submit_save(parts, meant, note, seq=seq)
    return begun


async def _submit_save(parts: Parts, meant: Target, note: _Note, *, seq: int) -> None:
    """Raises _Overtaken, and forgets what was noted, when another job has the seq."""
    try:
        await _submit(parts, meant, SaveWeights(name=_final(meant), overwrite=True), seq=seq)
    except _Overtaken:
        await note.forget()
        raise


async def _ending(parts: Parts, meant: Target, note: _Note, progress: _Progress) -> _Progress:
    if progress.ended is not None:
        return progress
    payload: Payload = ResetModel(weights=progress.reset_weights) if meant.is_default else UnloadModel()
    future = await _submit(parts, meant, payload, seq=progress.next_seq)
    progress = msgspec.structs.replace(progress, ended=future, next_seq=_behind(future))
    await note.write(progress)
    return progress


async def _submit(parts: Parts, meant: Target, payload: Payload, *, seq: int) -> FutureId:
    """The future of a job with this very seq, so that calls at the same time are one; raises _Overtaken when another job has it."""
    submission = Submission(
        owner=meant.model, seq=seq, op=codec.op_of(payload), tenant=meant.tenant, payload=codec.encode(payload)
    )
    try:
        return (await parts.admission.submit(submission)).future_id
    except (SequenceConflict, UnknownModel) as error:
        raise _Overtaken from error


def _behind(future: FutureId) -> int:
    """The model's next seq when this future is its last one."""
    return future_parts(future).seq + 1


def _final(meant: Target) -> str:
    """The checkpoint's name; of a model whose own name is too long for that, with the start of it."""
    name = f"session_{meant.name}_final"
    if len(name) <= _MAX_NAME:
        return name
    digest = hashlib.blake2b(meant.name.encode(), digest_size=8).hexdigest()
    return f"session_{meant.name[:96]}_{digest}_final"


def _why(outcome: object) -> str:
    assert isinstance(outcome, Failed), outcome
    return shown(outcome.message)


def _done(meant: Target, progress: _Progress) -> str:
    if not meant.is_default:
        return f"the session {meant.name!r} is over, and its model is unloaded"
    weights = "back to its first weights" if progress.reset_weights else "with the weights that it has"
    return f"the session {meant.name!r} begins anew, {weights}; its optimizer state and gradients are gone"
