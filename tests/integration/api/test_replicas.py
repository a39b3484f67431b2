"""Two API processes on one queue: whatever one of them did, the other knows."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.support.api_process import ANY_PORT, DEADLINE_S, api_process, handover
from tests.support.cards import UNIFORM_CARD
from tests.support.echo_worker import EchoWorker, echo_worker
from tests.support.polling import wait_until
from tests.support.rig import Rig


@dataclass(frozen=True, slots=True)
class Pair:
    """A client of each of two replicas, and the first one's process."""

    first: Rig
    second: Rig
    worker: EchoWorker
    first_process: "subprocess.Popen[bytes]"

    def trained(self, model: str) -> list[int]:
        """The seqs of a model in the order in which they ran."""
        return [seq for owner, seq, _ in self.worker.seen if owner == model]


@pytest.fixture
def pair(tmp_path: Path, redis_url: str, engine_name: str) -> Iterator[Pair]:
    """Two API processes from one settings file, on ports of their own."""
    path = handover(tmp_path, redis_url=redis_url, engine=engine_name)
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(echo_worker(redis_url, engine=engine_name, card=UNIFORM_CARD))
        replicas = [stack.enter_context(api_process(path, *ANY_PORT)) for _ in range(2)]
        rigs = []
        for replica in replicas:
            base_url = replica.base_url()
            http = stack.enter_context(httpx.Client(base_url=base_url, timeout=DEADLINE_S))
            rigs.append(Rig(base_url, http, worker))
        yield Pair(*rigs, worker, replicas[0].process)


def poll(threads: ThreadPoolExecutor, rig: Rig, future: str) -> "Future[httpx.Response]":
    """A long poll on a connection of its own, once it is parked."""
    waiting = threads.submit(
        httpx.post, f"{rig.base_url}/api/v1/retrieve_future", json={"request_id": future}, timeout=DEADLINE_S
    )
    wait_until(lambda: "gradstream_api_polls_parked 1.0" in rig.http.get("/metrics").text)
    return waiting


def test_polls_of_a_job_wake_at_both_replicas_with_the_same_bytes(pair: Pair) -> None:
    model = pair.first.model()
    pair.worker.pause()
    future = pair.first.ok(pair.first.train(model, 1))["request_id"]
    with ThreadPoolExecutor() as threads:
        polls = [poll(threads, rig, future) for rig in (pair.first, pair.second)]
        pair.worker.resume()
        answers = [waiting.result(timeout=DEADLINE_S) for waiting in polls]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content == pair.second.poll(future).content


def test_a_models_order_and_its_retries_hold_across_replicas(pair: Pair) -> None:
    model = pair.second.model(pair.first.session())
    rigs = (pair.first, pair.second)
    with ThreadPoolExecutor() as threads:
        # All at once, each through one of the two, whichever comes first.
        sent = [threads.submit(rigs[seq % 2].step, model, seq, learning_rate=seq / 100) for seq in (6, 3, 5, 1, 4, 2)]
        futures = [rigs[0].ok(answer.result(timeout=DEADLINE_S))["request_id"] for answer in sent]
    for future in futures:
        pair.second.result(future)
    assert pair.trained(model) == [0, 1, 2, 3, 4, 5, 6]

    again = pair.second.step(model, 5, learning_rate=0.05)
    assert pair.second.ok(again)["request_id"] == f"{model}:5"
    for rig in rigs:
        other = rig.step(model, 5, learning_rate=0.5)
        assert other.status_code == 400
        assert "was used with another payload" in other.text
    # A seq that one refused is used up at the other.
    assert pair.first.train(model, 7, []).status_code == 400
    assert pair.second.ok(pair.second.step(model, 8))["request_id"] == f"{model}:8"
    pair.first.result(f"{model}:8")
    assert pair.trained(model) == [0, 1, 2, 3, 4, 5, 6, 8]


def test_a_session_is_kept_alive_and_finished_at_either_replica(pair: Pair) -> None:
    session = pair.first.session()
    for rig in (pair.second, pair.first):
        assert rig.post("session_heartbeat", {"session_id": session}).status_code == 200
    finish = {"reason": {"type": "success"}, "detail": None}
    assert pair.second.post(f"sessions/{session}/finish", finish).status_code == 204
    assert pair.first.post("session_heartbeat", {"session_id": session}).status_code == 410


def test_clients_of_a_replica_that_is_killed_go_on_at_the_other(pair: Pair) -> None:
    model = pair.first.model()
    pair.worker.pause()
    futures = [pair.first.ok(pair.first.step(model, seq))["request_id"] for seq in (1, 2)]
    held = pair.first.ok(pair.first.step(model, 4))["request_id"]
    with ThreadPoolExecutor() as threads:
        cut_off = poll(threads, pair.first, futures[0])
        parked = poll(threads, pair.second, futures[1])
        pair.first_process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            cut_off.result(timeout=DEADLINE_S)
        # The client does not know whether its last request was taken, and sends it again.
        assert pair.second.ok(pair.second.step(model, 2))["request_id"] == futures[1]
        pair.second.ok(pair.second.step(model, 3))
        pair.worker.resume()
        assert parked.result(timeout=DEADLINE_S).status_code == 200
    for future in (*futures, held):
        pair.second.result(future)
    assert pair.trained(model) == [0, 1, 2, 3, 4]
