"""Short ways to talk to a server as a xorl client does."""

import time
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support.cards import MODEL_NAME
from tests.support.rig import Rig

_DEADLINE_S = 90.0


@dataclass(frozen=True, slots=True)
class Xorl:
    """Calls are named by what stands behind /api/v1/, or by their whole path."""

    rig: Rig

    def post(self, call: str, **fields: Any) -> httpx.Response:
        path = call if call.startswith("/") else f"/api/v1/{call}"
        return self.rig.http.post(path, json=fields)

    def ok(self, call: str, **fields: Any) -> dict[str, Any]:
        return self.rig.ok(self.post(call, **fields))

    def outcome(self, response: httpx.Response) -> dict[str, Any]:
        """What the job of an accepted request came to: its result, or {error, category}."""
        request_id = self.rig.ok(response)["request_id"]
        deadline = time.monotonic() + _DEADLINE_S
        while time.monotonic() < deadline:
            self.rig.worker.check()
            answer = self.ok("retrieve_future", request_id=request_id)
            if answer.get("type") != "try_again":
                return answer
        raise AssertionError(f"{request_id} was not done within {_DEADLINE_S} s")

    def done(self, call: str, **fields: Any) -> dict[str, Any]:
        """The result of a job that succeeds."""
        result = self.outcome(self.post(call, **fields))
        assert "error" not in result, result
        return result

    def make(self, model: str) -> str:
        """A new model that is ready."""
        config = {"rank": 8, "dropout": 0.0}
        assert self.done("create_model", model_id=model, base_model=MODEL_NAME, lora_config=config)["model_id"] == model
        return model

    def step(self, model: str = "default") -> dict[str, Any]:
        return self.done("optim_step", model_id=model, adam_params={"learning_rate": 1e-4})
