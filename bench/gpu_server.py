"""A step of LoRA training through the whole server with the stock SDK, for its tax over the bare engine."""

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

from bench.gpu_model import Shape, Work, qwen3
from examples.local_server import local_server

_CONFIG = Path(__file__).parent.parent / "configs" / "tiny.yaml"
_NAME = "bench/random-qwen3"
_IN_FLIGHT = 3
_WARM_UP = 2


def server_step_s(shape: Shape, work: Work, *, device: str, folder: Path) -> float:
    """Mean wall time of a step, steps submitted ahead, on a server of its own; its model's files are written to folder."""
    model = folder / "model"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    qwen3(shape, device=torch.device(device), dtype=dtype).save_pretrained(model)
    if device != "cpu":
        torch.cuda.empty_cache()
    overrides = {
        "model_path": str(model),
        "model_name": _NAME,
        "device": device,
        "torch_threads": str(torch.get_num_threads()),
    }
    with (
        local_server(_CONFIG, output_dir=folder / "outputs", overrides=overrides, ready_timeout_s=900.0) as server,
        tinker.ServiceClient(base_url=server.url, api_key="tml-bench") as service,
    ):
        client = service.create_lora_training_client(
            base_model=_NAME, rank=work.rank, seed=0, train_unembed=False
        ).result()
        data = _data(shape, num_sequences=work.num_sequences, context=work.context)
        _train(client, data, steps=_WARM_UP)
        started = time.perf_counter()
        _train(client, data, steps=work.steps)
        return (time.perf_counter() - started) / work.steps


def _train(client: tinker.TrainingClient, data: list[types.Datum], *, steps: int) -> None:
    in_flight: deque[Any] = deque()  # Any: futures of two kinds
    for _ in range(steps):
        in_flight.append(client.forward_backward(data, "cross_entropy"))
        in_flight.append(client.optim_step(types.AdamParams(learning_rate=1e-4)))
        while len(in_flight) > 2 * _IN_FLIGHT:
            in_flight.popleft().result()
    while in_flight:
        in_flight.popleft().result()


def _data(shape: Shape, *, num_sequences: int, context: int) -> list[types.Datum]:
    tokens = np.random.default_rng(0).integers(0, shape.vocab, (num_sequences, context + 1))
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={"target_tokens": types.TensorData(data=row[1:].tolist(), dtype="int64")},
        )
        for row in tokens
    ]
