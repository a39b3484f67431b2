"""Vitals read from Redis: the commands, and what their replies tell."""

from collections.abc import Mapping, Sequence
from typing import cast

from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.batcher import Command
from gradstream.shared.joblog.keys import Keys
from gradstream.shared.joblog.line import Reply
from gradstream.shared.joblog.port import BatchId
from gradstream.shared.joblog.vitals import Running, Vitals


def vitals_commands(keys: Keys, tenant: TenantId) -> list[Command]:
    """What has to be asked, in this order."""
    return [
        ("TIME",),
        ("GET", keys.epoch),
        ("PTTL", keys.lease),
        ("HMGET", keys.stat, "queued_jobs", "queued_bytes", "log", "journal"),
        ("HGETALL", keys.running),
        ("HGET", keys.tenant_jobs, tenant),
    ]


def vitals_of(replies: Sequence[Reply], *, lease_ttl_s: float) -> Vitals:
    """The vitals that the replies to vitals_commands tell. lease_ttl_s: how long a renewed lease lasts."""
    time, epoch, lease_ms, stat, running, tenant_jobs = replies
    num_jobs, num_bytes, num_accepted = (int(value or 0) for value in stat[:3])
    is_led = int(lease_ms) > 0
    note = {name.decode(): value.decode() for name, value in cast("Mapping[bytes, bytes]", running).items()}
    is_of_leader = is_led and epoch is not None and note.get("epoch") == epoch.decode()
    # Only long batches are noted, so the last one may be older than those that ran since.
    last = BatchId.parse((stat[3] or b"0-0").decode())
    is_current = is_of_leader and BatchId.parse(f"{note['epoch']}-{note['batch']}") > last
    now_ms = 1000 * int(time[0]) + int(time[1]) // 1000
    return Vitals(
        epoch=int(epoch or 0) if is_led else None,
        heartbeat_age_s=max(0.0, lease_ttl_s - int(lease_ms) / 1000) if is_led else None,
        running=_running(note, now_ms) if is_current else None,
        num_jobs=num_jobs,
        num_bytes=num_bytes,
        num_accepted=num_accepted,
        tenant_jobs=int(tenant_jobs or 0),
    )


def _running(note: Mapping[str, str], now_ms: int) -> Running:
    return Running(
        op=note["op"],
        num_jobs=len(note["futures"].split()),
        for_s=max(0, now_ms - int(note["since_ms"])) / 1000,
    )
