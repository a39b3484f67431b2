"""Which batches run again, and what is said of those that differ."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from gradstream.shared.codec import decode_payload, encode
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, SessionId, future_id
from gradstream.shared.joblog.port import BatchId, Ended
from gradstream.shared.wire import (
    Batch,
    CreateModel,
    CreateModelDone,
    Failed,
    Job,
    OptimStepDone,
    Outcome,
    Payload,
    Plan,
)
from gradstream.worker.recovery.attempts import MAX_DEATHS, Attempts
from gradstream.worker.recovery.compare import exact
from gradstream.worker.recovery.replay import PastBatch, replay

FAILED = Failed(code="non_finite", category="user", message="nan")


def past(number: int, *outcomes: Outcome, kind: str = "optim_step", payload: Payload | None = None) -> PastBatch:
    owner = ModelId("s:train:0")
    jobs = [
        Job(
            future_id=future_id(owner, 10 * number + at),
            owner=owner,
            seq=10 * number + at,
            op=kind,
            tenant=LOCAL_TENANT,
            payload=b"" if payload is None else encode(payload),
        )
        for at in range(len(outcomes))
    ]
    plan = Plan(kind=kind, future_ids=[job.future_id for job in jobs], row_budget_tokens=7, isolate_jobs=True)
    ended = [Ended.of(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]
    return PastBatch(batch=BatchId(3, number), plan=plan, ended=ended, sources={})


class Again:
    """Gives every job the same outcome, and keeps the batches."""

    def __init__(self, outcome: Outcome) -> None:
        self.batches: list[Batch] = []
        self._outcome = outcome

    def __call__(self, batch: Batch) -> Mapping[FutureId, Outcome]:
        self.batches.append(batch)
        return {job.future_id: self._outcome for job in batch.jobs}


DONE = OptimStepDone(metrics={"step": 1.0})


def test_batches_run_again_in_order_with_their_own_plans_and_the_others_are_left_out() -> None:
    batches = [past(1, DONE), past(2, DONE, kind="sample"), past(3, FAILED), past(4, DONE, DONE)]
    run = Again(DONE)
    assert replay(batches, run, compare=exact, epoch=9) == []
    assert [batch.plan for batch in run.batches] == [batches[0].plan, batches[3].plan]
    assert {batch.epoch for batch in run.batches} == {9}


def test_a_job_that_failed_beside_others_runs_with_them_and_must_fail_again() -> None:
    (divergence,) = replay([past(1, DONE, FAILED)], Again(DONE), compare=exact, epoch=1)
    assert divergence.job.seq == 11
    assert divergence.message == "in batch 3-1, optim_step seq 11: it was done and had failed (nan)"


def test_a_refused_batch_does_not_run_and_all_its_jobs_diverged() -> None:
    run = Again(DONE)
    found = replay([past(1, DONE, DONE), past(2, DONE)], run, compare=exact, epoch=1, refuse=lambda _: "no")
    assert [divergence.what for divergence in found] == ["no"] * 3
    assert run.batches == []


def test_a_creation_runs_again_without_its_file_and_without_those_that_failed() -> None:
    model = ModelId("s:train:0")
    payload = CreateModel(session_id=SessionId("s"), base_model="b", user_metadata={"a": "b"}, save_as="000000")
    full_disk = Failed(code="storage_limit", category="user", message="no room")
    batch = past(
        1,
        CreateModelDone(model_id=model, path="tinker://m/weights/000000"),
        full_disk,
        kind="create_model",
        payload=payload,
    )
    run = Again(CreateModelDone(model_id=model))
    assert replay([batch], run, compare=exact, epoch=1) == []
    (given,) = run.batches
    (job,) = given.jobs
    assert decode_payload(job.payload) == msgspec.structs.replace(payload, save_as=None)
    assert given.plan.future_ids == [job.future_id] == [batch.ended[0].job.future_id]
    other = Again(CreateModelDone(model_id=ModelId("another")))
    assert len(replay([batch], other, compare=exact, epoch=1)) == 1


def test_a_job_that_found_no_room_is_left_out_for_there_may_be_room_now() -> None:
    batch = past(1, DONE, Failed(code="out_of_memory", category="server", message="no room"))
    run = Again(DONE)
    assert replay([batch], run, compare=exact, epoch=1) == []
    assert (
        [job.future_id for job in run.batches[0].jobs]
        == run.batches[0].plan.future_ids
        == [batch.ended[0].job.future_id]
    )


def test_a_batch_that_ends_every_gang_is_refused_from_then_on_and_others_are_counted_on_their_own(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log" / "replaying.json"
    for _ in range(MAX_DEATHS):
        assert Attempts(path).begin(BatchId(1, 5)) is None
    assert Attempts(path).begin(BatchId(1, 6)) is None
    for _ in range(MAX_DEATHS):
        assert Attempts(path).begin(BatchId(1, 5)) is None
    last = Attempts(path)
    assert f"died {MAX_DEATHS} times" in (last.begin(BatchId(1, 5)) or "")
    assert last.begin(BatchId(1, 6)) is None
    last.end()
    assert Attempts(path).begin(BatchId(1, 5)) is not None
    assert Attempts(path).begin(BatchId(1, 6)) is None
