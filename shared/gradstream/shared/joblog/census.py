"""Walks over the records of a kind, for the sweeps and exports of the housekeeping processes."""

from collections.abc import Iterator, Mapping
from typing import Self, cast

import redis

from gradstream.shared.joblog import lua
from gradstream.shared.joblog.client import redis_errors, sync_client
from gradstream.shared.joblog.keys import Keys, record_fields
from gradstream.shared.joblog.port import RecordKind

_SCAN_COUNT = 500
_NUM_RETRIES = 4


class RedisCensus:
    """Blocking; one thread. Methods raise Unavailable when Redis cannot be reached."""

    def __init__(self, url: str, *, engine: str = "main") -> None:
        self._url = url
        self._keys = Keys(engine)
        self._client: redis.Redis | None = None

    def __enter__(self) -> Self:
        self._client = sync_client(self._url, num_retries=_NUM_RETRIES)
        return self

    def __exit__(self, *_: object) -> None:
        self._redis.close()
        self._client = None

    def records(self, kind: RecordKind) -> Iterator[tuple[str, dict[str, str]]]:
        """Id and fields of every record that exists throughout the walk; one made or removed meanwhile may be missed."""
        prefix = self._keys.record(kind, "")
        with redis_errors():
            for key in self._redis.scan_iter(match=f"{prefix}*", count=_SCAN_COUNT):
                name = cast("bytes", key).decode()
                fields = record_fields(cast("dict[bytes, bytes]", self._redis.hgetall(name)))
                if fields is not None:
                    yield name.removeprefix(prefix), fields

    def children(self, kind: RecordKind, parent: str) -> Iterator[tuple[str, dict[str, str]]]:
        """Id and fields of every record of the kind that has this parent, the oldest first."""
        with redis_errors():
            members = cast("list[bytes]", self._redis.zrange(self._keys.child_list(kind, parent), 0, -1))
            for member in members:
                fields = self.record(kind, member.decode())
                if fields is not None:
                    yield member.decode(), fields

    def record(self, kind: RecordKind, record_id: str) -> dict[str, str] | None:
        """All fields of a record, or None."""
        with redis_errors():
            return record_fields(cast("dict[bytes, bytes]", self._redis.hgetall(self._keys.record(kind, record_id))))

    def change(self, kind: RecordKind, record_id: str, fields: Mapping[str, str]) -> bool:
        """Set fields of a record unless it is gone; True when they were set."""
        script = self._redis.register_script(lua.load("put_record").text)
        flat = [part for item in fields.items() for part in item]
        with redis_errors():
            return bool(script(keys=[self._keys.log], args=[self._keys.prefix, kind.value, record_id, 1, *flat]))

    def count_up(self, kind: RecordKind, record_id: str, field: str) -> int:
        """The record's counter after it was counted up by one; 0 when there is no record. A retry may skip a number."""
        script = self._redis.register_script(lua.load("count_up").text)
        with redis_errors():
            return int(script(keys=[self._keys.log], args=[self._keys.prefix, kind.value, record_id, field]))

    def remove(self, kind: RecordKind, record_id: str, *, created_ms: str = "") -> bool:
        """Delete a record, if created_ms is given only the one made then; True when this call removed it.

        A model's record stays while the model takes jobs or has open ones.
        """
        script = self._redis.register_script(lua.load("remove_record").text)
        with redis_errors():
            return bool(script(keys=[self._keys.log], args=[self._keys.prefix, kind.value, record_id, created_ms]))

    @property
    def _redis(self) -> redis.Redis:
        assert self._client is not None, "the census is not open"
        return self._client
