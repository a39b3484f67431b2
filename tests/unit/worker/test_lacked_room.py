"""Which batches are run once more, job by job."""

import pytest
from tests.support.worker_jobs import job

from gradstream.shared.wire import Batch, Failed, ForwardBackwardDone, Outcome, Plan
from gradstream.worker.execute import lacked_room_together

NO_ROOM = Failed(code="out_of_memory", category="server", message="no room")
REFUSED = Failed(code="invalid_request", category="user", message="no")
DONE = ForwardBackwardDone(outputs={}, metrics={}, backward=True)


@pytest.mark.parametrize(
    ("outcomes", "is_split"),
    [
        ([NO_ROOM, NO_ROOM], True),
        ([NO_ROOM, NO_ROOM, REFUSED], True),
        ([NO_ROOM], False),
        ([NO_ROOM, REFUSED], False),
        ([NO_ROOM, NO_ROOM, DONE], False),
        ([DONE, DONE], False),
        ([], False),
    ],
)
def test_only_jobs_that_together_had_no_room_are_tried_one_by_one(outcomes: list[Outcome], is_split: bool) -> None:
    jobs = [job(f"m{number}", 1, "forward_backward", num_tokens=1) for number in range(len(outcomes))]
    plan = Plan(kind="forward_backward", future_ids=[one.future_id for one in jobs], row_budget_tokens=8)
    batch = Batch(number=1, epoch=1, plan=plan, jobs=jobs)
    found = {one.future_id: outcome for one, outcome in zip(jobs, outcomes, strict=True)}
    assert lacked_room_together(batch, found) is is_split


def test_samples_without_room_are_not_tried_again_by_the_leader() -> None:
    jobs = [job(f"s{number}", 1, "sample", num_tokens=1) for number in range(2)]
    plan = Plan(kind="sample", future_ids=[one.future_id for one in jobs], row_budget_tokens=8)
    batch = Batch(number=1, epoch=1, plan=plan, jobs=jobs)
    assert not lacked_room_together(batch, {one.future_id: NO_ROOM for one in jobs})
