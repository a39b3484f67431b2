"""xorl clients make models, train them and poll, at the addresses of the tinker dialect."""

import asyncio
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.support.api_server import api_server
from tests.support.cards import MODEL_NAME, UNIFORM_CARD, VOCAB_SIZE
from tests.support.echo_worker import echo_worker
from tests.support.rig import FAST, Rig
from tests.support.xorl import Xorl

from gradstream.shared import codec
from gradstream.shared.ids import ModelId, TenantId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.wire import IGNORE, AdamParams, CreateModel, ForwardBackward, OptimStep, Payload

NAT = math.log(VOCAB_SIZE)
DATUM = {"model_input": {"input_ids": [1, 2, 3, 4]}, "loss_fn_inputs": {"labels": [IGNORE, 2, 3, 4]}}
INPUT = {"data": [DATUM], "loss_fn": "cross_entropy"}


@pytest.fixture
def xorl(rig: Rig) -> Xorl:
    return Xorl(rig)


@pytest.fixture
def payloads(redis_url: str, engine_name: str) -> Iterator["Payloads"]:
    with RedisFeed(redis_url, engine=engine_name) as feed:
        yield Payloads(feed)


class Payloads:
    """What the worker was given, from the job log itself."""

    def __init__(self, feed: RedisFeed) -> None:
        self._feed = feed

    def of(self, model: str) -> list[Payload]:
        entries = self._feed.read("0-0", count=10_000, block_ms=0)
        return [codec.decode_payload(entry.job.payload) for entry in entries if entry.job.owner == model]


def ops(xorl: Xorl, model: str) -> list[tuple[int, str]]:
    return [(seq, op) for owner, seq, op in xorl.rig.worker.seen if owner == model]


def refused(response: httpx.Response, message: str, status: int = 400) -> None:
    assert response.status_code == status, response.text
    assert message in response.json()["detail"]


def train(xorl: Xorl, model: str = "default", **fields: Any) -> dict[str, Any]:
    return xorl.done("forward_backward", model_id=model, forward_backward_input=INPUT, **fields)


def test_the_model_default_is_there_without_being_made(xorl: Xorl, payloads: Payloads) -> None:
    result = train(xorl)
    assert result["metrics"]["loss:sum"] == pytest.approx(3 * NAT)
    assert ops(xorl, "default") == [(0, "create_model"), (1, "forward_backward")]
    made = payloads.of("default")[0]
    assert isinstance(made, CreateModel)
    assert (made.lora.rank, made.lora.alpha, made.reduction) == (32, 16.0, "token_mean")
    assert (made.session_id, made.base_model) == ("default", MODEL_NAME)


def test_many_first_requests_at_once_make_default_once(xorl: Xorl) -> None:
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: train(xorl), range(6)))
    assert all(result["metrics"]["loss:sum"] == pytest.approx(3 * NAT) for result in results)
    assert ops(xorl, "default") == [(0, "create_model"), *((seq, "forward_backward") for seq in range(1, 7))]


def test_a_model_is_made_trained_and_dropped(xorl: Xorl, payloads: Payloads) -> None:
    promise = xorl.ok("create_model", model_id="mine", base_model=MODEL_NAME, lora_config={"rank": 8, "dropout": 0.0})
    assert promise == {"request_id": "mine:0", "model_id": "mine"}
    assert xorl.outcome(xorl.post("create_model", model_id="mine", lora_config={"rank": 8})) == {
        "type": "create_model",
        "model_id": "mine",
    }
    train(xorl, "mine")
    step = xorl.done("optim_step", model_id="mine", adam_params={"learning_rate": 1e-3}, gradient_clip=1.0)
    assert step["metrics"]["grad_norm"] == 0.0
    assert xorl.done("forward", model_id="mine", forward_input=INPUT)["metrics"]["loss:sum"] == pytest.approx(3 * NAT)
    assert xorl.done("unload_model", model_id="mine") == {"type": "unload_model", "model_id": "mine"}
    refused(xorl.post("forward", model_id="mine", forward_input=INPUT), "there is no model 'mine'", status=404)
    assert payloads.of("mine")[2] == OptimStep(adam=AdamParams(learning_rate=1e-3, grad_clip_norm=1.0))
    assert [op for _, op in ops(xorl, "mine")] == [
        "create_model",
        "forward_backward",
        "optim_step",
        "forward",
        "unload_model",
    ]


def test_a_dropped_model_can_be_made_again_at_once_and_otherwise(xorl: Xorl) -> None:
    xorl.make("mine")
    xorl.rig.worker.pause()
    unload = xorl.post("unload_model", model_id="mine")
    made = xorl.post("create_model", model_id="mine", lora_config={"rank": 16})
    last = xorl.post("optim_step", model_id="mine")
    xorl.rig.worker.resume()
    for response in (unload, made, last):
        assert "error" not in xorl.outcome(response)
    assert [seq for seq, _ in ops(xorl, "mine")] == [0, 1, 2, 3]
    assert xorl.ok("get_info", model_id="mine")["lora_rank"] == 16


def test_a_model_of_the_same_kind_is_found_and_of_another_kind_is_refused(xorl: Xorl) -> None:
    fields = {"model_id": "mine", "lora_config": {"rank": 8}, "optimizer_config": {"learning_rate": 1e-3}}
    first = xorl.ok("create_model", **fields)
    assert xorl.ok("create_model", **fields) == first
    assert "error" not in xorl.outcome(xorl.post("create_model", **fields))
    other = {**fields, "lora_config": {"rank": 9}}
    refused(xorl.post("create_model", **other), "'mine' exists and was made otherwise: lora.rank was 8, now 9")
    other = {**fields, "optimizer_config": {"learning_rate": 2e-3}}
    refused(xorl.post("create_model", **other), "optimizer_config.learning_rate was 0.001, now 0.002")
    assert ops(xorl, "mine") == [(0, "create_model")]


@pytest.mark.parametrize(
    ("fields", "message", "status"),
    [
        ({"model_id": "no such name"}, "model_id: 'no such name' cannot name a model", 400),
        ({"model_id": "mine", "base_model": "other/base"}, "this server does not serve 'other/base'", 400),
        ({"model_id": "mine", "lora_config": {"rank": 65}}, "lora_config.rank: 65 is more than 64", 400),
        ({"model_id": "mine", "lora_config": {"rank": 8, "r": 8}}, "lora_config.r: Extra inputs", 400),
        ({"model_id": "mine", "session_id": "yours"}, "model_id and session_id name different models", 400),
        ({"model_id": "mine", "optimizer_config": {"type": "signsgd"}}, "optimizer_config.type: 'signsgd' is not", 400),
    ],
)
def test_a_creation_that_cannot_be_is_refused_and_makes_nothing(
    xorl: Xorl, fields: dict, message: str, status: int
) -> None:
    refused(xorl.post("create_model", **fields), message, status)
    refused(xorl.post("optim_step", model_id="mine"), "there is no model 'mine'", status=404)


@pytest.mark.parametrize("name", ["model_id", "session_id"])
def test_model_id_and_session_id_are_the_same(xorl: Xorl, name: str) -> None:
    xorl.make("mine")
    for call, fields in [
        ("forward_backward", {"forward_backward_input": INPUT}),
        ("forward", {"forward_input": INPUT}),
        ("optim_step", {"adam_params": {}}),
        ("unload_model", {}),
    ]:
        assert "error" not in xorl.outcome(xorl.post(call, **{name: "mine"}, **fields))


def test_the_prefix_xorl_always_speaks_xorl(xorl: Xorl) -> None:
    promise = xorl.rig.ok(xorl.rig.http.post("/xorl/api/v1/forward_backward", json={"forward_backward_input": INPUT}))
    assert promise["request_id"] == "default:1"
    answer = xorl.rig.ok(xorl.rig.http.post("/xorl/api/v1/retrieve_future", json={"request_id": "default:0"}))
    assert answer == {"type": "create_model", "model_id": "default"}


def test_forward_takes_its_data_under_either_name(xorl: Xorl) -> None:
    for name in ("forward_input", "forward_backward_input"):
        assert xorl.done("forward", **{name: INPUT})["metrics"]["loss:sum"] == pytest.approx(3 * NAT)
    refused(xorl.post("forward"), "forward_input: missing")
    refused(xorl.post("forward_backward", forward_input=INPUT), "forward_input: belongs to /api/v1/forward")


def test_results_are_tensors_of_each_datum_in_order(xorl: Xorl) -> None:
    long = {"model_input": {"input_ids": [5, 6, 7, 8, 9]}, "loss_fn_inputs": {"target_tokens": [1, 2, 3, 4, 5]}}
    result = xorl.done("forward", forward_input={"data": [DATUM, long], "loss_fn": "cross_entropy"})
    shapes = [output["logprobs"]["shape"] for output in result["loss_fn_outputs"]]
    assert shapes == [[3], [5]]
    assert result["loss_fn_outputs"][0]["logprobs"]["dtype"] == "float32"


def test_labels_reach_the_engine_shifted(xorl: Xorl, payloads: Payloads) -> None:
    train(xorl)
    payload = payloads.of("default")[1]
    assert isinstance(payload, ForwardBackward)
    assert payload.tokens.values().tolist() == [1, 2, 3]
    assert payload.inputs["target_tokens"].values().tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{**DATUM, "loss_fn_inputs": {"labels": [1]}}], "data[0].loss_fn_inputs.labels: 1 values"),
        ([DATUM, {**DATUM, "loss_fn_inputs": {}}], "data[1].loss_fn_inputs.target_tokens: missing"),
        ([DATUM, {"model_input": {"input_ids": "no"}}], "$.forward_backward_input.data[1].model_input.input_ids"),
        ([{**DATUM, "reward": 1.0}], "unknown field `reward`"),
        ([], "there are no datums"),
    ],
)
def test_a_wrong_datum_is_refused_and_uses_no_seq(xorl: Xorl, data: list, message: str) -> None:
    train(xorl)
    wrong = {"data": data, "loss_fn": "cross_entropy"}
    refused(xorl.post("forward_backward", seq_id=5, forward_backward_input=wrong), message)
    train(xorl, seq_id=5)
    assert [seq for seq, _ in ops(xorl, "default")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adam_params": {"learning_rate": -1.0}}, "adam_params.learning_rate"),
        ({"adam_params": {"beta1": 1.0}}, "adam_params.beta1"),
        ({"adam_params": {"momentum": 0.9}}, "adam_params.momentum"),
        ({"learning_rate": 0.1, "lr": 0.2}, "they mean the same"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"step": 1}, "step: Extra inputs"),
    ],
)
def test_a_wrong_step_is_refused_by_its_field(xorl: Xorl, fields: dict, message: str) -> None:
    refused(xorl.post("optim_step", model_id="default", **fields), message)


def test_a_step_takes_what_the_model_was_made_with(xorl: Xorl, payloads: Payloads) -> None:
    config = {"learning_rate": 2e-3, "betas": [0.8, 0.9], "weight_decay": 0.1}
    xorl.done("create_model", model_id="mine", optimizer_config=config)
    xorl.done("optim_step", model_id="mine")
    xorl.done("optim_step", model_id="mine", adam_params={"learning_rate": 5e-3, "beta1": 0.7})
    xorl.done("optim_step", model_id="mine", learning_rate=1e-2)
    own = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1}
    assert [payload.adam for payload in payloads.of("mine")[1:]] == [
        AdamParams(learning_rate=2e-3, **own),
        AdamParams(learning_rate=5e-3, **{**own, "beta1": 0.7}),
        AdamParams(learning_rate=1e-2, **own),
    ]


def test_a_request_sent_again_before_its_future_was_polled_is_the_same_job(xorl: Xorl) -> None:
    xorl.make("mine")
    body = {"model_id": "mine", "seq_id": 1, "forward_backward_input": INPUT}
    first, second = xorl.ok("forward_backward", **body), xorl.ok("forward_backward", **body)
    assert first == second
    assert "error" not in xorl.outcome(xorl.post("forward_backward", **body))
    assert ops(xorl, "mine") == [(0, "create_model"), (1, "forward_backward")]


def test_a_client_that_restarts_counts_from_1_and_its_requests_are_new(xorl: Xorl) -> None:
    xorl.make("mine")
    for _ in range(3):
        train(xorl, "mine", seq_id=1)
        xorl.done("optim_step", model_id="mine", seq_id=2, adam_params={"learning_rate": 1e-3})
    assert [seq for seq, _ in ops(xorl, "mine")] == list(range(7))


def test_seq_ids_decide_no_order_and_leave_no_gap(xorl: Xorl) -> None:
    xorl.make("mine")
    for seq_id in (7, 3, 900):
        train(xorl, "mine", seq_id=seq_id)
    assert [seq for seq, _ in ops(xorl, "mine")] == [0, 1, 2, 3]


def test_two_clients_of_one_model_at_once_lose_and_double_nothing(xorl: Xorl) -> None:
    xorl.make("mine")

    def client(number: int) -> None:
        for seq_id in itertools.chain(range(1, 6)):
            one = {**DATUM, "model_input": {"input_ids": [number, seq_id, 3, 4]}}
            body = {"data": [one], "loss_fn": "cross_entropy"}
            xorl.done("forward_backward", model_id="mine", seq_id=seq_id, forward_backward_input=body)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    assert [seq for seq, _ in ops(xorl, "mine")] == list(range(21))


def test_a_failed_job_tells_why_with_200(xorl: Xorl) -> None:
    xorl.make("mine")
    response = xorl.post("optim_step", model_id="mine", learning_rate=666.0)
    answer = xorl.outcome(response)
    assert answer == {"error": "the gradient is not finite", "category": "user", "code": "non_finite"}


def test_a_job_that_is_not_done_is_answered_with_200_try_again(xorl: Xorl) -> None:
    xorl.make("mine")
    xorl.rig.worker.pause()
    request_id = xorl.ok("optim_step", model_id="mine")["request_id"]
    answer = xorl.ok("retrieve_future", request_id=request_id)
    assert answer == {
        "type": "try_again",
        "request_id": request_id,
        "queue_state": "active",
        "queue_state_reason": None,
    }
    xorl.rig.worker.resume()


@pytest.mark.parametrize("request_id", ["nobody:0", "default:99", "a:b:c"])
def test_an_unknown_future_is_404(xorl: Xorl, request_id: str) -> None:
    refused(xorl.post("retrieve_future", request_id=request_id), "there is no future", status=404)


def test_a_result_can_be_read_again(xorl: Xorl) -> None:
    train(xorl)
    first, second = (xorl.ok("retrieve_future", request_id="default:1") for _ in range(2))
    assert first == second


def test_a_creation_is_known_for_as_long_as_the_model_is_there(redis_url: str, engine_name: str) -> None:
    limits = Limits(delivered_ttl_s=1)
    with (
        echo_worker(redis_url, engine=engine_name, card=UNIFORM_CARD) as worker,
        api_server(redis_url, engine=engine_name, config=FAST, limits=limits) as base_url,
        httpx.Client(base_url=base_url, timeout=60) as http,
    ):
        xorl = Xorl(Rig(base_url, http, worker))
        xorl.make("mine")
        train(xorl, "mine")
        deadline = 200
        while xorl.post("retrieve_future", request_id="mine:1").status_code != 410:
            deadline -= 1
            assert deadline
            asyncio.run(asyncio.sleep(0.05))
        assert xorl.ok("retrieve_future", request_id="mine:0") == {"type": "create_model", "model_id": "mine"}
        assert xorl.make("mine") == "mine"
        dropped = xorl.ok("unload_model", model_id="mine")
        assert xorl.ok("unload_model", model_id="mine") == dropped
        for _ in range(2):
            xorl.outcome(xorl.post("unload_model", model_id="mine"))
        assert xorl.ok("create_model", model_id="mine")["request_id"] == "mine:3"


def test_a_full_queue_is_429(redis_url: str, engine_name: str) -> None:
    limits = Limits(max_queued_jobs_per_model=2)
    with (
        echo_worker(redis_url, engine=engine_name, card=UNIFORM_CARD) as worker,
        api_server(redis_url, engine=engine_name, config=FAST, limits=limits) as base_url,
        httpx.Client(base_url=base_url, timeout=60) as http,
    ):
        xorl = Xorl(Rig(base_url, http, worker))
        xorl.make("mine")
        worker.pause()
        accepted = [xorl.post("optim_step", model_id="mine") for _ in range(2)]
        full = xorl.post("optim_step", model_id="mine")
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        worker.resume()
        for response in accepted:
            xorl.outcome(response)
        assert xorl.ok("optim_step", model_id="mine")["request_id"] == "mine:3"


def test_a_body_over_the_cap_is_refused_before_it_is_read(xorl: Xorl) -> None:
    raw = b'{"model_id": "default", "forward_backward_input": "' + b"x" * FAST.max_json_body_bytes + b'"}'
    response = xorl.rig.http.post("/api/v1/forward_backward", content=raw)
    refused(response, "the limit of this call", status=413)
    small = b'{"model_id": "default", "adam_params": "' + b"x" * 300_000 + b'"}'
    refused(xorl.rig.http.post("/api/v1/optim_step", content=small), "the limit of this call", status=413)


def test_both_dialects_train_side_by_side(xorl: Xorl) -> None:
    tinker = xorl.rig.model()
    train(xorl, "default")
    assert xorl.rig.result(xorl.rig.ok(xorl.rig.train(tinker, 1))["request_id"])["metrics"]["loss:sum"]
    assert xorl.rig.result(xorl.rig.ok(xorl.rig.step(tinker, 2))["request_id"])["metrics"]["grad_norm"] == 0.0
    assert [seq for seq, _ in ops(xorl, tinker)] == [0, 1, 2]


def test_ids_of_other_tenants_cannot_be_named(xorl: Xorl) -> None:
    model = ModelId(f"{TenantId('acme')}:mine")
    response = xorl.post("optim_step", model_id=model)
    assert response.status_code == 400
    assert ops(xorl, model) == []
