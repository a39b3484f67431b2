"""When a session is over."""

import pytest

from gradstream.shared.ids import UNLOAD_SEQ, ModelId
from gradstream.worker.sweeps import Activity, Patience, activity_by_session, has_ended, session_of, unload_of

NOW_MS = 1_000_000
PATIENCE = Patience(grace_s=100.0, idle_s=500.0)


@pytest.mark.parametrize(
    ("session", "ended"),
    [
        pytest.param({"created_ms": "100000", "heartbeat_ms": "950000"}, False, id="alive"),
        pytest.param({"created_ms": "100000", "heartbeat_ms": "850000"}, True, id="silent"),
        pytest.param(
            {"created_ms": "850000", "heartbeat_ms": "850000"}, False, id="never a heartbeat, within idle time"
        ),
        pytest.param(
            {"created_ms": "450000", "heartbeat_ms": "450000"}, True, id="never a heartbeat, beyond idle time"
        ),
        pytest.param({"created_ms": "1", "heartbeat_ms": "950000", "finished_ms": "960000"}, True, id="finished"),
        pytest.param({"created_ms": "1", "heartbeat_ms": "850000", "swept_ms": "960000"}, False, id="swept before"),
        pytest.param({"created_ms": "1", "heartbeat_ms": "850000", "swept_ms": "800000"}, True, id="came back"),
        pytest.param(
            {"created_ms": "1", "heartbeat_ms": "950000", "finished_ms": "960000", "swept_ms": "970000"},
            False,
            id="finished and swept",
        ),
    ],
)
def test_a_session_is_over_when_finished_or_silent_and_is_swept_once(session, ended):
    assert has_ended(session, now_ms=NOW_MS, patience=PATIENCE) is ended


@pytest.mark.parametrize(
    ("activity", "ended"),
    [
        pytest.param(Activity(), True, id="no models"),
        pytest.param(Activity(used_ms=850_000), True, id="jobs long ago"),
        pytest.param(Activity(used_ms=950_000), False, id="jobs a moment ago"),
        pytest.param(Activity(used_ms=850_000, has_open_jobs=True), False, id="a job that waits or runs"),
    ],
)
def test_jobs_are_a_sign_of_life_where_heartbeats_are_missing(activity, ended):
    session = {"created_ms": "100000", "heartbeat_ms": "850000"}
    assert has_ended(session, now_ms=NOW_MS, patience=PATIENCE, activity=activity) is ended


def test_silence_counts_from_when_the_server_could_hear():
    session = {"created_ms": "100000", "heartbeat_ms": "200000"}
    for awake_ms, ended in ((890_000, True), (910_000, False)):
        patience = Patience(grace_s=100.0, idle_s=500.0, awake_ms=awake_ms)
        assert has_ended(session, now_ms=NOW_MS, patience=patience) is ended
        finished = {**session, "finished_ms": "300000"}
        assert has_ended(finished, now_ms=NOW_MS, patience=patience)


def test_a_sessions_activity_is_that_of_all_its_models():
    models = [
        {"session": "a", "used_ms": "5", "queued": "0", "held": "1"},
        {"session": "a", "used_ms": "9", "queued": "0", "held": "0"},
        {"session": "b"},
    ]
    assert activity_by_session(models) == {"a": Activity(used_ms=9, has_open_jobs=True), "b": Activity()}


def test_a_sampler_without_a_recorded_session_belongs_to_the_one_in_its_id():
    assert session_of("s:1:sample:4", {}) == "s:1"
    assert session_of("s:1:sample:4", {"session": "other"}) == "other"


def test_the_unload_of_a_model_whose_jobs_the_server_numbers_is_one_of_them():
    unload = unload_of(ModelId("default"), {"tenant": "t", "dialect": "xorl"})
    assert (unload.seq, unload.ordered, unload.tenant) == (None, True, "t")


def test_the_unload_of_a_model_whose_client_numbers_its_jobs_stands_beside_them():
    unload = unload_of(ModelId("s:train:0"), {"tenant": "t"})
    assert (unload.seq, unload.ordered) == (UNLOAD_SEQ, False)
