"""Rank 0's side of the job log on Redis."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, cast

import msgspec
import redis
import structlog

from gradstream.shared import codec
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import FutureId, ModelId, OwnerId, TenantId
from gradstream.shared.joblog import lua
from gradstream.shared.joblog.batcher import Value
from gradstream.shared.joblog.client import BLOCK_MS, redis_errors, sync_client
from gradstream.shared.joblog.keys import Keys, record_fields
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.packed import Packed, former_digest, payload_digest
from gradstream.shared.joblog.port import (
    Adoption,
    BatchId,
    Commit,
    Ended,
    Fenced,
    FutureStatus,
    Journaled,
    LogEntry,
    RecordKind,
    RecordWrite,
    TailLost,
)
from gradstream.shared.wire import Job

_log = structlog.get_logger(__name__)
_SCRIPTS = (
    "lease",
    "commit",
    "card",
    "adopt",
    "snapshot",
    "restore",
    "restore_record",
    "expel",
    "running",
    "mark_started",
    "mark_stopped",
)
# With delays growing to one second: a restart of Redis is ridden out inside a call.
_NUM_RETRIES = 30
_TEXTS: msgspec.msgpack.Decoder[list[str]] = msgspec.msgpack.Decoder(list[str])
_Entry = tuple[bytes, dict[bytes, bytes]]
_OPEN = (FutureStatus.HELD.value.encode(), FutureStatus.QUEUED.value.encode())


class RedisFeed:
    """See port.Feed. Methods raise Unavailable when Redis cannot be reached for about half a minute."""

    def __init__(self, url: str, *, engine: str = "main", limits: Limits | None = None) -> None:
        self._url = url
        self._keys = Keys(engine)
        self._limits = limits or Limits()
        self._client: redis.Redis | None = None
        # redis-py's Script; it loads itself again after NOSCRIPT. Its reply type is unknown to the type checker.
        self._scripts: dict[str, Any] = {}
        self._owner = ""
        self._card = b""

    def open(self) -> Self:
        """Prepare the client; connections are made when used."""
        self._client = sync_client(self._url, num_retries=_NUM_RETRIES)
        self._scripts = {name: self._client.register_script(lua.load(name).text) for name in _SCRIPTS}
        return self

    def close(self) -> None:
        """Drop the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def acquire(self, *, owner: str, above: int = 0) -> int:
        reply = self._eval("lease", ["acquire", owner, self._lease_ms, above])
        if reply[0] == b"taken":
            raise Unavailable(
                f"another worker, {reply[1].decode()!r}, serves this engine; its lease ends in {int(reply[2]) / 1000:.1f} s "
                "unless it goes on; stop it, or give this one another engine name"
            )
        self._owner = owner
        return int(reply[1])

    def renew(self, epoch: int) -> None:
        self._eval("lease", ["renew", self._owner, self._lease_ms, epoch, self._card], epoch=epoch)

    def release(self, epoch: int) -> None:
        self._eval("lease", ["release", self._owner, self._lease_ms, epoch], epoch=epoch)

    def cursor(self) -> str:
        with redis_errors():
            value = cast("bytes | None", self._redis.get(self._keys.cursor))
        return value.decode() if value else "0-0"

    def read(self, after: str, *, count: int, block_ms: int) -> list[LogEntry]:
        deadline = time.monotonic() + block_ms / 1000
        while True:
            left_ms = max(1, int((deadline - time.monotonic()) * 1000))
            block: int | None = min(left_ms, BLOCK_MS) if block_ms > 0 else None
            with redis_errors():
                streams = self._redis.xread({self._keys.log: after}, count=count, block=block)
            reply = cast("list[tuple[bytes, list[_Entry]]]", streams)
            if reply:
                return self._entries(reply[0][1])
            if time.monotonic() >= deadline:
                return []

    def newest_entry(self) -> int:
        with redis_errors():
            value = cast("bytes | None", self._redis.hget(self._keys.stat, "log"))
        return int(value or 0)

    def mark_started(self, future_ids: Sequence[FutureId], *, epoch: int) -> list[FutureId]:
        reply = self._eval("mark_started", [epoch, *future_ids], epoch=epoch)
        return [FutureId(future.decode()) for future in reply[1:]]

    def mark_stopped(self, future_ids: Sequence[FutureId], *, epoch: int) -> None:
        self._eval("mark_stopped", [epoch, *future_ids], epoch=epoch)

    def note_running(self, number: int, op: str, future_ids: Sequence[FutureId], *, epoch: int) -> None:
        self._eval("running", [epoch, number, op, *future_ids], epoch=epoch)

    def record(self, kind: RecordKind, record_id: str) -> dict[str, str] | None:
        with redis_errors():
            fields = cast("dict[bytes, bytes]", self._redis.hgetall(self._keys.record(kind, record_id)))
        return record_fields(fields)

    def commit(self, commit: Commit) -> None:
        limits = self._limits
        batch = commit.batch or BatchId(commit.epoch, commit.number)
        args: list[Value] = [commit.epoch, batch.number, commit.cursor, commit.plan]
        args += [" ".join(ended.job.op for ended in commit.outcomes), limits.unread_ttl_s, limits.keep_blob_s]
        args += [limits.keep_log_entries, limits.keep_journal_entries, limits.keep_notes, len(commit.outcomes)]
        covered = commit.covered
        args += [batch.epoch, str(covered.batch) if covered else "0-0", covered.entry_id if covered else "0-0"]
        args += [str(commit.after) if commit.after else "", int(commit.batch is not None), commit.at_ms]
        args += [limits.delivered_ttl_s]
        for ended in commit.outcomes:
            args += [ended.job.future_id, ended.status.value, ended.data, ended.digest]
        for record in commit.records:
            args += [record.kind.value, record.record_id, -1 if record.fields is None else len(record.fields)]
            for name, value in (record.fields or {}).items():
                args += [name, value]
        reply = self._eval("commit", args, epoch=commit.epoch)
        if reply[0] == b"order":
            raise ValueError(f"batch {batch} does not come after batch {reply[1].decode()}")
        if reply[0] == b"lost":
            raise TailLost(
                f"batch {batch} was made after batch {commit.after}, and the journal in Redis ends at {reply[1].decode()}"
            )
        if reply[0] == b"ok" and (reply[1] or reply[2]):
            _log.warning("commit_met_finished_jobs", batch=str(batch), num_gone=reply[1], num_other_outcome=reply[2])

    def publish_card(self, card: EngineCard, *, epoch: int) -> None:
        encoded = msgspec.json.encode(card)
        self._eval("card", [epoch, encoded], epoch=epoch)
        self._card = encoded

    def adopt(
        self, models: Sequence[ModelId], *, lost: Mapping[ModelId, str], otherwise: str = "", epoch: int
    ) -> Adoption:
        reasons = [text for pair in lost.items() for text in pair]
        reply = self._eval("adopt", [epoch, otherwise, len(models), *models, *reasons], epoch=epoch)
        num_needless = int(reply[1])
        named = [ModelId(model.decode()) for model in reply[2:]]
        return Adoption(needless=named[:num_needless], lost=named[num_needless:])

    def name_snapshot(self, snapshot: Mapping[str, str], *, epoch: int) -> None:
        fields = [text for pair in snapshot.items() for text in pair]
        self._eval("snapshot", [epoch, *fields], epoch=epoch)

    def last_batch(self) -> BatchId | None:
        with redis_errors():
            value = cast("bytes | None", self._redis.hget(self._keys.stat, "journal"))
        return BatchId.parse(value.decode()) if value else None

    def restore(self, entry: LogEntry, *, epoch: int, ended_ms: int = 0) -> bool:
        job, packed = entry.job, Packed.of(entry.job.payload)
        blob = ""
        if entry.is_open and len(packed.data) > self._limits.inline_bytes:
            blob = self._keys.blob(job.future_id, packed.digest)
            with redis_errors():
                self._redis.set(blob, packed.data)
        payload = packed.data if entry.is_open and not blob else b""
        args: list[Value] = [epoch, job.owner, job.seq, job.op, job.tenant, packed.digest, len(packed.data)]
        args += [job.num_tokens, packed.enc, payload, blob, int(entry.ordered), entry.at_ms]
        args += [int(entry.entry_id.partition("-")[0]), int(entry.is_open)]
        args += [ended_ms, self._limits.unread_ttl_s, self._limits.keep_seqs, entry.again, self._limits.retry_window_s]
        args += [text for pair in entry.record.items() for text in pair]
        return bool(self._eval("restore", args, epoch=epoch)[1])

    def unknown(self, future_ids: Sequence[FutureId]) -> set[FutureId]:
        with redis_errors(), self._redis.pipeline(transaction=False) as pipe:
            for future_id in future_ids:
                pipe.exists(self._keys.future(future_id))
            known = pipe.execute()
        return {future_id for future_id, is_there in zip(future_ids, known, strict=True) if not is_there}

    def expel(self, entries: Sequence[LogEntry], *, epoch: int) -> set[FutureId]:
        limits = self._limits
        args: list[Value] = [epoch, limits.unread_ttl_s, limits.keep_blob_s, limits.keep_notes]
        for entry in entries:
            payload = entry.job.payload
            args += [entry.job.future_id, payload_digest(payload), former_digest(payload), int(not entry.is_open)]
        return {FutureId(future.decode()) for future in self._eval("expel", args, epoch=epoch)[1:]}

    def restore_record(self, write: RecordWrite, *, epoch: int, made_by: int | None = None) -> bool:
        fields = [text for pair in (write.fields or {}).items() for text in pair]
        args: list[Value] = [epoch, write.kind.value, write.record_id, "" if made_by is None else made_by, *fields]
        return bool(self._eval("restore_record", args, epoch=epoch)[1])

    def journaled(self, after: BatchId, *, count: int) -> list[Journaled]:
        with redis_errors():
            raw = cast("list[_Entry]", self._redis.xrange(self._keys.journal, min=f"({after}", count=count))
            return [self._journaled(entry_id.decode(), fields) for entry_id, fields in raw]

    def _journaled(self, entry_id: str, fields: dict[bytes, bytes]) -> Journaled:
        futures = [FutureId(text) for text in fields[b"futures"].decode().split(" ") if text]
        entries: list[LogEntry] = []
        ended: list[Ended] = []
        for future in futures:
            stored = self._redis.hmget(self._keys.future(future), "entry", "status", "outcome", "outcome_digest")
            entry, status, data, digest = cast("list[bytes | None]", stored)
            found = cast("list[_Entry]", self._redis.xrange(self._keys.log, min=entry, max=entry)) if entry else []
            if not found or status is None or data is None or digest is None:
                continue
            (logged,) = self._entries(found)
            if not logged.job.payload:
                continue
            entries.append(logged)
            ended.append(Ended(job=logged.job, status=FutureStatus(status.decode()), data=data, digest=digest.decode()))
        return Journaled(
            batch=BatchId.parse(entry_id),
            plan=fields[b"plan"],
            entries=entries,
            ended=ended,
            num_gone=len(futures) - len(ended),
            at_ms=int(fields[b"at_ms"]),
        )

    @property
    def _redis(self) -> redis.Redis:
        assert self._client is not None, "open() was not called"
        return self._client

    @property
    def _lease_ms(self) -> int:
        return int(self._limits.lease_ttl_s * 1000)

    def _eval(self, script: str, args: Iterable[Value], *, epoch: int | None = None) -> list[Any]:
        """The script's reply, a list whose first item is its verdict; raises Fenced."""
        assert self._client is not None, "open() was not called"
        with redis_errors():
            reply: list[Any] = self._scripts[script](keys=[self._keys.log], args=[self._keys.prefix, *args])
        if reply[0] == b"fenced":
            raise Fenced(f"epoch {epoch} is over: epoch {reply[1].decode()} has begun")
        return reply

    def _entries(self, raw: list[_Entry]) -> list[LogEntry]:
        with redis_errors(), self._redis.pipeline(transaction=False) as pipe:
            for _, fields in raw:
                pipe.hmget(self._keys.future(FutureId(fields[b"future"].decode())), "status", "starts", "ordered")
                pipe.get(fields[b"blob"]) if b"blob" in fields else pipe.echo("")
            replies = pipe.execute()
        entries: list[LogEntry] = []
        for i, (entry_id, fields) in enumerate(raw):
            stored = replies[2 * i + 1] if b"blob" in fields else fields[b"payload"]
            status, starts, ordered = replies[2 * i]
            job = self._job(fields, stored)
            entries.append(
                LogEntry(
                    entry_id=entry_id.decode(),
                    job=job,
                    is_open=status in _OPEN,
                    starts=int(starts or 0),
                    ordered=ordered == b"1",
                    at_ms=int(fields[b"at_ms"]),
                    again=fields.get(b"again", b"").decode(),
                    record=_record(fields.get(b"record")),
                    frame=stored if stored and fields[b"enc"] == b"zstd" else b"",
                )
            )
        return entries

    def _job(self, fields: dict[bytes, bytes], stored: bytes | None) -> Job:
        """A job whose blob is gone has an empty payload, which no decoder accepts."""
        payload = stored or b""
        if stored and fields[b"enc"] == b"zstd":
            payload = codec.decompress(stored, max_bytes=self._limits.max_payload_bytes, name="payload")
        return Job(
            future_id=FutureId(fields[b"future"].decode()),
            owner=_owner(fields[b"owner"].decode()),
            seq=int(fields[b"seq"]),
            op=fields[b"op"].decode(),
            tenant=TenantId(fields[b"tenant"].decode()),
            payload=payload,
            num_tokens=int(fields[b"tokens"]),
            v=int(fields[b"v"]),
        )


def _record(stored: bytes | None) -> dict[str, str]:
    """Fields of a record that stand as name and value in turn."""
    texts = _TEXTS.decode(stored) if stored else []
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _owner(text: str) -> OwnerId:
    return ModelId(text)
