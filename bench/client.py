"""One client in a process of its own: the stock tinker SDK, told by JSON lines on stdin what to do next.

Each command `{"do": NAME, "times": N}` is answered with one JSON line; the process ends when stdin closes.
"""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import tinker
from tinker import types

from bench import job

STEPS_IN_FLIGHT = 4
Answer = dict[str, Any]  # the JSON object of one answer; each command documents its fields


def datums(data: job.Data) -> list[types.Datum]:
    """The job's data as the SDK wants it, every token with weight 1."""
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(inputs.tolist()),
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=targets.tolist(), dtype="int64"),
                "weights": types.TensorData(data=[1.0] * len(targets), dtype="float32"),
            },
        )
        for inputs, targets in zip(data.inputs, data.targets, strict=True)
    ]


class Client:
    """One LoRA model on the server, and the commands that time it."""

    def __init__(self, service: tinker.ServiceClient, base_model: str) -> None:
        self._client = service.create_lora_training_client(base_model=base_model, rank=job.RANK, seed=job.SEED).result()
        self._data = datums(job.make_data())
        self._one_token = datums(job.make_data(num_datums=1, num_tokens=1))
        self._adam = types.AdamParams(learning_rate=job.LEARNING_RATE, beta2=job.BETA2, eps=job.EPS)

    def sequential(self, times: int) -> Answer:
        """forward_backward_ms and optim_step_ms: submit to result, one op at a time."""
        forward_backward, optim_step = [], []
        for _ in range(times):
            forward_backward.append(
                _timed_ms(lambda: self._client.forward_backward(self._data, "cross_entropy").result())
            )
            optim_step.append(_timed_ms(lambda: self._client.optim_step(self._adam).result()))
        return {"forward_backward_ms": forward_backward, "optim_step_ms": optim_step}

    def one_token(self, times: int) -> Answer:
        """forward_ms: submit to result of a forward pass on one token, the op with the least work in it."""
        forward = [
            _timed_ms(lambda: self._client.forward(self._one_token, "cross_entropy").result()) for _ in range(times)
        ]
        return {"forward_ms": forward}

    def pipelined(self, times: int) -> Answer:
        """started_s and ended_s on the machine's monotonic clock, and cpu_s of this process, for that many steps."""
        in_flight: deque[tuple[Any, Any]] = deque()
        started, cpu = time.monotonic(), time.process_time()
        for _ in range(times):
            in_flight.append(
                (self._client.forward_backward(self._data, "cross_entropy"), self._client.optim_step(self._adam))
            )
            if len(in_flight) == STEPS_IN_FLIGHT:
                _finish(in_flight.popleft())
        while in_flight:
            _finish(in_flight.popleft())
        return {"started_s": started, "ended_s": time.monotonic(), "cpu_s": time.process_time() - cpu, "steps": times}


def _finish(step: tuple[Any, Any]) -> None:
    for future in step:
        future.result()


def _timed_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--base-model", required=True)
    options = parser.parse_args()
    with tinker.ServiceClient(base_url=options.url, api_key="tml-bench") as service:
        client = Client(service, options.base_model)
        commands = {"sequential": client.sequential, "one_token": client.one_token, "pipelined": client.pipelined}
        for line in sys.stdin:
            command = json.loads(line)
            sys.stdout.write(json.dumps(commands[command["do"]](command["times"])) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
