"""Datums of both encodings become the same payload, or an error that names the field."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from tests.support.bodies import good_datum, json_datum, json_request, proto_datum, proto_request, proto_tensor
from tests.support.cards import CONTEXT_TOKENS, UNIFORM_CARD, VOCAB_SIZE

from gradstream.api.tinker import training_json, training_proto
from gradstream.api.tinker.proto import wire_pb2
from gradstream.api.training_data import DatumColumns, TrainingData, to_payload
from gradstream.shared import codec
from gradstream.shared.errors import InvalidRequest, PayloadTooLarge, Unsupported
from gradstream.shared.wire import IGNORE, ForwardBackward


def from_proto(request: wire_pb2.ForwardBackwardRequest) -> ForwardBackward:
    message = training_proto.parse_request(request.SerializeToString(), max_datums=100)
    return to_payload(training_proto.training_data(message), UNIFORM_CARD)


def from_json(body: dict) -> ForwardBackward:
    parsed = training_json.parse_forward_backward(msgspec.json.encode(body))
    data = training_json.training_data(parsed.forward_backward_input, backward=True, max_datums=100)
    return to_payload(data, UNIFORM_CARD)


def test_protobuf_and_json_of_the_same_request_give_the_same_bytes() -> None:
    lengths = [3, 1, 7]
    tokens = [list(range(n)) for n in lengths]
    proto = from_proto(proto_request("m", 1, [good_datum(t) for t in tokens]))
    assert codec.encode(proto) == codec.encode(from_json(json_request("m", 1, [json_datum(t) for t in tokens])))
    assert proto.tokens.lengths_array().tolist() == lengths
    assert (proto.tokens.dtype, proto.inputs["target_tokens"].dtype) == ("int32", "int32")
    assert [a.tolist() for a in proto.inputs["target_tokens"].arrays()] == tokens


def test_the_order_of_names_on_the_wire_does_not_change_the_bytes() -> None:
    datum = json_datum()
    turned = {**datum, "loss_fn_inputs": dict(reversed(datum["loss_fn_inputs"].items()))}
    assert codec.encode(from_json(json_request("m", 1, [datum]))) == codec.encode(
        from_json(json_request("m", 1, [turned]))
    )


def test_text_chunks_are_joined() -> None:
    datum = good_datum([5, 6, 7])
    del datum.model_input[:]
    for part in ([5], [6, 7]):
        datum.model_input.add().encoded_text.tokens = np.asarray(part, dtype="<i4").tobytes()
    assert from_proto(proto_request("m", 1, [datum])).tokens.values().tolist() == [5, 6, 7]


def test_an_absent_optional_input_takes_its_default_beside_datums_that_have_it() -> None:
    without = proto_datum([1, 2], {"target_tokens": ([1, 2], "int64")})
    payload = from_proto(proto_request("m", 1, [good_datum([1]), without]))
    assert payload.inputs["weights"].values().tolist() == [0.5, 1.0, 1.0]


def test_an_optional_input_that_nobody_sends_is_left_out() -> None:
    without = proto_datum([1, 2], {"target_tokens": ([1, 2], "int64")})
    assert set(from_proto(proto_request("m", 1, [without])).inputs) == {"target_tokens"}


def test_whole_weights_become_floats_and_bfloat16_is_widened() -> None:
    inputs = {"target_tokens": ([1, 2], "int32"), "weights": ([1, 0], "int64")}
    assert from_proto(proto_request("m", 1, [proto_datum([1, 2], inputs)])).inputs["weights"].values().tolist() == [
        1,
        0,
    ]
    half = good_datum([1, 2])
    half.loss_fn_inputs["weights"].dense = np.asarray([0x3FC0, 0xBF80], dtype="<u2").tobytes()
    half.loss_fn_inputs["weights"].dtype = wire_pb2.DTYPE_BFLOAT16
    assert from_proto(proto_request("m", 1, [half])).inputs["weights"].values().tolist() == [1.5, -1.0]


def test_loss_config_v2_wins_over_the_legacy_map() -> None:
    inputs = {"target_tokens": ([1], "int64"), "logprobs": ([-1.0], "float32"), "advantages": ([1.0], "float32")}
    request = proto_request(
        "m", 1, [proto_datum([1], inputs)], loss_fn="ppo", loss_fn_config={"clip_low_threshold": 0.5}
    )
    request.loss_fn_config_v2["clip_low_threshold"].number = 0.25
    assert from_proto(request).loss_config == {"clip_low_threshold": 0.25}


def with_input(name: str, values: object, dtype: str) -> wire_pb2.Datum:
    datum = good_datum()
    datum.loss_fn_inputs[name].CopyFrom(proto_tensor(values, dtype))
    return datum


def edited(edit: Callable[[wire_pb2.Datum], object]) -> wire_pb2.Datum:
    datum = good_datum()
    edit(datum)
    return datum


def add_image(datum: wire_pb2.Datum) -> None:
    datum.model_input.add().image.data = b"png"


BAD_DATUMS = {
    "token above the vocabulary": (
        good_datum([1, VOCAB_SIZE]),
        rf"data\[1\]\.model_input\[1\]: token id {VOCAB_SIZE} is outside the vocabulary; ids are 0 to {VOCAB_SIZE - 1}",
    ),
    "negative token": (good_datum([-1, 2]), r"data\[1\]\.model_input\[0\]: token id -1"),
    "target above the vocabulary": (
        with_input("target_tokens", [1, 2, 10**12], "int64"),
        r"data\[1\]\.loss_fn_inputs\.target_tokens\[2\]: token id 1000000000000",
    ),
    "target that is another one in 32 bits": (
        with_input("target_tokens", [1, 2**32 + 1, 2], "int64"),
        r"data\[1\]\.loss_fn_inputs\.target_tokens\[1\]: token id 4294967297",
    ),
    "negative target": (
        with_input("target_tokens", [1, 2, -7], "int64"),
        r"data\[1\]\.loss_fn_inputs\.target_tokens\[2\]: token id -7",
    ),
    "NaN weight": (
        with_input("weights", [1.0, np.nan, 0], "float32"),
        r"data\[1\].*weights\[1\]: the value nan is not finite",
    ),
    "infinite weight": (with_input("weights", [np.inf, 1, 0], "float32"), r"data\[1\].*weights\[0\]: the value inf"),
    "too few weights": (
        with_input("weights", [1.0], "float32"),
        r"data\[1\].*weights: 1 values, but model_input has 3",
    ),
    "fractions as ids": (
        with_input("target_tokens", [1.0, 2, 3], "float32"),
        r"target_tokens: dtype float32; it must be int64",
    ),
    "matrix": (with_input("weights", [[1.0], [1.0], [1.0]], "float32"), r"data\[1\].*weights: shape \[3, 1\]"),
    "unknown input": (
        with_input("mask", [1.0, 1, 1], "float32"),
        r"does not read mask; it reads target_tokens, weights",
    ),
    "missing input": (proto_datum([1], {}), r"data\[1\]\.loss_fn_inputs\.target_tokens: missing"),
    "no tokens": (good_datum([]), r"data\[1\]\.model_input: has no tokens"),
    "too long": (good_datum([1] * (CONTEXT_TOKENS + 1)), rf"{CONTEXT_TOKENS + 1} tokens are more than the context"),
    "image": (edited(add_image), r"data\[1\]\.model_input\.chunks\[1\]: image chunks are not supported"),
    "empty chunk": (edited(lambda d: d.model_input.add()), r"chunks\[1\]: has no content"),
    "odd token bytes": (
        edited(lambda d: setattr(d.model_input[0].encoded_text, "tokens", b"abc")),
        r"data\[1\].*tokens: 3 bytes are no whole number of int32",
    ),
    "odd tensor bytes": (
        edited(lambda d: setattr(d.loss_fn_inputs["weights"], "dense", b"abc")),
        r"weights: 3 bytes are no whole number",
    ),
    "no dtype": (edited(lambda d: setattr(d.loss_fn_inputs["weights"], "dtype", 0)), r"weights: dtype 0 is not known"),
    "shape that does not fit": (
        edited(lambda d: d.loss_fn_inputs["weights"].shape.append(2)),
        r"weights: shape \[3, 2\] does not hold its 3 values",
    ),
    "sparse": (
        edited(lambda d: d.loss_fn_inputs["weights"].sparse_csr.SetInParent()),
        r"weights: a sparse tensor needs its shape \[T, K\]; it came with \[3\]",
    ),
}


@pytest.mark.parametrize("case", BAD_DATUMS)
def test_a_bad_datum_is_refused_with_its_place(case: str) -> None:
    datum, message = BAD_DATUMS[case]
    with pytest.raises((InvalidRequest, Unsupported), match=message):
        from_proto(proto_request("m", 1, [good_datum(), datum]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param(
            {"loss_fn": "dpo"}, "loss_fn: 'dpo' is not offered here; choose one of cross_entropy, ppo", id="loss"
        ),
        pytest.param({"loss_fn_config": {"beta": 1.0}}, "loss_fn_config: cross_entropy has no beta", id="param"),
        pytest.param({"data": []}, "data: there are no datums", id="no datums"),
    ],
)
def test_a_bad_request_field_is_refused_by_name(fields: dict, message: str) -> None:
    request = proto_request("m", 1, fields.pop("data", [good_datum()]), **fields)
    with pytest.raises(InvalidRequest, match=message):
        from_proto(request)


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, np.inf])
def test_a_loss_param_out_of_its_bounds_is_refused(value: float) -> None:
    inputs = {"target_tokens": ([1], "int64"), "logprobs": ([-1.0], "float32"), "advantages": ([1.0], "float32")}
    request = proto_request(
        "m", 1, [proto_datum([1], inputs)], loss_fn="ppo", loss_fn_config={"clip_low_threshold": value}
    )
    with pytest.raises(InvalidRequest, match=r"loss_fn_config.clip_low_threshold: .* is not between 0.0 and 1.0"):
        from_proto(request)


def test_every_truncation_of_a_message_is_refused_or_lacks_what_was_cut() -> None:
    whole = proto_request("model-a", 7, [good_datum(), good_datum([4, 5])]).SerializeToString()
    for end in range(len(whole)):
        try:
            message = training_proto.parse_request(whole[:end], max_datums=100)
            to_payload(training_proto.training_data(message), UNIFORM_CARD)
        except (InvalidRequest, Unsupported):
            continue
        assert not message.loss_fn or len(message.data) < 2 or end == len(whole)


@pytest.mark.parametrize(
    "raw", [b"\xff" * 40, b"\x0a", b"\x0a\xff\xff\xff\xff\x0f", b"{}", b"\x1a\x05\xff\xff\xff\xff\xff"]
)
def test_bytes_that_are_no_message_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="body: not a ForwardBackwardRequest protobuf"):
        training_proto.parse_request(raw, max_datums=100)


def nested(inner: bytes, *tags: int) -> bytes:
    """inner inside one message field after the other, the last tag outermost."""
    for tag in tags:
        length = len(inner)
        size = bytearray()
        while length > 0x7F:
            size.append(length & 0x7F | 0x80)
            length >>= 7
        inner = bytes([tag << 3 | 2]) + bytes(size) + bytes([length]) + inner
    return inner


MANY = 2_000_000
BOMBS = {
    "datums": b"\x1a\x00" * MANY,
    "chunks": nested(b"\x0a\x00" * MANY, 3),
    "inputs": nested(b"\x12\x00" * MANY, 3),
    "texts of one chunk": nested(b"\x0a\x00" * MANY, 1, 3),
    "spans": nested(b"\x1a\x00" * MANY, 3),
    "loss params": b"\x2a\x00" * MANY,
    "sizes of a shape": nested(b"\x20\x01" * MANY, 2, 2, 3),
    "packed sizes of a shape": nested(bytes(MANY), 4, 2, 2, 3),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_of_tiny_fields_is_refused_before_they_are_built(case: str) -> None:
    with pytest.raises((PayloadTooLarge, InvalidRequest), match=r"more than 6400 protobuf fields|takes 256 at most"):
        training_proto.parse_request(BOMBS[case], max_datums=100)


def test_more_datums_than_allowed_are_refused() -> None:
    raw = proto_request("m", 1, [good_datum()] * 101).SerializeToString()
    with pytest.raises(PayloadTooLarge, match="data: 101 datums; one call takes at most 100"):
        training_proto.parse_request(raw, max_datums=100)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(b"", "not valid JSON", id="empty"),
        pytest.param(b"{", "not valid JSON", id="truncated"),
        pytest.param(b"[" * 100_000, "body: ", id="depth bomb"),
        pytest.param(
            b'{"forward_backward_input": {"data": [' + b"[]," * 100_000 + b"[]]}}",
            r"\$.forward_backward_input.data",
            id="lists",
        ),
        pytest.param(b'{"model_id": "m"}', "missing required field `forward_backward_input`", id="missing"),
        pytest.param(b'{"model_id": "m", "extra": 1}', "unknown field `extra`", id="unknown"),
        pytest.param(b'{"model_id": NaN}', r"not valid JSON .*no NaN and no Infinity, send finite numbers", id="NaN"),
        pytest.param(b"\xff\xfe", "not valid JSON", id="not text"),
    ],
)
def test_a_json_body_that_is_wrong_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        training_json.parse_forward_backward(raw)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("target_tokens", {"data": [1, 2.5, 3], "dtype": "int64"}, "it holds fractions"),
        ("target_tokens", {"data": [1, 2**70, 3], "dtype": "int64"}, "does not fit in int64"),
        ("weights", {"data": [1, 1e39, 3], "dtype": "float32"}, "the value inf is not finite"),
        ("weights", {"data": [1, 2, 3], "dtype": "float32", "shape": [2, 2]}, r"shape \[2, 2\] does not hold its 3"),
        ("weights", {"data": [1], "dtype": "float32", "sparse_crow_indices": [0]}, "send both or neither"),
    ],
)
def test_a_bad_json_tensor_is_refused_by_name(name: str, tensor: dict, message: str) -> None:
    datum = json_datum()
    datum["loss_fn_inputs"][name] = tensor
    with pytest.raises((InvalidRequest, Unsupported), match=rf"data\[0\]\.loss_fn_inputs\.{name}.*{message}"):
        from_json(json_request("m", 1, [datum]))


def test_a_json_image_is_refused_by_name() -> None:
    datum = json_datum()
    datum["model_input"]["chunks"].append({"type": "image", "data": "AAAA", "format": "png"})
    with pytest.raises(Unsupported, match=r"data\[0\]\.model_input\.chunks\[1\]: image chunks"):
        from_json(json_request("m", 1, [datum]))


def test_columns_may_have_targets_to_ignore_where_the_dialect_has_them():
    datums = DatumColumns(
        lengths=[2, 1],
        tokens=np.array([4, 5, 6], dtype="<i4").tobytes(),
        inputs={
            "target_tokens": (np.dtype("<i8"), np.array([1, IGNORE, 3], dtype="<i8").tobytes()),
            "weights": (np.dtype("<f4"), np.ones(3, dtype="<f4").tobytes()),
        },
    )
    payloads = [
        to_payload(
            TrainingData(datums=each, loss_fn="cross_entropy", loss_config={}, backward=True, may_ignore=True),
            UNIFORM_CARD,
        )
        for each in (datums, datums.datums())
    ]
    assert payloads[0] == payloads[1]
    assert payloads[0].inputs["target_tokens"].values().tolist() == [1, IGNORE, 3]
