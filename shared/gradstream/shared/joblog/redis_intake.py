"""The API's side of the job log on Redis."""

import asyncio
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Self

import msgspec
import redis.asyncio

from gradstream.shared import ids
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import FutureId, ModelId, SamplerId, TenantId, lane_of, seq_in_lane
from gradstream.shared.joblog import admission, lua
from gradstream.shared.joblog.batcher import Command, CommandBatcher, Value
from gradstream.shared.joblog.client import async_client, redis_errors
from gradstream.shared.joblog.deliveries import Deliveries
from gradstream.shared.joblog.done import MAX_COMPLETIONS, block_name, completions_of, entry_id
from gradstream.shared.joblog.keys import Keys, next_seq_field, record_fields
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.line import Reply
from gradstream.shared.joblog.packed import Packed, is_former_digest
from gradstream.shared.joblog.port import Completions, FutureStatus, FutureView, Page, Receipt, RecordKind, Submission
from gradstream.shared.joblog.redis_vitals import vitals_commands, vitals_of
from gradstream.shared.joblog.vitals import Vitals
from gradstream.shared.joblog.waiters import NoteTail

_SCRIPTS = (
    "submit",
    "refuse",
    "fail_gaps",
    "add_record",
    "put_record",
    "remove_record",
    "cancel",
    "count_up",
    "delivered",
    "polled",
    "swap_field",
)
_NUM_RETRIES = 4
# Of large payloads. Two: while one is written to disk by the server the next is on its way.
_BULK_IN_FLIGHT = 2
# Above this, compressing and hashing leave the event loop.
_THREAD_ABOVE_BYTES = 64 * 1024
_CARD = msgspec.json.Decoder(EngineCard)
_VIEW_FIELDS = ("op", "tenant", "status", "outcome", "owner", "seq")


class RedisIntake:
    """See port.Intake. Methods raise Unavailable when Redis cannot be reached within about a second."""

    def __init__(self, url: str, *, engine: str = "main", limits: Limits | None = None) -> None:
        self._url = url
        self._keys = Keys(engine)
        self._limits = limits or Limits()
        self._clients: list[redis.asyncio.Redis] = []
        self._batcher: CommandBatcher | None = None
        # Large payloads go their own way, so that nothing small waits behind them.
        self._bulk: CommandBatcher | None = None
        self._deliveries = Deliveries(self._send_deliveries)
        self._tail: NoteTail | None = None
        self._seen = admission.Seen()

    async def open(self) -> Self:
        """Start following the note stream. Redis may still be away; it is met when it comes."""
        commands = async_client(self._url, max_connections=1, num_retries=_NUM_RETRIES, socket_timeout_s=None)
        notes = async_client(self._url, max_connections=1, num_retries=0)
        self._clients = [commands, notes]
        scripts = [lua.load(name) for name in _SCRIPTS]
        self._batcher = CommandBatcher(commands, scripts)
        self._bulk = CommandBatcher(commands, scripts, max_in_flight=_BULK_IN_FLIGHT, max_calls=1)
        self._tail = NoteTail(notes, self._keys)
        await self._tail.open()
        return self

    async def close(self) -> None:
        """Wake all waiters and drop the connections."""
        if self._tail is not None:
            await self._tail.close()
        await self._deliveries.close()
        for batcher in (self._batcher, self._bulk):
            if batcher is not None:
                await batcher.close()
        for client in self._clients:
            await client.aclose()
        self._clients = []

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def submit(self, submission: Submission) -> Receipt:
        admission.check_submission(submission)
        if submission.seq is None:
            return await self._submit(submission)
        assert self._tail is not None, "open() was not called"
        future_id, is_new = ids.future_id(submission.owner, submission.seq), False
        self._tail.submitting(future_id)
        try:
            receipt = await self._submit(submission)
            is_new = not receipt.is_duplicate
        finally:
            if is_new:
                self._tail.accepted(future_id, submission.tenant)
            else:
                self._tail.not_accepted(future_id)
        return receipt

    async def _submit(self, submission: Submission) -> Receipt:
        packed = submission.packed
        if packed is None and len(submission.payload) > _THREAD_ABOVE_BYTES:
            packed = await asyncio.to_thread(Packed.of, submission.payload)
        elif packed is None:
            packed = Packed.of(submission.payload)
        admission.check_size(submission, packed, self._limits)
        reply = await self._ask(submission, packed)
        used = admission.conflicting_digest(reply)
        if used is not None and await asyncio.to_thread(is_former_digest, used, submission.payload):
            reply = await self._ask(submission, replace(packed, digest=used))
        if reply[0] != b"ok":
            raise admission.refusal(reply, submission.owner, submission.seq, self._limits)
        self._seen = self._seen.and_then(int(reply[4]), int(reply[5]))
        return Receipt(
            future_id=ids.future_id(submission.owner, int(reply[3])),
            status=FutureStatus(reply[1].decode()),
            is_duplicate=bool(reply[2]),
        )

    async def _ask(self, submission: Submission, packed: Packed) -> Reply:
        """The submit script's answer. Raises Unavailable when the payload is gone twice before the script comes to it."""
        commands: list[Command] = []
        blob = ""
        if len(packed.data) > self._limits.inline_bytes:
            blob = admission.blob_key(submission, packed, keys=self._keys)
            # NX: a retry must not give an accepted blob an expiry again.
            commands.append(("SET", blob, packed.data, "EX", self._limits.orphan_blob_ttl_s, "NX"))
        args = admission.submit_args(
            submission, packed, blob=blob, seen=self._seen, keys=self._keys, limits=self._limits
        )
        commands.append(self._call("submit", args))
        run = self._run_bulk if len(packed.data) > _THREAD_ABOVE_BYTES else self._run
        reply = (await run(*commands))[-1]
        if reply[0] == b"noblob":
            reply = (await run(*commands))[-1]
            if reply[0] == b"noblob":
                raise Unavailable("the payload was dropped while it was being accepted; send it again")
        return reply

    async def refuse(self, *, model: ModelId, seq: int, tenant: TenantId) -> None:
        admission.check_ids(model, seq)
        limits = self._limits
        args: list[Value] = [self._keys.prefix, model, seq, tenant, limits.hold_window, limits.keep_seqs]
        reply = (await self._run(self._call("refuse", args)))[0]
        if reply[0] != b"ok":
            raise admission.refusal(reply, model, seq, limits)

    async def future(self, future_id: FutureId) -> FutureView | None:
        reply = (await self._run(("HMGET", self._keys.future(future_id), *_VIEW_FIELDS)))[0]
        op, tenant, status_text, outcome, owner, seq = reply
        if status_text is None:
            return None
        status = FutureStatus(status_text.decode())
        waiting_for: int | None = None
        if status is FutureStatus.HELD:
            waiting_for = await self._next_seq(ModelId(owner.decode()), int(seq))
        return FutureView(
            future_id=future_id,
            op=op.decode(),
            tenant=TenantId(tenant.decode()),
            status=status,
            outcome=outcome,
            waiting_for_seq=waiting_for,
        )

    async def _next_seq(self, model: ModelId, seq: int) -> int:
        """The seq that seq's lane of a model waits for."""
        key = self._keys.record(RecordKind.MODEL, model)
        next_seq = (await self._run(("HGET", key, next_seq_field(seq))))[0]
        return seq_in_lane(lane_of(seq), 1) if next_seq is None else int(next_seq)

    async def wait(self, future_id: FutureId, *, timeout_s: float, tenant: TenantId | None = None) -> FutureView | None:
        assert self._tail is not None, "open() was not called"
        view: FutureView | None = None

        async def look() -> bool:
            nonlocal view
            view = await self.future(future_id)
            return view is None or view.outcome is not None or (tenant is not None and view.tenant != tenant)

        is_open = self._tail.is_unnoted(future_id, tenant)
        await self._tail.until(future_id, look, timeout_s=timeout_s, is_false_now=is_open)
        if view is None or view.outcome is not None:
            self._tail.met(future_id)
        return view

    async def completions(self, sampler: SamplerId, block: int, *, after: int, timeout_s: float) -> Completions:
        assert self._tail is not None, "open() was not called"
        key = self._keys.done(sampler, block)
        if after:
            await self._run(("XTRIM", key, "MINID", entry_id(after + 1)))

        async def look() -> Completions | None:
            found = (await self._run(("XRANGE", key, entry_id(after + 1), "+", "COUNT", MAX_COMPLETIONS)))[0]
            return completions_of(found) if found else None

        found = await self._tail.until(block_name(sampler, block), look, timeout_s=timeout_s)
        return found or Completions(items=(), cursor=after)

    async def cancel(self, future_id: FutureId, *, tenant: TenantId) -> bool:
        limits = self._limits
        args: list[Value] = [self._keys.prefix, future_id, tenant]
        args += [limits.unread_ttl_s, limits.keep_blob_s, limits.keep_notes]
        return bool((await self._run(self._call("cancel", args)))[0])

    def mark_delivered(self, future_id: FutureId) -> None:
        self._deliveries.note(future_id)

    async def _send_deliveries(self, futures: Sequence[FutureId]) -> None:
        args: list[Value] = [self._keys.prefix, self._limits.delivered_ttl_s, *futures]
        await self._run(self._call("delivered", args))

    async def note_polled(self, future_id: FutureId, *, tenant: TenantId) -> None:
        await self._run(self._call("polled", [self._keys.prefix, future_id, tenant]))

    async def put_record(self, kind: RecordKind, record_id: str, fields: Mapping[str, str]) -> None:
        await self._put(kind, record_id, fields, only_existing=False)

    async def add_record(self, kind: RecordKind, record_id: str, fields: Mapping[str, str]) -> bool:
        args: list[Value] = [self._keys.prefix, kind.value, record_id, uuid.uuid4().hex, *_flat(fields)]
        return bool((await self._run(self._call("add_record", args)))[0])

    async def record(self, kind: RecordKind, record_id: str) -> dict[str, str] | None:
        reply = (await self._run(("HGETALL", self._keys.record(kind, record_id))))[0]
        return record_fields(reply)

    async def change_record(self, kind: RecordKind, record_id: str, fields: Mapping[str, str]) -> bool:
        return await self._put(kind, record_id, fields, only_existing=True)

    async def swap_field(self, kind: RecordKind, record_id: str, field: str, *, old: str, new: str) -> bool:
        args: list[Value] = [self._keys.prefix, kind.value, record_id, field, old, new]
        return bool((await self._run(self._call("swap_field", args)))[0])

    async def remove_record(self, kind: RecordKind, record_id: str, *, created_ms: str = "") -> bool:
        args: list[Value] = [self._keys.prefix, kind.value, record_id, created_ms]
        return bool((await self._run(self._call("remove_record", args)))[0])

    async def list_tenant(self, kind: RecordKind, tenant: TenantId, *, offset: int, limit: int) -> Page:
        return await self._page(kind, self._keys.tenant_list(kind, tenant), offset=offset, limit=limit)

    async def list_children(self, kind: RecordKind, parent: str, *, offset: int, limit: int) -> Page:
        return await self._page(kind, self._keys.child_list(kind, parent), offset=offset, limit=limit)

    async def num_children(self, kind: RecordKind, parents: Sequence[str]) -> list[int]:
        if not parents:
            return []
        commands: list[Command] = [("ZCARD", self._keys.child_list(kind, parent)) for parent in parents]
        return [int(reply) for reply in await self._run(*commands)]

    async def count_up(self, kind: RecordKind, record_id: str, field: str) -> int:
        args: list[Value] = [self._keys.prefix, kind.value, record_id, field]
        return int((await self._run(self._call("count_up", args)))[0])

    async def put_link(self, token: str, target: str, *, ttl_s: int) -> None:
        await self._run(("SET", self._keys.link(token), target, "EX", ttl_s))

    async def link(self, token: str) -> str | None:
        text = (await self._run(("GET", self._keys.link(token))))[0]
        return None if text is None else text.decode()

    async def card(self) -> EngineCard | None:
        text = (await self._run(("GET", self._keys.card)))[0]
        return None if text is None else _CARD.decode(text)

    async def is_worker_alive(self) -> bool:
        return bool((await self._run(("EXISTS", self._keys.lease)))[0])

    async def leading(self) -> int | None:
        epoch, card, lease = (await self._run(("MGET", self._keys.epoch, self._keys.card, self._keys.lease)))[0]
        if epoch is None or card is None or lease is None or _CARD.decode(card).epoch != int(epoch):
            return None
        return int(epoch)

    async def vitals(self, tenant: TenantId) -> Vitals:
        replies = await self._run(*vitals_commands(self._keys, tenant))
        return vitals_of(replies, lease_ttl_s=self._limits.lease_ttl_s)

    async def fail_gaps(self) -> int:
        limits = self._limits
        hold_ms = int(limits.hold_timeout_s * 1000)
        args: list[Value] = [
            self._keys.prefix,
            hold_ms,
            limits.unread_ttl_s,
            limits.keep_blob_s,
            limits.keep_notes,
            limits.keep_seqs,
        ]
        return int((await self._run(self._call("fail_gaps", args)))[0])

    async def _put(self, kind: RecordKind, record_id: str, fields: Mapping[str, str], *, only_existing: bool) -> bool:
        args: list[Value] = [self._keys.prefix, kind.value, record_id, int(only_existing), *_flat(fields)]
        return bool((await self._run(self._call("put_record", args)))[0])

    async def _page(self, kind: RecordKind, key: str, *, offset: int, limit: int) -> Page:
        """A part of a list; a record that is removed in between is left out."""
        assert limit > 0, "ZREVRANGE would read -1 as the end of the list"
        members, total = await self._run(("ZREVRANGE", key, offset, offset + limit - 1), ("ZCARD", key))
        names = [member.decode() for member in members]
        if not names:
            return Page(records={}, total=int(total))
        commands: list[Command] = [("HGETALL", self._keys.record(kind, name)) for name in names]
        found = zip(names, map(record_fields, await self._run(*commands)), strict=True)
        return Page(records={name: fields for name, fields in found if fields is not None}, total=int(total))

    def _call(self, script: str, args: Iterable[Value]) -> Command:
        return ("EVALSHA", lua.load(script).sha, 1, self._keys.log, *args)

    async def _run(self, *commands: Command) -> list[Reply]:
        assert self._batcher is not None, "open() was not called"
        with redis_errors():
            return await self._batcher.run(*commands)

    async def _run_bulk(self, *commands: Command) -> list[Reply]:
        assert self._bulk is not None, "open() was not called"
        with redis_errors():
            return await self._bulk.run(*commands)


def _flat(fields: Mapping[str, str]) -> list[str]:
    return [part for item in fields.items() for part in item]
