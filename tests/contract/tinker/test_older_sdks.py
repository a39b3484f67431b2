"""The JSON that SDK 0.16.1 and 0.24.1 send gets the JSON that they read.

0.16.1 leaves out every field that has its default, the type of a text chunk included, and makes a model from a checkpoint with
weights_info, create_model and load_weights; 0.24.1 writes shapes and asks for client/config.
"""

import math

import pytest
from tests.support.bodies import json_datum, json_request
from tests.support.cards import MODEL_NAME, VOCAB_SIZE
from tests.support.rig import Rig

LOGPROB = pytest.approx(-math.log(VOCAB_SIZE), rel=1e-6)


def bare_datum(tokens: list[int]) -> dict:
    datum = json_datum(tokens)
    del datum["model_input"]["chunks"][0]["type"]
    return datum


@pytest.mark.parametrize("make", [bare_datum, json_datum], ids=["0.16.1", "0.24.1"])
def test_json_training_gets_json_results(rig: Rig, make: object) -> None:
    model = rig.model()
    data = [make([1, 2, 3]), make([4])]  # type: ignore[operator]
    promise = rig.ok(rig.post("forward_backward", json_request(model, 1, data)))
    assert promise == {"request_id": f"{model}:1", "model_id": model}
    result = rig.result(promise["request_id"])
    assert result["metrics"]["loss:sum"] == pytest.approx(2 * math.log(VOCAB_SIZE), rel=1e-6)
    assert [out["logprobs"] for out in result["loss_fn_outputs"]] == [
        {"data": [LOGPROB] * 3, "dtype": "float32", "shape": [3]},
        {"data": [LOGPROB], "dtype": "float32", "shape": [1]},
    ]
    forward = rig.ok(rig.post("forward", json_request(model, 2, data, forward=True)))
    assert rig.result(forward["request_id"]) == result
    assert rig.worker.seen[-1] == (model, 2, "forward")


def test_optim_step_and_checkpoints_without_the_newer_fields(rig: Rig) -> None:
    model = rig.model()
    adam = {"learning_rate": 0.001}
    step = rig.ok(rig.post("optim_step", {"adam_params": adam, "model_id": model, "seq_id": 1}))
    assert rig.result(step["request_id"]) == {"metrics": {"grad_norm": 0.0}}
    saved = rig.ok(rig.post("save_weights", {"model_id": model, "path": "ck", "seq_id": 2}))
    path = rig.result(saved["request_id"])["path"]
    assert path == f"tinker://{model}/weights/ck"
    loaded = rig.ok(rig.post("load_weights", {"model_id": model, "path": path, "optimizer": True, "seq_id": 3}))
    assert rig.result(loaded["request_id"])["path"] == path
    info = rig.ok(rig.post("weights_info", {"tinker_path": path}))
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == (MODEL_NAME, True, 8)


def test_a_save_without_a_name_is_named_after_its_seq_id(rig: Rig) -> None:
    model = rig.model()
    saved = rig.ok(rig.post("save_weights", {"model_id": model, "seq_id": 1}))
    assert rig.result(saved["request_id"])["path"] == f"tinker://{model}/weights/000001"


def test_unload_model_has_no_seq_id_and_one_future(rig: Rig) -> None:
    model = rig.model()
    promise = rig.ok(rig.post("unload_model", {"model_id": model, "type": "unload_model"}))
    assert rig.ok(rig.post("unload_model", {"model_id": model})) == promise
    assert rig.result(promise["request_id"]) == {"type": "unload_model", "model_id": model}
    assert rig.step(model, 1).status_code == 404


def test_sampling_with_a_session_gets_json(rig: Rig) -> None:
    made = {"session_id": rig.session(), "sampling_session_seq_id": 0, "base_model": MODEL_NAME}
    sampler = rig.ok(rig.post("create_sampling_session", made))["sampling_session_id"]
    body = {
        "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 2, "seed": 1},
        "num_samples": 2,
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 1,
        "sampling_session_id": sampler,
        "seq_id": 42407083000000000,
    }
    promise = rig.ok(rig.post("asample", body))
    request_id = f"{sampler}:42407083000000000"
    assert promise == {"request_id": request_id, "sample_sequence_ids": [f"{request_id}:0", f"{request_id}:1"]}
    result = rig.result(request_id)
    assert [sequence["logprobs"] for sequence in result["sequences"]] == [[LOGPROB] * 2] * 2
    assert result["prompt_logprobs"] == [None, LOGPROB, LOGPROB]
    assert rig.ok(rig.post("asample", body)) == promise


def test_sampling_without_a_session_is_known_by_its_idempotency_key(rig: Rig) -> None:
    model = rig.model()
    saved = rig.ok(rig.post("save_weights_for_sampler", {"model_id": model, "path": "s", "seq_id": 1}))
    path = rig.result(saved["request_id"])["path"]
    body = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 1}, "model_path": path}
    key = {"X-Idempotency-Key": "abc"}
    first = rig.ok(rig.post("asample", body, headers=key))
    assert rig.ok(rig.post("asample", body, headers=key)) == first
    assert rig.ok(rig.post("asample", body)) != first
    assert len(rig.result(first["request_id"])["sequences"]) == 1
    unknown = rig.post("asample", {**body, "model_path": f"tinker://{model}/sampler_weights/nothing"})
    assert unknown.status_code == 404
