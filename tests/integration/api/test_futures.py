"""What a poll hears: results, failures, waits with their reason, and futures that are not there."""

import time

import httpx
import pytest
from tests.support.api_server import api_server
from tests.support.bodies import good_datum
from tests.support.polling import wait_until
from tests.support.rig import FAST, LIMITS, PROTOBUF, Rig, running_rig

from gradstream.api.tinker.proto import wire_pb2
from gradstream.shared.joblog.limits import Limits


def test_a_finished_future_is_protobuf_or_json_as_the_client_accepts_and_can_be_read_again(rig: Rig) -> None:
    promise = rig.ok(rig.train(rig.model(), 1))["request_id"]
    as_json = rig.result(promise)
    response = rig.poll(promise, accept=PROTOBUF)
    assert response.headers["content-type"] == PROTOBUF
    message = wire_pb2.ForwardBackwardOutput.FromString(response.content)
    assert dict(message.metrics) == as_json["metrics"]
    assert rig.poll(promise, accept=PROTOBUF).content == response.content


def test_a_pending_future_is_408_try_again_only_after_the_hold(rig: Rig) -> None:
    model = rig.model()
    rig.worker.pause()
    promise = rig.ok(rig.train(model, 1))["request_id"]
    start_s = time.monotonic()
    response = rig.poll(promise)
    assert time.monotonic() - start_s >= FAST.poll_hold_s
    assert response.status_code == 408
    assert response.json() == {
        "type": "try_again",
        "request_id": promise,
        "queue_state": "active",
        "queue_state_reason": None,
    }


def test_a_poll_of_a_held_job_says_which_seq_id_it_waits_for(rig: Rig) -> None:
    promise = rig.ok(rig.train(rig.model(), 3))["request_id"]
    body = rig.poll(promise).json()
    assert body["queue_state"] == "paused_capacity"
    assert "seq_id 1" in body["queue_state_reason"]


def test_a_poll_says_that_no_worker_is_running(redis_url: str, engine_name: str) -> None:
    with running_rig(redis_url, engine=engine_name) as rig:
        model = rig.model()
    with (
        api_server(redis_url, engine=engine_name, config=FAST, limits=LIMITS) as base_url,
        httpx.Client(base_url=base_url, timeout=60) as http,
    ):
        alone = Rig(base_url, http, rig.worker)
        body = alone.poll(alone.ok(alone.train(model, 1))["request_id"]).json()
        assert body["queue_state"] == "paused_capacity"
        assert "no worker is running" in body["queue_state_reason"]
        health = http.get("/api/v1/healthz")
        assert (health.status_code, health.json()) == (503, {"status": "starting"})


def test_a_poll_wakes_as_soon_as_the_job_is_done(redis_url: str, engine_name: str) -> None:
    patient = type(FAST)(poll_hold_s=25.0, gap_check_s=60.0)
    with running_rig(redis_url, engine=engine_name, config=patient) as rig:
        model = rig.model()
        for seq in range(1, 6):
            assert rig.poll(rig.ok(rig.train(model, seq))["request_id"]).status_code == 200


def test_a_failed_job_is_200_with_error_and_category(rig: Rig) -> None:
    promise = rig.ok(rig.step(rig.model(), 1, learning_rate=666.0))["request_id"]
    assert rig.result(promise) == {"error": "the gradient is not finite", "category": "user", "code": "non_finite"}


@pytest.mark.parametrize("request_id", ["nobody:train:0:1", "x", "../etc", ""])
def test_a_future_that_never_was_is_404(rig: Rig, request_id: str) -> None:
    response = rig.poll(request_id)
    assert response.status_code == 404
    assert "request_id: there is no future" in response.json()["detail"]


def test_a_future_not_yet_used_is_404_and_an_expired_one_is_410(redis_url: str, engine_name: str) -> None:
    # Only once it was read: what nobody read yet must wait for a client that is slow.
    brief = Limits(delivered_ttl_s=1)
    with running_rig(redis_url, engine=engine_name, limits=brief) as rig:
        model = rig.model()
        promise = rig.ok(rig.train(model, 1))["request_id"]
        rig.result(promise)
        assert rig.poll(f"{model}:2").status_code == 404
        deadline = time.monotonic() + 60
        while (response := rig.poll(promise)).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert response.status_code == 410
        assert response.json()["error"] == "expired"


def test_a_large_result_is_announced_once_and_then_sent(rig: Rig) -> None:
    data = [good_datum([1] * 100) for _ in range(100)]
    promise = rig.ok(rig.train(rig.model(), 1, data))["request_id"]
    rig.result(promise)
    announced = rig.ok(rig.poll(promise, accept=PROTOBUF, metadata=True))
    content = rig.poll(promise, accept=PROTOBUF, metadata=False).content
    assert announced == {"status": "complete_metadata", "request_id": promise, "response_payload_size": len(content)}


def test_a_gap_that_never_closes_fails_the_held_job_and_the_model_goes_on(redis_url: str, engine_name: str) -> None:
    impatient = Limits(hold_timeout_s=0.3)
    with running_rig(redis_url, engine=engine_name, limits=impatient) as rig:
        model = rig.model()
        other = rig.model()
        held = rig.ok(rig.train(model, 3))["request_id"]
        failed = rig.result(held)
        assert (failed["code"], failed["category"]) == ("sequence_gap", "server")
        assert "metrics" in rig.result(rig.ok(rig.train(model, 4))["request_id"])
        assert "metrics" in rig.result(rig.ok(rig.train(other, 1))["request_id"])


def test_a_full_queue_holds_a_request_until_there_is_room(rig: Rig) -> None:
    model = rig.model()
    rig.worker.pause()
    for seq in range(1, LIMITS.max_queued_jobs_per_model + 1):
        rig.ok(rig.step(model, seq))
    last = LIMITS.max_queued_jobs_per_model + 1
    start_s = time.monotonic()
    full = rig.step(model, last)
    assert time.monotonic() - start_s >= FAST.admit_hold_s
    assert full.status_code == 429
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"] == "queue_full"
    rig.worker.resume()
    # Again and again, as clients do it: the worker may take its time.
    wait_until(lambda: rig.step(model, last).status_code != 429)
    assert "metrics" in rig.result(rig.ok(rig.step(model, last))["request_id"])


def test_a_sampler_that_is_full_answers_429_at_once_to_a_client_that_backs_off(
    redis_url: str, engine_name: str
) -> None:
    small = Limits(max_queued_jobs_per_sampler=1)
    # Held for longer than a client here waits for an answer.
    patient = type(FAST)(admit_hold_s=1000.0, poll_hold_s=0.4)
    with running_rig(redis_url, engine=engine_name, limits=small, config=patient) as rig:
        made = {"session_id": rig.session(), "sampling_session_seq_id": 0, "base_model": "tests/uniform"}
        sampler = rig.ok(rig.post("create_sampling_session", made))["sampling_session_id"]
        rig.worker.pause()
        body = {
            "sampling_session_id": sampler,
            "prompt": {"chunks": [{"tokens": [1], "type": "encoded_text"}]},
            "sampling_params": {"max_tokens": 2},
        }
        rig.ok(rig.post("asample", {**body, "seq_id": 0}))
        full = rig.post("asample", {**body, "seq_id": 1}, headers={"X-Tinker-Sampling-Backpressure": "1"})
        assert full.status_code == 429
        rig.worker.resume()
