"""The whole server as xorl clients use it: its numbers are torch's, and a killed worker changes none of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.launched import Launch, launching
from tests.support.xorl_server import RATE, Client, data
from transformers import AutoModelForCausalLM

from gradstream.shared.wire import IGNORE

MODEL = Path("tests/models/tiny-qwen3-shakespeare")
pytestmark = pytest.mark.e2e


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with launching(tmp_path) as start:
        yield start


def torch_losses(seeds: list[int]) -> list[float]:
    """The mean losses of the same training with transformers' own loss and torch's AdamW, in double precision."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for seed in seeds:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for datum in data(seed):
            labels = torch.tensor([datum["loss_fn_inputs"]["labels"]])
            tokens = torch.tensor([datum["model_input"]["input_ids"]])
            valid = int((labels[:, 1:] != IGNORE).sum())
            total = total + valid * model(input_ids=tokens, labels=labels).loss
            count += valid
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(total.detach() / count))
    return losses


def test_full_weights_learn_as_transformers_and_torch_do(launch: Launch) -> None:
    client = Client(launch(config="configs/tiny_full.yaml").until_ready())
    seeds = [1, 2, 3, 1]
    losses = [client.train("default", seed) for seed in seeds]
    assert losses == pytest.approx(torch_losses(seeds), rel=2e-4)
    assert losses[3] < losses[0]


def test_each_datum_has_its_own_loss_and_log_probabilities(launch: Launch) -> None:
    client = Client(launch().until_ready())
    result = client.done("forward", forward_input={"data": data(1), "loss_fn": "per_token_ce"})
    outputs = result["loss_fn_outputs"]
    assert [output["logprobs"]["shape"] for output in outputs] == [[8], [16], [4]]
    for output in outputs:
        logprobs = output["logprobs"]["data"]
        assert logprobs[:2] == [0.0, 0.0], "the prompt has no targets"
        assert output["loss"]["data"] == pytest.approx([-sum(logprobs[2:]) / len(logprobs[2:])], rel=1e-5)
    assert result["metrics"]["valid_tokens:sum"] == 6 + 14 + 2


def test_accumulation_over_requests_is_one_request(launch: Launch) -> None:
    client = Client(launch().until_ready())
    norms = []
    for parts in ([data(1)], [[datum] for datum in data(1)]):
        for part in parts:
            client.done("forward_backward", forward_backward_input={"data": part})
        norms.append(client.done("optim_step", learning_rate=0.0)["metrics"]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] > 0


def test_only_named_modules_are_trained_and_unknown_ones_are_refused(launch: Launch) -> None:
    client = Client(launch().until_ready())
    config = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    client.done("create_model", model_id="named", lora_config=config)
    client.train("named", 1)
    refused = client.post("create_model", model_id="wrong", lora_config={"rank": 4, "target_modules": ["qkv"]})
    answer = client.outcome(refused.json()["request_id"])
    assert "lora.target_modules: qkv; modules that can have an adapter here are" in answer["error"]
    assert answer["category"] == "user"
    client.done("create_model", model_id="wrong", lora_config=config)


def test_a_model_that_was_dropped_and_made_again_survives_a_killed_worker(launch: Launch) -> None:
    server = launch("--server.restart_backoff_s", "0.1").until_ready()
    client = Client(server)
    client.done("create_model", model_id="mine", lora_config={"rank": 4})
    client.train("mine", 1)
    client.done("unload_model", model_id="mine")
    client.done("create_model", model_id="mine", lora_config={"rank": 8})
    for seed in (2, 3):
        client.train("mine", seed)
    client.train("default", 4)
    before = [client.loss(model) for model in ("mine", "default")]

    worker = server.member("gradstream.worker")
    assert worker is not None
    worker.kill()
    accepted = client.post("optim_step", model_id="mine", learning_rate=0.0)
    client.result(accepted.json()["request_id"])

    assert [client.loss(model) for model in ("mine", "default")] == before
    assert client.post("get_info", model_id="mine").json()["lora_rank"] == 8
    client.done("unload_model", model_id="mine")
    client.done("create_model", model_id="mine", lora_config={"rank": 4})
    client.train("mine", 1)
