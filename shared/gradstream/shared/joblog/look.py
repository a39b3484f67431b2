"""The queue as a person wants to see it: what waits, what is held, what runs. Reads only."""

from collections.abc import Iterator
from typing import Any, Self, cast

import msgspec
import redis

from gradstream.shared.catalog import EngineCard
from gradstream.shared.ids import FutureId, ModelId, TenantId, future_id, lane_of, seq_in_lane
from gradstream.shared.joblog import lua
from gradstream.shared.joblog.client import redis_errors, sync_client
from gradstream.shared.joblog.keys import Keys, next_seq_field
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.joblog.queue_look import Gang, HeldJob, OwnerQueue, QueuedJob, QueueLook, Running, TenantQueue

_PAGE = 256
_NUM_RETRIES = 2
_FIELDS_OF_JOB = 10
_HELD_FIELDS = ("op", "tenant", "bytes", "tokens")


def _literal(text: str) -> str:
    """The text as a part of a pattern of SCAN that matches nothing else."""
    return "".join(f"\\{char}" if char in "*?[]^-\\" else char for char in text)


class QueueReader:
    """Blocking; one thread. Methods raise Unavailable when Redis cannot be reached."""

    def __init__(self, url: str, *, engine: str = "main") -> None:
        self._engine = engine
        self._keys = Keys(engine)
        self._client: redis.Redis = sync_client(url, num_retries=_NUM_RETRIES)
        self._open_jobs = self._client.register_script(lua.load("open_jobs").text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def look(self, *, max_jobs: int = 10_000) -> QueueLook:
        """The queue now. At most max_jobs queued and max_jobs held jobs are listed. The parts are read one after the other."""
        with redis_errors():
            at_ms = self._now_ms()
            gang = self._gang()
            raw = self._queued(max_jobs + 1)
            noted = self._running(gang)
            held = self._held(at_ms, max_jobs + 1)
            jobs = _jobs(raw[:max_jobs], at_ms=at_ms, gang=gang, noted=noted)
            stat = _text(cast("dict[bytes, bytes]", self._client.hgetall(self._keys.stat)))
            tenants = self._tenants()
            owners = self._owners(jobs, held[:max_jobs])
        return QueueLook(
            engine=self._engine,
            at_ms=at_ms,
            gang=gang,
            running=_running_now(jobs, noted, at_ms),
            num_jobs=int(stat.get("queued_jobs", 0)),
            bytes=int(stat.get("queued_bytes", 0)),
            job_ms=float(stat["ewma_ms"]) if "ewma_ms" in stat else None,
            last_batch=stat.get("journal"),
            last_done_s=_age_s(at_ms, stat["done_ms"]) if "done_ms" in stat else None,
            tenants=tenants,
            owners=owners,
            jobs=jobs,
            held=held[:max_jobs],
            is_cut=max(len(raw), len(held)) > max_jobs,
        )

    def engines(self) -> list[str]:
        """The engines that a gang has led on this Redis."""
        with redis_errors():
            keys = [key.decode() for key in cast("Iterator[bytes]", self._client.scan_iter(match="gs:{*}:epoch"))]
        return sorted(key.removeprefix("gs:{").removesuffix("}:epoch") for key in keys)

    def knows(self, owner: str) -> bool:
        """True when a model or sampler of this id is on record."""
        kinds = (RecordKind.MODEL, RecordKind.SAMPLER)
        with redis_errors():
            return bool(self._client.exists(*(self._keys.record(kind, owner) for kind in kinds)))

    def models(self) -> list[str]:
        """The models on record."""
        prefix = self._keys.record(RecordKind.MODEL, "")
        with redis_errors():
            keys = [
                key.decode() for key in cast("Iterator[bytes]", self._client.scan_iter(match=f"{_literal(prefix)}*"))
            ]
        return sorted(key.removeprefix(prefix) for key in keys)

    def _now_ms(self) -> int:
        seconds, microseconds = self._client.time()
        return seconds * 1000 + microseconds // 1000

    def _gang(self) -> Gang:
        keys = self._keys
        epoch, lease, card = cast("list[bytes | None]", self._client.mget(keys.epoch, keys.lease, keys.card))
        left_ms = self._client.pttl(keys.lease)
        return Gang(
            epoch=int(epoch or 0),
            lease_owner=(lease or b"").decode(),
            lease_left_s=max(left_ms, 0) / 1000 if lease else 0.0,
            base_model=msgspec.json.decode(card, type=EngineCard).model_name if card else None,
        )

    def _queued(self, count: int) -> list[list[str]]:
        """The open jobs of the log as open_jobs.lua gives them, oldest first."""
        found: list[list[str]] = []
        after = (cast("bytes | None", self._client.get(self._keys.cursor)) or b"0-0").decode()
        while len(found) < count:
            # Any: redis-py does not know a script's reply.
            reply: Any = self._open_jobs(keys=[self._keys.log], args=[self._keys.prefix, after, _PAGE])
            texts = [text.decode() for text in reply]
            if not texts[0]:
                break
            after = texts[0]
            found += [texts[at : at + _FIELDS_OF_JOB] for at in range(1, len(texts), _FIELDS_OF_JOB)]
        return found[:count]

    def _running(self, gang: Gang) -> dict[str, str]:
        """What the gang said it began, empty when it is another gang's or nobody leads."""
        note = _text(cast("dict[bytes, bytes]", self._client.hgetall(self._keys.running)))
        return note if gang.lease_left_s > 0 and note.get("epoch") == str(gang.epoch) else {}

    def _held(self, at_ms: int, count: int) -> list[HeldJob]:
        """Held jobs, those of the model that waits longest first, each model's in order of seq."""
        found: list[HeldJob] = []
        for model in cast("list[bytes]", self._client.zrange(self._keys.gaps, 0, -1)):
            if len(found) >= count:
                break
            found += self._held_of(ModelId(model.decode()), at_ms, count - len(found))
        return found

    def _held_of(self, model: ModelId, at_ms: int, count: int) -> list[HeldJob]:
        raw = self._client.zrange(self._keys.held(model), 0, count - 1, withscores=True)
        arrivals = {int(seq): at for seq, at in cast("list[tuple[bytes, float]]", raw)}
        seqs = sorted(arrivals)
        if not seqs:
            return []
        with self._client.pipeline(transaction=False) as pipe:
            for seq in seqs:
                pipe.hmget(self._keys.future(future_id(model, seq)), *_HELD_FIELDS)
                pipe.hget(self._keys.record(RecordKind.MODEL, model), next_seq_field(seq))
            replies = pipe.execute()
        held: list[HeldJob] = []
        for i, seq in enumerate(seqs):
            (op, tenant, num_bytes, tokens), next_seq = replies[2 * i], replies[2 * i + 1]
            if op is None:
                continue
            held.append(
                HeldJob(
                    future_id=future_id(model, seq),
                    op=op.decode(),
                    owner=model,
                    seq=seq,
                    tenant=TenantId(tenant.decode()),
                    age_s=_age_s(at_ms, arrivals[seq]),
                    tokens=int(tokens),
                    bytes=int(num_bytes),
                    waits_for_seq=seq_in_lane(lane_of(seq), 1) if next_seq is None else int(next_seq),
                )
            )
        return held

    def _tenants(self) -> list[TenantQueue]:
        stored = _text(cast("dict[bytes, bytes]", self._client.hgetall(self._keys.tenants)))
        counts = _text(cast("dict[bytes, bytes]", self._client.hgetall(self._keys.tenant_jobs)))
        return [
            TenantQueue(tenant=TenantId(tenant), num_jobs=int(counts.get(tenant, 0)), bytes=int(stored.get(tenant, 0)))
            for tenant in sorted(stored.keys() | counts.keys())
        ]

    def _owners(self, jobs: list[QueuedJob], held: list[HeldJob]) -> list[OwnerQueue]:
        """The owners of these jobs, those with the oldest job first."""
        by_owner: dict[str, list[QueuedJob | HeldJob]] = {}
        for queued in jobs:
            by_owner.setdefault(queued.owner, []).append(queued)
        for waiting in held:
            by_owner.setdefault(waiting.owner, []).append(waiting)
        with self._client.pipeline(transaction=False) as pipe:
            for owner in by_owner:
                pipe.hmget(self._keys.record(RecordKind.MODEL, owner), "state", "next_seq", "applied")
            records = pipe.execute()
        owners = [
            _owner_queue(owner, of, record) for (owner, of), record in zip(by_owner.items(), records, strict=True)
        ]
        return sorted(owners, key=lambda queue: -queue.oldest_s)


def _jobs(raw: list[list[str]], *, at_ms: int, gang: Gang, noted: dict[str, str]) -> list[QueuedJob]:
    running = set(noted.get("futures", "").split())
    epoch = str(gang.epoch) if gang.lease_left_s > 0 else None
    num_of: dict[str, int] = {}
    jobs: list[QueuedJob] = []
    for place, (future, op, owner, seq, tenant, num_bytes, tokens, job_ms, starts, started_epoch) in enumerate(raw, 1):
        num_of[owner] = num_of.get(owner, 0) + 1
        jobs.append(
            QueuedJob(
                place=place,
                place_in_owner=num_of[owner],
                future_id=FutureId(future),
                op=op,
                owner=owner,
                seq=int(seq),
                tenant=TenantId(tenant),
                age_s=_age_s(at_ms, job_ms),
                tokens=int(tokens),
                bytes=int(num_bytes),
                starts=int(starts),
                is_running=future in running or (epoch is not None and started_epoch == epoch),
            )
        )
    return jobs


def _running_now(jobs: list[QueuedJob], noted: dict[str, str], at_ms: int) -> Running | None:
    """What runs, None when nothing does that has no outcome yet."""
    running = [job for job in jobs if job.is_running]
    if not running:
        return None
    future_ids = [job.future_id for job in running]
    if not set(noted.get("futures", "").split()) & set(future_ids):
        ops = {job.op for job in running}
        return Running(future_ids=future_ids, op=ops.pop() if len(ops) == 1 else None)
    return Running(
        future_ids=future_ids,
        op=noted["op"],
        batch=f"{noted['epoch']}-{noted['batch']}",
        for_s=_age_s(at_ms, noted["since_ms"]),
    )


def _owner_queue(owner: str, jobs: list[QueuedJob | HeldJob], record: list[bytes | None]) -> OwnerQueue:
    state, next_seq, applied = record
    return OwnerQueue(
        owner=owner,
        tenant=jobs[0].tenant,
        num_queued=sum(isinstance(job, QueuedJob) for job in jobs),
        num_held=sum(isinstance(job, HeldJob) for job in jobs),
        num_running=sum(isinstance(job, QueuedJob) and job.is_running for job in jobs),
        tokens=sum(job.tokens for job in jobs),
        bytes=sum(job.bytes for job in jobs),
        oldest_s=max(job.age_s for job in jobs),
        state=None if state is None else state.decode(),
        next_seq=None if next_seq is None else int(next_seq),
        applied=None if applied is None else int(applied),
    )


def _age_s(at_ms: int, then_ms: float | str) -> float:
    return max(0, at_ms - int(then_ms)) / 1000


def _text(raw: dict[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in raw.items()}
