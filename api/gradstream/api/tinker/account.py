"""What a hosted service keeps for accounts: keys, audits, bills. One's own server has none, and says so in the expected form."""

import zlib
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from gradstream.api.auth import tenant_of
from gradstream.api.parts import parts_of
from gradstream.api.query import MAX_PAGE, Query, query, takes
from gradstream.shared.errors import Unsupported
from gradstream.shared.joblog.port import RecordKind

router = APIRouter()
_BYTES_PER_GIGABYTE = 10**9
_Text = Annotated[str, Field(max_length=256)]


class AuditQuery(Query):
    event_type: _Text | None = None
    day: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None


class UsageQuery(Query):
    starting_on: _Text | None = None
    ending_before: _Text | None = None


class StorageQuery(Query):
    project_id: _Text | None = None


class Organization(BaseModel):
    name: str


class User(BaseModel):
    email: str


class KeyDetails(BaseModel):
    org_details: Organization
    user_details: User


class OwnKey(BaseModel):
    key_id: int
    name: str
    note: str
    details: KeyDetails


class AuditLog(BaseModel):
    entries: list[None] = []


class Usage(BaseModel):
    data: list[None] = []
    sessions: dict[str, None] = {}
    cost_data_through: None = None


class StorageRow(BaseModel):
    org_user_urn: str
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: None = None


class StorageUsage(BaseModel):
    effective_rate_usd_per_gigabyte_month: None = None
    data: list[StorageRow]


@router.get("/auth/apikey/me")
async def get_own_key(request: Request) -> OwnKey:
    """The tenant behind the request; `tinker auth login` checks a key with it. Keys have no users here."""
    tenant = tenant_of(request)
    details = KeyDetails(org_details=Organization(name="gradstream"), user_details=User(email=tenant))
    return OwnKey(key_id=zlib.crc32(tenant.encode()), name=tenant, note="", details=details)


@router.delete("/auth/apikey/me")
async def delete_own_key() -> None:
    """Refused: keys are managed by the operator."""
    raise Unsupported("a key cannot delete itself here; `gradstream keys revoke` on the server does")


@router.get("/audit", openapi_extra=takes(AuditQuery))
async def audit(request: Request) -> AuditLog:
    """Always empty: no audit log is kept."""
    query(request, AuditQuery)
    return AuditLog()


@router.get("/billing/usage/events", openapi_extra=takes(UsageQuery))
async def billing_usage(request: Request) -> Usage:
    """Always empty: nothing is billed."""
    query(request, UsageQuery)
    return Usage()


@router.get("/billing/usage/checkpoints/current", openapi_extra=takes(StorageQuery))
async def checkpoint_storage(request: Request) -> StorageUsage:
    """How many checkpoints the caller has, and the bytes of their files; it costs nothing. Projects are not told apart."""
    parts, tenant = parts_of(request), tenant_of(request)
    query(request, StorageQuery)
    count = size_bytes = offset = 0
    while True:
        page = await parts.intake.list_tenant(RecordKind.CHECKPOINT, tenant, offset=offset, limit=MAX_PAGE)
        count += len(page.records)
        size_bytes += sum(int(record.get("size_bytes") or 0) for record in page.records.values())
        offset += MAX_PAGE
        if offset >= page.total:
            break
    row = StorageRow(
        org_user_urn=tenant,
        checkpoint_count=count,
        size_bytes=size_bytes,
        size_gigabytes=size_bytes / _BYTES_PER_GIGABYTE,
    )
    return StorageUsage(data=[row])
