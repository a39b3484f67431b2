"""The lane header: which requests heed it, what it changes, and what a client hears that lacks it."""

import time
from typing import Any

import httpx
import pytest
from tests.support.bodies import good_datum, json_datum, proto_request
from tests.support.rig import Rig, running_rig

from gradstream.api.ordered import LANE_HEADER
from gradstream.shared.ids import LANE_SEQS
from gradstream.shared.joblog.limits import Limits

ADAM = {"adam_params": {"learning_rate": 1e-3}}
CONTENT = {"data": [json_datum()], "loss_fn": "cross_entropy"}
# Every request that has a place in a model's order, as JSON.
ORDERED = {
    "forward_backward": {"forward_backward_input": CONTENT},
    "forward": {"forward_input": CONTENT},
    "optim_step": ADAM,
    "save_weights": {"path": "a"},
    "save_weights_for_sampler": {"path": "a"},
    "save_weights_external": {"path": "a"},
    "load_weights": {"path": "tinker://m:train:0/weights/none", "optimizer": False},
}


def ask(rig: Rig, route: str, model: str, seq_id: int, *, lane: str | int, **fields: Any) -> httpx.Response:
    body = {"model_id": model, "seq_id": seq_id, **ORDERED[route], **fields}
    return rig.post(route, body, headers={LANE_HEADER: str(lane)})


def in_order(rig: Rig, model: str) -> list[tuple[int, int]]:
    """What the worker ran of a model after its creation: lane and seq_id."""
    return [divmod(seq, LANE_SEQS) for owner, seq, _ in rig.worker.seen if owner == model][1:]


@pytest.mark.parametrize("route", ORDERED)
def test_every_ordered_request_counts_in_the_lane_that_its_header_names(rig: Rig, route: str) -> None:
    model = rig.model()
    rig.result(rig.ok(rig.step(model, 1))["request_id"])
    promise = rig.ok(ask(rig, route, model, 1, lane=12))
    assert promise["request_id"] == f"{model}:{12 * LANE_SEQS + 1}"
    rig.result(promise["request_id"])
    assert in_order(rig, model) == [(0, 1), (12, 1)]


def test_a_protobuf_request_counts_in_the_lane_that_its_header_names(rig: Rig) -> None:
    model = rig.model()
    raw = proto_request(model, 1, [good_datum()]).SerializeToString()
    promises = [rig.ok(rig.send(raw, **{LANE_HEADER: lane})) for lane in ("2", "0", "2", "1")]
    assert promises[0] == promises[2]
    for promise in promises:
        rig.result(promise["request_id"])
    assert in_order(rig, model) == [(2, 1), (0, 1), (1, 1)]


def test_no_header_is_lane_zero(rig: Rig) -> None:
    model = rig.model()
    assert rig.ok(rig.step(model, 1, learning_rate=1e-3)) == rig.ok(ask(rig, "optim_step", model, 1, lane=0))


def test_a_gap_in_one_lane_holds_no_other_and_the_poll_names_the_lane(rig: Rig) -> None:
    model = rig.model()
    held = rig.ok(ask(rig, "optim_step", model, 3, lane=4))["request_id"]
    rig.result(rig.ok(rig.step(model, 1))["request_id"])
    reason = rig.poll(held).json()["queue_state_reason"]
    assert reason == "held until the request with seq_id 1 of lane 4 of the same model arrives"


def test_a_refused_request_uses_up_its_seq_id_in_its_lane(rig: Rig) -> None:
    model = rig.model()
    assert ask(rig, "optim_step", model, 1, lane=7, adam_params={"learning_rate": -1.0}).status_code == 400
    rig.result(rig.ok(ask(rig, "optim_step", model, 2, lane=7))["request_id"])
    rig.result(rig.ok(rig.step(model, 1))["request_id"])
    assert in_order(rig, model) == [(7, 2), (0, 1)]


@pytest.mark.parametrize("lane", ["", "-1", "1000", "a", "1.0", "0x1", "1 2", "1,2", "9" * 5000, "\u0661".encode()])
@pytest.mark.parametrize("route", ["forward_backward", "optim_step", "load_weights"])
def test_a_header_that_names_no_lane_is_refused_and_uses_up_nothing(rig: Rig, route: str, lane: str | bytes) -> None:
    model = rig.model()
    body = {"model_id": model, "seq_id": 1, **ORDERED[route]}
    response = rig.post(route, body, headers={LANE_HEADER: lane})
    assert (response.status_code, response.json()["error"]) == (400, "invalid_request")
    assert f"{LANE_HEADER}: " in response.json()["detail"]
    assert "is not one number from 0 to 999" in response.json()["detail"]
    assert len(response.json()["detail"]) < 200
    rig.result(rig.ok(rig.step(model, 1))["request_id"])


def test_two_lanes_in_one_request_are_refused(rig: Rig) -> None:
    headers = [(LANE_HEADER, "1"), (LANE_HEADER, "2")]
    response = rig.post("optim_step", {"model_id": rig.model(), "seq_id": 1, **ADAM}, headers=headers)
    assert response.status_code == 400
    assert "'1, 2' is not one number" in response.json()["detail"]


@pytest.mark.parametrize("lane", [0, 3])
def test_a_conflict_tells_of_lanes(rig: Rig, lane: int) -> None:
    model = rig.model()
    rig.ok(ask(rig, "optim_step", model, 1, lane=lane))
    response = ask(rig, "optim_step", model, 1, lane=lane, adam_params={"learning_rate": 0.5})
    assert (response.status_code, response.json()["error"]) == (400, "sequence_conflict")
    assert "was used with another payload" in response.json()["detail"]
    assert f"this request's is {lane}, and the header {LANE_HEADER} names another" in response.json()["detail"]


def test_unnamed_checkpoints_of_two_lanes_have_different_names(rig: Rig) -> None:
    model = rig.model()
    paths = [
        rig.result(rig.ok(ask(rig, route, model, seq_id, lane=lane, path=None))["request_id"])["path"]
        for route, seq_id in (("save_weights", 1), ("save_weights_external", 2))
        for lane in (0, 5)
    ]
    names = [path.rsplit("/", 1)[1] for path in paths]
    assert names == ["000001", "lane5-000001", "000002", "lane5-000002"]


def test_snapshots_of_two_lanes_with_one_number_are_two_samplers(rig: Rig) -> None:
    model = rig.model()
    number = {"path": None, "sampling_session_seq_id": 0}
    samplers = [
        rig.result(rig.ok(ask(rig, "save_weights_for_sampler", model, 1, lane=lane, **number))["request_id"])
        for lane in (0, 5)
    ]
    ids = [sampler["sampling_session_id"] for sampler in samplers]
    assert len(set(ids)) == 2
    for sampler in ids:
        assert rig.http.get(f"/api/v1/samplers/{sampler}").status_code == 200
    number["sampling_session_seq_id"] = LANE_SEQS
    refused = ask(rig, "save_weights_for_sampler", model, 2, lane=5, **number)
    assert (refused.status_code, refused.json()["error"]) == (400, "invalid_request")


def test_an_expired_future_of_a_lane_is_410_and_one_not_yet_used_is_404(redis_url: str, engine_name: str) -> None:
    # Only once it was read: what nobody read yet must wait for a client that is slow.
    brief = Limits(delivered_ttl_s=1)
    with running_rig(redis_url, engine=engine_name, limits=brief) as rig:
        model = rig.model()
        promise = rig.ok(ask(rig, "optim_step", model, 1, lane=2))["request_id"]
        rig.result(promise)
        for unused in (1, LANE_SEQS + 1, 2 * LANE_SEQS + 2, 3 * LANE_SEQS + 1):
            assert rig.poll(f"{model}:{unused}").status_code == 404
        deadline = time.monotonic() + 60
        while (response := rig.poll(promise)).status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (response.status_code, response.json()["error"]) == (410, "expired")


def test_the_openapi_document_shows_the_header_where_it_counts(rig: Rig) -> None:
    paths = rig.ok(rig.http.get("/openapi.json"))["paths"]
    laned = {
        path.rsplit("/", 1)[1]
        for path, calls in paths.items()
        for call in calls.values()
        if any(parameter["name"] == LANE_HEADER for parameter in call.get("parameters", ()))
    }
    assert laned == set(ORDERED)
