"""Datums read as views on the body are those that protobuf's own parser finds, whatever the bytes are."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tests.support.bodies import good_datum, proto_datum, proto_request
from tests.support.cards import UNIFORM_CARD

from gradstream.api.tinker import proto_views, training_proto
from gradstream.api.tinker.proto import wire_pb2
from gradstream.api.tinker.proto_views import usual_form
from gradstream.api.training_data import DatumArrays, DatumColumns, to_payload
from gradstream.shared import codec
from gradstream.shared.errors import UserError

_NUM_MUTATIONS = 4000


def by_protobuf(raw: bytes) -> training_proto.ParsedRequest:
    return training_proto.ParsedRequest(message=wire_pb2.ForwardBackwardRequest.FromString(raw))


def payload_of(parsed: training_proto.ParsedRequest) -> bytes:
    return codec.encode(to_payload(training_proto.training_data(parsed), UNIFORM_CARD))


def found_in(raw: bytes) -> Sequence[DatumArrays]:
    usual = usual_form(raw, max_datums=100)
    assert usual is not None
    return usual.datums.datums() if isinstance(usual.datums, DatumColumns) else usual.datums


def soft_datum() -> wire_pb2.Datum:
    """Two targets a token."""
    return proto_datum(
        [4, 5, 6], {"target_tokens": ([[1, 2], [3, 4], [5, 6]], "int64"), "weights": ([[0.5] * 2] * 3, "float32")}
    )


def requests() -> dict[str, bytes]:
    lengths = {"equal": (3, 3, 3), "varied": (3, 1, 7, 3, 100, 1), "one": (64,)}
    found = {
        name: proto_request("m", 1, [good_datum(range(n)) for n in each]).SerializeToString()
        for name, each in lengths.items()
    }
    found["soft"] = proto_request("m", 7, [soft_datum(), soft_datum()], forward_only=True).SerializeToString()
    config = {"clip_low_threshold": 0.9}
    found["config"] = proto_request("m", 7, [good_datum()], loss_fn="ppo", loss_fn_config=config).SerializeToString()
    return found


REQUESTS = requests()


@pytest.mark.parametrize("name", REQUESTS)
def test_what_sdks_write_is_read_without_protobuf_and_is_the_same_payload(name: str) -> None:
    raw = REQUESTS[name]
    usual = usual_form(raw, max_datums=100)

    assert usual is not None
    # Two targets a token are no plain column.
    assert isinstance(usual.datums, DatumColumns) == (name != "soft")
    parsed = training_proto.parse_request(raw, max_datums=100)
    assert parsed.datums is not None
    assert not parsed.message.data
    assert _outcome(raw, is_fast=True) == _outcome(raw, is_fast=False)


def test_datums_that_are_not_alike_are_views_on_the_body() -> None:
    raw = REQUESTS["soft"]
    for datum in found_in(raw):
        for array in (datum.tokens, *datum.inputs.values()):
            assert not array.flags.owndata
            assert not array.flags.writeable
            assert np.shares_memory(array, np.frombuffer(raw, dtype=np.uint8))


@pytest.mark.parametrize("name", ["equal", "varied", "one", "config"])
def test_columns_taken_apart_are_the_datums_that_protobuf_finds(name: str) -> None:
    raw = REQUESTS[name]
    expected = training_proto.training_data(by_protobuf(raw)).datums
    assert not isinstance(expected, DatumColumns)
    for ours, theirs in zip(found_in(raw), expected, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert ours.inputs.keys() == theirs.inputs.keys()
        for input_name, values in theirs.inputs.items():
            assert ours.inputs[input_name].dtype == values.dtype
            np.testing.assert_array_equal(ours.inputs[input_name], values)


# What is wrong, with words of the error; in the second of three datums.
WRONG: dict[str, tuple[Callable[[], wire_pb2.Datum], str]] = {
    "token": (lambda: good_datum([1, 10**6, 3]), r"data\[1\]\.model_input\[1\]: token id 1000000"),
    "negative token": (lambda: good_datum([1, 2, -3]), r"data\[1\]\.model_input\[2\]: token id -3"),
    "target": (
        lambda: proto_datum([1, 2, 3], {"target_tokens": ([1, 2, 2**40], "int64"), "weights": ([0.5] * 3, "float32")}),
        r"data\[1\]\.loss_fn_inputs\.target_tokens\[2\]: token id 1099511627776",
    ),
    "weight": (
        lambda: proto_datum([1, 2], {"target_tokens": ([1, 2], "int64"), "weights": ([0.5, math.nan], "float32")}),
        r"data\[1\]\.loss_fn_inputs\.weights\[1\]: the value nan is not finite",
    ),
    "name": (
        lambda: proto_datum([1, 2], {"target_tokens": ([1, 2], "int64"), "weightz": ([0.5] * 2, "float32")}),
        r"data\[1\]\.loss_fn_inputs: cross_entropy does not read weightz",
    ),
    "dtype": (
        lambda: proto_datum([1, 2], {"target_tokens": ([1, 2], "float32"), "weights": ([0.5] * 2, "float32")}),
        r"data\[1\]\.loss_fn_inputs\.target_tokens: dtype float32",
    ),
    "too long": (lambda: good_datum([1] * 100_000), r"data\[1\]\.model_input: 100000 tokens are more"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_names_the_datum_and_the_value_whichever_way_they_were_read(wrong: str) -> None:
    make, words = WRONG[wrong]
    raw = proto_request("m", 1, [good_datum(), make(), good_datum()]).SerializeToString()
    assert usual_form(raw, max_datums=100) is not None
    with pytest.raises(UserError, match=words):
        payload_of(training_proto.parse_request(raw, max_datums=100))
    assert _outcome(raw, is_fast=True) == _outcome(raw, is_fast=False)


def test_an_input_that_all_datums_lack_is_asked_for_or_stood_in_for_as_ever() -> None:
    for inputs in ({"target_tokens": ([1, 2], "int64")}, {"weights": ([0.5] * 2, "float32")}):
        raw = proto_request("m", 1, [proto_datum([1, 2], inputs)] * 2).SerializeToString()
        assert usual_form(raw, max_datums=100) is not None
        assert _outcome(raw, is_fast=True) == _outcome(raw, is_fast=False)


def test_bodies_that_were_changed_at_random_are_read_as_protobuf_reads_them() -> None:
    generator = np.random.default_rng(0)
    names = itertools.cycle(REQUESTS)
    num_usual = 0
    for _ in range(_NUM_MUTATIONS):
        raw = _mutated(REQUESTS[next(names)], generator)
        num_usual += usual_form(raw, max_datums=100) is not None
        assert _outcome(raw, is_fast=True) == _outcome(raw, is_fast=False), raw
    assert 0.05 * _NUM_MUTATIONS < num_usual < 0.95 * _NUM_MUTATIONS


def test_datums_of_equal_size_that_differ_between_their_arrays_are_told_apart() -> None:
    other = proto_datum([1, 2, 3], {"target_tokens": ([1, 2, 3], "int64"), "weightz": ([0.5] * 3, "float32")})
    raw = proto_request("m", 1, [good_datum(), other]).SerializeToString()
    assert [sorted(datum.inputs) for datum in found_in(raw)] == [
        ["target_tokens", "weights"],
        ["target_tokens", "weightz"],
    ]


def test_what_was_learned_of_one_body_is_not_believed_of_the_next_one() -> None:
    bodies = [
        proto_request("m", 1, [proto_datum([4, 5, 6], {"target_tokens": ([1, 2, 3], kind)})]).SerializeToString()
        for kind in ("int64", "float32", "int64")
    ]
    long = proto_request("m", 1, [proto_datum([4, 5, 6], {"target_token": ([1, 2, 3], "int64")})]).SerializeToString()

    for raw in (*bodies, long, *bodies):
        (expected,) = training_proto.training_data(by_protobuf(raw)).datums
        (found,) = found_in(raw)
        assert found.inputs.keys() == expected.inputs.keys()
        for name, values in expected.inputs.items():
            assert found.inputs[name].dtype == values.dtype
            np.testing.assert_array_equal(found.inputs[name], values)


def test_layouts_of_many_sizes_are_not_kept_for_ever() -> None:
    for length in range(1, 600):
        assert usual_form(proto_request("m", 1, [good_datum(range(length))]).SerializeToString(), max_datums=1)
        assert len(proto_views._LAYOUTS) <= proto_views._MAX_LAYOUTS


def test_spans_of_provenance_are_passed_over() -> None:
    datum = good_datum()
    datum.model_input_spans.add().prompt_tokens.sequence_id = "s"
    datum.loss_fn_input_spans.add().sampled_tokens.length = 3
    raw = proto_request("m", 1, [datum]).SerializeToString()
    assert usual_form(raw, max_datums=100) is not None
    assert _outcome(raw, is_fast=True) == _outcome(raw, is_fast=False)


def test_a_datum_whose_tag_is_longer_than_need_be_is_not_lost() -> None:
    datum = good_datum().SerializeToString()
    raw = proto_request("m", 1, [good_datum()]).SerializeToString() + b"\x9a\x00" + bytes([len(datum)]) + datum
    parsed = training_proto.parse_request(raw, max_datums=100)
    assert len(training_proto.training_data(parsed).datums) == 2


def _mutated(raw: bytes, generator: np.random.Generator) -> bytes:
    """raw with one to three bytes changed, put in, or taken out."""
    changed = bytearray(raw)
    for _ in range(int(generator.integers(1, 4))):
        place = int(generator.integers(len(changed)))
        match int(generator.integers(4)):
            case 0:
                changed[place] = int(generator.integers(256))
            case 1:
                changed[place] ^= 1 << int(generator.integers(8))
            case 2:
                changed.insert(place, int(generator.integers(256)))
            case _:
                del changed[place]
    return bytes(changed)


def _outcome(raw: bytes, *, is_fast: bool) -> object:
    """The message's place and the payload's bytes, or what is wrong."""
    try:
        parsed = training_proto.parse_request(raw, max_datums=100) if is_fast else by_protobuf(raw)
        place = (parsed.message.model_id, parsed.message.seq_id)
        return place, payload_of(parsed)
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  protobuf's own error stands for ours
        return (
            "body: not a ForwardBackwardRequest protobuf; it is truncated or malformed"
            if "parsing" in str(error)
            else repr(error)
        )
