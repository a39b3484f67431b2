"""Any sequence of submissions, refusals, gaps, commits and takeovers leaves the log as a small Python model says."""

import asyncio
import uuid
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.support.joblog_bench import Bench, ready

from gradstream.shared.errors import QueueFull, SequenceConflict
from gradstream.shared.ids import ModelId, TenantId, lane_of, seq_in_lane
from gradstream.shared.joblog.keys import next_seq_field
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import Fenced, FutureStatus
from gradstream.shared.wire import OptimStepDone

MODELS = (ModelId("s:train:0"), ModelId("s:train:1"))
MAX_JOBS = 6
WINDOW = 8
# Whoever is held at fail_gaps has been held for too long.
LIMITS = Limits(max_queued_jobs_per_model=MAX_JOBS, hold_window=WINDOW, hold_timeout_s=0.0)

LANES = (0, 1)
seqs = st.integers(0, 14) | st.integers(1, 12).map(lambda seq_id: seq_in_lane(1, seq_id))
models = st.sampled_from(MODELS)
payloads = st.sampled_from([b"a", b"b"])


@dataclass
class ModelOf:
    """What should be true of one model."""

    next_seq: dict[int, int] = field(default_factory=lambda: {lane: seq_in_lane(lane, 1) for lane in LANES})
    jobs: dict[int, bytes] = field(default_factory=lambda: {0: b"create"})
    dead: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    order: list[int] = field(default_factory=lambda: [0])
    outcomes: dict[int, float | None] = field(default_factory=dict)

    def drain(self) -> None:
        for lane in LANES:
            while self.next_seq[lane] in self.held | self.dead:
                if self.next_seq[lane] in self.held:
                    self.held.remove(self.next_seq[lane])
                    self.order.append(self.next_seq[lane])
                self.next_seq[lane] += 1

    def ahead(self, seq: int) -> int:
        return seq - self.next_seq[lane_of(seq)]

    @property
    def num_open(self) -> int:
        return sum(1 for seq in self.order if seq not in self.outcomes) + len(self.held)


class JobLogMachine(RuleBasedStateMachine):
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.context = Bench.running(self.url, f"m{uuid.uuid4().hex[:12]}", LIMITS)
        self.bench = self.loop.run_until_complete(self.context.__aenter__())
        self.models = {name: ModelOf() for name in MODELS}
        self.old_epochs: list[int] = []
        self.last = None
        self.value = 0.0

    def teardown(self) -> None:
        self.loop.run_until_complete(self.context.__aexit__(None, None, None))
        self.loop.close()

    @initialize()
    def create(self) -> None:
        for name in MODELS:
            self.loop.run_until_complete(self.bench.create(name))

    @rule(name=models, seq=seqs, payload=payloads)
    def submit(self, name: ModelId, seq: int, payload: bytes) -> None:
        model = self.models[name]
        call = self.bench.submit(seq, payload, model=name)
        ahead = model.ahead(seq)
        room = MAX_JOBS * 3 / 4 if ahead > 0 else MAX_JOBS
        if seq in model.jobs or seq in model.dead:
            if model.jobs.get(seq) != payload:
                with pytest.raises(SequenceConflict):
                    self.loop.run_until_complete(call)
            else:
                assert self.loop.run_until_complete(call).is_duplicate
        elif ahead >= WINDOW or model.num_open + 1 > room:
            with pytest.raises(QueueFull):
                self.loop.run_until_complete(call)
        else:
            receipt = self.loop.run_until_complete(call)
            assert not receipt.is_duplicate
            assert receipt.status is (FutureStatus.HELD if ahead else FutureStatus.QUEUED)
            model.jobs[seq] = payload
            model.held.add(seq)
            model.drain()

    @rule(name=models, seq=seqs)
    def refuse(self, name: ModelId, seq: int) -> None:
        model = self.models[name]
        call = self.bench.intake.refuse(model=name, seq=seq, tenant=TenantId("local"))
        if model.ahead(seq) >= WINDOW:
            with pytest.raises(QueueFull):
                self.loop.run_until_complete(call)
            return
        self.loop.run_until_complete(call)
        if seq not in model.jobs and model.ahead(seq) >= 0:
            model.dead.add(seq)
        model.drain()

    @rule()
    def fail_gaps(self) -> None:
        want = sum(len(model.held) for model in self.models.values())
        assert self.loop.run_until_complete(self.bench.intake.fail_gaps()) == want
        for model in self.models.values():
            for lane in LANES:
                last = max((seq for seq in model.held if lane_of(seq) == lane), default=-1)
                for seq in range(model.next_seq[lane], last + 1):
                    if seq in model.held:
                        model.outcomes[seq] = None
                        model.next_seq[lane] = seq + 1
                    else:
                        model.dead.add(seq)
            model.held.clear()
            model.drain()

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        entries = self.bench.log()
        count = data.draw(st.integers(0, len(entries)))
        self.value += 1
        self.last = self.bench.commit(
            entries[:count],
            OptimStepDone(metrics={"n": self.value}),
            records=[ready(name) for name in MODELS],
            cursor=entries[count - 1].entry_id if count else "0-0",
        )
        for entry in entries[:count]:
            self.models[entry.job.owner].outcomes.setdefault(entry.job.seq, self.value)

    @precondition(lambda self: self.last is not None and self.last.epoch == self.bench.epoch)
    @rule()
    def commit_again(self) -> None:
        self.bench.feed.commit(self.last)

    @rule()
    def take_over(self) -> None:
        self.old_epochs.append(self.bench.epoch)
        self.bench.epoch = self.bench.feed.acquire(owner="test-gang")

    @precondition(lambda self: self.old_epochs)
    @rule()
    def commit_of_a_dead_gang(self) -> None:
        with pytest.raises(Fenced):
            self.bench.commit(self.bench.log(), number=10**6, epoch=self.old_epochs[-1])

    @invariant()
    def the_log_is_as_the_model_says(self) -> None:
        for name, model in self.models.items():
            assert self.bench.seqs(name) == model.order
            entries = {entry.job.seq: entry for entry in self.bench.log() if entry.job.owner == name}
            assert {seq for seq, entry in entries.items() if entry.is_open} == set(model.order) - set(model.outcomes)
            assert all(entries[seq].job.payload == model.jobs[seq] for seq in model.order)

    @invariant()
    def the_counters_are_as_the_model_says(self) -> None:
        num_open = 0
        for name, model in self.models.items():
            record = self.loop.run_until_complete(self.bench.record(name))
            for lane in LANES:
                stored = record.get(next_seq_field(seq_in_lane(lane, 1)), seq_in_lane(lane, 1))
                assert int(stored) == model.next_seq[lane]
            assert int(record["held"]) == len(model.held)
            assert int(record["queued"]) == model.num_open - len(model.held)
            num_open += model.num_open
        stat = self.bench.raw.hgetall(self.bench.keys.stat)
        assert int(stat["queued_jobs"]) == num_open
        held = set(self.bench.raw.zrange(f"{self.bench.keys.prefix}gaps", 0, -1))
        assert held == {name for name, model in self.models.items() if model.held}


def test_the_scripts_agree_with_the_model(joblog_url: str) -> None:
    JobLogMachine.url = joblog_url
    run_state_machine_as_test(
        JobLogMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
