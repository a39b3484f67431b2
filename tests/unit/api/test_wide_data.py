"""Several targets per token, sparse matrices and thresholds of single tokens, as the SDK's own conversion writes them."""

import msgspec
import numpy as np
import pytest
import torch
from tests.support.bodies import json_datum, json_request, proto_datum, proto_request
from tests.support.cards import MAX_CANDIDATES, UNIFORM_CARD
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from gradstream.api.tinker import sparse, training_json, training_proto
from gradstream.api.tinker.proto import wire_pb2
from gradstream.api.training_data import to_payload
from gradstream.shared.errors import InvalidRequest, PayloadTooLarge, Unsupported
from gradstream.shared.wire import ForwardBackward


def payload_of(raw: bytes) -> ForwardBackward:
    message = training_proto.parse_request(raw, max_datums=100)
    return to_payload(training_proto.training_data(message), UNIFORM_CARD)


def through_the_sdk(datums: list[types.Datum], loss_fn: str = "cross_entropy", config: dict | None = None):
    request = ForwardBackwardRequest(
        forward_backward_input=ForwardBackwardInput(data=datums, loss_fn=loss_fn, loss_fn_config=config),
        model_id="m",
        seq_id=1,
    )
    return payload_of(forward_backward_request_to_proto(request).SerializeToString())


def soft(targets: torch.Tensor, weights: torch.Tensor) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(range(len(targets)))),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )


def test_dense_tokens_beside_sparse_signed_weights_become_columns_of_the_same_shape() -> None:
    targets = torch.arange(1, 25).reshape(6, 4)
    weights = torch.zeros(6, 4)
    weights[4, 1], weights[5, 3] = -0.25, 1.5
    datum = soft(targets, weights)
    assert datum.loss_fn_inputs["target_tokens"].sparse_crow_indices is None
    assert datum.loss_fn_inputs["weights"].sparse_crow_indices is not None

    payload = through_the_sdk([datum, soft(targets[:2], weights[4:])])

    assert payload.inputs["target_tokens"].trailing == payload.inputs["weights"].trailing == (4,)
    for name, want in (("target_tokens", targets), ("weights", weights)):
        assert payload.inputs[name].arrays()[0].tolist() == want.tolist()
    assert payload.inputs["weights"].arrays()[1].tolist() == weights[4:].tolist()


def test_sparse_tokens_hold_zero_where_nothing_is_stored() -> None:
    targets = torch.zeros(5, 4, dtype=torch.int64)
    targets[4, 2] = 7
    datum = soft(targets, torch.ones(5, 4))
    assert datum.loss_fn_inputs["target_tokens"].sparse_crow_indices == [0, 0, 0, 0, 0, 1]
    assert through_the_sdk([datum]).inputs["target_tokens"].arrays()[0].tolist() == targets.tolist()


def test_absent_weights_of_wide_targets_are_one_everywhere() -> None:
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [[1, 2], [3, 4]]}
    )
    wide = soft(torch.tensor([[5, 6]]), torch.tensor([[0.5, 0.25]]))
    assert through_the_sdk([datum, wide]).inputs["weights"].values().tolist() == [[1, 1], [1, 1], [0.5, 0.25]]


def test_a_datum_without_its_own_thresholds_has_those_of_the_call() -> None:
    inputs = {"target_tokens": [1], "logprobs": [-1.0], "advantages": [1.0]}
    datums = [
        types.Datum(model_input=types.ModelInput.from_ints([1]), loss_fn_inputs=inputs),
        types.Datum(
            model_input=types.ModelInput.from_ints([1]), loss_fn_inputs={**inputs, "clip_low_threshold": [0.25]}
        ),
    ]
    payload = through_the_sdk(datums, "ppo", {"clip_low_threshold": 0.5})
    assert payload.inputs["clip_low_threshold"].values().tolist() == [0.5, 0.25]
    assert payload.loss_config == {"clip_low_threshold": 0.5}
    assert "clip_low_threshold" not in through_the_sdk(datums[:1], "ppo").inputs
    low = {**inputs, "clip_low_threshold": [-0.5]}
    with pytest.raises(InvalidRequest, match=r"clip_low_threshold\[0\]: -0.5 is not between 0.0 and inf"):
        through_the_sdk([types.Datum(model_input=types.ModelInput.from_ints([1]), loss_fn_inputs=low)], "ppo")


def test_provenance_spans_change_nothing() -> None:
    datum = soft(torch.tensor([1, 2]), torch.tensor([1.0, 1.0]))
    spans = [types.SampledProvenanceSpan(sequence_id="s:0:0", length=2)]
    assert through_the_sdk([datum.with_provenance(spans, spans)]) == through_the_sdk([datum])


def test_a_known_loss_that_is_not_had_is_refused_with_the_engines_reason() -> None:
    with pytest.raises(Unsupported, match="'stable_reinforce' is not offered here; use ppo"):
        through_the_sdk([soft(torch.tensor([1]), torch.tensor([1.0]))], "stable_reinforce")


def csr(values: list, crow: list[int], col: list[int], shape: list[int]) -> wire_pb2.Datum:
    """A datum of three tokens whose weights [3, 2] are given as CSR."""
    datum = proto_datum([1, 2, 3], {"target_tokens": ([[1, 2], [3, 4], [5, 6]], "int64")})
    tensor = datum.loss_fn_inputs["weights"]
    tensor.dtype = wire_pb2.DTYPE_FLOAT32
    tensor.shape.extend(shape)
    tensor.sparse_csr.values = np.asarray(values, dtype="<f4").tobytes()
    tensor.sparse_csr.crow_indices = np.asarray(crow, dtype="<i8").tobytes()
    tensor.sparse_csr.col_indices = np.asarray(col, dtype="<i8").tobytes()
    return datum


def as_json(datum: wire_pb2.Datum) -> dict:
    tensor = datum.loss_fn_inputs["weights"]
    body = json_datum([1, 2, 3])
    body["loss_fn_inputs"] = {
        "target_tokens": {"data": [1, 2, 3, 4, 5, 6], "dtype": "int64", "shape": [3, 2]},
        "weights": {
            "data": np.frombuffer(tensor.sparse_csr.values, dtype="<f4").tolist(),
            "dtype": "float32",
            "shape": list(tensor.shape),
            "sparse_crow_indices": np.frombuffer(tensor.sparse_csr.crow_indices, dtype="<i8").tolist(),
            "sparse_col_indices": np.frombuffer(tensor.sparse_csr.col_indices, dtype="<i8").tolist(),
        },
    }
    return json_request("m", 1, [body])


def from_json(body: dict) -> ForwardBackward:
    parsed = training_json.parse_forward_backward(msgspec.json.encode(body))
    data = training_json.training_data(parsed.forward_backward_input, backward=True, max_datums=100)
    return to_payload(data, UNIFORM_CARD)


def test_json_and_protobuf_of_a_sparse_matrix_give_the_same_payload() -> None:
    datum = csr([0.5, -2.0, 3.0], [0, 1, 1, 3], [1, 0, 1], [3, 2])
    payload = payload_of(proto_request("m", 1, [datum]).SerializeToString())
    assert payload.inputs["weights"].values().tolist() == [[0, 0.5], [0, 0], [-2, 3]]
    assert from_json(as_json(datum)) == payload


BAD = {
    "one dimension": (csr([1], [0, 1], [0], [3]), r"needs its shape \[T, K\]; it came with \[3\]"),
    "negative size": (csr([1], [0, 1], [0], [3, -2]), r"came with \[3, -2\]"),
    "short crow": (csr([1], [0, 1], [0], [3, 2]), r"crow_indices has 2 entries; shape \[3, 2\] needs 4"),
    "no crow": (csr([], [], [], [3, 2]), "crow_indices has 0 entries"),
    "crow falls": (csr([1, 1], [0, 2, 1, 2], [0, 1], [3, 2]), r"crow_indices\[2\] is 1 after 2; it must not fall"),
    "crow jumps around": (
        csr([], [0, 2**63 - 1, -(2**63), 0], [], [3, 2]),
        r"crow_indices\[2\] is -9223372036854775808",
    ),
    "crow starts late": (csr([1], [1, 1, 1, 1], [0], [3, 2]), "crow_indices goes from 1 to 1"),
    "crow ends early": (csr([1, 1], [0, 0, 0, 1], [0, 1], [3, 2]), "from 0 to 1; it must go from 0 to .* 2"),
    "fewer columns than values": (csr([1, 1], [0, 1, 1, 2], [0], [3, 2]), "1 col_indices for 2 values"),
    "column out of range": (csr([1], [0, 1, 1, 1], [2], [3, 2]), r"col_indices\[0\] is 2; columns are 0 to 1"),
    "negative column": (csr([1], [0, 1, 1, 1], [-1], [3, 2]), r"col_indices\[0\] is -1"),
    "repeated column": (csr([1, 1], [0, 2, 2, 2], [1, 1], [3, 2]), r"col_indices\[1\] is 1 after 1; columns must rise"),
    "other rows than tokens": (csr([1], [0, 1, 1], [0], [2, 2]), r"weights: shape \[2, 2\]; it must be \[3, 2\]"),
    "other columns than targets": (csr([1], [0, 1, 1, 1], [0], [3, 5]), r"shape \[3, 5\]; it must be \[3, 2\]"),
    "NaN": (csr([np.nan], [0, 0, 0, 1], [1], [3, 2]), r"data\[0\]\.loss_fn_inputs\.weights\[5\]: the value nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sparse_matrix_that_is_none_is_refused_by_place(case: str) -> None:
    datum, message = BAD[case]
    with pytest.raises(InvalidRequest, match=message):
        payload_of(proto_request("m", 1, [datum]).SerializeToString())
    if case != "NaN":
        with pytest.raises(InvalidRequest, match=message):
            from_json(as_json(datum))


def test_a_few_bytes_cannot_ask_for_much_memory() -> None:
    bomb = csr([1], [0, 1, 1, 1], [0], [3, 2**60])
    with pytest.raises(PayloadTooLarge, match=f"more than {sparse.MAX_DENSE_VALUES} values when dense"):
        payload_of(proto_request("m", 1, [bomb]).SerializeToString())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[[1]]], r"target_tokens: shape \[1, 1, 1\]; cross_entropy takes \[T\] or \[T, K\] with K from 1 to 8"),
        ([[1] * (MAX_CANDIDATES + 1)], r"shape \[1, 9\]"),
        ([[]], r"shape \[1, 0\]"),
    ],
)
def test_targets_of_another_shape_are_refused(targets: list, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        payload_of(proto_request("m", 1, [proto_datum([1], {"target_tokens": (targets, "int64")})]).SerializeToString())


def test_datums_of_one_call_have_the_same_number_of_targets_per_token() -> None:
    narrow, wide = (soft(torch.ones(1, k, dtype=torch.int64), torch.ones(1, k)) for k in (2, 3))
    with pytest.raises(InvalidRequest, match=r"data\[1\].*shape \[1, 3\], but earlier datums have \[T, 2\]"):
        through_the_sdk([narrow, wide])


def test_a_loss_of_one_target_refuses_several() -> None:
    inputs = {"target_tokens": ([[1, 2]], "int64"), "logprobs": ([-1.0], "float32"), "advantages": ([1.0], "float32")}
    with pytest.raises(InvalidRequest, match=r"target_tokens: shape \[1, 2\]; ppo takes \[T\]"):
        payload_of(proto_request("m", 1, [proto_datum([1], inputs)], loss_fn="ppo").SerializeToString())
