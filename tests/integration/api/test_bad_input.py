"""Each kind of bad input gets a clear error, changes nothing, and leaves the other clients alone."""

import json
from collections.abc import Iterator

import httpx
import msgspec
import numpy as np
import pytest
import zstandard
from tests.support.bodies import good_datum, json_datum, json_request, proto_datum, proto_request, proto_tensor
from tests.support.cards import VOCAB_SIZE
from tests.support.rig import Rig

GOOD = proto_request("MODEL", 1, [good_datum()])


@pytest.fixture
def model(rig: Rig) -> Iterator[str]:
    """A model whose neighbour has work in the queue that must come out untouched."""
    session = rig.session()
    bystander = rig.model(session, number=1)
    mine = rig.model(session, number=0)
    rig.worker.pause()
    promise = rig.ok(rig.train(bystander, 1))["request_id"]
    yield mine
    rig.worker.resume()
    assert rig.result(promise)["metrics"]["loss:sum"] == pytest.approx(1.5 * np.log(VOCAB_SIZE))


def refused(response: httpx.Response, message: str, *, status: int = 400) -> None:
    assert response.status_code == status, response.text
    body = response.json()
    assert message in body["detail"]
    assert body["error"]
    assert body["category"] == "user"


def goes_on(rig: Rig, model: str, seq: int) -> None:
    """The model takes seq next, and it has run nothing of its own before."""
    rig.worker.resume()
    promise = rig.ok(rig.train(model, seq))["request_id"]
    assert "metrics" in rig.result(promise)
    assert [entry[1] for entry in rig.worker.seen if entry[0] == model] == [0, seq]


def bad_datums() -> dict[str, tuple[object, str]]:
    wrong = good_datum()
    wrong.loss_fn_inputs["target_tokens"].CopyFrom(proto_tensor([1.0, 2, 3], "float32"))
    matrix = good_datum()
    matrix.loss_fn_inputs["weights"].CopyFrom(proto_tensor([[1.0], [1.0], [1.0]], "float32"))
    short = good_datum()
    short.loss_fn_inputs["weights"].CopyFrom(proto_tensor([1.0], "float32"))
    nan = good_datum()
    nan.loss_fn_inputs["weights"].CopyFrom(proto_tensor([1.0, np.nan, 1.0], "float32"))
    infinite = good_datum()
    infinite.loss_fn_inputs["weights"].CopyFrom(proto_tensor([1.0, 1.0, -np.inf], "float32"))
    return {
        "wrong dtype": (wrong, "data[0].loss_fn_inputs.target_tokens: dtype float32; it must be int64"),
        "wrong shape": (matrix, "data[0].loss_fn_inputs.weights: shape [3, 1]"),
        "token outside the vocabulary": (good_datum([1, VOCAB_SIZE, 2]), "data[0].model_input[1]: token id 1000"),
        "lengths that disagree": (short, "data[0].loss_fn_inputs.weights: 1 values, but model_input has 3 tokens"),
        "NaN weight": (nan, "data[0].loss_fn_inputs.weights[1]: the value nan is not finite"),
        "infinite weight": (infinite, "data[0].loss_fn_inputs.weights[2]: the value -inf is not finite"),
        "missing input": (proto_datum([1], {}), "data[0].loss_fn_inputs.target_tokens: missing"),
    }


@pytest.mark.parametrize("case", bad_datums())
def test_a_bad_datum_is_refused_and_its_seq_counts_as_used(rig: Rig, model: str, case: str) -> None:
    datum, message = bad_datums()[case]
    refused(rig.train(model, 1, [datum]), message)
    goes_on(rig, model, 2)


def test_an_unknown_loss_is_refused_and_its_seq_counts_as_used(rig: Rig, model: str) -> None:
    refused(rig.train(model, 1, loss_fn="dpo"), "loss_fn: 'dpo' is not offered here; choose one of cross_entropy, ppo")
    goes_on(rig, model, 2)


def test_a_json_body_wrong_in_one_field_is_refused_and_its_seq_counts_as_used(rig: Rig, model: str) -> None:
    datum = json_datum()
    datum["model_input"]["chunks"][0]["tokens"] = ["one"]
    refused(rig.post("forward_backward", json_request(model, 1, [datum])), "tokens")
    goes_on(rig, model, 2)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("optim_step", {"adam_params": {"learning_rate": -1.0}}, "adam_params.learning_rate"),
        ("optim_step", {"adam_params": {"beta1": 1.0}}, "adam_params.beta1"),
        ("optim_step", {"adam_params": {"momentum": 0.9}}, "adam_params.momentum"),
        ("optim_step", {}, "adam_params: missing"),
        ("optim_step", {"optimizer_params": {"type": "dimuon", "learning_rate": 1.0}}, "'dimuon' is not offered"),
        ("save_weights", {"path": "../../etc"}, "path: '../../etc' cannot name a checkpoint"),
        ("save_weights", {"path": "a/b"}, "path: 'a/b'"),
        ("save_weights", {"path": "ok", "ttl_seconds": 0}, "ttl_seconds"),
        ("save_weights_for_sampler", {}, "path, sampling_session_seq_id: send exactly one"),
        ("save_weights_for_sampler", {"path": "a", "sampling_session_seq_id": 1}, "send exactly one"),
        ("load_weights", {"path": "/etc/passwd", "optimizer": True}, "path: '/etc/passwd' is not a checkpoint"),
        ("load_weights", {"path": "tinker://m/weights/../x", "optimizer": True}, "is not a checkpoint's path"),
        ("load_weights", {"path": "tinker://m/other/x", "optimizer": True}, "is a path of kind 'other'"),
        ("load_weights", {"path": "tinker://m/weights/x"}, "optimizer: Field required"),
    ],
)
def test_a_small_body_wrong_in_one_field_is_refused_and_its_seq_counts_as_used(
    rig: Rig, model: str, path: str, fields: dict, message: str
) -> None:
    refused(rig.post(path, {"model_id": model, "seq_id": 1, **fields}), message)
    goes_on(rig, model, 2)


@pytest.mark.parametrize("seq", [0, -1, 2**31 - 1])
def test_a_seq_id_out_of_range_is_refused(rig: Rig, model: str, seq: int) -> None:
    refused(rig.train(model, seq), f"seq_id: {seq} is not between 1 and")
    goes_on(rig, model, 1)


BROKEN = {
    "malformed protobuf": ({"raw": b"\xff" * 64}, 400, "body: not a ForwardBackwardRequest protobuf"),
    "truncated protobuf": ({"raw": GOOD.SerializeToString()[:-5]}, 400, "truncated"),
    "empty body": ({"raw": b""}, 400, "model_id"),
    "malformed zstd": ({"raw": b"nonsense", "content_encoding": "zstd"}, 400, "not a valid zstd frame"),
    "truncated zstd": (
        {"raw": zstandard.compress(GOOD.SerializeToString())[:-4], "content_encoding": "zstd"},
        400,
        "zstd frame is truncated",
    ),
    "zstd bomb": (
        {"raw": zstandard.compress(bytes(200 * 1024**2)), "content_encoding": "zstd"},
        413,
        "expands to more",
    ),
    "zstd of nonsense": ({"raw": zstandard.compress(b"\xff" * 64), "content_encoding": "zstd"}, 400, "body: not a"),
    "unknown encoding": ({"raw": b"x", "content_encoding": "br"}, 400, "content-encoding: 'br' is not read here"),
    "datum bomb": ({"raw": b"\x1a\x00" * 400_000}, 413, "protobuf fields; send fewer datums"),
    "too large": ({"raw": bytes(1024 * 1024 + 1)}, 413, "1048577 bytes are more than 1048576"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_body_that_cannot_be_read_changes_nothing(rig: Rig, model: str, case: str) -> None:
    options, status, message = BROKEN[case]
    refused(rig.send(**options), message, status=status)
    goes_on(rig, model, 1)


BROKEN_JSON = {
    "malformed": (b"{nonsense", 400, "not valid JSON"),
    "truncated": (json.dumps(json_request("m", 1, [json_datum()])).encode()[:-9], 400, "not valid JSON"),
    "empty": (b"", 400, "not valid JSON"),
    "depth bomb": (b"[" * 100_000, 400, "body: "),
    "list bomb": (b'{"forward_backward_input":{"data":[' + b"[]," * 100_000 + b"[]]}}", 400, "data"),
    "too large": (b" " * (512 * 1024 + 1), 413, "are more than 524288"),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_a_json_body_that_cannot_be_read_changes_nothing(rig: Rig, model: str, case: str) -> None:
    raw, status, message = BROKEN_JSON[case]
    headers = {"content-type": "application/json"}
    refused(rig.post("forward_backward", content=raw, headers=headers), message, status=status)
    goes_on(rig, model, 1)


def test_a_body_that_grows_past_its_cap_without_a_declared_length_is_cut_off(rig: Rig, model: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(64 * 1024)

    response = rig.post("forward_backward", content=endless(), headers={"content-type": "application/x-protobuf"})
    refused(response, "body: more than 1048576 bytes", status=413)
    goes_on(rig, model, 1)


def test_an_unknown_model_is_refused(rig: Rig, model: str) -> None:
    refused(rig.train("no-such-model", 1), "no-such-model", status=404)
    refused(rig.step("no-such-model", 1), "no-such-model", status=404)
    refused(rig.post("get_info", {"model_id": "no-such-model"}), "model_id: there is no model", status=404)
    refused(rig.train("../../x", 1), "model_id: '../../x' is not an id")
    goes_on(rig, model, 1)


def test_an_unknown_base_model_is_refused(rig: Rig) -> None:
    body = {"session_id": rig.session(), "model_seq_id": 0, "base_model": "gpt-9", "lora_config": {"rank": 8}}
    refused(rig.post("create_model", body), "base_model: this server does not serve 'gpt-9'; it serves tests/uniform")
    assert rig.ok(rig.post("create_model", {**body, "base_model": "uniform-alias"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_config": {"rank": 65}}, "lora_config.rank: 65 is more than 64"),
        ({"lora_config": {"rank": 0}}, "lora_config.rank"),
        ({"lora_config": {"rank": 8, "alpha": 1}}, "lora_config.alpha"),
        (
            {"lora_config": {"rank": 8, "train_attn": False, "train_mlp": False, "train_unembed": False}},
            "are all false",
        ),
        ({}, "lora_config: missing"),
        ({"lora_config": {"rank": 8}, "optimizer_config": {"type": "dimuon", "version": 1}}, "'dimuon' is not offered"),
        ({"lora_config": {"rank": 8}, "session_id": "nobody"}, "session_id: there is no session 'nobody'"),
        ({"lora_config": {"rank": 8}, "model_seq_id": -1}, "model_seq_id"),
    ],
)
def test_a_bad_create_model_is_refused_and_makes_nothing(rig: Rig, fields: dict, message: str) -> None:
    session = rig.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tests/uniform", **fields}
    refused(rig.post("create_model", body), message, status=404 if "no session" in message else 400)
    assert rig.model(session) == f"{session}:train:0"


def test_the_same_request_again_is_the_same_future_and_runs_once(rig: Rig, model: str) -> None:
    first = rig.ok(rig.train(model, 1))
    again = rig.ok(rig.train(model, 1))
    as_json = rig.ok(rig.post("forward_backward", json_request(model, 1, [json_datum()])))
    assert first == again == as_json
    rig.worker.resume()
    result = rig.result(first["request_id"])
    assert rig.ok(rig.train(model, 1)) == first
    assert rig.result(first["request_id"]) == result
    assert [entry for entry in rig.worker.seen if entry[0] == model and entry[1] == 1] == [
        (model, 1, "forward_backward")
    ]


def test_another_request_under_a_used_seq_id_is_refused(rig: Rig, model: str) -> None:
    rig.ok(rig.train(model, 1))
    refused(rig.train(model, 1, [good_datum([4, 5])]), "1")
    refused(rig.step(model, 1), "1")
    goes_on_after = rig.ok(rig.train(model, 2))
    rig.worker.resume()
    assert "metrics" in rig.result(goes_on_after["request_id"])


def test_a_refused_seq_id_cannot_be_used_again(rig: Rig, model: str) -> None:
    refused(rig.train(model, 1, loss_fn="dpo"), "loss_fn")
    refused(rig.train(model, 1), "1")
    goes_on(rig, model, 2)


def test_requests_that_arrive_out_of_order_run_in_order(rig: Rig, model: str) -> None:
    rig.worker.resume()
    promises = {seq: rig.ok(rig.train(model, seq))["request_id"] for seq in (2, 4, 3, 1)}
    for promise in promises.values():
        assert "metrics" in rig.result(promise)
    assert [seq for owner, seq, _ in rig.worker.seen if owner == model] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"sampling_session_id": "nobody"}, 404, "sampling_session_id: there is no sampler 'nobody'"),
        ({"seq_id": None}, 400, "seq_id: missing"),
        ({"seq_id": -1}, 400, "seq_id: -1"),
        ({"model_path": "tinker://a/sampler_weights/b"}, 400, "a sampling session has its own"),
        ({"prompt": {"chunks": [{"tokens": [VOCAB_SIZE], "type": "encoded_text"}]}}, 400, "prompt.tokens[0]"),
        ({"num_samples": 0}, 400, "num_samples: 0"),
        ({"sampling_params": {"max_tokens": 10**9}}, 400, "sampling_params.max_tokens"),
    ],
)
def test_a_bad_sample_is_refused(rig: Rig, fields: dict, status: int, message: str) -> None:
    session = rig.session()
    made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tests/uniform"}
    sampler = rig.ok(rig.post("create_sampling_session", made))["sampling_session_id"]
    body = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": [1], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 2},
    }
    refused(rig.post("asample", {**body, **fields}), message, status=status)
    good = rig.ok(rig.post("asample", body))
    assert len(rig.result(good["request_id"])["sequences"][0]["tokens"]) == 2


def test_every_error_body_has_the_same_fields_also_for_paths_that_there_are_not(rig: Rig) -> None:
    refused(rig.post("no_such_call", {}), "Not Found", status=404)
    refused(rig.http.get("/api/v1/create_model"), "Method Not Allowed", status=405)
    refused(rig.post("create_session", content=b"nonsense"), "body: Invalid JSON")
    refused(rig.post("create_session", content=bytes(300_000)), "300000 bytes are more than", status=413)
    assert msgspec.json.decode(rig.post("no_such_call").content).keys() == {"error", "detail", "category"}
