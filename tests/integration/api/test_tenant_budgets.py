"""What a tenant may have lying around is bounded, and a retry of what was accepted is never refused."""

from dataclasses import replace

import redis
from tests.support.cards import MODEL_NAME
from tests.support.rig import FAST, running_rig

from gradstream.shared.ids import LOCAL_TENANT
from gradstream.shared.joblog.keys import Keys
from gradstream.shared.joblog.port import RecordKind


def test_a_sampler_too_many_is_refused_and_one_that_exists_is_found(redis_url: str, engine_name: str) -> None:
    with running_rig(redis_url, engine=engine_name, config=replace(FAST, max_samplers_per_tenant=2)) as rig:
        session = rig.session()

        def make(number: int):
            body = {"session_id": session, "sampling_session_seq_id": number, "base_model": MODEL_NAME}
            return rig.post("create_sampling_session", {**body})

        made = [rig.ok(make(number)) for number in range(2)]
        refused = make(2)
        assert (refused.status_code, refused.json()["error"]) == (400, "budget_exceeded")
        assert "has 2 samplers and may have 2" in refused.json()["detail"]
        assert rig.ok(make(1)) == made[1]
        frozen = {"model_id": rig.model(session), "seq_id": 1, "sampling_session_seq_id": 7}
        assert rig.post("save_weights_for_sampler", frozen).json()["error"] == "budget_exceeded"


def test_a_save_beyond_a_tenants_bytes_is_refused_and_its_retry_is_not(redis_url: str, engine_name: str) -> None:
    with running_rig(redis_url, engine=engine_name, config=replace(FAST, max_stored_bytes_per_tenant=1)) as rig:
        model = rig.model()
        body = {"model_id": model, "seq_id": 1, "path": "a"}
        first = rig.ok(rig.post("save_weights", body))
        path = rig.result(first["request_id"])["path"]
        size_up(redis_url, engine_name, path)
        assert rig.ok(rig.post("save_weights", body)) == first
        calls = ("save_weights", "save_weights_for_sampler", "save_weights_external")
        for seq, call in enumerate(calls, start=2):
            refused = rig.post(call, {"model_id": model, "seq_id": seq, "path": "b"})
            assert (refused.status_code, refused.json()["error"]) == (400, "budget_exceeded")
        assert rig.result(rig.ok(rig.step(model, 5))["request_id"])


def size_up(redis_url: str, engine_name: str, path: str) -> None:
    """Give the checkpoint the size and time that a real worker's record has."""
    with redis.Redis.from_url(redis_url) as client:
        keys = Keys(engine_name)
        client.hset(keys.record(RecordKind.CHECKPOINT, path), mapping={"size_bytes": "9", "created_ms": "1"})
        client.zadd(keys.tenant_list(RecordKind.CHECKPOINT, LOCAL_TENANT), {path: 1})


def test_sessions_and_models_on_record_are_bounded_and_a_retry_is_not_refused(redis_url: str, engine_name: str) -> None:
    config = replace(FAST, max_sessions_per_tenant=2, max_model_records_per_tenant=1)
    with running_rig(redis_url, engine=engine_name, config=config) as rig:
        session = rig.session()
        body = {"session_id": session, "model_seq_id": 0, "base_model": MODEL_NAME, "lora_config": {"rank": 8}}
        first = rig.ok(rig.post("create_model", body))
        assert rig.ok(rig.post("create_model", body)) == first
        refused = rig.post("create_model", {**body, "model_seq_id": 1})
        assert (refused.status_code, refused.json()["error"]) == (400, "budget_exceeded")
        assert "has 1 models on record and may have 1" in refused.json()["detail"]
        rig.session()
        refused = rig.post("create_session", {"tags": [], "user_metadata": None, "sdk_version": "0.38.0"})
        assert (refused.status_code, refused.json()["error"]) == (400, "budget_exceeded")
        assert "has 2 sessions on record and may have 2" in refused.json()["detail"]
