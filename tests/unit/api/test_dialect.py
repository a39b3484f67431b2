"""Which dialect a body speaks, where both have the path."""

import json
import uuid

import pytest

from gradstream.api.dialect import decides_for_xorl

SESSION = str(uuid.uuid4())
TINKER_MODEL = f"{SESSION}:train:0"

XORL: list[tuple[str, dict]] = [
    ("forward_backward", {"model_id": "default", "forward_backward_input": {}}),
    ("forward_backward", {"forward_backward_input": {}}),
    ("forward", {"session_id": "mine", "forward_input": {}}),
    ("optim_step", {"model_id": "my-adapter_1", "seq_id": 1, "adam_params": {}}),
    ("optim_step", {"session_id": SESSION}),
    ("create_model", {"model_id": "mine", "base_model": "b", "lora_config": {"rank": 8}}),
    ("create_model", {"session_id": "mine", "base_model": "b"}),
    ("create_model", {"base_model": "b"}),
    ("save_weights", {"model_id": "mine", "path": None}),
    ("load_weights", {"model_id": "mine", "path": "xorl://mine/weights/a", "optimizer": True}),
    ("weights_info", {"xorl_path": "xorl://mine/weights/a"}),
    ("retrieve_future", {"request_id": "default:0"}),
    ("retrieve_future", {"request_id": "acme:default:17"}),
    ("unload_model", {"model_id": "mine", "type": "unload_model"}),
    ("session_heartbeat", {"session_id": "mine"}),
    ("session_heartbeat", {"model_id": "mine"}),
    ("optim_step", {"model_id": "mine", "learning_rate": float("nan")}),
    ("forward_backward", {"model_id": "mine", "forward_backward_input": [float("inf"), -float("inf")]}),
]
TINKER: list[tuple[str, dict]] = [
    ("forward_backward", {"model_id": TINKER_MODEL, "seq_id": 1, "forward_backward_input": {}}),
    ("optim_step", {"model_id": TINKER_MODEL, "seq_id": 1, "adam_params": {}}),
    ("optim_step", {"model_id": "../../x", "seq_id": 1}),
    ("optim_step", {"model_id": 17}),
    ("optim_step", {"model_id": TINKER_MODEL, "seq_id": 1, "adam_params": {"learning_rate": float("nan")}}),
    ("create_model", {"session_id": SESSION, "model_seq_id": 0, "base_model": "b", "lora_config": {"rank": 8}}),
    ("load_weights", {"model_id": TINKER_MODEL, "seq_id": 1, "path": "tinker://x/weights/a", "optimizer": True}),
    ("load_weights", {"session_id": SESSION, "model_seq_id": 0, "path": "tinker://x/weights/a", "optimizer": True}),
    ("weights_info", {"tinker_path": "tinker://x/weights/a"}),
    ("retrieve_future", {"request_id": f"{TINKER_MODEL}:3"}),
    ("retrieve_future", {"request_id": f"{SESSION}:sample:0:3"}),
    ("retrieve_future", {"request_id": "nonsense"}),
    ("session_heartbeat", {"session_id": SESSION}),
    ("create_session", {"tags": [], "user_metadata": None, "sdk_version": "0.38.0"}),
]


@pytest.mark.parametrize(("call", "body"), XORL)
def test_a_name_of_the_clients_choice_speaks_xorl(call, body):
    assert decides_for_xorl(f"/api/v1/{call}", json.dumps(body).encode())


@pytest.mark.parametrize(("call", "body"), TINKER)
def test_an_id_of_a_session_speaks_tinker(call, body):
    assert not decides_for_xorl(f"/api/v1/{call}", json.dumps(body).encode())


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"17", b"\xff\xfe", b'{"model_id": }', b"[" * 100_000])
def test_what_is_no_json_object_is_left_to_tinker(raw):
    assert not decides_for_xorl("/api/v1/optim_step", raw)
