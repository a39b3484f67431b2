"""Sessions and samplers: made once, found again, and closed for good when finished."""

import pytest
from tests.support.cards import MODEL_NAME
from tests.support.rig import Rig


def test_each_session_is_new_and_heartbeats_keep_it(rig: Rig) -> None:
    first, second = rig.session(), rig.session()
    assert first != second
    assert rig.ok(rig.post("session_heartbeat", {"session_id": first})) == {"type": "session_heartbeat"}


def test_the_heartbeat_of_an_unknown_session_is_404(rig: Rig) -> None:
    assert rig.post("session_heartbeat", {"session_id": "nobody"}).status_code == 404


@pytest.mark.parametrize("reason", ["success", "errored", "interrupted"])
def test_a_finished_session_answers_410_and_owns_nothing_new(rig: Rig, reason: str) -> None:
    session = rig.session()
    finish = {"reason": {"type": reason}, "detail": None}
    for _ in range(2):
        response = rig.post(f"sessions/{session}/finish", finish)
        assert (response.status_code, response.content) == (204, b"")
    assert rig.post("session_heartbeat", {"session_id": session}).status_code == 410
    body = {"session_id": session, "model_seq_id": 0, "base_model": MODEL_NAME, "lora_config": {"rank": 8}}
    refused = rig.post("create_model", body)
    assert refused.status_code == 400
    assert "was finished; create a new session" in refused.json()["detail"]


def test_create_model_again_is_the_same_future_and_with_other_content_a_conflict(rig: Rig) -> None:
    body = {
        "session_id": rig.session(),
        "model_seq_id": 0,
        "base_model": MODEL_NAME,
        "lora_config": {"rank": 8, "seed": 3},
        "user_metadata": {"b": [1], "a": "x"},
    }
    first = rig.ok(rig.post("create_model", body))
    assert rig.ok(rig.post("create_model", {**body, "user_metadata": {"a": "x", "b": [1]}})) == first
    other = rig.post("create_model", {**body, "lora_config": {"rank": 4}})
    assert (other.status_code, other.json()["error"]) == (400, "sequence_conflict")


def test_a_sampler_is_made_once_and_found_again(rig: Rig) -> None:
    session = rig.session()
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL_NAME}
    first = rig.ok(rig.post("create_sampling_session", body))
    assert rig.ok(rig.post("create_sampling_session", body)) == first
    sampler = first["sampling_session_id"]
    assert rig.ok(rig.http.get(f"/api/v1/samplers/{sampler}")) == {
        "sampler_id": sampler,
        "base_model": MODEL_NAME,
        "model_path": None,
    }
    other = rig.post("create_sampling_session", {**body, "base_model": "uniform-alias"})
    assert (other.status_code, other.json()["error"]) == (400, "sequence_conflict")
    assert rig.http.get("/api/v1/samplers/nobody").status_code == 404


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, 400, "base_model, model_path: send at least one"),
        ({"base_model": "gpt-9"}, 400, "base_model: this server does not serve 'gpt-9'"),
        ({"model_path": "tinker://m:train:0/sampler_weights/none"}, 404, "model_path: there is no checkpoint"),
        ({"model_path": "tinker://m:train:0/weights/a"}, 400, "is a path of kind 'weights'"),
        ({"model_path": "https://example.com"}, 400, "model_path: 'https://example.com' is not a checkpoint's path"),
    ],
)
def test_a_sampler_of_nothing_is_refused(rig: Rig, fields: dict, status: int, message: str) -> None:
    body = {"session_id": rig.session(), "sampling_session_seq_id": 0, **fields}
    response = rig.post("create_sampling_session", body)
    assert response.status_code == status
    assert message in response.json()["detail"]


def test_an_ephemeral_sampler_belongs_to_the_session_of_its_model(rig: Rig) -> None:
    session = rig.session()
    model = rig.model(session)
    body = {"model_id": model, "sampling_session_seq_id": 5, "seq_id": 1, "kind": "inflight"}
    saved = rig.ok(rig.post("save_weights_for_sampler", body))
    assert rig.result(saved["request_id"])["sampling_session_id"] == f"{session}:sample:5"
    assert rig.ok(rig.http.get(f"/api/v1/samplers/{session}:sample:5"))["model_path"].startswith("tinker://")
