"""Unguessable URLs: what a token stands for, and for how long."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from fastapi import Request

from gradstream.api.parts import Parts
from gradstream.shared import ids
from gradstream.shared.errors import UnknownModel
from gradstream.shared.joblog.port import RecordKind

# Clients ask for new URLs five minutes before the end.
LINK_TTL_S = 3600
_TOKEN_BYTES = 32


class _Target(msgspec.Struct, frozen=True):
    """What a token stands for: one checkpoint or export as it was made then, not a later one of the same name."""

    path: str
    created_ms: str
    kind: RecordKind = RecordKind.CHECKPOINT


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The URL below which the files are, and until when."""

    base: str
    expires: datetime


async def make_link(
    parts: Parts, request: Request, record_id: str, record: Mapping[str, str], *, kind: RecordKind
) -> Link:
    """A new URL for the files that a record describes."""
    token = secrets.token_hex(_TOKEN_BYTES)
    target = _Target(path=record_id, created_ms=record["created_ms"], kind=kind)
    await parts.intake.put_link(token, msgspec.json.encode(target).decode(), ttl_s=LINK_TTL_S)
    expires = datetime.fromtimestamp(parts.clock.wall_ms() // 1000 + LINK_TTL_S, tz=UTC)
    return Link(base=f"{str(request.base_url).rstrip('/')}/api/v1/downloads/{token}", expires=expires)


async def linked_record(parts: Parts, token: str) -> Mapping[str, str]:
    """The record that a token stands for; raises UnknownModel when there is none any more."""
    link = await parts.intake.link(token) if ids.is_valid_id(token) else None
    target = None if link is None else msgspec.json.decode(link, type=_Target)
    record = None if target is None else await parts.intake.record(target.kind, target.path)
    if target is None or record is None or record.get("created_ms") != target.created_ms:
        raise UnknownModel("there is nothing to download here; the URL's time may be over, ask for a new one")
    return record
