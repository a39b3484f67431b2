"""Copying checkpoints into runs of their own."""

import hashlib
import uuid
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, small_body
from gradstream.api.budgets import check_session_room, check_storage_room
from gradstream.api.errors import STATUS_OF_CODE, http_error, require
from gradstream.api.futures import Expired, Finished, Missing, Pending, poll
from gradstream.api.ordered import Place
from gradstream.api.parts import Parts, parts_of
from gradstream.api.records import CHECKPOINT_KINDS, any_checkpoint_path, open_session, own_record
from gradstream.api.tinker.checkpoints import LongTtl
from gradstream.api.tinker.models import MAX_MODEL_SEQ_ID, submit_creation
from gradstream.api.tinker.weights import INHERITED
from gradstream.shared import codec, ids
from gradstream.shared.errors import InvalidRequest, Unavailable, UnknownModel, Unsupported
from gradstream.shared.ids import SessionId, TenantId
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import CopyCheckpoint, Failed

router = APIRouter()
_ACCESS_HEADER = "x-tinker-weights-access-token"
_KEY_HEADER = "x-idempotency-key"
_UUID_BYTES = 16


class CopyWeightsBody(Body):
    """Where to: session_id and model_seq_id name the new run; destination_project_id makes a session for it."""

    source_path: str
    session_id: str | None = None
    model_seq_id: Annotated[int, Field(ge=0, le=MAX_MODEL_SEQ_ID)] | None = None
    destination_project_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    ttl_seconds: LongTtl | None = None
    weights_access_token: str | None = None


class CopiedWeights(BaseModel):
    tinker_path: str


@router.post("/copy_weights", response_model=CopiedWeights, openapi_extra=documents(CopyWeightsBody))
async def copy_weights(request: Request) -> CopiedWeights | Response:
    """Copies a checkpoint into a new run that is never loaded. The same run, or the same X-Idempotency-Key, is the same copy."""
    parts, tenant = parts_of(request), tenant_of(request)
    body = await small_body(request, CopyWeightsBody)
    if body.weights_access_token is not None or _ACCESS_HEADER in request.headers:
        raise Unsupported("weights_access_token: this server gives no access to other owners' weights; leave it out")
    kind, name = _checked(body)
    source = await own_record(parts, RecordKind.CHECKPOINT, body.source_path, tenant=tenant, field="source_path")
    session = await _session(parts, body, request.headers.get(_KEY_HEADER), tenant=tenant)
    seq = body.model_seq_id or 0
    run = ids.model_id(session, seq)
    await check_storage_room(parts, Place(model=run, seq=0, tenant=tenant))
    path = any_checkpoint_path(run, f"{kind}/{name}")
    payload = CopyCheckpoint(source=body.source_path, path=path, ttl_seconds=body.ttl_seconds)
    fields = {key: source[key] for key in ("base_model", *INHERITED) if key in source}
    promise = await submit_creation(parts, payload, session=session, model_seq_id=seq, tenant=tenant, fields=fields)
    return await _answer(parts, promise.request_id, path, tenant=tenant)


def _checked(body: CopyWeightsBody) -> tuple[str, str]:
    """Kind and name of the source; raises InvalidRequest for what cannot be a checkpoint's path, or an unclear destination."""
    in_session = body.session_id is not None and body.model_seq_id is not None
    is_partial = (body.session_id is None) != (body.model_seq_id is None)
    require(
        not is_partial and in_session != (body.destination_project_id is not None),
        "session_id, model_seq_id, destination_project_id: send session_id and model_seq_id, or destination_project_id",
    )
    scheme, _, rest = body.source_path.partition("://")
    run, *checkpoint_id = rest.split("/")
    if scheme != "tinker" or len(checkpoint_id) != 2 or checkpoint_id[0] not in CHECKPOINT_KINDS:
        raise InvalidRequest(
            f"source_path: {body.source_path[:200]!r} is not a checkpoint's path; it has the form tinker://MODEL/KIND/NAME"
        )
    any_checkpoint_path(run, "/".join(checkpoint_id))
    return checkpoint_id[0], checkpoint_id[1]


async def _session(parts: Parts, body: CopyWeightsBody, key: str | None, *, tenant: TenantId) -> SessionId:
    """The session of the new run: the caller's own, or one that is made for this copy and takes nothing else."""
    if body.session_id is not None:
        return await open_session(parts, body.session_id, tenant=tenant)
    session = SessionId(str(uuid.uuid4() if key is None else _uuid_of(tenant, key)))
    now_ms = str(parts.clock.wall_ms())
    fields = {"created_ms": now_ms, "heartbeat_ms": now_ms, "finished_ms": now_ms, "finish_reason": "success"}
    origin = {"tenant": tenant, "project_id": body.destination_project_id or "", "display_name": "copy_weights"}
    if await parts.intake.record(RecordKind.SESSION, session) is None:
        await check_session_room(parts, tenant=tenant)
    await parts.intake.add_record(RecordKind.SESSION, session, {**_NO_FACTS, **fields, **origin})
    return session


_NO_FACTS: Mapping[str, str] = {"tags": "[]", "user_metadata": "{}", "sdk_version": "", "finish_detail": ""}


def _uuid_of(tenant: TenantId, key: str) -> uuid.UUID:
    """The same for the same tenant and key; for other tenants it is another one."""
    digest = hashlib.blake2b(f"copy {tenant} {key}".encode(), digest_size=_UUID_BYTES).digest()
    return uuid.UUID(bytes=digest, version=4)


async def _answer(parts: Parts, future_id: ids.FutureId, path: str, *, tenant: TenantId) -> CopiedWeights | Response:
    """What came of the copy. Raises Unavailable when it has not been made yet: the same request again goes on waiting."""
    match await poll(parts, future_id, tenant=tenant):
        case Finished(outcome=outcome):
            match codec.decode_outcome(outcome):
                case Failed(code=code, message=message):
                    # Asked again, a failed job answers the same, so no status that clients repeat.
                    status = STATUS_OF_CODE.get(code, 500)
                    return http_error(status if status < 500 else 400, code=code, detail=message)
                case _:
                    return CopiedWeights(tinker_path=path)
        case Pending(reason=reason):
            raise Unavailable(
                f"the copy is not made yet ({reason or 'the worker is busy'}); send the same request again"
            )
        case Expired():
            if await parts.intake.record(RecordKind.CHECKPOINT, path) is not None:
                return CopiedWeights(tinker_path=path)
            raise UnknownModel(f"the copy {path} was made, and is gone since")
        case Missing():
            raise UnknownModel(f"the copy {path} was asked for, and nothing of it is left; ask again")
