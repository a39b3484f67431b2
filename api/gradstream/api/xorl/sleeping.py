"""Sleeping: the trained weights leave the device while inference needs it, and come back."""

from fastapi import APIRouter, Request
from pydantic import BaseModel

from gradstream.api.auth import tenant_of
from gradstream.api.names import shown, target
from gradstream.api.parts import Parts, parts_of
from gradstream.api.xorl.submitting import submit
from gradstream.api.xorl.waiting import WAIT_S, outcome_of
from gradstream.shared.errors import EngineFailure, InvalidRequest, Unavailable, Unsupported
from gradstream.shared.ids import DEFAULT_MODEL, TenantId
from gradstream.shared.wire import Failed, OffloadModel, OffloadModelDone

router = APIRouter()


class Sleep(BaseModel):
    """status: sleeping or awake. bytes_moved: between device and host, by this call."""

    status: str
    bytes_moved: int


@router.post("/sleep", openapi_extra={"requestBody": {"required": False, "content": {}}})
async def sleep(request: Request) -> Sleep:
    """Moves weights, gradient and optimizer state to host memory, behind everything that is queued. Training fails until /wake_up."""
    return await _offload(parts_of(request), tenant_of(request), asleep=True)


@router.post("/wake_up", openapi_extra={"requestBody": {"required": False, "content": {}}})
async def wake_up(request: Request) -> Sleep:
    """Moves them back to the device."""
    return await _offload(parts_of(request), tenant_of(request), asleep=False)


async def _offload(parts: Parts, tenant: TenantId, *, asleep: bool) -> Sleep:
    if (await parts.catalog.card()).is_lora:
        call = "sleep" if asleep else "wake_up"
        raise Unsupported(
            f"{call}: this server trains adapters beside a base model that all of them share; only one that trains full weights can sleep"
        )
    deadline_s = parts.clock.monotonic_s() + WAIT_S
    future = await submit(parts, target(DEFAULT_MODEL, tenant=tenant), OffloadModel(asleep=asleep), seq_id=None)
    match await outcome_of(parts, future, deadline_s=deadline_s):
        case OffloadModelDone(asleep=is_asleep, bytes_moved=num_bytes):
            return Sleep(status="sleeping" if is_asleep else "awake", bytes_moved=num_bytes)
        case Failed(category="user", message=message):
            raise InvalidRequest(shown(message))
        case Failed(message=message):
            raise EngineFailure(shown(message))
        case None:
            raise Unavailable("what became of the call is no longer known; send it again")
        case other:
            raise AssertionError(other)
