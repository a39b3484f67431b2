"""Budgets and caches of the API: bytes in flight, the hold at a full queue, the card's age."""

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
from starlette.types import Receive, Scope, Send
from tests.support.cards import UNIFORM_CARD

from gradstream.api.admission import Admission
from gradstream.api.arrival import arrived_s, note_arrival
from gradstream.api.catalog import Catalog, base_model_name
from gradstream.api.errors import STATUS_OF_CODE
from gradstream.api.gate import Gate
from gradstream.api.limits import ByteBudget, Lease
from gradstream.api.metrics import Metrics
from gradstream.shared import errors
from gradstream.shared.catalog import EngineCard
from gradstream.shared.clock import ManualClock
from gradstream.shared.errors import GradstreamError, InvalidRequest, QueueFull, Unavailable
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, TenantId
from gradstream.shared.joblog.port import FutureStatus, Receipt, Submission

JOB = Submission(owner=ModelId("m"), seq=1, op="optim_step", tenant=LOCAL_TENANT, payload=b"x")


class FullQueue:
    """A queue that is full for the first num_full submissions, and knows its card."""

    def __init__(self, num_full: int, card: EngineCard | None = None) -> None:
        self.num_full = num_full
        self.num_asked = 0
        self.ages_ms: list[int] = []
        self.known_card = card

    async def submit(self, submission: Submission) -> Receipt:
        self.num_asked += 1
        self.ages_ms.append(submission.age_ms)
        if self.num_asked <= self.num_full:
            raise QueueFull("full", retry_after_s=2.0)
        return Receipt(future_id=FutureId("m:1"), status=FutureStatus.QUEUED, is_duplicate=False)

    async def card(self) -> EngineCard | None:
        self.num_asked += 1
        return self.known_card


def admission(queue: FullQueue, *, hold_s: float, clock: ManualClock | None = None) -> Admission:
    """On a clock that a wait turns by as much as it would take."""
    turned = clock or ManualClock()

    async def sleep(seconds: float) -> None:
        turned.advance(seconds)

    return Admission(queue, clock=turned, hold_s=hold_s, metrics=Metrics(), sleep=sleep)  # type: ignore[arg-type]


async def test_a_submission_is_held_until_there_is_room() -> None:
    queue = FullQueue(num_full=2)
    assert (await admission(queue, hold_s=30.0).submit(JOB)).future_id == "m:1"
    assert queue.num_asked == 3


async def test_a_queue_that_stays_full_refuses_after_the_hold() -> None:
    queue = FullQueue(num_full=10**6)
    clock = ManualClock()
    with pytest.raises(QueueFull):
        await admission(queue, hold_s=0.6, clock=clock).submit(JOB)
    assert clock.monotonic_s() == pytest.approx(0.6)
    assert queue.num_asked == 4


async def test_the_hold_counts_from_the_arrival_of_the_request() -> None:
    queue, clock = FullQueue(num_full=10**6), ManualClock()
    note_arrival(clock)
    clock.advance(0.5)
    with pytest.raises(QueueFull):
        await admission(queue, hold_s=0.6, clock=clock).submit(JOB)
    assert clock.monotonic_s() - arrived_s(clock) == pytest.approx(0.6)


async def test_a_submission_that_may_not_be_held_is_refused_at_once() -> None:
    queue = FullQueue(num_full=1)
    with pytest.raises(QueueFull):
        await admission(queue, hold_s=30.0).submit(JOB, hold=False)
    assert queue.num_asked == 1


async def test_each_submission_that_may_be_a_repetition_says_how_long_ago_its_request_arrived() -> None:
    clock, queue = ManualClock(), FullQueue(num_full=2)
    note_arrival(clock)
    clock.advance(10.0)
    await admission(queue, hold_s=30.0, clock=clock).submit(replace(JOB, retry_key="1"))
    assert queue.ages_ms == [10_000, 10_250, 10_500]


async def test_the_gate_notes_when_a_request_arrives() -> None:
    clock = ManualClock()
    seen: list[float] = []

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        clock.advance(5.0)
        seen.append(clock.monotonic_s() - arrived_s(clock))

    parts = SimpleNamespace(clock=clock, keys=None, config=SimpleNamespace(is_open=True))
    scope: Scope = {"type": "http", "path": "/api/v1/optim_step", "headers": []}
    for _ in range(2):
        await Gate(app, parts=parts)(scope, None, None)  # type: ignore[arg-type]
    assert seen == [5.0, 5.0]


def test_a_lease_gives_its_bytes_back_also_after_an_error() -> None:
    budget = ByteBudget(100)

    def overdraw() -> None:
        with budget.lease(LOCAL_TENANT) as lease:
            lease.take(30)
            with budget.lease(LOCAL_TENANT) as other:
                other.take(20)
            assert budget.held_bytes == 30
            lease.take(21)

    with pytest.raises(
        QueueFull, match="leave no room for 21 bytes more of this tenant, which has 30 of the server's 100"
    ):
        overdraw()
    assert budget.held_bytes == 0
    with budget.lease(LOCAL_TENANT) as lease:
        lease.take(50)


def fill(lease: Lease) -> None:
    while True:
        lease.take(1)


def test_tenants_that_hold_all_they_can_leave_room_for_the_next_one() -> None:
    budget = ByteBudget(1000)
    with ExitStack() as stack:
        held = []
        for number in range(5):
            lease = stack.enter_context(budget.lease(TenantId(f"t{number}")))
            with pytest.raises(QueueFull):
                fill(lease)
            held.append(lease.held_bytes)
        assert held == [500, 250, 125, 62, 31]
    assert budget.held_bytes == 0


async def test_the_card_is_read_again_when_it_is_old() -> None:
    clock, queue = ManualClock(), FullQueue(0, UNIFORM_CARD)
    catalog = Catalog(queue, clock=clock, ttl_s=1.0)  # type: ignore[arg-type]
    assert await catalog.card() is await catalog.card() is UNIFORM_CARD
    assert queue.num_asked == 1
    clock.advance(1.0)
    await catalog.card()
    assert queue.num_asked == 2


async def test_a_card_that_is_not_there_is_asked_for_each_time() -> None:
    queue = FullQueue(0)
    catalog = Catalog(queue, clock=ManualClock(), ttl_s=1.0)  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match="no worker has been ready yet"):
        await catalog.card()
    queue.known_card = UNIFORM_CARD
    assert await catalog.card() is UNIFORM_CARD


def test_a_checkpoint_of_a_name_no_longer_served_takes_the_main_name() -> None:
    assert base_model_name(UNIFORM_CARD, None, saved="gone") == UNIFORM_CARD.model_name
    assert base_model_name(UNIFORM_CARD, None, saved="uniform-alias") == "uniform-alias"
    with pytest.raises(InvalidRequest, match="does not serve 'gone'"):
        base_model_name(UNIFORM_CARD, "gone", saved=None)


def family(error: type[GradstreamError]) -> list[type[GradstreamError]]:
    return [error, *(member for child in error.__subclasses__() for member in family(child))]


def test_every_error_has_a_status_and_none_that_the_client_caused_is_repeated_silently() -> None:
    members = [member for member in family(GradstreamError) if member.__module__ == errors.__name__]
    assert {member.code for member in members} == set(STATUS_OF_CODE)
    for member in members:
        status = STATUS_OF_CODE[member.code]
        if member.category == "user":
            assert 400 <= status < 500
            assert status not in {408, 409, 429}
        if member.retryable:
            assert status in {429, 503}
