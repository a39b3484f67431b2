"""Records that a scan of the checkpoints makes."""

from types import SimpleNamespace

from gradstream.engine.checkpoint.manifest import FileEntry, Manifest
from gradstream.shared.ids import LOCAL_TENANT, FutureId
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import LoraSpec
from gradstream.worker.rescan import rescan

MANIFEST = Manifest(
    version=1,
    kind="weights",
    source="tinker://named/weights/first",
    model="named",
    job=FutureId("named:4"),
    tenant=LOCAL_TENANT,
    base_model="tiny",
    lora=LoraSpec(rank=8, seed=5),
    scale=4.0,
    step=3,
    has_optimizer=True,
    created_ms=1_000,
    files={"a": FileEntry(size_bytes=7, sha256="00")},
)


class Intake:
    """Keeps the records that are made."""

    def __init__(self) -> None:
        self.records: dict[tuple[RecordKind, str], dict[str, str]] = {}

    async def record(self, kind: RecordKind, record_id: str) -> dict[str, str] | None:
        return self.records.get((kind, record_id))

    async def add_record(self, kind: RecordKind, record_id: str, fields: dict[str, str]) -> bool:
        return self.records.setdefault((kind, record_id), fields) is fields

    put_record = add_record


async def test_a_scanned_model_has_run_nothing_and_says_where_its_record_is_from() -> None:
    intake = Intake()
    parts = SimpleNamespace(intake=intake, storage=SimpleNamespace(checkpoints=lambda: [MANIFEST]), now_ms=5)
    assert await rescan(parts) == 1  # type: ignore[arg-type]
    record = intake.records[RecordKind.MODEL, "named"]
    assert (record["state"], record["applied"], record["scanned"]) == ("unloaded", "-1", "1")
    assert await rescan(parts) == 0  # type: ignore[arg-type]
