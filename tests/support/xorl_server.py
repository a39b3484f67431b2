"""A real server as xorl clients use it."""

import time
from typing import Any

import httpx
import torch

from gradstream.shared.wire import IGNORE
from tests.support.launched import Server

RATE = 1e-3
STEP = {"adam_params": {"learning_rate": RATE, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}, "gradient_clip": 1.0}


class Client:
    """Calls of one client, each waited for."""

    def __init__(self, server: Server) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=120, trust_env=False)

    def post(self, call: str, **fields: Any) -> httpx.Response:
        return self._http.post(f"/api/v1/{call}", json=fields)

    def done(self, call: str, **fields: Any) -> dict[str, Any]:
        response = self.post(call, **fields)
        assert response.status_code == 200, response.text
        return self.result(response.json()["request_id"])

    def result(self, request_id: str) -> dict[str, Any]:
        outcome = self.outcome(request_id)
        assert "error" not in outcome, outcome
        return outcome

    def outcome(self, request_id: str) -> dict[str, Any]:
        """What a job came to: its result, or {error, category}."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            response = self.post("retrieve_future", request_id=request_id)
            assert response.status_code == 200, response.text
            if response.json().get("type") != "try_again":
                return response.json()
        raise AssertionError(request_id)

    def train(self, model: str, seed: int) -> float:
        """One forward_backward and one step; the mean loss before the step."""
        result = self.done("forward_backward", model_id=model, forward_backward_input={"data": data(seed)})
        self.done("optim_step", model_id=model, **STEP)
        return result["metrics"]["loss:mean"]

    def loss(self, model: str) -> float:
        return self.done("forward", model_id=model, forward_input={"data": data(99)})["metrics"]["loss:mean"]


def data(seed: int) -> list[dict[str, Any]]:
    """Three datums whose first tokens, a prompt, are not learned."""
    generator = torch.Generator().manual_seed(seed)
    datums = []
    for length in (9, 17, 5):
        tokens = torch.randint(0, 2048, (length,), generator=generator).tolist()
        labels = [IGNORE] * 3 + tokens[3:]
        datums.append({"model_input": {"input_ids": tokens}, "loss_fn_inputs": {"labels": labels}})
    return datums
