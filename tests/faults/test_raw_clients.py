"""Requests that come twice, out of order or in conflict, with kills between them (queue.md section 10, fault 9)."""

from typing import Any

import httpx
import pytest
from tests.faults.conftest import StartRun, cases
from tests.support.bodies import proto_datum, proto_request
from tests.support.faults_client import BASE_MODEL, patiently
from tests.support.faults_server import Role, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

_RETRIED = {408, 409, 429, 500, 502, 503, 504}


class Raw:
    """Plain HTTP with the SDK's rules for what is tried again."""

    def __init__(self, server: Server) -> None:
        self.http = httpx.Client(base_url=f"{server.url}/api/v1/", timeout=30, trust_env=False)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return patiently(lambda: self.http.post(path, **body), lambda answer: answer.status_code not in _RETRIED)

    def model(self) -> str:
        session = self.post("create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0.38.0"}).json()[
            "session_id"
        ]
        promise = self.post(
            "create_model",
            json={
                "session_id": session,
                "model_seq_id": 0,
                "base_model": BASE_MODEL,
                "lora_config": {"rank": 4, "seed": 3},
            },
        ).json()
        self.result(promise["request_id"])
        return str(promise["model_id"])

    def train(self, model: str, seq: int, *, salt: int = 0) -> httpx.Response:
        tokens = [3 + (seq * 17 + salt + index * 7) % 190 for index in range(20)]
        datum = proto_datum(tokens, {"target_tokens": (tokens, "int64"), "weights": ([1.0] * 20, "float32")})
        raw = proto_request(model, seq, [datum]).SerializeToString()
        return self.post("forward_backward", content=raw, headers={"content-type": "application/x-protobuf"})

    def step(self, model: str, seq: int) -> httpx.Response:
        return self.post("optim_step", json={"model_id": model, "seq_id": seq, "adam_params": {"learning_rate": 1e-3}})

    def result(self, request_id: str) -> bytes:
        """The final answer's bytes."""
        answer = self.post(
            "retrieve_future", json={"request_id": request_id}, headers={"accept": "application/x-protobuf"}
        )
        assert answer.status_code == 200, answer.text
        return answer.content


@pytest.mark.parametrize("role", cases([Role.API, None, Role.RANK0, Role.QUEUE, Role.EVERYTHING]))
def test_repeated_and_reordered_requests_count_once(start_run: StartRun, role: Role | None) -> None:
    """Pass: the same request is the same future before and after a kill, a later one waits for an earlier one, a step counts once."""
    # Two jobs wait for one that comes behind a recovery, however long that takes.
    run = start_run({"hold_timeout_s": "1200"})
    raw = Raw(run.server)
    model = raw.model()
    # 3 and 2 wait for 1; each comes twice.
    futures = {}
    for seq in (3, 2, 2, 3):
        futures[seq] = raw.train(model, seq).json()["request_id"]
    if role is not None:
        run.kill(role)
    for seq in (1, 2, 1, 3):
        repeated = raw.train(model, seq).json()["request_id"]
        assert futures.setdefault(seq, repeated) == repeated
    step = raw.step(model, 4).json()["request_id"]
    first = [raw.result(futures[seq]) for seq in (1, 2, 3)]
    outcome = raw.result(step)
    assert b'"step":1' in outcome.replace(b" ", b""), outcome
    if role is not None:
        run.kill(role)
    assert raw.step(model, 4).json()["request_id"] == step
    assert [raw.result(futures[seq]) for seq in (1, 2, 3)] == first
    assert raw.result(step) == outcome
    conflict = raw.train(model, 2, salt=1)
    assert conflict.status_code in (400, 422), conflict.text
    run.verdict()
