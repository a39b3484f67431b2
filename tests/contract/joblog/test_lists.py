"""Records are listed by tenant and by parent, newest first, for exactly as long as they exist."""

from tests.support.joblog_bench import MODEL, Bench

from gradstream.shared.ids import LOCAL_TENANT as TENANT
from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.port import RecordKind, RecordWrite
from gradstream.shared.wire import OptimStepDone

OTHER = TenantId("other")


def checkpoint(name: str, *, created_ms: int, model: str = MODEL) -> RecordWrite:
    fields = {"tenant": TENANT, "model": model, "created_ms": str(created_ms)}
    return RecordWrite(kind=RecordKind.CHECKPOINT, record_id=name, fields=fields)


async def put_session(bench: Bench, name: str, *, created_ms: int, tenant: TenantId = TENANT) -> None:
    await bench.intake.put_record(RecordKind.SESSION, name, {"tenant": tenant, "created_ms": str(created_ms)})


async def make_model(bench: Bench) -> None:
    record = {"base_model": "tiny", "session": "s1", "created_ms": "7"}
    await bench.submit(0, b"create", record=record)


async def test_a_tenants_records_come_newest_first_in_pages_with_the_total(bench: Bench) -> None:
    for number in range(5):
        await put_session(bench, f"s{number}", created_ms=1000 + number)
    page = await bench.intake.list_tenant(RecordKind.SESSION, TENANT, offset=1, limit=2)
    assert list(page.records) == ["s3", "s2"]
    assert page.records["s3"]["created_ms"] == "1003"
    assert page.total == 5


async def test_a_page_past_the_end_is_empty_and_knows_the_total(bench: Bench) -> None:
    await put_session(bench, "s", created_ms=1)
    page = await bench.intake.list_tenant(RecordKind.SESSION, TENANT, offset=7, limit=2)
    assert (dict(page.records), page.total) == ({}, 1)


async def test_a_list_holds_one_tenants_records_only(bench: Bench) -> None:
    await put_session(bench, "mine", created_ms=1)
    await put_session(bench, "theirs", created_ms=2, tenant=OTHER)
    page = await bench.intake.list_tenant(RecordKind.SESSION, TENANT, offset=0, limit=9)
    assert list(page.records) == ["mine"]


async def test_a_model_is_listed_from_its_creation_on(bench: Bench) -> None:
    await make_model(bench)
    page = await bench.intake.list_tenant(RecordKind.MODEL, TENANT, offset=0, limit=9)
    assert list(page.records) == [MODEL]
    assert await bench.intake.num_children(RecordKind.MODEL, ["s1"]) == [1]


async def test_a_checkpoint_of_a_commit_is_listed_under_its_tenant_and_its_model(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    records = [checkpoint("a", created_ms=1), checkpoint("b", created_ms=2, model="else:train:0")]
    bench.commit(bench.log()[1:], OptimStepDone(metrics={}), records=records)
    every = await bench.intake.list_tenant(RecordKind.CHECKPOINT, TENANT, offset=0, limit=9)
    own = await bench.intake.list_children(RecordKind.CHECKPOINT, MODEL, offset=0, limit=9)
    assert (list(every.records), list(own.records)) == (["b", "a"], ["a"])
    assert await bench.intake.num_children(RecordKind.CHECKPOINT, [MODEL, "none"]) == [1, 0]


async def test_a_checkpoint_that_is_saved_again_moves_to_the_front(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    first = [checkpoint("a", created_ms=1), checkpoint("b", created_ms=2), checkpoint("a", created_ms=3)]
    bench.commit(bench.log()[1:], OptimStepDone(metrics={}), records=first)
    page = await bench.intake.list_tenant(RecordKind.CHECKPOINT, TENANT, offset=0, limit=9)
    assert list(page.records) == ["a", "b"]


async def test_a_record_that_a_commit_removes_leaves_its_lists(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    await bench.submit(2)
    entries = bench.log()[1:]
    bench.commit(entries[:1], OptimStepDone(metrics={}), records=[checkpoint("a", created_ms=1)])
    gone = RecordWrite(kind=RecordKind.CHECKPOINT, record_id="a", fields=None)
    bench.commit(entries[1:], OptimStepDone(metrics={}), records=[gone])
    page = await bench.intake.list_tenant(RecordKind.CHECKPOINT, TENANT, offset=0, limit=9)
    assert (dict(page.records), page.total) == ({}, 0)
    assert await bench.intake.num_children(RecordKind.CHECKPOINT, [MODEL]) == [0]


async def test_a_record_is_removed_only_while_it_is_the_one_that_was_meant(bench: Bench) -> None:
    await put_session(bench, "s", created_ms=5)
    assert not await bench.intake.remove_record(RecordKind.SESSION, "s", created_ms="4")
    assert await bench.intake.remove_record(RecordKind.SESSION, "s", created_ms="5")
    assert not await bench.intake.remove_record(RecordKind.SESSION, "s", created_ms="5")
    assert (await bench.intake.list_tenant(RecordKind.SESSION, TENANT, offset=0, limit=9)).total == 0


async def test_a_model_that_takes_jobs_cannot_be_removed(bench: Bench) -> None:
    await make_model(bench)
    assert not await bench.intake.remove_record(RecordKind.MODEL, MODEL)
    unloaded = RecordWrite(kind=RecordKind.MODEL, record_id=MODEL, fields={"state": "unloaded"})
    bench.commit(bench.log(), OptimStepDone(metrics={}), records=[unloaded])
    assert (await bench.intake.list_tenant(RecordKind.MODEL, TENANT, offset=0, limit=9)).total == 1
    assert await bench.intake.remove_record(RecordKind.MODEL, MODEL)
    assert (await bench.intake.list_tenant(RecordKind.MODEL, TENANT, offset=0, limit=9)).total == 0


async def test_a_field_is_swapped_only_while_it_is_as_it_was_read(bench: Bench) -> None:
    async def swapped(old: str, new: str) -> bool:
        return await bench.intake.swap_field(RecordKind.SESSION, "s", "note", old=old, new=new)

    assert not await swapped("", "first")
    assert await bench.intake.record(RecordKind.SESSION, "s") is None
    await put_session(bench, "s", created_ms=5)
    assert await swapped("", "first")
    assert not await swapped("", "late")
    assert await swapped("first", "second")
    assert await swapped("first", "second")
    assert not await swapped("first", "third")
    record = await bench.intake.record(RecordKind.SESSION, "s")
    assert record is not None
    assert record["note"] == "second"


async def test_a_change_does_not_bring_a_removed_record_back(bench: Bench) -> None:
    assert not await bench.intake.change_record(RecordKind.CHECKPOINT, "a", {"expires_ms": "1"})
    assert await bench.intake.record(RecordKind.CHECKPOINT, "a") is None
    await put_session(bench, "s", created_ms=5)
    assert await bench.intake.change_record(RecordKind.SESSION, "s", {"project_id": "p"})
