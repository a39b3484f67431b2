"""When a session is over."""

import pytest

from gradstream.worker.sweeps import has_ended, session_of

NOW_MS = 1_000_000
GRACE_S = 100.0


@pytest.mark.parametrize(
    ("session", "ended"),
    [
        pytest.param({"heartbeat_ms": "950000"}, False, id="alive"),
        pytest.param({"heartbeat_ms": "850000"}, True, id="silent"),
        pytest.param({"created_ms": "850000"}, True, id="never a heartbeat"),
        pytest.param({"heartbeat_ms": "950000", "finished_ms": "960000"}, True, id="finished"),
        pytest.param({"heartbeat_ms": "850000", "swept_ms": "960000"}, False, id="swept before"),
        pytest.param({"heartbeat_ms": "850000", "swept_ms": "800000"}, True, id="came back after a sweep"),
        pytest.param(
            {"heartbeat_ms": "950000", "finished_ms": "960000", "swept_ms": "970000"}, False, id="finished and swept"
        ),
    ],
)
def test_a_session_is_over_when_finished_or_silent_and_is_swept_once(session, ended):
    assert has_ended(session, now_ms=NOW_MS, grace_s=GRACE_S) is ended


def test_a_sampler_without_a_recorded_session_belongs_to_the_one_in_its_id():
    assert session_of("s:1:sample:4", {}) == "s:1"
    assert session_of("s:1:sample:4", {"session": "other"}) == "other"
