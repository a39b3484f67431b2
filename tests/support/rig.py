"""A running API with an echo worker on the real Redis, and short ways to talk to it."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from gradstream.api.config import ApiConfig
from gradstream.api.tinker.proto import wire_pb2
from gradstream.shared.joblog.limits import Limits
from tests.support.api_server import api_server
from tests.support.bodies import good_datum, proto_request
from tests.support.cards import MODEL_NAME, UNIFORM_CARD
from tests.support.echo_worker import EchoWorker, echo_worker

PROTOBUF = "application/x-protobuf"
FAST = ApiConfig(
    poll_hold_s=0.4,
    poll_jitter_s=0.0,
    admit_hold_s=0.6,
    gap_check_s=0.1,
    card_ttl_s=0.05,
    max_body_bytes=1024 * 1024,
    max_json_body_bytes=512 * 1024,
    inline_result_bytes=4096,
    max_datums=256,
)
LIMITS = Limits(max_queued_jobs_per_model=8, hold_timeout_s=60.0)
_DEADLINE_S = 90.0


@dataclass(frozen=True, slots=True)
class Rig:
    """A client of the server. Paths are below /api/v1."""

    base_url: str
    http: httpx.Client
    worker: EchoWorker

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return self.http.post(f"/api/v1/{path}", **options)

    def session(self) -> str:
        return self.ok(self.post("create_session", {"tags": [], "user_metadata": None, "sdk_version": "0.38.0"}))[
            "session_id"
        ]

    def model(self, session: str | None = None, *, number: int = 0) -> str:
        """The id of a new model that is ready."""
        body = {
            "session_id": session or self.session(),
            "model_seq_id": number,
            "base_model": MODEL_NAME,
            "lora_config": {"rank": 8},
        }
        promise = self.ok(self.post("create_model", body))
        assert self.result(promise["request_id"])["model_id"] == promise["model_id"]
        return promise["model_id"]

    def train(
        self, model: str, seq: int, data: Sequence[wire_pb2.Datum] | None = None, **fields: Any
    ) -> httpx.Response:
        """The answer to a protobuf forward_backward."""
        data = [good_datum()] if data is None else data
        return self.send(proto_request(model, seq, data, **fields).SerializeToString())

    def send(self, raw: bytes, **headers: str) -> httpx.Response:
        """The answer to these bytes as a protobuf forward_backward."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.post("forward_backward", content=raw, headers={"content-type": PROTOBUF, **named})

    def step(self, model: str, seq: int, **adam: Any) -> httpx.Response:
        return self.post("optim_step", {"model_id": model, "seq_id": seq, "adam_params": adam})

    def poll(self, request_id: str, *, accept: str = "application/json", metadata: bool = False) -> httpx.Response:
        body = {"request_id": request_id, "allow_metadata_only": metadata}
        return self.post("retrieve_future", body, headers={"accept": accept})

    def result(self, request_id: str) -> dict[str, Any]:
        """The JSON result, polled for as long as the server says try_again."""
        deadline = time.monotonic() + _DEADLINE_S
        while time.monotonic() < deadline:
            self.worker.check()
            response = self.poll(request_id)
            if response.status_code != 408:
                return self.ok(response)
        raise AssertionError(f"{request_id} was not done within {_DEADLINE_S} s")

    @staticmethod
    def ok(response: httpx.Response) -> dict[str, Any]:
        assert response.status_code == 200, response.text
        return response.json()


@contextlib.contextmanager
def running_rig(url: str, *, engine: str, config: ApiConfig = FAST, limits: Limits = LIMITS) -> Iterator[Rig]:
    """The rig, with its server and worker stopped at the end."""
    with (
        echo_worker(url, engine=engine, card=UNIFORM_CARD, output_dir=config.output_dir) as worker,
        api_server(url, engine=engine, config=config, limits=limits) as base_url,
        httpx.Client(base_url=base_url, timeout=90) as http,
    ):
        yield Rig(base_url, http, worker)
