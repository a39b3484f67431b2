"""Ending a session: its state is saved, then it is taken from memory, or, of the model `default`, begins anew.

Clients send this call once and wait; when it takes long they send it again. What was begun is noted in the model's record, so the same
call goes on where the one before was, for as long as nobody sent the model another job.
"""

import hashlib

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel

from gradstream.api.auth import tenant_of
from gradstream.api.body import documents, small_body
from gradstream.api.parts import Parts, parts_of
from gradstream.api.xorl.bodies import NamedBody
from gradstream.api.xorl.models import Target, target_of, unknown
from gradstream.api.xorl.paths import shown
from gradstream.api.xorl.submitting import submit
from gradstream.api.xorl.waiting import WAIT_S, outcome_of
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import Failed, Payload, ResetModel, SaveWeights, SaveWeightsDone, UnloadModel

router = APIRouter()
_FIELD = "kill"
_MAX_NAME = 128
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


@router.post("/api/v1/kill_session", openapi_extra=documents(KillBody))
async def kill_session(request: Request) -> SessionKilled:
    """Saves session_MODEL_final, unless told otherwise, then unloads the model; `default` starts anew with the weights it has.

    It waits for everything that the model has queued. When the checkpoint cannot be saved, nothing else is done.
    """
    parts = parts_of(request)
    body = await small_body(request, KillBody)
    meant = target_of(body, tenant=tenant_of(request))
    deadline_s = parts.clock.monotonic_s() + WAIT_S
    progress = await _begun(parts, meant, body)
    if progress is None:
        return SessionKilled(success=True, message=_NOTHING)
    if body.save_checkpoint and progress.path is None:
        saving = await _saving(parts, meant, progress)
        assert saving.saved is not None
        outcome = await outcome_of(parts, saving.saved, deadline_s=deadline_s)
        if not isinstance(outcome, SaveWeightsDone):
            await _forget(parts, meant)
            return SessionKilled(
                success=False, message=f"nothing was done, as the checkpoint was not saved: {_why(outcome)}"
            )
        progress = await _note(parts, meant, msgspec.structs.replace(saving, path=shown(outcome.path)))
    ending = await _ending(parts, meant, progress)
    assert ending.ended is not None
    outcome = await outcome_of(parts, ending.ended, deadline_s=deadline_s)
    if isinstance(outcome, Failed):
        await _forget(parts, meant)
        return SessionKilled(success=False, message=_why(outcome), checkpoint_path=ending.path)
    return SessionKilled(success=True, message=_done(meant, body), checkpoint_path=ending.path)


async def _begun(parts: Parts, meant: Target, body: KillBody) -> _Progress | None:
    """How far this very call came before, or a fresh one; None when there is nothing to kill. Raises UnknownModel."""
    record = await parts.intake.record(RecordKind.MODEL, meant.model)
    if record is None or record.get("tenant") != meant.tenant:
        if meant.is_default:
            return None
        raise unknown(meant)
    next_seq = int(record.get("next_seq", "0"))
    if record.get(_FIELD):
        before = msgspec.json.decode(record[_FIELD], type=_Progress)
        is_same = (before.save_checkpoint, before.reset_weights) == (body.save_checkpoint, body.reset_weights)
        if is_same and before.next_seq == next_seq:
            return before
    if record.get("state") in {"unloaded", "failed", "lost"}:
        return None
    return _Progress(save_checkpoint=body.save_checkpoint, reset_weights=body.reset_weights, next_seq=next_seq)


async def _saving(parts: Parts, meant: Target, progress: _Progress) -> _Progress:
    if progress.saved is not None:
        return progress
    future = await submit(parts, meant, SaveWeights(name=_final(meant), overwrite=True), seq_id=None)
    return await _note(parts, meant, msgspec.structs.replace(progress, saved=future, next_seq=_behind(future)))


async def _ending(parts: Parts, meant: Target, progress: _Progress) -> _Progress:
    if progress.ended is not None:
        return progress
    payload: Payload = ResetModel(weights=progress.reset_weights) if meant.is_default else UnloadModel()
    future = await submit(parts, meant, payload, seq_id=None)
    return await _note(parts, meant, msgspec.structs.replace(progress, ended=future, next_seq=_behind(future)))


async def _note(parts: Parts, meant: Target, progress: _Progress) -> _Progress:
    """Write down how far the call came."""
    await parts.intake.change_record(RecordKind.MODEL, meant.model, {_FIELD: msgspec.json.encode(progress).decode()})
    return progress


async def _forget(parts: Parts, meant: Target) -> None:
    """The next call begins anew."""
    await parts.intake.change_record(RecordKind.MODEL, meant.model, {_FIELD: ""})


def _behind(future: FutureId) -> int:
    """The model's next seq when this future is its last one."""
    return int(future.rpartition(":")[2]) + 1


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


def _done(meant: Target, body: KillBody) -> str:
    if not meant.is_default:
        return f"the session {meant.name!r} is over, and its model is unloaded"
    weights = "back to its first weights" if body.reset_weights else "with the weights that it has"
    return f"the session {meant.name!r} begins anew, {weights}; its optimizer state and gradients are gone"
